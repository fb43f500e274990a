"""Training records: image bytes + the token ids of one to three texts, in indexed RecordIO files.

A record's float32 labels are the token ids of its texts one after the other, the raw text first, and its
payload is an encoded image. `<prefix>.json`, written by the builder, says what the labels mean; files of the
released code have none, there the number of labels tells. `recordio` has the file format itself.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import allow_open_files, parse_json, read_bytes
from .recordio import HEADER, Header, RecordError, RecordFile, RecordWriter, beside, pack, split_path, spread, unpack

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from .direct.reading import Reading

__all__ = [
    "Header",
    "Layout",
    "RecordError",
    "RecordFile",
    "RecordSet",
    "RecordWriter",
    "Records",
    "find_record_files",
    "open_records",
    "pack",
    "read_layout",
    "unpack",
]

TEXT_NAMES = ("raw", "synthetic", "generated")
CONTEXT = 77
SCHEMA = 1
EXACT = 1 << 24  # float32 labels hold every id below this exactly
CHECKSUM = "crc32"
LOOKED_AT = 64  # records of a file whose token ids are seen before training begins
DIGESTED = (16, 256)  # records of a file that a digest reads, at least and at most
ALL_DIGESTED = 4096  # records of all files, where that leaves each the least
BEGINNING = 1 << 14  # bytes of such a record, where it has no checksum
MAX_JSON = 1 << 24  # bytes of a side file that are read
WAYS = (
    "give a prefix, file, glob, folder or comma list of records, which data2rec.py makes from other data, or the "
    "folder of a split in an LMDB of Chinese-CLIP's (with imgs and pairs in it); or tables, tars, Parquet files, which "
    "are read as they are"
)


@dataclass(frozen=True)
class Layout:
    """What the labels of a file mean. `checksum`: header id2 is the CRC-32 of labels and payload. `content`: the sha256
    over the checksums of all records, where the builder wrote it."""

    text_names: tuple[str, ...]
    context: int = CONTEXT
    tokenizer: str | None = None
    vocab_size: int | None = None
    checksum: bool = False
    content: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def width(self) -> int:
        """Labels per record: texts * context."""
        return len(self.text_names) * self.context


def checksum(content: bytes | memoryview) -> int:
    """CRC-32 of labels and payload, kept in the header's id2, which mxnet and DALI ignore."""
    return zlib.crc32(content)


def find_record_files(spec: str | Path | list[str]) -> list[Path]:
    """The .rec files that `spec` names, sorted: a prefix, a .rec, a glob, a folder, or a comma list of these.

    The prefix of a sharded set (`train` for train-00000.rec, ...) means all its shards. A name with a comma in it is
    a list only where there are no records of that name. ValueError if one of the names matches nothing, or if
    shards that the builder wrote are missing.
    """
    names = split_names(spec, _names_records)
    found: set[Path] = set()
    for name in names:
        files = _expand(name)
        if not files:
            raise ValueError(f"records: {name!r} {_explain_none(Path(name))}")
        found.update(files)
    if not found:
        raise ValueError(f"records: {str(spec)!r} is empty; {WAYS}")
    files = sorted(found)
    for file in files:
        if not beside(split_path(file), ".idx").is_file():
            raise ValueError(f"records: {file} has no .idx beside it")
    return files


def split_names(spec: str | Path | list[str], is_one: Callable[[str], bool]) -> list[str]:
    """The names of a comma list; a name with a comma in it that `is_one` accepts is no list."""
    names = [str(name) for name in spec] if isinstance(spec, list) else [str(spec)]
    if len(names) == 1 and "," in names[0] and not is_one(names[0]):
        return [name.strip() for name in names[0].split(",") if name.strip()]
    return names


def _names_records(name: str) -> bool:
    try:
        return os.path.exists(name) or bool(_expand(name))
    except OSError:  # longer than a name can be
        return False


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return list(path.glob("*.rec"))
    if glob.has_magic(name) and not path.exists():
        return [Path(found) for found in glob.glob(name) if found.endswith(".rec")]
    whole, prefix = beside(split_path(path), ".rec"), split_path(path)
    shards = list(path.parent.glob(f"{glob.escape(path.name)}-[0-9][0-9][0-9][0-9][0-9].rec"))
    if path.suffix == ".rec" or not shards:
        return [whole] if whole.is_file() else []
    if whole.is_file():
        raise ValueError(f"records: {name!r} means {whole} and also {shards[0].name}, ...; name the one you want")
    summary = _read_json(beside(prefix, ".json"))
    if summary is None:  # shards by others have no .json at all
        if any(beside(split_path(shard), ".json").exists() for shard in shards):
            raise ValueError(f"records: {name!r}: the build is not finished; run it again, or name files by a glob")
        return shards
    missing = {f"{shard}.rec" for shard in summary.get("shards", [])} - {shard.name for shard in shards}
    if missing:
        raise ValueError(f"records: {name!r}: shards {sorted(missing)[:5]} are missing; run the build again")
    return shards


