"""Chinese-CLIP's files of features, {"image_id": 7, "feature": [0.1, ..]} a line: read exactly, several times faster
than by a JSON parser.

A number means what Python makes of it: the nearest float64, then the nearest float32. Numbers as Python's json writes
them (0.0123, -0.5) are read all at once: the first 16 digits behind the point, as they stand in the file, are two
integers (arithmetic on 8 bytes of a 64-bit word), and the float64 made of these is close to the number. That decides
the float32 unless it lies too close to the middle of two; then, and for every other way to write a number, Python
decides. Lines of any other form go through the JSON parser, which says what is wrong with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .files import DamagedError, parse_json

Id = int | str
Piece = tuple[int, list[bytes]]  # number of the first line, and lines
_LINES = 32
_MOST_DIGITS, _USED_DIGITS = 24, 16  # of a fraction: those that are checked, those that are read
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ZEROS, _TENS = np.uint64(0x3030303030303030), np.uint64(0x7676767676767676)
_HIGH_BITS = np.uint64(0x8080808080808080)
# For each of three words: the bytes, from the lowest on, that belong to a fraction of n digits, n from 0 on.
_DIGITS = np.array(
    [[(1 << 8 * min(8, max(0, n - skipped))) - 1 for n in range(_MOST_DIGITS + 1)] for skipped in (0, 8, 16)],
    np.uint64,
)
_STEPS = [(10, 8, 0x00FF00FF00FF00FF), (100, 16, 0x0000FFFF0000FFFF), (10000, 32, 0xFFFFFFFF)]
_FACTORS = [tuple(map(np.uint64, step)) for step in _STEPS]
# Of the 29 bits that float32 lacks: the middle, and how close to it Python decides. From 2^-16 on the digits that are
# not read, 10^-16, are less than 29600 units of a float64's last place, and roundings a few.
_MIDDLE, _CLOSE, _LEAST = 1 << 28, 1 << 15, 2.0**-16


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
    characters = np.frombuffer(text + b", " + b" " * _MOST_DIGITS, np.uint8)
    ends = np.flatnonzero(characters == ord(","))
    starts = np.concatenate([[0], ends[:-1] + 2])
    if (characters[ends + 1] != ord(" ")).any() or (starts >= ends).any():
        return None, ends
    negative = characters[starts] == ord("-")
    whole = starts + negative  # place of the one digit before the point
    lead = characters[whole] - np.uint8(ord("0"))
    count = ends - whole - 2  # digits of the fraction
    plain = (lead <= 9) & (count >= 1) & (count <= _MOST_DIGITS) & (characters[whole + 1] == ord("."))
    count = np.where(plain, count, 1)
    # From every byte on, the next 24: rows of a sliding window, which numpy copies one by one, take thrice as long.
    windows = np.ndarray(len(text), f"V{_MOST_DIGITS}", characters, offset=2, strides=(1,))
    fractions = windows[np.where(plain, whole, 0)].view("<u8").reshape(-1, 3)
    words = [(fractions[:, i] ^ _ZEROS) & masks.take(count) for i, masks in enumerate(_DIGITS)]
    wrong = [(word + _TENS) | word for word in words]
    plain &= (wrong[0] | wrong[1] | wrong[2]) & _HIGH_BITS == 0  # every character is a digit
    values = lead + (_eight_digits(words[0]) * 1e8 + _eight_digits(words[1])) / 10.0**_USED_DIGITS
    plain &= (values >= _LEAST) | (count <= _USED_DIGITS)
    missing = values.view(np.int64) & (2 * _MIDDLE - 1)
    plain &= abs(missing - _MIDDLE) > _CLOSE
    signs = negative.astype(np.uint32) << np.uint32(31)
    result = (values.astype(np.float32).view(np.uint32) | signs).view(np.float32)
    with np.errstate(over="ignore"):
        for place in np.flatnonzero(~plain).tolist():
            token = text[starts[place] : ends[place]]
            if not _NUMBER.fullmatch(token):
                return None, ends
            result[place] = float(token)
    return result if np.isfinite(result).all() else None, ends


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
