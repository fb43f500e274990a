"""Samples made of several files that share a name, 000.jpg 000.txt 000.json: members of a tar, or files of a folder.

The tar is read here and not by `tarfile`: forwards and once, every size checked before it is believed (a negative one
lets `tarfile` spin for ever, a long name of gigabytes fills the memory), and a compressed one to its end, where its
checksum stands.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..files import OutsideError, find_below, read_bytes
from .image import MAX_BYTES
from .readers import IMAGE_ENDINGS, MAX_TEXT_BYTES, MISSING, Problem, Row, Skip, SourceError, load_json

MAX_NAME = 1 << 20  # bytes of a header that only names a member
MAX_PADDING = 1 << 26  # zeros behind the end mark
MAX_APART = 1 << 18  # samples without picture or text that are remembered
MAX_FILES = 1000  # of one name

BLOCK = 512
END = bytes(BLOCK)
OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}

TWICE = Problem("one name twice")
MUCH = Problem("files of one name too many or too large")
SEVERAL = Problem("several pictures under one name")
LINKED = Problem("a link that leads out of the folder")
APART = Problem("picture and text of one name lie apart in the tar; sort it by name")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for the system's own use: .ipynb_checkpoints, ._0.jpg, __MACOSX, PaxHeaders."""
    return name == "__MACOSX" or (name.startswith((".", "PaxHeaders")) and name not in (".", ".."))


def is_picture(ending: str) -> bool:
    """Whether the last part of a lower-case ending, jpg or seg.png, is a picture's."""
    return ending.rpartition(".")[2] in IMAGE_ENDINGS


def is_text(ending: str) -> bool:
    """txt, raw.txt, json, caption, text."""
    return ending.endswith("txt") or ending in ("json", "caption", "text")


class Sample:
    """What files of one name hold: x.jpg -> a picture, x.txt -> {"txt": str}, x.raw.txt -> {"raw": str}, x.json -> its
    fields. Others (x.cls) are not read."""

    def __init__(self):
        self.endings: set[str] = set()
        self.fault: Problem | None = None
        self.pictures: dict[str, bytes | Problem] = {}
        self.texts: dict[str, str | Problem] = {}
        self.meta: dict = {}
        self.room = 2 * MAX_BYTES

    def note(self, ending: str) -> int:
        """There is a file of this ending: the most bytes that it is read with; 0: it is of no use."""
        if ending in self.endings:
            self.fault = TWICE
        elif len(self.endings) == MAX_FILES or not self.room:
            self.fault = MUCH
        else:
            self.endings.add(ending)
            return min(MAX_BYTES if is_picture(ending) else MAX_TEXT_BYTES if is_text(ending) else 0, self.room)
        return 0

    def add(self, ending: str, content: bytes | Problem) -> None:
        """What a file of this ending holds, or why it cannot be had."""
        if isinstance(content, bytes):
            self.room -= len(content)
        if is_picture(ending):
            self.pictures[ending] = content
            return
        name = ending.removesuffix(".txt")
        if isinstance(content, Problem):
            self.texts[name] = content
            return
        try:
            if ending != "json":
                self.texts[name] = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
                return
            fields = load_json(content, Path(), "")
            self.meta = fields if isinstance(fields, dict) else {"json": fields}
        except ValueError:
            self.texts[name] = Problem("text is not UTF-8 or JSON")

    def row(self, name: str) -> Row:
        """Fields of the JSON give way to the files. The picture is x.jpg; x.mask.png is a field only."""
        plain = [content for ending, content in self.pictures.items() if "." not in ending]
        image = MISSING if not plain else plain[0] if len(plain) == 1 else SEVERAL
        return Row(name, {**self.meta, **self.texts, **self.pictures}, None, self.fault or image)

    def lacks(self) -> str | None:
        """picture or text, where it has only the other one."""
        picture, text = any(map(is_picture, self.endings)), any(map(is_text, self.endings))
        return None if picture == text else "text" if picture else "picture"


# ---- webdataset ------------------------------------------------------------------------------------------------------


