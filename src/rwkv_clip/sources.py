"""Where records are made from: files with images and captions -> one Row after the other, in the same order.

Kinds, told by the ending: .jsonl .json .csv .tsv (a manifest beside an image folder), .tar .tar.gz .tgz
(webdataset shards), .parquet, .npy (token ids beside an ordered list of images). Nothing is decoded here.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from .errors import DATA
from .image import MAX_BYTES

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MAX_TEXT_BYTES = 1 << 20
WHOLE = 1 << 26  # bytes of a file that is hashed as a whole
KINDS = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "tar",
    ".tgz": "tar",
    ".tar.gz": "tar",
    ".parquet": "parquet",
    ".npy": "npy",
}


class SourceError(ValueError):
    """An input file is missing, damaged or not of a known kind; names file and place."""

    exit_code = DATA


class Problem(str):
    """In place of a value that could not be had: the reason, by which the row is counted as skipped."""


class Row(NamedTuple):
    """One image with its texts, as found: `fields` by name, paths in it are relative to `folder`."""

    name: str
    fields: dict[str, Any]
    folder: Path | None  # None: the names in `fields` are no paths
    image: bytes | Problem | None = None  # the picture that came with the row


class Source:
    """The rows of all input files that `spec` names: file, folder, glob, a{00..09}.tar range or comma list.

    `images` is needed for an .npy of token ids: the text file or manifest that lists the images in order.
    """

    def __init__(self, spec: str | Path, images: str | Path | None = None, columns: set[str] | None = None):
        self.files = list_inputs(spec)
        self.kind = _kind(self.files[0])
        self.images = Path(images) if images else None
        self.columns = columns  # parquet columns to read; None reads all
        if self.kind == "npy" and (len(self.files) > 1 or not self.images or not self.images.is_file()):
            raise ValueError(f"{self.files[0]}: token ids need --images FILE, one file that lists the images in order")

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Rows from number `start` on; what lies before is passed over without reading images."""
        reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "tar": _read_tar}.get(self.kind)
        if reader:
            skip = _Skip(start)
            for file in self.files:
                yield from reader(file, skip)
        elif self.kind == "parquet":
            yield from _read_parquet(self.files, start, self.columns)
        else:
            yield from islice(_read_npy(self.files[0], self.images), start, None)

    def fingerprint(self) -> list[list]:
        """Tells one input from another, for every input file: [name, bytes, SHA-256], of larger files than WHOLE
        [name, bytes, time of change, SHA-256 of both ends].
        """
        files = self.files + ([self.images] if self.kind == "npy" else [])
        return [_fingerprint(file) for file in files]

    def count(self) -> int | None:
        """Number of rows where it is known without reading everything, else None."""
        if self.kind == "npy":
            return len(np.load(self.files[0], mmap_mode="r", allow_pickle=False))
        if self.kind == "parquet":
            parquet = import_parquet()
            return sum(_open_parquet(parquet, file).metadata.num_rows for file in self.files)
        if self.kind == "jsonl":
            return sum(_count_lines(file) for file in self.files)
        return None


