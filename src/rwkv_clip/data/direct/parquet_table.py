"""Rows of a Parquet file by their number.

Parquet is made to be read in order: its values lie in pages, which are packed together. The index, made once, is an
Arrow file of all columns but those of bytes, which keep their place instead: a picture is read from its page alone. In
a file that packs its pictures (snappy, zstd, ..) that page is unpacked for one picture; without compression the picture
itself is read.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..parquet import COLUMNS, Parquet, import_parquet
from ..recordio import RecordError
from ..rows import Row, SourceError, first_line
from .arrow_rows import BINARY, ArrowRows, identify, make_arrow_row
from .index_file import open_index
from .pages import IN_FILE, NOTHING, Pages, locate_values
from .storage import Stored

PLACE = "place of "  # before the name of a column of bytes
KEPT = 2  # unpacked pages that a process keeps
LARGE = 1 << 23  # bytes of a page that is large for one picture
log = logging.getLogger(__name__)


def index_parquet(stored: Stored) -> tuple[dict[str, Any], Any]:
    """What the index of a Parquet file holds: the digest, the pages that are packed, and an Arrow file."""
    arrow, file, digest, pages = import_parquet(), Path(stored.name), hashlib.sha256(), Pages()
    sink, writer = arrow.BufferOutputStream(), None
    with stored.stream() as stream:
        parquet = Parquet(file, stream, remote=stored.path is None)
        leaves = find_leaves(parquet)
        for number, group in enumerate(parquet.groups):
            places = {
                name: locate_values(
                    f"{file}: row group {number}, column {name!r}",
                    stream,
                    group[COLUMNS][column],
                    most,
                    pages,
                    lambda data, size, codec: _unpack(arrow, file, data, size, codec),
                )
                for name, (column, most) in leaves.items()
            }
            row = 0
            for batch in parquet.read(number):
                digest.update(identify(arrow, batch))
                for name, found in places.items():
                    _compare(arrow, file, batch, name, found[row : row + len(batch)])
                part = _replace(arrow, batch, places, row)
                writer = writer or arrow.ipc.new_file(sink, part.schema)
                writer.write_batch(part)
                row += len(batch)
    if writer is None:
        raise SourceError(f"{file}: no rows")
    writer.close()
    return {"digest": digest.hexdigest(), "pages": pages.found}, memoryview(sink.getvalue())


def find_leaves(parquet: Parquet) -> dict[str, tuple[int, int]]:
    """{"image" or "image.bytes": (number of the column in the file, its definition level)} of all columns of bytes
    that are not in lists."""
    schema, found = parquet.table.schema, {}
    arrow = parquet.table.schema_arrow
    for number in range(len(schema)):
        column = schema.column(number)
        top, _, inner = column.path.partition(".")
        if top not in arrow.names or column.max_repetition_level:
            continue
        kind = arrow.field(top).type
        if inner:
            at = kind.get_field_index(inner) if kind.num_fields and str(kind).startswith("struct") else -1
            kind = kind.field(at).type if at >= 0 else None
        if str(kind) in BINARY:
            found[column.path] = number, column.max_definition_level
    return found


def _unpack(arrow: Any, file: Path, data: bytes, size: int, codec: str) -> bytes:
    try:
        return arrow.decompress(data, size, codec, asbytes=True)
    except (OSError, ValueError, NotImplementedError, arrow.ArrowException) as error:
        raise SourceError(f"{file}: a page cannot be unpacked by {codec} ({first_line(error)})") from None


def _values(batch: Any, name: str) -> Any:
    top, _, inner = name.partition(".")
    column = batch.column(top)
    return column.flatten()[column.type.get_field_index(inner)] if inner else column


def _compare(arrow: Any, file: Path, batch: Any, name: str, places: np.ndarray) -> None:
    """The places against pyarrow's values: two readers of a format must agree."""
    lengths = arrow.compute.fill_null(arrow.compute.binary_length(_values(batch, name)), NOTHING)
    if not np.array_equal(lengths.to_numpy(zero_copy_only=False), places[:, 2]):
        raise SourceError(f"{file}: column {name!r}: values are not where its pages say; write it anew")


