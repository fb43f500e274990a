"""One indexed RecordIO file, the format of MXNet, read and written without the retired mxnet package.

`<prefix>.rec` is a chain of frames; `<prefix>.idx` is text, one "<key>TAB<byte offset>" line per record. A frame is
u32 magic, u32 (cflag << 29 | length), `length` bytes, zero padding to 4. Where the magic word itself stands
at a 4-byte aligned place of a record, the record is cut there and the word left out: the parts carry cflag 1
(first), 2 (middle), 3 (last) and the reader puts the word back; cflag 0 is a whole record. A record starts
with `<IfQQ` (flag, label, id, id2), then `flag` float32 labels, then the payload.

No length read from a file is used before it is checked against the file, and a record must end, zero padding
included, where the next one starts: a flipped bit in a frame is found without a checksum, unless it makes one or two
bytes of the padding part of the record.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DATA
from ..files import naming, sync_folder, write_json

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_LENGTH = (1 << 29) - 1  # the length field has 29 bits
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
_FRAME = struct.Struct("<II")
_PADDING = (b"", b"\0", b"\0\0", b"\0\0\0")
HEADER = struct.Struct("<IfQQ")
_SPOT_CHECKS = 64  # frames checked when a file is opened
INDEX_BLOCK = 1 << 24  # bytes of an index parsed at once: bounds the temporary arrays to a few hundred MB
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})\Z", re.ASCII)  # an int64 holds every number of 18 digits


class RecordError(ValueError):
    """A record file or its index is damaged or not what was expected; names file, key and byte offset."""

    exit_code = DATA


@dataclass(frozen=True, eq=False)
class Header:
    """Stands before a payload: scalar `label` (flag 0) or float32 vector (flag = its length), two ids."""

    flag: int = 0
    label: float | np.ndarray = 0.0
    id: int = 0
    id2: int = 0


def pack(header: Header, payload: bytes) -> bytes:
    """Header + payload -> record. A vector label sets flag to its length, a scalar to 0, as mxnet does."""
    for name, value in (("id", header.id), ("id2", header.id2)):
        if not 0 <= value < 1 << 64:
            raise RecordError(f"header.{name}: {value} does not fit in 64 unsigned bits")
    if np.ndim(header.label) == 0:
        return HEADER.pack(0, float(header.label), header.id, header.id2) + payload
    labels = np.asarray(header.label, dtype="<f4")
    return b"".join((HEADER.pack(labels.size, 0.0, header.id, header.id2), labels.tobytes(), payload))


def unpack(packed: bytes | memoryview) -> tuple[Header, memoryview]:
    """Record -> (Header, payload), both sharing memory with `packed`. RecordError if it is cut short."""
    view = memoryview(packed)
    if len(view) < HEADER.size:
        raise RecordError(f"record of {len(view)} bytes is shorter than its {HEADER.size}-byte header")
    flag, label, id, id2 = HEADER.unpack_from(view)
    start = HEADER.size + 4 * flag
    if start > len(view):
        raise RecordError(f"header announces {flag} labels, but the record has only {len(view)} bytes")
    if flag:
        label = np.frombuffer(view, "<f4", flag, HEADER.size)
    return Header(flag, label, id, id2), view[start:]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread, first and last included."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist()


def split_path(path: str | Path) -> Path:
    """'dir/train' or 'dir/train.rec' -> Path('dir/train'), the prefix shared by .rec, .idx and .json."""
    path = Path(path)
    return path.with_suffix("") if path.suffix == ".rec" else path


def beside(prefix: Path, suffix: str) -> Path:
    """The file `<prefix><suffix>`; unlike with_suffix it keeps dots that belong to the name."""
    return prefix.with_name(prefix.name + suffix)


class RecordWriter:
    """Writes `<prefix>.rec` and `<prefix>.idx`; they appear under their names only when `close` succeeds.

    Use as a context manager: leaving the block by an exception removes what was written so far. An OSError names the
    .rec.
    """

    def __init__(self, path: str | Path):
        self.prefix = split_path(path)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._index_path = beside(self.prefix, ".rec"), beside(self.prefix, ".idx")
        self._side_path: Path | None = None
        self.size = 0  # bytes of the .rec so far
        self._rec = open(_unfinished(self.path), "wb")  # noqa: SIM115 - closed by close() and discard()
        self._idx = open(_unfinished(self._index_path), "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._increasing = array("q")  # integer keys so far; kept small because 15 million keys are usual
        self._seen: set[str] | None = None  # all keys as text, once one came out of order

    def __len__(self) -> int:
        return len(self._increasing) if self._seen is None else len(self._seen)

    def write(self, key: int | str, packed: bytes) -> None:
        """Append one record. RecordError for a key that the index cannot hold or that was used before."""
        if len(packed) > MAX_LENGTH:
            raise RecordError(f"key {key!r}: {len(packed)} bytes; a record holds at most {MAX_LENGTH}")
        text = self._check_key(key)
        start = self.size
        with naming(self.path):
            for cflag, begin, end in _parts(packed):
                self._rec.write(_FRAME.pack(MAGIC, cflag << 29 | (end - begin)))
                self._rec.write(packed[begin:end])
                self.size += 8 + end - begin
            padding = -self.size % 4
            self._rec.write(b"\0" * padding)
            self.size += padding
            self._idx.write(f"{text}\t{start}\n")

    def flush(self, side: dict | None = None) -> None:
        """Bring everything onto the disk, and `side` as a .json that is to be published with it; all of it still has
        temporary names."""
        with naming(self.path):
            for file in (self._rec, self._idx):
                file.flush()
                os.fsync(file.fileno())
        if side is not None:
            self._side_path = beside(self.prefix, ".json")
            write_json(_unfinished(self._side_path), side)

    def close(self) -> None:
        """Flush and publish: .json first and .idx last, so that an index never describes another file."""
        if self._rec.closed:
            return
        self.flush()
        self._rec.close()
        self._idx.close()
        self._index_path.unlink(missing_ok=True)
        for path in filter(None, (self._side_path, self.path, self._index_path)):
            os.replace(_unfinished(path), path)
        sync_folder(self.prefix.parent)

    def discard(self) -> None:
        """Drop everything written so far; files of an earlier run under the same name stay as they are."""
        for file in (self._rec, self._idx):
            with suppress(OSError):  # what is still to be written may find no room
                file.close()
            Path(file.name).unlink(missing_ok=True)
        if self._side_path is not None:
            _unfinished(self._side_path).unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close() if kind is None else self.discard()

    def _check_key(self, key: int | str) -> str:
        text = str(key)
        if isinstance(key, str):
            if not text or text != text.strip() or any(mark in text for mark in "\t\n\r"):
                raise RecordError(f"key {key!r}: must not be empty, hold tabs or line ends, or begin or end in space")
        elif isinstance(key, bool) or not isinstance(key, (int, np.integer)) or abs(int(key)) >= 10**18:
            raise RecordError(f"key {key!r}: must be an integer of at most 18 digits or a str")
        elif self._seen is None and (not self._increasing or key > self._increasing[-1]):
            self._increasing.append(int(key))
            return text
        if self._seen is None:
            self._seen = {str(old) for old in self._increasing}
        if text in self._seen:
            raise RecordError(f"key {key!r}: already written to {self.prefix}.rec; keys must differ")
        self._seen.add(text)
        return text


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _parts(packed: bytes) -> list[tuple[int, int, int]]:
    """(cflag, begin, end) of the frames that hold `packed`: it is cut at every aligned magic word."""
    cuts = [found.start() for found in re.finditer(re.escape(MAGIC_BYTES), packed) if found.start() % 4 == 0]
    if not cuts:
        return [(WHOLE, 0, len(packed))]
    begins, ends = [0] + [cut + 4 for cut in cuts], [*cuts, len(packed)]
    flags = [FIRST] + [MIDDLE] * (len(cuts) - 1) + [LAST]
    return list(zip(flags, begins, ends))


class RecordFile:
    """Random access to one .rec through its .idx, in the order of the index lines. Memory-mapped; picklable.

    Opening parses the index, checks every offset against the file and looks at the first, the last and 64
    frames in between; the rest is checked when it is read. The index may be in any order and may leave out
    records. The files must not be cut or rewritten in place while they are open (the writer never does that).

    Attributes: size (bytes of the .rec) and offsets (int64 (n,): the byte at which each record's frame starts).
    """

    def __init__(self, path: str | Path, index: str | Path | None = None):
        self.prefix = split_path(path)
        self.path = beside(self.prefix, ".rec")
        self.index_path = Path(index) if index else beside(self.prefix, ".idx")
        self._keys, self.offsets = read_index(self.index_path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except FileNotFoundError:
            raise RecordError(f"{self.path}: no such file") from None
        self._view = memoryview(self._map if self._map is not None else b"")
        self._ends = self._check_offsets()
        if not len(self) and self.size:
            raise RecordError(f"{self.index_path}: empty, but {self.path} holds {self.size} bytes")
        if len(self):
            for i in sorted({*spread(len(self), _SPOT_CHECKS + 2), int(np.argmax(self.offsets))}):
                self._frames(i, *self._extent(i))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict:
        return {"path": self.path, "index": self.index_path, "size": self.size, "count": len(self)}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"], state["index"])
        if (self.size, len(self)) != (state["size"], state["count"]):
            raise RecordError(f"{self.path}: changed since it was opened ({state['size']} -> {self.size} bytes)")

    @property
    def keys(self) -> list[int] | list[str]:
        """All keys in index order, as a new list."""
        return self._keys.tolist() if isinstance(self._keys, np.ndarray) else list(self._keys)

    def key(self, i: int) -> int | str:
        """Key of record `i`."""
        key = self._keys[i]
        return key if isinstance(key, str) else int(key)

    def view(self, i: int) -> memoryview:
        """Record `i` in one view, which shares the file's memory unless the record was stored in parts."""
        if not 0 <= i < len(self.offsets):
            raise IndexError(f"{self.path}: record {i} of {len(self.offsets)}")
        start, limit = self._extent(i)
        magic, word = _FRAME.unpack_from(self._view, start)
        end = start + 8 + (word & MAX_LENGTH)
        if magic == MAGIC and word >> 29 == WHOLE and self._ends_well(end, limit):
            return self._view[start + 8 : end]
        parts = self._frames(i, start, limit)  # the slow way: a record in parts, or a damaged one
        return memoryview(MAGIC_BYTES.join(self._view[begin:end] for begin, end in parts))

    def read(self, i: int) -> bytes:
        """Record `i` as bytes, the parts of a split record joined. IndexError, RecordError."""
        return bytes(self.view(i))

    def _check_offsets(self) -> np.ndarray:
        """Byte at which the space of each record ends and the next one starts. Bounds every later read."""
        offsets = self.offsets
        if not len(offsets):
            return offsets
        wrong = np.flatnonzero((offsets < 0) | (offsets > self.size - 8) | (offsets % 4 != 0))
        if len(wrong):
            self._fail(int(wrong[0]), int(offsets[wrong[0]]), f"no record can start here ({self.size} bytes in all)")
        order = np.argsort(offsets, kind="stable")
        ends = np.empty_like(offsets)
        ends[order] = np.append(offsets[order][1:], self.size)
        same = np.flatnonzero(ends == offsets)
        if len(same):
            self._fail(int(same[0]), int(offsets[same[0]]), "two index lines point to this offset")
        return ends

    def _extent(self, i: int) -> tuple[int, int]:
        return self.offsets.item(i), self._ends.item(i)

    def _ends_well(self, end: int, limit: int) -> bool:
        """Whether a record that ends at byte `end` fills its space up to `limit` with its padding, or is followed
        there by another one, left out of the index."""
        if 0 <= limit - end < 4:
            return self._map[end:limit] in _PADDING
        start = end + -end % 4
        if start > limit - 8 or self._map[end:start] not in _PADDING:
            return False
        magic, word = _FRAME.unpack_from(self._view, start)
        return magic == MAGIC and word >> 29 in (WHOLE, FIRST)

    def _frames(self, i: int, start: int, limit: int) -> list[tuple[int, int]]:
        """(begin, end) in the file of every part of record `i`. RecordError for anything out of order."""
        parts: list[tuple[int, int]] = []
        at = start
        while True:
            if at + 8 > limit:
                self._fail(i, at, f"a part of the record should start here, but its space ends at byte {limit}")
            magic, word = _FRAME.unpack_from(self._view, at)
            cflag, length = word >> 29, word & MAX_LENGTH
            if magic != MAGIC:
                self._fail(i, at, f"magic word is {magic:#010x}, should be {MAGIC:#010x}")
            if cflag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                self._fail(i, at, f"continuation flag is {cflag} on part {len(parts) + 1}")
            if at + 8 + length > limit:
                self._fail(i, at, f"{length} bytes announced, but only {limit - at - 8} are there")
            parts.append((at + 8, at + 8 + length))
            if cflag != WHOLE and len(_parts(self._map[at + 8 : at + 8 + length])) > 1:
                self._fail(i, at, f"{length} bytes announced, which go over the start of another part")
            if cflag in (WHOLE, LAST):
                if not self._ends_well(parts[-1][1], limit):
                    what = f"the record ends at byte {parts[-1][1]}, its space at {limit}, and no record lies between"
                    self._fail(i, at, f"{what}: cut or overwritten")
                return parts
            if length % 4:
                self._fail(i, at, f"part of {length} bytes goes on, but is not cut at a 4-byte place")
            at += 8 + length

    def _fail(self, i: int, offset: int, what: str) -> None:
        raise RecordError(f"{self.path}: record {i} (key {self.key(i)!r}), byte {offset}: {what}")


# ---- the index -------------------------------------------------------------------------------------------------------


def read_index(path: Path) -> tuple[np.ndarray | list[str], np.ndarray]:
    """Parse `path` -> (keys, offsets int64 (n,)), in the order of the lines.

    Keys are an int64 array if all are plain integers, else a list of str. RecordError names the bad line. YFCC15M has
    15 million lines: the usual form, plain non-negative integers, is parsed by numpy in blocks.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RecordError(f"{path}: no such index; a .rec file is read through the .idx beside it") from None
    if data and not data.endswith(b"\n"):
        data += b"\n"
    blocks, start = [], 0
    while start < len(data):
        stop = data.rfind(b"\n", start, start + INDEX_BLOCK) + 1
        block = _parse_block(data[start:stop]) if stop > start else None
        if block is None:  # not the plain form: start over, carefully
            return _parse_lines(path, data)
        blocks.append(block)
        start = stop
    pairs = np.concatenate(blocks) if blocks else np.zeros((0, 2), np.int64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


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
    if widths.min() < 1 or widths.max() > 18 or leading_zero.any():
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
