"""Chinese-CLIP's files of features, {"image_id": 7, "feature": [0.1, ..]} a line: read exactly, several times faster
than by a JSON parser.

A number means what Python makes of it: the nearest float64, then the nearest float32. Numbers as Python's json writes
them (0.0123, -0.5) are read all at once: their digits, as they stand in the file, are integers of 8 digits each
(arithmetic on 8 bytes of a 64-bit word), and the float64 made of these is within a few units of the last place. That
decides the float32 unless it lies that close to the middle of two; then, and for every other way to write a number,
Python decides. Lines of any other form go through the JSON parser, which says what is wrong with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from rwkv_clip.files import DamagedError, parse_json

Id = int | str
Piece = tuple[int, list[bytes]]  # number of the first line, and lines
_LINES = 32
_WINDOW = 24  # bytes that hold the digits of a fraction
_MOST_DIGITS = 22  # of a fraction: 10^22 is the last power of ten that a float64 holds exactly
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ZEROS, _TENS = np.uint64(0x3030303030303030), np.uint64(0x7676767676767676)
_HIGH_BITS = np.uint64(0x8080808080808080)
# For each of the three words of a window: the bytes that belong to a fraction of n digits, n from 0 on.
_DIGITS = np.array(
    [
        [(2**64 - 1) ^ ((1 << 8 * (8 - min(8, max(0, n - skipped)))) - 1) for n in range(_MOST_DIGITS + 1)]
        for skipped in (16, 8, 0)
    ],
    np.uint64,
)
_STEPS = [(10, 8, 0x00FF00FF00FF00FF), (100, 16, 0x0000FFFF0000FFFF), (10000, 32, 0xFFFFFFFF)]
_FACTORS = [tuple(map(np.uint64, step)) for step in _STEPS]
_POWERS = 10.0 ** np.arange(_MOST_DIGITS + 1)
_MIDDLE, _CLOSE = 1 << 28, 16  # of the 29 bits that float32 lacks; how close to it Python decides


def read_feature_lines(path: Path, key: str) -> tuple[list[Id], np.ndarray]:
    """Ids and features float32 (n, d) of the lines {key: id, "feature": [numbers]} of a file, in its order.

    key: "image_id" or "text_id"; an id is an integer or a text. DamagedError names file and line of what is not such a
    line, of a number that float32 cannot hold, and of a list of another length than the first.
    """
    ids: list[Id] = []
    parts: list[np.ndarray] = []
    prefix = re.compile(rb'\{"' + key.encode() + rb'": (-?(?:0|[1-9][0-9]{0,17})), "feature": \[')

    for piece in _pieces(path):
        numbers, vectors = _read_quickly(piece[1], prefix) or _read_slowly(path, key, piece)
        if parts and vectors.shape[1] != parts[0].shape[1]:
            width, line = parts[0].shape[1], len(ids) + 1
            raise DamagedError(f"{path}:{line}: `feature` holds {vectors.shape[1]} numbers, the lines before {width}")
        ids += numbers
        parts.append(vectors)
    return ids, np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _pieces(path: Path) -> Iterator[Piece]:
    """The lines of a file, some at a time."""
    with open(path, "rb") as file:
        lines: list[bytes] = []
        number = 1
        for line in file:
            lines.append(line)
            if len(lines) == _LINES:
                yield number, lines
                number, lines = number + _LINES, []
        if lines:
            yield number, lines


def _read_quickly(lines: list[bytes], prefix: re.Pattern[bytes]) -> tuple[list[Id], np.ndarray] | None:
    """Ids and features of lines as Python's json writes them; None where one is not."""
    ids: list[Id] = []
    bodies = []
    for line in lines:
        start = prefix.match(line)
        line = line.rstrip(b"\r\n")
        if start is None or not line.endswith(b"]}"):
            return None
        ids.append(int(start[1]))
        bodies.append(line[start.end() : -2])
    # Each line has as many numbers as any other if the same shares of all commas end the bodies.
    values, ends = _parse_numbers(b", ".join(bodies))
    lengths = np.cumsum([len(body) + 2 for body in bodies]) - 2
    width, rest = divmod(len(ends), len(ids))
    if values is None or rest or (ends[width - 1 :: width] != lengths).any():
        return None
    return ids, values.reshape(len(ids), width)


