"""The values of Chinese-CLIP's LMDB of pairs: pickled tuples (image_id, text_id, text), read without unpickling.

A pickle is a program. Here it is not run: its bytes must follow the one form that CPython's pickler gives to a tuple of
two ids (int or str) and a str, in protocols 2 to 5, and whatever else stands there is refused with its place. The
opcodes are those of CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

Bytes = bytes | memoryview

MAX_BYTES = 1 << 22  # of a value
MAX_NUMBER = 1 << 10  # bytes of a whole number
PROTOCOLS = (2, 5)
FRAME_TARGET = 1 << 16  # bytes from which the pickler cuts what it writes into several frames

# opcode -> bytes of the little-endian number after it; for texts and long numbers it is the length of what follows
_INTEGERS = {0x4B: 1, 0x4D: 2, 0x4A: 4}  # BININT1, BININT2, BININT (the only one with a sign)
_LONGS = {0x8A: 1, 0x8B: 4}  # LONG1, LONG4
_TEXTS = {0x8C: 1, 0x58: 4, 0x8D: 8}  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
_PUTS = {0x94: 0, 0x71: 1, 0x72: 4}  # MEMOIZE, BINPUT, LONG_BINPUT
_GETS = {0x68: 1, 0x6A: 4}  # BINGET, LONG_BINGET
_BININT, _MEMOIZE, _PROTO, _FRAME, _TUPLE3, _STOP = 0x4A, 0x94, 0x80, 0x95, 0x87, 0x2E


class PairError(ValueError):
    """A value is not a pickled (image_id, text_id, text); the message names the place in it."""


class Pair(NamedTuple):
    """An image and one of its texts."""

    image_id: int | str
    text_id: int | str
    text: str


class _Scanner:
    """The bytes of a value, taken from the front; none beyond the end of the value or of the frame around it."""

    def __init__(self, data: Bytes):
        self.data, self.at, self.end, self.framed = data, 0, len(data), False

    def take(self, count: int) -> Bytes:
        start, self.at = self.at, self.at + count
        if self.at > self.end:
            raise PairError(f"byte {start}: {count} bytes should follow, {self.end - start} are left")
        return self.data[start : self.at]

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def opcode(self) -> int:
        """The next opcode that is not the start of a frame (protocol 4)."""
        if self.framed and self.at == self.end:
            self.framed, self.end = False, len(self.data)
        code = self.take(1)[0]
        if code != _FRAME or self.framed:
            return code
        length = self.number(8)
        if not length or length > self.end - self.at:
            raise PairError(f"byte {self.at - 8}: a frame of {length} bytes, {self.end - self.at} are left")
        self.framed, self.end = True, self.at + length
        return self.opcode()


def parse_pair(data: Bytes) -> Pair:
    """The tuple in a value of the `pairs` database. PairError for anything else; nothing of it is ever run."""
    if len(data) > MAX_BYTES:
        raise PairError(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    scan, memo, values = _Scanner(data), {}, []
    if scan.take(1)[0] != _PROTO:
        raise PairError("byte 0: no pickle of protocol 2 or later begins there")
    if not PROTOCOLS[0] <= (protocol := scan.number(1)) <= PROTOCOLS[1]:
        raise PairError(f"byte 1: pickle protocol {protocol}, not {PROTOCOLS[0]} to {PROTOCOLS[1]}")
    code = scan.opcode()
    for _ in Pair._fields:
        value, stored = _parse_value(code, scan, memo)
        values.append(value)
        code = _skip_memo(scan, memo, value if isinstance(value, str) and not stored else None)
    if code != _TUPLE3:
        raise _unexpected(code, scan, "the end of a tuple of three")
    if (code := _skip_memo(scan, memo, "")) != _STOP:
        raise _unexpected(code, scan, "the end of the pickle")
    if scan.at != len(data):
        raise PairError(f"byte {scan.at}: {len(data) - scan.at} bytes after the end of the pickle")
    image_id, text_id, text = values
    if not isinstance(text, str):
        raise PairError(f"the third of the tuple is the number {str(text)[:20]}, not a text")
    return Pair(image_id, text_id, text)


def _parse_value(code: int, scan: _Scanner, memo: dict[int, str]) -> tuple[int | str, bool]:
    """(an int or a str, whether it came from the memo)."""
    if code in _INTEGERS:
        return scan.number(_INTEGERS[code], signed=code == _BININT), False
    if code in _TEXTS:
        start = scan.at
        try:
            return str(scan.take(scan.number(_TEXTS[code])), "utf-8", "surrogatepass"), False
        except UnicodeDecodeError:
            raise PairError(f"byte {start}: a text that is not UTF-8") from None
    if code in _LONGS:
        if (length := scan.number(_LONGS[code])) > MAX_NUMBER:
            raise PairError(f"byte {scan.at}: a number of {length:,} bytes, more than {MAX_NUMBER}")
        return scan.number(length, signed=True), False
    if code in _GETS:
        place = scan.number(_GETS[code])
        if place in memo:
            return memo[place], True
        raise PairError(f"byte {scan.at}: memo {place} holds no text")
    raise _unexpected(code, scan, "an int or a str")


def _skip_memo(scan: _Scanner, memo: dict[int, str], value: str | None) -> int:
    """The next opcode after one that stores `value` in the memo, if there is one; None: there should be none."""
    code = scan.opcode()
    if value is None or code not in _PUTS:
        return code
    memo[len(memo) if code == _MEMOIZE else scan.number(_PUTS[code])] = value
    return scan.opcode()


def _unexpected(code: int, scan: _Scanner, wanted: str) -> PairError:
    return PairError(f"byte {scan.at - 1}: opcode {code:#04x} instead of {wanted}")


def write_pair(image_id: int, text_id: int, text: str) -> bytes:
    """The bytes of `pickle.dumps((image_id, text_id, text))` of CPython 3.8 to 3.13: protocol 4 in one frame.

    ValueError for ids of more than 255 bytes, and for a text near or beyond FRAME_TARGET, which would take several
    frames.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) > FRAME_TARGET - (1 << 10):
        raise ValueError(f"text of {len(encoded):,} bytes, more than {FRAME_TARGET - (1 << 10):,}")
    length = len(encoded)
    head = struct.pack("<BB", 0x8C, length) if length < 256 else struct.pack("<BI", 0x58, length)
    body = b"".join((_write_number(image_id), _write_number(text_id), head, encoded, b"\x94\x87\x94."))
    return struct.pack("<BBBQ", _PROTO, 4, _FRAME, len(body)) + body


def _write_number(value: int) -> bytes:
    """The shortest opcode for a whole number."""
    if 0 <= value < 1 << 8:
        return struct.pack("<BB", 0x4B, value)
    if 0 <= value < 1 << 16:
        return struct.pack("<BH", 0x4D, value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<Bi", _BININT, value)
    size = (value.bit_length() >> 3) + 1
    content = value.to_bytes(size, "little", signed=True)
    if value < 0 and size > 1 and content[-1] == 0xFF and content[-2] & 0x80:  # -2^(8n-1) fits n bytes
        content = content[:-1]
    if len(content) > 255:
        raise ValueError(f"a number of {len(content)} bytes; ids have at most 255")
    return struct.pack("<BB", 0x8A, len(content)) + content
