"""Where values lie in the pages of a Parquet column of bytes, so that one can be read without those before it.

Written from the format's definition (Parquet Format 2.9: PLAIN, RLE_DICTIONARY, and the hybrid of runs and packed bits
for levels and places in a dictionary). A value is at a place in the file where its page is not compressed, else at a
place in the page, unpacked.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ..parquet import META, check_growth, read_page_headers
from ..rows import SourceError

CODEC, VALUES = 4, 5  # fields of a column's description
CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
DATA, DICTIONARY, DATA_V2 = 0, 2, 3  # kinds of pages
V1, V2 = 5, 8  # fields of a page's header with what is special to its kind
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
LENGTH = struct.Struct("<I")
IN_FILE, NOTHING = -1, -1  # in place of a page's number; of the length of a value that is not there


@dataclass
class Pages:
    """Pages that have to be unpacked: [start in the file, bytes stored, bytes unpacked, of them not packed, codec]."""

    found: list[list[Any]] = field(default_factory=list)

    def add(self, *page: Any) -> int:
        """The number of a page."""
        self.found.append(list(page))
        return len(self.found) - 1


def locate_values(where: str, stream: BinaryIO, column: dict, most: int, pages: Pages, unpack: Any) -> np.ndarray:
    """int64 (rows, 3): page or IN_FILE, place in it, length or NOTHING, of every value of a column chunk of bytes.

    most: the definition level of a value that is there. unpack: (bytes, size, codec) -> bytes. SourceError for another
    encoding, or where the pages are damaged.
    """
    chunk, parts = column[META], []
    codec = CODECS.get(chunk.get(CODEC, 0), "unknown")
    dictionary, end, left = np.empty((0, 3), np.int64), stream.seek(0, os.SEEK_END), chunk[VALUES]
    for header, start in read_page_headers(where, stream, chunk):
        check_growth(where, header[2], header[3])
        if start + header[3] > end:
            raise SourceError(f"{where}: the page at byte {start:,} is longer than the file; cut short")
        stream.seek(start)
        stored, about = stream.read(header[3]), header.get(V2 if header[1] == DATA_V2 else V1, {})
        bare = about.get(5, 0) + about.get(6, 0) if header[1] == DATA_V2 else 0
        packed = codec is not None and not (header[1] == DATA_V2 and about.get(7) is False)
        body = stored[:bare] + unpack(stored[bare:], header[2] - bare, codec) if packed else stored
        page, base = (pages.add(start, header[3], header[2], bare, codec), 0) if packed else (IN_FILE, start)
        try:
            if header[1] == DICTIONARY:
                dictionary = _walk(body, 0, page, base)
            elif header[1] in (DATA, DATA_V2):
                if about[1] > left:
                    raise ValueError(f"{about[1]:,} values, where there are {left:,}")
                parts.append(_locate_in_page(body, header[1] == DATA_V2, about, most, (page, base, dictionary)))
                left -= about[1]
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise SourceError(f"{where}: the page at byte {start:,} cannot be taken apart ({error})") from None
    return np.concatenate([np.empty((0, 3), np.int64), *parts])


def _locate_in_page(
    body: bytes, second: bool, about: dict, most: int, place: tuple[int, int, np.ndarray]
) -> np.ndarray:
    count, encoding, at = about[1], about[4 if second else 2], 0
    there = np.ones(count, bool)
    if second:
        at = about.get(5, 0) + about.get(6, 0)
        if most:
            there = decode_hybrid(body, about.get(6, 0), at, most.bit_length(), count) == most
    elif most:
        size = LENGTH.unpack_from(body)[0]
        at = LENGTH.size + size
        there = decode_hybrid(body, LENGTH.size, at, most.bit_length(), count) == most
    page, base, dictionary = place
    if encoding == PLAIN:
        values = _walk(body, at, page, base)
    elif encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
        numbers = decode_hybrid(body, at + 1, len(body), body[at], int(there.sum())) if there.any() else []
        values = dictionary[numbers] if len(numbers) else np.empty((0, 3), np.int64)
    else:
        raise ValueError(f"encoding {encoding}; write it anew with PLAIN")
    found = np.full((count, 3), NOTHING, np.int64)
    found[there] = values
    return found


def _walk(body: bytes, at: int, page: int, base: int) -> np.ndarray:
    """PLAIN: each value after its length."""
    found = []
    while at < len(body):
        size = LENGTH.unpack_from(body, at)[0]
        at += LENGTH.size
        if at + size > len(body):
            raise ValueError("a value longer than its page")
        found.append((page, base + at, size))
        at += size
    return np.array(found, np.int64).reshape(-1, 3)


def decode_hybrid(data: bytes, at: int, end: int, width: int, count: int) -> np.ndarray:
    """The first `count` of numbers of `width` bits in data[at:end], runs and packed bits: int64 (count,). ValueError
    where there are fewer."""
    if not width:
        return np.zeros(count, np.int64)
    if width > 32:
        raise ValueError(f"numbers of {width} bits")
    parts, left = [], count
    while left > 0:
        head = shift = 0
        while True:
            if at >= end or shift > 35:
                raise ValueError(f"{left} numbers are missing")
            head |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not data[at - 1] & 0x80:
                break
        if head & 1:
            size = (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[at : min(at + size, end)], np.uint8), bitorder="little")
            rows = bits[: len(bits) // width * width].reshape(-1, width)[:left]
            part = rows.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
        else:
            size = (width + 7) // 8
            part = np.full(min(head >> 1, left), int.from_bytes(data[at : at + size], "little"), np.int64)
        if not len(part):
            raise ValueError(f"{left} numbers are missing")
        parts.append(part)
        at, left = at + size, left - len(part)
    return np.concatenate([np.empty(0, np.int64), *parts])