def _explain_none(path: Path) -> str:
    if not path.is_file():
        return f"names no .rec file; {WAYS}"
    prefix = path.with_suffix("")
    if beside(prefix, ".rec").is_file():
        return f"lies beside the records; give their prefix {str(prefix)!r}"
    return f"is a file, but no .rec; make records of it first: python data2rec.py {path} PREFIX, and give PREFIX"


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = parse_json(read_bytes(path, MAX_JSON), str(path))
    except (ValueError, OSError) as error:
        raise RecordError(str(error)) from None
    if not isinstance(content, dict):
        raise RecordError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def read_layout(file: RecordFile) -> Layout:
    """From the side file, or from the number of labels of the first record where there is none."""
    path = beside(file.prefix, ".json")
    side = _read_json(path)
    if side is None:
        flag = unpack(file.view(0))[0].flag
        texts, rest = divmod(flag, CONTEXT)
        if rest or not 1 <= texts <= len(TEXT_NAMES):
            raise RecordError(
                f"{file.path}: records have {flag} labels, not {CONTEXT}, {2 * CONTEXT} or {3 * CONTEXT} "
                f"token ids, and no {path.name} says what they are; write it: "
                f'{{"schema": 1, "views": ["raw", ...], "context": ..., "tokenizer": ..., "vocab_size": ...}}'
            )
        return Layout(TEXT_NAMES[:texts])
    if side.get("schema") != SCHEMA:
        raise RecordError(f"{path}: schema {side.get('schema')!r} is not known, this version reads {SCHEMA}")
    names, context, vocab = side.get("views"), side.get("context"), side.get("vocab_size")
    named = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
    if not named or len(set(names)) != len(names):
        raise RecordError(f"{path}: views is {names!r}, should be a list of different names")
    for field, value in (("context", context), ("vocab_size", vocab)):
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= EXACT
        if not whole and not (field == "vocab_size" and value is None):
            raise RecordError(f"{path}: {field} is {value!r}, should be a whole number from 1 to {EXACT}")
    if side.get("count", len(file)) != len(file):
        raise RecordError(f"{path}: says {side['count']} records, {file.index_path.name} lists {len(file)}")
    tokenizer = side.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise RecordError(f"{path}: tokenizer is {tokenizer!r}, should be a name")
    content = side.get("content")
    if content is not None and not isinstance(content, str):
        raise RecordError(f"{path}: content is {str(content)[:40]}, should be a hash; build the records again")
    return Layout(tuple(names), context, tokenizer, vocab, side.get("checksum") == CHECKSUM, content)


