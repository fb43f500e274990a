"""The text index (.idx) of an indexed RecordIO file: one "<key>TAB<byte offset>" line per record.

YFCC15M has 15 million lines, so the usual file (plain integer keys) is parsed by numpy in blocks; all else
(string keys, negative keys, Windows line ends) goes through a line-by-line parser that names the bad line.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import DATA

BLOCK = 1 << 24  # bytes parsed at once: bounds the temporary arrays to a few hundred MB
MAX_DIGITS = 18  # an int64 holds every number of 18 digits
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})\Z", re.ASCII)


class RecordError(ValueError):
    """A record file or its index is damaged or not what was expected; names file, key and byte offset."""

    exit_code = DATA


def read_index(path: Path) -> tuple[np.ndarray | list[str], np.ndarray]:
    """Parse `path` -> (keys, offsets int64 (n,)), in the order of the lines.

    Keys are an int64 array if all are plain integers, else a list of str. RecordError names the bad line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RecordError(f"{path}: no such index; a .rec file is read through the .idx beside it") from None
    if data and not data.endswith(b"\n"):
        data += b"\n"
    blocks, start = [], 0
    while start < len(data):
        stop = data.rfind(b"\n", start, start + BLOCK) + 1
        block = _parse_block(data[start:stop]) if stop > start else None
        if block is None:  # not the plain form: start over, carefully
            return _parse_lines(path, data)
        blocks.append(block)
        start = stop
    pairs = np.concatenate(blocks) if blocks else np.zeros((0, 2), np.int64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def is_complete(path: Path, count: int, size: int) -> bool:
    """Whether `path` has the keys 0, 1, .. of `count` records, one behind the other in a file of `size` bytes."""
    try:
        keys, offsets = read_index(path)
    except RecordError:
        return False
    ends = np.append(offsets, size)
    return len(keys) == count and np.array_equal(keys, np.arange(count)) and not ends[0] and (np.diff(ends) > 0).all()


def _parse_block(block: bytes) -> np.ndarray | None:
    """Whole lines of plain non-negative integers -> int64 (n, 2); None if any line has another form."""
    text = np.frombuffer(block, np.uint8)
    if text.max() > 57:
        return None
    breaks = np.flatnonzero(text < 48)
    if len(breaks) % 2 or (text[breaks[0::2]] != 9).any() or (text[breaks[1::2]] != 10).any():
        return None
    starts = np.concatenate(([0], breaks[:-1] + 1))
    widths = breaks - starts
    leading_zero = (text[starts] == 48) & (widths > 1)  # "007" is a name, not the number 7
    if widths.min() < 1 or widths.max() > MAX_DIGITS or leading_zero.any():
        return None
    return np.fromstring(block, dtype=np.int64, sep=" ").reshape(-1, 2)


def _parse_lines(path: Path, data: bytes) -> tuple[np.ndarray | list[str], np.ndarray]:
    try:
        lines = data.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: the index is not UTF-8 text (byte {error.start})") from None
    keys, offsets = [], np.zeros(len(lines), np.int64)
    for number, line in enumerate(lines):
        key, tab, offset = line.strip().partition("\t")
        if not tab or not key or not _INTEGER.match(offset):
            raise RecordError(f"{path}: line {number + 1} is {line[:80]!r}, not '<key>TAB<byte offset>'")
        keys.append(key)
        offsets[number] = int(offset)
    if all(_INTEGER.match(key) for key in keys):
        return np.array([int(key) for key in keys], np.int64), offsets
    return keys, offsets
