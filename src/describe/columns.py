"""Captions, tags and texts that exist already, in files of their own: looked up by id, picture or place.

A file is read once and kept as bytes, some hundred per row, so that a million captions take little room. Ids that the
file lacks, and entries that no row asked for, are counted.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rwkv_clip.data.encode import RowError
from rwkv_clip.data.fields import GUESS, IMAGE_FIELDS, TOKEN_FIELDS, find_field, find_tokens, list_fields
from rwkv_clip.data.rows import Row
from rwkv_clip.data.sources import Source
from rwkv_clip.data.token_arrays import open_ids

from .ingest import IDS, OCR, SCORES, TAGS, parse_scores, parse_tags
from .token_texts import Decoder, find_text

Kind = Literal["raw", "caption", "tags", "ocr"]
FIELDS: dict[str, tuple[str, ...]] = {
    "raw": ("raw", "raw_caption", "text", "title"),
    "caption": ("caption", "synthetic", "ofa", "generated_text", "prediction", "text"),
    "tags": TAGS,
    "ocr": OCR,
}
FILE = "file"  # where a value comes from, as rows say it
MOST = 1 << 20  # characters of a text


@dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """Where a column of its own file has its keys and values."""

    key: str | None = None
    """Field that says which row an entry belongs to: id, image (compared with the row's picture), row (its place).
    Default: the first usual one that the file has."""
    field: str | None = None
    """Field of the value; default: the first usual name that the file has."""

    def problems(self) -> list[str]:
        """None: the file decides."""
        return []


class Column:
    """Values of one kind by key. by: what of a row is the key, `id`, `image` or `row`."""

    def __init__(self, name: str, kind: str, by: str):
        self.name, self.kind, self.by = name, kind, by
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        raise NotImplementedError

    def find(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The columns that the file has for a row of a job, for example {caption, caption_source}; None for none."""
        key = _key(row.get(self.by), self.by)
        self.counts["asked"] += 1
        value = self._get(key) if key is not None else None
        if value is None:
            self.counts["rows that are not in the file"] += 1
            return None
        self.counts["found"] += 1
        if self.kind == "tags":
            return {"tags": value[0], "tag_scores": value[1], "tag_source": FILE}
        return {self.kind: value, **({"caption_source": FILE} if self.kind == "caption" else {})}

    def _get(self, key: str) -> Any:
        raise NotImplementedError

    def count_unused(self) -> int:
        """Entries that no row asked for so far."""
        raise NotImplementedError

    def tell(self) -> str:
        """How many rows the file had something for, "" where no row asked."""
        return str(self) if self.counts["asked"] else ""

    def __str__(self) -> str:
        what = self.kind if self.kind in ("tags", "ocr") else f"{self.kind} texts"
        counts = {**self.counts, "entries that no row asked for": self.count_unused()}
        known = f"{self.name}: {len(self):,} {what} by {self.by}; {counts.pop('found', 0):,} rows found"
        counts.pop("asked", None)
        return "".join([known, *(f"; {count:,} {reason}" for reason, count in counts.items() if count)])


class TableColumn(Column):
    """Of a table: JSON of key and value in one block of bytes, found by sorted hashes of the keys."""

    def __init__(self, name: str, kind: str, by: str, entries: Iterator[tuple[str | None, Any]]):
        super().__init__(name, kind, by)
        hashes, starts, self._bytes = array("Q"), array("Q"), bytearray()
        for key, value in entries:
            if key is None or value is None:
                self.counts["entries without a key" if key is None else f"entries without {kind}"] += 1
                continue
            hashes.append(_hash(key))
            starts.append(len(self._bytes))
            self._bytes += json.dumps([key, value]).encode()
        starts.append(len(self._bytes))
        found, self._starts = np.frombuffer(hashes, np.uint64), np.frombuffer(starts, np.uint64)
        self._order = np.argsort(found, kind="stable")
        self._hashes = found[self._order]
        self._used = np.zeros(len(found), bool)
        self._drop_repeated()

    def _drop_repeated(self) -> None:
        """Of entries with one key the first is kept."""
        same, kept = np.flatnonzero(self._hashes[1:] == self._hashes[:-1]) + 1, np.ones(len(self._hashes), bool)
        for place in same.tolist():
            first = int(np.searchsorted(self._hashes, self._hashes[place]))
            keys = [self._load(i)[0] for i in range(first, place)]
            kept[place] = self._load(place)[0] not in keys
        if not kept.all():
            self.counts["entries with the key of an earlier one"] = int((~kept).sum())
            self._hashes, self._order, self._used = self._hashes[kept], self._order[kept], self._used[kept]

    def _load(self, place: int) -> list[Any]:
        at = int(self._order[place])
        return json.loads(self._bytes[int(self._starts[at]) : int(self._starts[at + 1])])

    def __len__(self) -> int:
        return len(self._hashes)

    def _get(self, key: str) -> Any:
        wanted = _hash(key)
        place = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        while place < len(self._hashes) and int(self._hashes[place]) == wanted:
            known, value = self._load(place)
            if known == key:
                self._used[place] = True
                return value
            place += 1
        return None

    def count_unused(self) -> int:
        return int((~self._used).sum())


class TokenColumn(Column):
    """Of an .npy of token ids, (N, texts * 77) or (N, texts, 77), by the row's place; decoded when asked for."""

    def __init__(self, file: Path, kind: str):
        super().__init__(file.name, kind, "row")
        self._ids, self._decode = open_ids(file), Decoder()
        self._used = np.zeros(len(self._ids), bool)

    def __len__(self) -> int:
        return len(self._ids)

    def _get(self, key: str) -> str | None:
        place = int(key)
        if not 0 <= place < len(self._ids):
            return None
        try:
            text = find_text(self._decode(np.array(self._ids[place])), self.kind)
        except RowError as error:
            self.counts[str(error)] += 1
            return None
        self._used[place] |= text is not None
        return text

    def count_unused(self) -> int:
        return int((~self._used).sum())


def read_column(file: str | Path, kind: Kind, settings: ColumnSettings = ColumnSettings()) -> Column:
    """The column `kind` of a file: JSONL, JSON, CSV/TSV or Parquet with keys and values, or published token ids.

    Tags: a list, or a text in which |, commas or semicolons separate them, with tag_scores beside them or not. Token
    ids, an .npy or a field `texts` or `tokens`, give raw texts and captions. ValueError where keys or values are not
    found, SourceError where the file cannot be read.
    """
    if kind not in FIELDS:
        raise ValueError(f"column: {kind!r} is not one of {', '.join(FIELDS)}")
    path = Path(file)
    if path.suffix == ".npy":
        if kind not in ("raw", "caption") or settings.key not in (None, "row"):
            raise ValueError(
                f"{path}: token ids are raw texts or captions by row; not {kind} by {settings.key or 'row'}"
            )
        return TokenColumn(path, kind)
    sample = list(islice(Source(path).rows(), GUESS))
    field, tokens = _choose_field(path, kind, sample, settings.field)
    key = settings.key or _choose_key(path, sample, tokens)
    by = "row" if key == "row" else "image" if key in IMAGE_FIELDS else "id"
    return TableColumn(path.name, kind, by, _read_entries(path, kind, field, key, Decoder() if tokens else None))


def _choose_field(path: Path, kind: str, sample: list[Row], named: str | None) -> tuple[str, bool]:
    """(field of the values, whether they are token ids)."""
    for name in (named,) if named else FIELDS[kind]:
        if any(find_field(row.fields, name) is not None for row in sample):
            return name, any(find_tokens(row.fields, name) is not None for row in sample) and kind in ("raw", "caption")
    for name in () if named or kind not in ("raw", "caption") else TOKEN_FIELDS:
        if any(find_tokens(row.fields, name) is not None for row in sample):
            return name, True
    wanted = named or " or ".join(FIELDS[kind])
    raise ValueError(f"{path}: no field {wanted} for {kind}; it has {list_fields(sample)}; say which")


def _choose_key(path: Path, sample: list[Row], tokens: bool) -> str:
    for name in (*IDS, *IMAGE_FIELDS):
        if any(isinstance(find_field(row.fields, name), (str, int)) for row in sample):
            return name
    if tokens:
        return "row"
    raise ValueError(
        f"{path}: no field says which row an entry belongs to ({', '.join(IDS)} or a picture's name); it has "
        f"{list_fields(sample)}; give its key, or `row` where the entries are those of the input in the same order"
    )


def _read_entries(
    path: Path, kind: str, field: str, key: str, decode: Decoder | None
) -> Iterator[tuple[str | None, Any]]:
    by = "row" if key == "row" else "image" if key in IMAGE_FIELDS else "id"
    for number, row in enumerate(Source(path).rows()):
        found = number if by == "row" else find_field(row.fields, key)
        yield _key(found, by), _read_value(row, kind, field, decode)


def _read_value(row: Row, kind: str, field: str, decode: Decoder | None) -> Any:
    if decode is not None:
        try:
            return find_text(decode(find_tokens(row.fields, field)), kind)
        except RowError:
            return None
    value = find_field(row.fields, field)
    if kind == "tags":
        tags = parse_tags(value)
        scores = next((x for name in SCORES if (x := find_field(row.fields, name)) is not None), None)
        return [tags, parse_scores(scores, tags)] if tags else None
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value.strip()[:MOST] or None if isinstance(value, str) else None


def _key(value: Any, by: str) -> str | None:
    """As keys are compared: numbers as texts, names of pictures as paths."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    return str(Path(value)) if by == "image" and isinstance(value, str) else str(value)


def _hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
