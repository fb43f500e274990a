"""Nearest items in files of features: numbers are read exactly, the order is exact, whatever chunks and types."""

import json
import random
import struct

import numpy as np
import pytest
import torch

from rwkv_clip.eval import nearest
from rwkv_clip.eval.main import main
from rwkv_clip.eval.nearest import find_nearest
from rwkv_clip.feature_lines import read_feature_lines


def unit(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def write_lines(path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- reading ---------------------------------------------------------------------------------------------------------


def middles(count: int) -> list[float]:
    """Float64 in the middle of two float32, and their neighbours: where rounding twice could go wrong."""
    choose = random.Random(0)
    halves = []
    for _ in range(count):
        low = struct.unpack("<f", struct.pack("<I", choose.randrange(0x35000000, 0x40800000)))[0]
        high = float(np.nextafter(np.float32(low), np.float32(9)))
        middle = (low + high) / 2
        halves += [middle, float(np.nextafter(middle, 0)), float(np.nextafter(middle, 9)), low, -high]
    return halves


NUMBERS = {
    "float32": [float(x) for x in np.random.default_rng(0).standard_normal(5000).astype(np.float32)],
    "float64": [float(x) for x in np.random.default_rng(1).standard_normal(5000)],
    "small": [float(x) for x in 10.0 ** np.random.default_rng(2).uniform(-40, 0, 2000)],
    "large": [float(x) for x in 10.0 ** np.random.default_rng(3).uniform(0, 38, 2000)],
    "middles": middles(1000),
    "short": [0.0, -0.0, 0.5, -0.25, 1.0, -1.0, 9.75, 10.5, 1e-05, 3.0e20, 7, -7, 0],
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_those_of_python(tmp_path, kind):
    numbers = NUMBERS[kind]
    write_lines(tmp_path / "f.jsonl", [{"image_id": 3, "feature": numbers}, {"image_id": -4, "feature": numbers[::-1]}])
    ids, features = read_feature_lines(tmp_path / "f.jsonl", "image_id")
    expected = np.array([numbers, numbers[::-1]], np.float64).astype(np.float32)
    assert ids == [3, -4] and features.dtype == np.float32
    assert (features.view(np.int32) == expected.view(np.int32)).all()


LONG = [
    *("0.12345678901234567890", "0.1234567890123456789012", "0.123456789012345678901234567"),
    *("0.000000000123456789012345", "0.000000000000000000000001", "9.999999999999999999999999"),
    *(f"{abs(x):.{digits}f}" for x in middles(200) for digits in (16, 17, 20, 24, 25)),
]


def test_long_fractions(tmp_path):
    numbers = ", ".join(f"{text}, -{text}" for text in LONG)
    (tmp_path / "f.jsonl").write_text(f'{{"image_id": 3, "feature": [{numbers}]}}\n')
    values = [np.float32(sign * float(text)) for text in LONG for sign in (1, -1)]
    assert read_feature_lines(tmp_path / "f.jsonl", "image_id")[1].tolist() == [values]


@pytest.mark.parametrize(
    "line",
    [
        '{"feature": [0.5, 2e-1], "image_id": 7}',
        '{"image_id":7,"feature":[0.5,0.2]}',
        ' {"image_id": 7, "feature": [ 0.5 , 0.2 ], "more": [1]}\r',
        '{"image_id": 7, "feature": [0.5, 0.2]}\r',
    ],
)
@pytest.mark.parametrize("others", [0, 40])
def test_any_json_is_read(tmp_path, line, others):
    plain = '{"image_id": 7, "feature": [0.5, 0.2]}'
    (tmp_path / "f.jsonl").write_bytes("\n".join([*[plain] * others, line, plain]).encode())  # no newline at the end
    ids, features = read_feature_lines(tmp_path / "f.jsonl", "image_id")
    assert ids == [7] * (others + 2) and (features == np.array([0.5, 0.2], np.float32)).all()


@pytest.mark.parametrize(
    "line, problem",
    [
        ("", "not JSON"),
        ("[1]", "no `image_id`"),
        ('{"text_id": 7, "feature": [0.5, 0.2]}', "no `image_id`"),
        ('{"image_id": 1.5, "feature": [0.5, 0.2]}', "no `image_id`"),
        ('{"image_id": true, "feature": [0.5, 0.2]}', "no `image_id`"),
        ('{"image_id": 7}', "must be a list of numbers"),
        ('{"image_id": 7, "feature": [0.5, "0.2"]}', "must be a list of numbers"),
        ('{"image_id": 7, "feature": [0.5, true]}', "must be a list of numbers"),
        ('{"image_id": 7, "feature": [0.5, [0.2]]}', "must be a list of numbers"),
        ('{"image_id": 7, "feature": [0.5, 0.2,]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5, 0.2a]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5, 0.:]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5, 00.2]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5, .2]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5, 2.]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5 0.2]}', "not JSON"),
        ('{"image_id": 7, "feature": [0.5, NaN]}', "float32 cannot hold"),
        ('{"image_id": 7, "feature": [0.5, 1e39]}', "float32 cannot hold"),
        ('{"image_id": 7, "feature": [0.5, 1' + "0" * 400 + "]}", "float32 cannot hold"),
        ('{"image_id": 7, "feature": []}', "holds no numbers"),
        ('{"image_id": 7, "feature": [0.5]}', "1 numbers, the lines before 2"),
        ('{"image_id": 7, "feature": ' + "[" * 100000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("before", [1, 40])
def test_wrong_lines_are_named(tmp_path, capsys, line, problem, before):
    plain = '{"image_id": 7, "feature": [0.5, 0.2]}\n'
    (tmp_path / "i.jsonl").write_text(plain * before + line + "\n")
    write_lines(tmp_path / "t.jsonl", [{"text_id": 1, "feature": [0.5, 0.2]}])
    assert knn(tmp_path) == 3
    error = capsys.readouterr().err
    assert f"i.jsonl:{before + 1}" in error and problem in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


# ---- ranking ---------------------------------------------------------------------------------------------------------


def exact_order(queries: torch.Tensor, items: torch.Tensor, count: int) -> np.ndarray:
    """By whole numbers: features on the grid, Python's stable sort."""
    grid = [np.round(x.double().numpy() * 2**26).astype(object) for x in (queries, items)]
    scores = grid[0] @ grid[1].T
    return np.array([sorted(range(len(items)), key=lambda i: -row[i])[:count] for row in scores])


SETS = {
    "random": unit(2000, 16, 1),
    "ties": unit(40, 16, 1).repeat(50, 1),
    "one direction": torch.nn.functional.normalize(unit(2000, 16, 1) + 50 * unit(1, 16, 2)),
    "nearly equal": torch.nn.functional.normalize(unit(1, 16, 1) + 1e-6 * unit(2000, 16, 2)),
    "all equal": unit(1, 16, 1).repeat(2000, 1),
    "few": unit(7, 16, 1),
    "opposite": -torch.nn.functional.normalize(unit(2000, 16, 1) + 50 * unit(1, 16)),  # every similarity is negative
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETS)
def test_the_order_is_exact(monkeypatch, name, dtype):
    monkeypatch.setattr(nearest, "fastest_type", lambda: dtype)
    queries, items = torch.cat([unit(20, 16), SETS[name][:3]]), SETS[name]
    queries = unit(1, 16).repeat(3, 1) if name == "opposite" else queries
    expected = exact_order(queries, items, 10)
    for chunk in ((256, 32768), (7, 700), (23, 1999), (1, 64)):
        assert (find_nearest(queries, items, 10, chunk=chunk) == expected).all(), chunk


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    queries, items = unit(50, 64), unit(3000, 64, 1)
    expected = find_nearest(queries, items, 10)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert (find_nearest(queries, items, 10) == expected).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("factor", [1e-3, 0.3, 3.0, 1e5])
def test_lengths_of_features_count(factor):
    """Dot products, as released: a longer item is more similar, a longer query changes nothing."""
    queries, items = unit(20, 16), unit(2000, 16, 1) * torch.linspace(0.5, 1, 2000)[:, None]
    scores = queries.double() @ items.double().T
    found = find_nearest(queries * factor, items * factor, 10)
    assert (found == scores.topk(10).indices.numpy()).all()


@pytest.mark.parametrize("count", [1, 10, 64, 5000])
def test_any_count(count):
    queries, items = unit(9, 8), unit(3000, 8, 1)
    assert (find_nearest(queries, items, count) == exact_order(queries, items, count)).all()


# ---- the command -----------------------------------------------------------------------------------------------------


def knn(folder, *more) -> int:
    files = ["--image-feats", folder / "i.jsonl", "--text-feats", folder / "t.jsonl", "--output", folder / "out.jsonl"]
    return main(["knn", *map(str, files), *more])


def test_ids_stay_as_they_are_and_few_items_are_all_listed(tmp_path, capsys):
    write_lines(tmp_path / "i.jsonl", [{"image_id": i, "feature": [0.5, 0.2]} for i in (5, "图", 5)])
    write_lines(tmp_path / "t.jsonl", [{"text_id": i, "feature": [0.1, 0.2]} for i in (9, "x")])
    assert knn(tmp_path) == 0
    listed = '"image_ids": [5, "\\u56fe", 5]}\n'
    assert (tmp_path / "out.jsonl").read_text() == '{"text_id": 9, ' + listed + '{"text_id": "x", ' + listed
    said = capsys.readouterr().err
    assert "fewer than top_k 10" in said and "1 lines repeat the image_id" in said


def test_what_does_not_fit_is_said(tmp_path, capsys):
    write_lines(tmp_path / "i.jsonl", [{"image_id": 1, "feature": [0.5, 0.2]}])
    write_lines(tmp_path / "t.jsonl", [{"text_id": 1, "feature": [0.5]}])
    assert knn(tmp_path) == 3 and "i.jsonl has 2 and" in capsys.readouterr().err
    (tmp_path / "t.jsonl").write_text("")
    assert knn(tmp_path) == 3 and "t.jsonl: holds no features" in capsys.readouterr().err
    assert knn(tmp_path, "--top-k", "0") == 2
    (tmp_path / "t.jsonl").unlink()
    assert knn(tmp_path) == 2 and "t.jsonl: No such file" in capsys.readouterr().err