def _replace(arrow: Any, batch: Any, places: dict[str, np.ndarray], row: int) -> Any:
    """The batch without its bytes, and with their places."""
    names, columns = [], []
    for name, column in zip(batch.schema.names, batch.columns):
        kind = column.type
        if str(kind) in BINARY:
            continue
        if arrow.types.is_struct(kind):
            kept = [i for i in range(kind.num_fields) if str(kind.field(i).type) not in BINARY]
            parts = column.flatten()
            if not kept:
                continue
            inner = [kind.field(i).name for i in kept]
            column = arrow.StructArray.from_arrays([parts[i] for i in kept], names=inner, mask=column.is_null())
        names.append(name)
        columns.append(column)
    for name, found in places.items():
        part = np.ascontiguousarray(found[row : row + len(batch)])
        names.append(PLACE + name)
        columns.append(arrow.FixedSizeListArray.from_arrays(arrow.array(part.reshape(-1)), 3))
    return arrow.RecordBatch.from_arrays(columns, names=names)


class ParquetTable:
    """Rows of one Parquet file by number."""

    def __init__(self, stored: Stored, folder: str | None = None):
        self._stored, self.name = stored, stored.name
        self._index = open_index(stored, folder, index_parquet)
        self._kept: dict[int, bytes] = {}
        self._rows = self._open()
        largest = max((page[2] for page in self._index.facts["pages"]), default=0)
        if largest > LARGE:
            log.warning(
                "%s: a page of %.0f MB is unpacked for one picture; write it without compression and dictionaries of "
                "pictures, or make records of it, to read it faster",
                self.name,
                largest / 1e6,
            )

    def _open(self) -> ArrowRows:
        arrow, index = import_parquet(), self._index
        try:
            reader = arrow.ipc.open_file(arrow.py_buffer(index.data))
            return ArrowRows([reader.get_batch(i) for i in range(reader.num_record_batches)])
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise SourceError(f"{index.path}: damaged ({first_line(error)}); remove it") from None

    def __getstate__(self) -> dict:
        return {"stored": self._stored, "index": self._index}

    def __setstate__(self, state: dict) -> None:
        self._stored, self._index, self._kept = state["stored"], state["index"], {}
        self.name = self._stored.name
        self._rows = self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Row:
        """Row `i`, with all of its bytes. RecordError, SourceError."""
        fields = self._rows.fields(i)
        for name in [name for name in fields if name.startswith(PLACE)]:
            value = self._read(*fields.pop(name))
            top, _, inner = name.removeprefix(PLACE).partition(".")
            if not inner:
                fields[top] = value
            elif fields.get(top, {}) is not None:  # the whole is there
                fields[top] = {**fields.get(top, {}), inner: value}
        return make_arrow_row(Path(self.name), f"row {i}", fields)

    def _read(self, page: int, at: int, size: int) -> bytes | None:
        if size == NOTHING:
            return None
        if page == IN_FILE:
            return self._stored.read(at, at + size)
        if (body := self._kept.get(page)) is None:
            start, stored, unpacked, bare, codec = self._index.facts["pages"][page]
            data = self._stored.read(start, start + stored)
            body = data[:bare] + _unpack(import_parquet(), Path(self.name), data[bare:], unpacked - bare, codec)
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[page] = body
        value = body[at : at + size]
        if len(value) != size:
            raise RecordError(f"{self.name}: a picture is not in its page; the file was changed")
        return value

    def size_of_state(self) -> int:
        """Bytes of the list of pages; the rest is mapped."""
        return 8 * 5 * len(self._index.facts["pages"])

    def add_to(self, total: Any) -> None:
        """Update a hash with all values, of bytes their lengths."""
        total.update(f"parquet\0{self._index.facts['digest']}\0".encode())