class Records:
    """What training reads: numbered samples of an encoded image and the token ids of its texts.

    Picklable; give one to every worker. layout: what the token ids mean. files: those that hold them.
    """

    layout: Layout
    files: list[Any]
    several = False  # whether a text may be one of several captions, for `draw_sample`

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch of training: each record once, but in a mixture."""
        return len(self)

    @property
    def text_names(self) -> tuple[str, ...]:
        """Names of the texts, raw first."""
        return self.layout.text_names

    @property
    def context(self) -> int:
        """Tokens per text."""
        return self.layout.context

    @property
    def tokenizer(self) -> str | None:
        """Name of the tokenizer that made the ids; None if the files do not say."""
        return self.layout.tokenizer

    @property
    def vocab_size(self) -> int | None:
        """Ids are below this; None if the files do not say."""
        return self.layout.vocab_size

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 that identifies these records, whatever their folder and time of writing."""
        raise NotImplementedError

    def limit_vocab(self, vocab: int) -> int:
        """Treat records with a token id of `vocab` or more as damaged from now on. Looks at some records of every file
        first and returns the largest such id in them, 0 if there is none."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """How messages name record `i`."""
        raise NotImplementedError

    def sample(self, i: int) -> tuple[bytes, np.ndarray]:
        """(encoded image, token ids int64 (texts, context)) of record `i`. RecordError if it holds anything else."""
        raise NotImplementedError

    def draw_sample(self, i: int, drawn: float | None) -> tuple[bytes, np.ndarray]:
        """`sample`, where a text of the record may be one of several captions: which one follows from `drawn`, in
        [0, 1), and None is the first."""
        return self.sample(i)


class RecordSet(Records):
    """All records of the files that a spec names, one after the other; every file must have the same layout.

    Attributes: files (list of RecordFile), layout. Picklable; give one to every worker.
    """

    def __init__(self, spec: str | Path | list[str]):
        paths = find_record_files(spec)
        allow_open_files(len(paths))  # a mapped file stays open
        try:
            self.files = [file for file in map(RecordFile, paths) if len(file)]
        except PermissionError as error:  # output that cannot be written is another matter
            raise RecordError(f"{error.filename}: cannot be read ({error.strerror}); change its permissions") from None
        if not self.files:
            raise RecordError(f"{spec}: the files hold no record")
        layouts = [read_layout(file) for file in self.files]
        for file, layout in zip(self.files, layouts):
            if layout != layouts[0]:
                raise RecordError(f"{file.path}: {layout} differs from {layouts[0]} of {self.files[0].path}")
        self.layout = layouts[0]
        self._layouts = layouts
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 that identifies these records, whatever their folder and time of writing.

        Over each file's layout, size and offsets, the `content` of its side file, and some records, because the side
        file may be a stale one: their checksums, which a flipped bit leaves alone, or else their first bytes. Without
        `content`, a difference in other records that leaves their lengths as they are goes unnoticed.
        """
        least, most = DIGESTED
        sampled = min(most, max(least, ALL_DIGESTED // len(self.files)))
        total = hashlib.sha256()
        for file, layout in zip(self.files, self._layouts):
            about = [layout.text_names, layout.context, layout.tokenizer, layout.vocab_size, layout.content]
            total.update(json.dumps([*about, file.size, len(file)]).encode())
            total.update(file.offsets.astype("<i8", copy=False))
            for i in spread(len(file), sampled):
                with suppress(RecordError):  # a damaged one: counted and replaced when its turn comes
                    total.update(file.view(i)[: HEADER.size if layout.checksum else BEGINNING])
        return total.hexdigest()

    def limit_vocab(self, vocab: int) -> int:
        """Treat records with a token id of `vocab` or more as damaged from now on. Looks at some records of every file
        first and returns the largest such id in them, 0 if there is none."""
        self.layout = replace(self.layout, vocab_size=vocab)
        largest = 0
        for file in self.files:
            for i in spread(len(file), LOOKED_AT):
                with suppress(RecordError):  # damaged in another way: counted and replaced when its turn comes
                    labels = np.atleast_1d(unpack(file.view(i))[0].label)
                    if np.isfinite(labels).all():
                        largest = max(largest, int(labels.max(initial=0)))
        return largest if largest >= vocab else 0

    def name(self, i: int) -> str:
        """How messages name record `i`: 'path/train-00003.rec key 17'."""
        file, row = self._locate(i)
        return f"{file.path} key {file.key(row)}"

    def sample(self, i: int) -> tuple[bytes, np.ndarray]:
        """(encoded image, token ids int64 (texts, context)) of record `i`. RecordError if it holds anything else."""
        file, row = self._locate(i)
        record, layout = file.view(row), self.layout
        flag = HEADER.unpack_from(record)[0] if len(record) >= HEADER.size else 0
        start = HEADER.size + 4 * layout.width
        if flag != layout.width or len(record) < start:
            raise RecordError(f"{self.name(i)}: {flag} labels in {len(record)} bytes, should be {layout.width}")
        if layout.checksum and checksum(record[HEADER.size :]) != HEADER.unpack_from(record)[3]:
            raise RecordError(f"{self.name(i)}: checksum does not fit, the record was altered; build the file again")
        labels = np.frombuffer(record, "<f4", flag, HEADER.size)
        vocab = layout.vocab_size or EXACT
        if not (labels.min() >= 0 and labels.max() < vocab):  # also false for NaN
            worst = float(labels[~((labels >= 0) & (labels < vocab))][0])
            raise RecordError(f"{self.name(i)}: token ids must be from 0 to {vocab - 1}, found {worst}")
        tokens = labels.astype(np.int64)
        if (tokens != labels).any():
            raise RecordError(f"{self.name(i)}: token ids must be whole numbers")
        return bytes(record[start:]), tokens.reshape(len(layout.text_names), layout.context)

    def _locate(self, i: int) -> tuple[RecordFile, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"record {i} of {self._ends[-1]}")
        number = bisect_right(self._ends, i)
        return self.files[number], i - (self._ends[number - 1] if number else 0)


# ---- records of any kind ---------------------------------------------------------------------------------------------


def open_records(spec: str | Path | list[str], tokenizer: Tokenizer, reading: Reading | None = None) -> Records:
    """The records that `spec` names: .rec files (`find_record_files`), folders of Chinese-CLIP's LMDB, or tables, tars,
    Parquet files and folders of `datasets` (`direct/`), whose texts `tokenizer` turns into ids as they are read.

    reading: what the user says about them. ValueError, RecordError, SourceError, OSError; ImportError where a package
    is not installed.
    """
    kind = reading.kind if reading else "auto"
    if kind == "lmdb" or (kind == "auto" and names_lmdb(spec)):
        from .lmdb import LmdbSet

        return LmdbSet(spec, tokenizer)
    if kind != "rec":
        from .direct.kinds import names_direct, open_direct
        from .direct.reading import Reading

        direct = [str(name) for name in spec] if isinstance(spec, list) else str(spec)
        if kind != "auto" or names_direct(direct):
            return open_direct(direct, tokenizer, reading or Reading())
    return RecordSet(spec)


LMDB_PLACES = ("data.mdb", "*/data.mdb", "*/pairs/data.mdb", "*/*/pairs/data.mdb")  # from what a user may name


def names_lmdb(spec: str | Path | list[str]) -> bool:
    """Whether one of the names is a folder that Chinese-CLIP's LMDB is in, at most three levels below."""
    names = split_names(spec, os.path.exists)
    places = [Path(found) for name in names for found in (glob.glob(name) if glob.has_magic(name) else [name])]
    return any(next(place.glob(pattern), None) for place in places if place.is_dir() for pattern in LMDB_PLACES)
