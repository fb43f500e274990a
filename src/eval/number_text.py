"""Float32 numbers as Python writes them, several times faster: the shortest decimals that give their float64 back.

A float32 m 2^-e (m of 24 bits) times 10^K is m 5^K 2^(K-e), so its first 14 to 17 digits are whole numbers that 64-bit
arithmetic gives exactly, with what rounding took away. A decimal gives the number back where that is at most half the
distance of two float64, 2^(-e-30): in units of its last digit 5^K / 2^30. So 17 digits always do, 16 often, and where
14 or fewer do Python decides; as it does for numbers outside 0.0001 to 1, powers of two, whose neighbours are not
equally far, and decimals that are equally near.
"""

from __future__ import annotations

import numpy as np

_FIVES = np.array([5**k for k in range(21)], np.uint64)
_FOUR_DIGITS = np.array([f"{n:04}" for n in range(10000)], "S4").view(np.uint32)
_LOW = np.uint64(0xFFFFFFFF)
_ONE, _WORD = np.uint64(1), np.uint64(32)
_COLUMNS = 25  # of ", -0." and 20 digits
_SHOWN = np.array([[digit >= 20 - k for digit in range(20)] for k in range(21)])  # the last k of 20 digits


def join_numbers(rows: np.ndarray) -> list[bytes]:
    """For each row of float32 (n, d) the text "0.1, -0.25, ..", each number as repr(float(number)).

    ValueError where one is not finite, which JSON cannot hold.
    """
    if not np.isfinite(rows).all():
        raise ValueError(
            f"features: row {int(np.argwhere(~np.isfinite(rows))[0, 0])} is not finite; the model is broken"
        )
    numbers = np.ascontiguousarray(rows, np.float32).reshape(-1)
    bits = numbers.view(np.uint32).astype(np.uint64)
    mantissa = (bits & np.uint64(0x7FFFFF)) | np.uint64(0x800000)
    size = np.abs(numbers).astype(np.float64)
    plain = (size >= 1e-4) & (size < 1) & (mantissa != 0x800000)
    mantissa = np.where(plain, mantissa, np.uint64(0xC00000))  # any number between 0.1 and 1
    places = np.where(plain, np.uint64(150) - (bits >> np.uint64(23) & np.uint64(0xFF)), np.uint64(24))
    decade = np.uint64(17) + ((size < 0.1).astype(np.uint64) + (size < 0.01) + (size < 0.001)) * plain
    values, _, tied = _round(mantissa, places, decade)
    decimals = decade.astype(np.int64)
    left = np.arange(len(numbers))  # that the decimal so far gives back: a shorter one may as well
    for fewer in (1, 2, 3):
        fewest = decade[left] - np.uint64(fewer)
        shorter, far, also_tied = _round(mantissa[left], places[left], fewest)
        enough = far << np.uint64(30) <= _FIVES[fewest]
        left = left[enough]
        values[left], tied[left] = shorter[enough], also_tied[enough]
        decimals[left] -= 1
    plain &= ~tied
    plain[left] = False
    return _join(numbers, plain, _write(values), decimals, rows.shape)


def _round(mantissa: np.ndarray, places: np.ndarray, decimals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mantissa 2^-places 10^decimals to the nearest whole number; how far away that is, in units of
    2^(decimals-places); and whether another one is as near."""
    fives, shift = _FIVES[decimals], places - decimals
    low, high = mantissa * (fives & _LOW), mantissa * (fives >> _WORD)
    unit = _ONE << shift
    rest = low & (unit - _ONE)
    up = rest + rest > unit
    whole = (high << (_WORD - shift)) + (low >> shift) + up
    return whole, np.where(up, unit - rest, rest), rest + rest == unit


def _write(values: np.ndarray) -> np.ndarray:
    """The 20 digits (n, 20), as characters, of whole numbers below 10^20."""
    most, rest = np.divmod(values, np.uint64(10**16))
    halves = [part.astype(np.uint32) for part in np.divmod(rest, np.uint64(10**8))]
    fours = [most.astype(np.uint32), *(four for half in halves for four in np.divmod(half, np.uint32(10**4)))]
    return np.stack([_FOUR_DIGITS[four] for four in fours], axis=1).view(np.uint8)


def _join(
    numbers: np.ndarray, plain: np.ndarray, digits: np.ndarray, decimals: np.ndarray, shape: tuple[int, ...]
) -> list[bytes]:
    """The rows as text; decimals: how many of the digits a number has."""
    characters = np.empty((len(numbers), _COLUMNS), np.uint8)
    characters[:, :5] = np.frombuffer(b", -0.", np.uint8)
    characters[:, 5:] = digits
    shown = np.ones((len(numbers), _COLUMNS), bool)
    shown[:: shape[1], :2] = False
    shown[:, 2] = np.signbit(numbers)
    shown[:, 5:] = _SHOWN.take(decimals, axis=0)
    if (odd := np.flatnonzero(~plain)).size:
        texts = np.array([repr(number).encode() for number in numbers[odd].tolist()], f"S{_COLUMNS - 2}")
        characters[odd, 2:] = texts.view(np.uint8).reshape(len(odd), -1)
        shown[odd, 2:] = characters[odd, 2:] != 0
    places = np.flatnonzero(shown)
    text = characters.reshape(-1).take(places).tobytes()  # far quicker than characters[shown]
    rows = np.arange(1, shape[0] + 1) * shape[1] * _COLUMNS
    ends = np.searchsorted(places, rows).tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends)]
