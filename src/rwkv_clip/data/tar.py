"""The tar format, forwards and once, with every size checked before it is believed.

`tarfile` itself loops for ever on a negative size and reads a long name of gigabytes into memory; only its functions
for single fields are used. A compressed tar is read to its end, where its checksum is.
"""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .rows import SourceError

MAX_NAME = 1 << 20  # bytes of a header that only names a member
MAX_PADDING = 1 << 26  # zeros after the end mark

BLOCK = 512
END = bytes(BLOCK)
OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
PAX = re.compile(rb"(\d{1,9}) ([^=]+)=")
SIZE = re.compile(r"\d{1,18}", re.ASCII)


class Member(NamedTuple):
    """kind: "file", "folder", or "other" (links, devices); size in bytes."""

    name: str
    kind: str
    size: int


class Tar:
    """The members of a tar in the order of the file. `read` gives the content of the current member.

    member_at: the byte at which the headers of the current member begin; after the last one, the end mark. always: what
    a header said about all members. origin: where `raw` begins in the file, if it is a part that ends without a mark.

    SourceError, with the place: compressed by another program than gzip, damaged, cut short, headers with impossible
    numbers, sparse members, anything but zeros after the end mark.
    """

    def __init__(self, file: Path, raw: BinaryIO, origin: int | None = None):
        self.file, self.at, self.member_at, self.origin = file, 0, 0, origin
        self.always: dict[str, str] = {}
        start = raw.read(6) if origin is None else b""
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        for magic, name in OTHER_COMPRESSION.items():
            if start.startswith(magic):
                raise SourceError(f"{file}: compressed by {name}; unpack it, or use gzip (.tgz)")
        self.stream = gzip.GzipFile(fileobj=raw) if start[:2] == b"\x1f\x8b" else raw
        self.length = None if self.stream is not raw else size  # known if not compressed
        self.last = "its start"

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        data = self._read(count)
        if len(data) != count:
            raise self.error("cut short")
        return data

    def _read(self, count: int) -> bytes:
        try:
            data = self.stream.read(count)
        except (EOFError, zlib.error, OSError) as error:
            raise self.error(f"damaged or cut short ({error})") from None
        self.at += len(data)
        return data

    def error(self, words: str) -> SourceError:
        """`words`, with the place."""
        last = re.sub(r"[\x00-\x1f]", "?", self.last[:200])
        return SourceError(f"{self.file}: byte {self.at + (self.origin or 0):,} of the tar, after {last}: {words}")

    def _go_to(self, end: int) -> None:
        if self.length is not None:
            self.stream.seek(end)
            self.at = end
        while self.at < end:
            self.read(min(end - self.at, 1 << 20))

    def __iter__(self) -> Iterator[Member]:
        here = {}  # what extended headers say about the next member
        part = self.origin is not None
        while (block := self._read(BLOCK)) != END and (block or not part):
            _check_block(self, block)
            kind, size = block[156:157], self._number(block[124:136])
            if kind in b"LKxXg":
                data = self._read_extended(size)
                if kind in b"LxX":
                    here |= {"path": _text(data)} if kind == b"L" else self._parse_pax(data)
                elif kind == b"g":
                    self.always |= self._parse_pax(data)
                continue
            said, here = {**self.always, **here}, {}
            yield from self._member(block, kind, size, said)
            self.member_at = self.at
        self._check_end()

    def _member(self, block: bytes, kind: bytes, size: int, said: dict[str, str]) -> Iterator[Member]:
        name = said.get("path") or _name(block)
        if kind == b"S" or "sparse" in said:
            raise self.error(f"{name[:200]!r} is stored with holes (tar -S); pack it anew without")
        regular = kind in b"07\0" or kind not in b"123456"
        if "size" in said:
            size = int(said["size"])
        end = self.at + (size + BLOCK - 1) // BLOCK * BLOCK if regular else self.at
        folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if self.length is not None and end > self.length:
            raise self.error(f"{name[:200]!r} should have {size:,} bytes; cut short")
        yield Member(name, "folder" if folder else "file" if kind in b"07\0" else "other", size)
        self.last = name
        if self.at != end:
            self._go_to(end)

    def _number(self, field: bytes) -> int:
        try:
            number = tarfile.nti(field)
        except tarfile.HeaderError:
            number = -1
        if number < 0:
            raise self.error(f"the header gives a size that cannot be ({field!r}); damaged")
        return number

    def _read_extended(self, size: int) -> bytes:
        if size > MAX_NAME:
            raise self.error(f"a header of {size:,} bytes, more than {MAX_NAME:,}; damaged or made to harm")
        return self.read((size + BLOCK - 1) // BLOCK * BLOCK)[:size]

    def _parse_pax(self, data: bytes) -> dict[str, str]:
        """path, size, and whether there are holes, of records `LENGTH KEY=VALUE` and a line end."""
        found, at = {}, 0
        while at < len(data) and data[at]:
            match = PAX.match(data, at)
            end = at + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
                raise self.error("an extended header that is not valid; damaged")
            key, value, at = match[2], _text(data[match.end() : end - 1]), end
            if key == b"path":
                found["path"] = value
            elif key == b"size":
                if not SIZE.fullmatch(value):
                    raise self.error(f"the header gives a size that cannot be ({value[:30]!r}); damaged")
                found["size"] = value
            elif key.startswith(b"GNU.sparse."):
                found["sparse"] = "yes"
        return found

    def _check_end(self) -> None:
        """Only zeros may follow; a compressed file is read to its end, where its checksum is."""
        start = self.at
        while self.origin is None and (data := self._read(1 << 20)):
            if data.count(0) != len(data):
                raise self.error("more after the end mark; damaged, or tars joined into one: give them one by one")
            if self.at - start > MAX_PADDING:
                raise self.error(f"more than {MAX_PADDING:,} bytes after the end mark")


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        return f"{_text(block[345:500])}/{name}"
    return name


def _check_block(tar: Tar, block: bytes) -> None:
    """Compare a header with its checksum; some old programs add its bytes up as signed ones."""
    if len(block) < BLOCK:
        raise tar.error("no end mark; cut short")
    try:
        good = tarfile.nti(block[148:156]) in tarfile.calc_chksums(block)
    except tarfile.HeaderError:
        good = False
    if not good:
        raise tar.error("no valid header; damaged")
