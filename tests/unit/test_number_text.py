"""Float32 numbers as text: character for character what Python's json writes."""

import json

import numpy as np
import pytest

from rwkv_clip.eval.number_text import join_numbers

RANDOM = np.random.default_rng(0)
DECIMALS = [round(n * 10.0**-k, k) for k in range(1, 8) for n in (*range(1, 200), 999, 1001, 9999)]
NUMBERS = {
    "features": RANDOM.standard_normal(80000) * 0.044,
    "uniform": RANDOM.uniform(-1, 1, 80000),
    "every size": 10 ** RANDOM.uniform(-45, 38, 8000),
    "between the decades": 10 ** RANDOM.uniform(-4.5, 0.5, 40000),
    "short decimals": DECIMALS,
    "few bits": RANDOM.integers(-1024, 1024, 8000) / 1024 * 2.0 ** RANDOM.integers(-12, 2, 8000),
    "powers of two": [sign * 2.0**k for k in range(-149, 128) for sign in (1, -1)],
    "limits": [np.nextafter(np.float32(x), np.float32(y)) for x in (1, 0.1, 0.01, 1e-3, 1e-4) for y in (0, x, 9)],
    "zeros": [0.0, -0.0],
    "any bits": RANDOM.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32),
}


@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("kind", NUMBERS)
def test_text_is_that_of_json(kind, width):
    numbers = np.asarray(NUMBERS[kind], np.float32)
    numbers = numbers[np.isfinite(numbers)]
    rows = np.resize(numbers, (-(-len(numbers) // width), width))
    assert [b"[" + text + b"]" for text in join_numbers(rows)] == [json.dumps(row).encode() for row in rows.tolist()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_cannot_hold(value):
    rows = np.ones((3, 2), np.float32)
    rows[1, 1] = value
    with pytest.raises(ValueError, match="row 1 is not finite"):
        join_numbers(rows)