def read_tar(file: Path, skip: Skip) -> Iterator[Row]:
    """webdataset: neighbouring members that share the name up to the first dot are one row."""
    with open(file, "rb") as raw:
        tar = Tar(file, raw)
        key, sample, passing = None, Sample(), False
        lacking: dict[int, str] = {}
        for member in tar:
            here, ending = split_name(member.name)
            if not here or member.kind == "folder":
                continue
            if here != key:
                if key is not None and not passing:
                    yield _finish(file, key, sample, lacking)
                elif key is not None:
                    _is_apart(key, sample, lacking)
                key, sample, passing = here, Sample(), skip()
            most = sample.note(ending)
            if passing or not most:
                continue
            if member.kind != "file":
                sample.add(ending, Problem("a link in the tar, not a file"))
            elif member.size > most:
                sample.add(ending, Problem("image too large" if is_picture(ending) else "text too long"))
            else:
                sample.add(ending, tar.read(member.size))
        if key is not None and not passing:
            yield _finish(file, key, sample, lacking)


def split_name(name: str) -> tuple[str, str]:
    """("a/000", "seg.png") for "./a/000.seg.PNG"; ("", "") for what is hidden or has no ending."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or not ending:
        return "", ""
    if ("/." in name or "__MACOSX" in name or "PaxHeaders" in name or name[0] == ".") and any(
        map(is_hidden, name.split("/"))
    ):
        return "", ""
    return folder + slash + stem, ending.lower()


def _finish(file: Path, key: str, sample: Sample, lacking: dict[int, str]) -> Row:
    row = sample.row(f"{file.name} {key}")
    if _is_apart(key, sample, lacking):
        return row._replace(fields={"txt": APART, **row.fields}, image=APART)
    return row


def _is_apart(key: str, sample: Sample, lacking: dict[int, str]) -> bool:
    """Whether an earlier sample of this name has what this one lacks."""
    lacks = sample.lacks()
    if lacks is None:
        return False
    before = lacking.get(hash(key))
    if before is None and len(lacking) < MAX_APART:
        lacking[hash(key)] = lacks
    return before is not None and before != lacks


class Member(NamedTuple):
    """kind: "file", "folder", or "other" (links, devices); size in bytes."""

    name: str
    kind: str
    size: int


class Tar:
    """The members of a tar, one after the other, as they stand in it. `read` is for the member at hand.

    SourceError, with the place: compressed by another program than gzip, damaged, cut short, headers whose numbers
    cannot be, sparse members, anything but zeros behind the end mark.
    """

    def __init__(self, file: Path, raw: BinaryIO):
        self.file, self.at = file, 0
        start = raw.read(6)
        raw.seek(0)
        for magic, name in OTHER_COMPRESSION.items():
            if start.startswith(magic):
                raise SourceError(f"{file}: compressed by {name}; unpack it, or use gzip (.tgz)")
        self.stream = gzip.GzipFile(fileobj=raw) if start[:2] == b"\x1f\x8b" else raw
        self.length = None if self.stream is not raw else os.fstat(raw.fileno()).st_size  # known if not compressed
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
        return SourceError(f"{self.file}: byte {self.at:,} of the tar, after {last}: {words}")

    def _go_to(self, end: int) -> None:
        if self.length is not None:
            self.stream.seek(end)
            self.at = end
        while self.at < end:
            self.read(min(end - self.at, 1 << 20))

    def __iter__(self) -> Iterator[Member]:
        always, here = {}, {}  # what extended headers say about all members, about the next one
        while (block := self._read(BLOCK)) != END:
            _check_block(self, block)
            kind, size = block[156:157], self._number(block[124:136])
            if kind in b"LKxXg":
                data = self._read_extended(size)
                if kind in b"LxX":
                    here |= {"path": _text(data)} if kind == b"L" else self._parse_pax(data)
                elif kind == b"g":
                    always |= self._parse_pax(data)
                continue
            said, here = {**always, **here}, {}
            yield from self._member(block, kind, size, said)
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
        """Octal digits, or base 256 where the first bit is set. A negative number is none that a header may say."""
        if field[0] & 0xC0 == 0x80:
            return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
        number = _octal(field)
        if number is None:
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
        """Zeros up to the end of the file, which a compressed one is read to: its checksum stands there."""
        start = self.at
        while data := self._read(1 << 20):
            if data.count(0) != len(data):
                raise self.error("more behind the end mark; damaged, or tars joined into one: give them one by one")
            if self.at - start > MAX_PADDING:
                raise self.error(f"more than {MAX_PADDING:,} bytes behind the end mark")


PAX = re.compile(rb"(\d{1,9}) ([^=]+)=")
SIZE = re.compile(r"\d{1,18}", re.ASCII)
OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)


def _octal(field: bytes) -> int | None:
    match = OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        return f"{_text(block[345:500])}/{name}"
    return name


def _check_block(tar: Tar, block: bytes) -> None:
    """A header's bytes add up to what it says, its own field counted as blanks; some old programs add them signed."""
    if len(block) < BLOCK:
        raise tar.error("no end mark; cut short")
    field = block[148:156]
    # Adler-32 that starts from 0 has the sum in its lower half, exact up to 65,520.
    bytes_sum = (zlib.adler32(block[:256], 0) & 0xFFFF) + (zlib.adler32(block[256:], 0) & 0xFFFF) - sum(field) + 256
    said = _octal(field)
    if said != bytes_sum:
        high = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in field)
        if said != bytes_sum - 256 * high:
            raise tar.error("no valid header; damaged")