class _Skip:
    """Counts down the rows to pass over, across files."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left >= 0


def list_inputs(spec: str | Path) -> list[Path]:
    """Sorted input files of one kind. ValueError if there is none, or more than one kind."""
    parts = [str(spec)] if Path(spec).exists() else [part.strip() for part in _expand_braces(str(spec))]
    found: list[Path] = []
    for part in filter(None, parts):
        path = Path(part)
        if path.is_dir():
            names = sorted(name for name in path.rglob("*") if name.is_file() and _kind(name, None))
        elif glob.has_magic(part) and not path.exists():
            names = sorted(Path(name) for name in glob.glob(part))
        else:
            names = [path]
        if not names or not all(name.is_file() for name in names):
            raise ValueError(f"source: {part!r} names no file; give a manifest, tar, parquet, npy or a folder of them")
        found += names
    kinds = {_kind(name) for name in found}
    if len(kinds) != 1:
        raise ValueError(f"source: {str(spec)!r} holds {sorted(kinds) or 'nothing'}; give files of one kind")
    return found


def _expand_braces(spec: str) -> list[str]:
    """Comma list outside braces, and shard-{000..011}.tar ranges as webdataset writes them."""
    parts = re.split(r",(?![^{]*\})", spec)
    done: list[str] = []
    for part in parts:
        match = re.search(r"\{(\d+)\.\.(\d+)\}", part)
        if not match:
            done.append(part)
            continue
        first, last = match.groups()
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        done += [x for n in numbers for x in _expand_braces(part[: match.start()] + n + part[match.end() :])]
    return done


def _kind(path: Path, otherwise: str | None = "error") -> str | None:
    name = path.name.lower()
    for ending, kind in KINDS.items():
        if name.endswith(ending):
            return kind
    if otherwise is None:
        return None
    raise ValueError(f"{path}: not a known kind of input; known endings: {' '.join(KINDS)}")


def _fingerprint(file: Path) -> list:
    about, span = file.stat(), 1 << 16
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        if about.st_size <= WHOLE:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
            return [file.name, about.st_size, digest.hexdigest()]
        digest.update(stream.read(span))
        stream.seek(about.st_size - span)
        digest.update(stream.read(span))
    return [file.name, about.st_size, about.st_mtime_ns, digest.hexdigest()]


def _count_lines(file: Path) -> int:
    with open(file, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _row(file: Path, place: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise SourceError(f"{file}: {place} is a {type(fields).__name__}, not an object with named fields")
    return Row(f"{file.name} {place}", fields, file.parent)


def _read_jsonl(file: Path, skip: _Skip) -> Iterator[Row]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip() or skip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{file}: line {number} is not JSON in UTF-8 ({error})") from None
            yield _row(file, f"line {number}", fields)


def _read_json(file: Path, skip: _Skip) -> Iterator[Row]:
    try:
        entries = json.loads(file.read_bytes())
    except ValueError as error:
        raise SourceError(f"{file}: not JSON in UTF-8 ({error})") from None
    if not isinstance(entries, list):
        raise SourceError(f"{file}: should be a list of objects; for one object per line call it .jsonl")
    for number, fields in enumerate(entries):
        if not skip():
            yield _row(file, f"entry {number}", fields)


def _read_csv(file: Path, skip: _Skip) -> Iterator[Row]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for fields in table:
                if skip():
                    continue
                if None in fields or None in fields.values():
                    raise SourceError(f"{file}: line {table.line_num} does not have {len(table.fieldnames)} columns")
                yield _row(file, f"line {table.line_num}", fields)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{file}: line {table.line_num} or the next is not valid ({error})") from None


def _read_tar(file: Path, skip: _Skip) -> Iterator[Row]:
    """webdataset: neighbouring members that share the name up to the first dot are one row."""
    try:
        with tarfile.open(file) as tar:
            key, fields, passing = None, {}, False
            for member in tar:
                tar.members.clear()  # tarfile would remember all of them
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                if not member.isfile() or not stem or not ending:
                    continue
                if (here := str(path.parent / stem)) != key:
                    if fields and not passing:
                        yield _row(file, key, fields)
                    key, fields, passing = here, {}, skip()
                if not passing:
                    fields.update(_read_member(tar, member, ending))
            if fields and not passing:
                yield _row(file, key, fields)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile itself takes any rubbish for the end
                raise SourceError(f"{file}: no valid header and no end mark after {key}; damaged or cut short")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{file}: not a complete tar file ({error})") from None


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> dict[str, Any]:
    """x.jpg -> {"jpg": bytes}; x.txt -> {"txt": str}; x.raw.txt -> {"raw": str}; x.json -> its fields."""
    ending = ending.lower()
    image = ending.rsplit(".")[-1] in IMAGE_ENDINGS
    if member.size > (MAX_BYTES if image else MAX_TEXT_BYTES):
        return {ending: Problem("image too large" if image else "text too long")}
    content = tar.extractfile(member).read()
    if image:
        return {ending: content}
    name = ending.removesuffix(".txt")
    if ending != "json" and not ending.endswith("txt") and name not in ("caption", "text"):
        return {}
    try:
        if ending != "json":
            return {name: content.decode("utf-8")}
        fields = json.loads(content)
        return fields if isinstance(fields, dict) else {"json": fields}
    except ValueError:
        return {name: Problem("text is not UTF-8 or JSON")}


def import_parquet():
    """pyarrow.parquet, an optional package. ImportError that names the extra."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("parquet input needs pyarrow: pip install -e '.[parquet]'") from None
    return pyarrow.parquet


def _open_parquet(parquet, file: Path):
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise SourceError(f"{file}: not a parquet file ({error})") from None


def _read_parquet(files: list[Path], start: int, columns: set[str] | None) -> Iterator[Row]:
    parquet = import_parquet()
    for file in files:
        table = _open_parquet(parquet, file)
        names = None if columns is None else [name for name in table.schema_arrow.names if name in columns]
        number = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if start >= size:  # row groups that are done already are not even read
                start, number = start - size, number + size
                continue
            try:
                for batch in table.iter_batches(64, row_groups=[group], columns=names):
                    for fields in batch.to_pylist():
                        if start:
                            start -= 1
                        else:
                            yield _row(file, f"row {number}", fields)
                        number += 1
            except (OSError, ValueError) as error:
                raise SourceError(f"{file}: row group {group} is damaged ({error})") from None


def _read_npy(file: Path, images: Path) -> Iterator[Row]:
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SourceError(f"{file}: not an .npy array ({error})") from None
    if ids.ndim not in (2, 3) or ids.dtype.kind not in "iuf":
        raise SourceError(f"{file}: {ids.dtype} {ids.shape}; should be numbers (N, views * context) or 3-D")
    if _kind(images, None) in ("jsonl", "json", "csv"):
        listed = list(Source(images).rows())
    else:
        names = [line.strip() for line in images.read_text(encoding="utf-8").splitlines()]
        listed = [Row(name, {"image": name}, images.parent) for name in names if name]
    if len(listed) != len(ids):
        raise SourceError(f"{file} has {len(ids)} rows, but {images} lists {len(listed)} images; they must agree")
    for row, tokens in zip(listed, ids):
        yield row._replace(fields={**row.fields, "tokens": np.asarray(tokens).reshape(-1)})