def _parse_numbers(text: bytes) -> tuple[np.ndarray | None, np.ndarray]:
    """Numbers (n,) float32 of a text "0.1, -0.2, .." and where each ends; None where one is no finite JSON number."""
    characters = np.frombuffer(b" " * _WINDOW + text + b", ", np.uint8)
    ends = np.flatnonzero(characters == ord(","))
    starts = np.concatenate([[_WINDOW], ends[:-1] + 2])
    if (characters[ends + 1] != ord(" ")).any() or (starts >= ends).any():
        return None, ends
    negative = characters[starts] == ord("-")
    whole = starts + negative  # place of the one digit before the point
    lead = characters[whole].astype(np.int64) - ord("0")
    count = ends - whole - 2  # digits of the fraction
    plain = (lead >= 0) & (lead <= 9) & (count >= 1) & (count <= _MOST_DIGITS) & (characters[whole + 1] == ord("."))
    count = np.where(plain, count, 1)
    windows = sliding_window_view(characters, _WINDOW)[ends - _WINDOW].view("<u8")
    words = [(windows[:, i] ^ _ZEROS) & masks[count] for i, masks in enumerate(_DIGITS)]
    wrong = [(word + _TENS) | word for word in words]
    plain &= (wrong[0] | wrong[1] | wrong[2]) & _HIGH_BITS == 0  # every character is a digit
    high, middle, low = map(_eight_digits, words)
    # Errors: 2^-53 for each sum and the quotient. 10^16 times a number below 10^6 and 10^count are exact.
    values = lead + (high * 1e16 + (middle * 1e8 + low)) / _POWERS[count]
    missing = values.view(np.int64) & (2 * _MIDDLE - 1)
    plain &= abs(missing - _MIDDLE) > _CLOSE
    result = np.where(negative, -values, values).astype(np.float32)
    for place in np.flatnonzero(~plain).tolist():
        token = characters[starts[place] : ends[place]].tobytes()
        if not _NUMBER.fullmatch(token):
            return None, ends
        with np.errstate(over="ignore"):
            result[place] = float(token)
    return result if np.isfinite(result).all() else None, ends - _WINDOW


def _eight_digits(words: np.ndarray) -> np.ndarray:
    """The numbers, float64 (n,), whose eight digits are the bytes of little-endian words uint64 (n,)."""
    for factor, shift, mask in _FACTORS:  # pairs of digits, then fours, then all eight
        words = (words * factor + (words >> shift)) & mask
    return words.astype(np.float64)


def _read_slowly(path: Path, key: str, piece: Piece) -> tuple[list[Id], np.ndarray]:
    """The same through the JSON parser. DamagedError for a line that is wrong."""
    ids: list[Id] = []
    vectors: list[np.ndarray] = []
    for number, line in enumerate(piece[1], piece[0]):
        where = f"{path}:{number}"
        row = parse_json(line, where)
        if not isinstance(row, dict) or not isinstance(row.get(key), (int, str)) or isinstance(row[key], bool):
            raise DamagedError(f"{where}: has no `{key}` that is a number or a text; write the features again")
        feature = row.get("feature")
        if not isinstance(feature, list) or not all(type(number) in (int, float) for number in feature):
            raise DamagedError(f"{where}: `feature` must be a list of numbers; write the features again")
        try:
            with np.errstate(over="ignore"):
                vector = np.array(feature, np.float64).astype(np.float32)
        except OverflowError:  # an integer of hundreds of digits
            vector = np.full(1, np.inf, np.float32)
        if not len(vector) or not np.isfinite(vector).all():
            raise DamagedError(f"{where}: `feature` holds no numbers, or one that float32 cannot hold (NaN, Infinity)")
        if vectors and len(vector) != len(vectors[0]):
            raise DamagedError(f"{where}: `feature` holds {len(vector)} numbers, the lines before {len(vectors[0])}")
        ids.append(row[key])
        vectors.append(vector)
    return ids, np.stack(vectors)