# ---- folders of files ------------------------------------------------------------------------------------------------


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(path of a folder, sorted names of its files) of `folder` and all below it, in order; nothing hidden, linked
    folders once."""
    seen = set()
    waiting = [str(folder)]
    while waiting:
        place = waiting.pop()
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(place) as entries:
            visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
        waiting += [entry.path for entry in reversed(visible) if entry.is_dir()]
        yield place, [entry.name for entry in visible if entry.is_file()]


def group_files(names: list[str]) -> dict[str, list[tuple[str, str]]]:
    """{stem: [(ending, file name)]} of the pictures and texts among the names of one folder.

    A picture's stem is its name without the last ending; a text's is that of a picture, else the name up to .txt.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    texts = []
    for name in names:
        stem, _, ending = name.rpartition(".")
        ending = ending.lower()
        if stem and is_picture(ending):
            groups.setdefault(stem, []).append((ending, name))
        elif stem and is_text(ending) and not name.endswith("_stats.json"):  # img2dataset's, about a whole shard
            texts.append((stem, ending, name))
    pictures = set(groups)
    for stem, ending, name in texts:
        shorter, _, view = stem.rpartition(".")
        if stem not in pictures and ending == "txt" and shorter in pictures:  # 000.raw.txt beside 000.jpg
            stem, ending = shorter, f"{view.lower()}.txt"
        groups.setdefault(stem, []).append((ending, name))
    return dict(sorted(groups.items()))


def read_pairs(folder: Path, skip: Skip, outside: bool = False) -> Iterator[Row]:
    """Pictures with texts of the same name beside them; one without the other is a row, too, that will be counted.
    Files that are elsewhere, by a link, are not read unless `outside`."""
    for place, names in walk(folder):
        for stem, files in group_files(names).items():
            if skip():
                continue
            sample = Sample()
            for ending, name in files:
                if most := sample.note(ending):
                    sample.add(ending, _read_file(folder, Path(place, name), ending, most, outside))
            inside = os.path.relpath(os.path.join(place, stem), folder)
            yield sample.row(f"{folder.name}/{inside}")


def _read_file(folder: Path, path: Path, ending: str, most: int, outside: bool) -> bytes | Problem:
    try:
        find_below(folder, os.path.relpath(path, folder), outside)
        return read_bytes(path, most)
    except OutsideError:
        return LINKED
    except OSError as error:
        if error.errno == errno.EFBIG:
            return Problem("image too large" if is_picture(ending) else "text too long")
        return Problem(f"file cannot be read ({error.strerror})")
