"""Rows of Arrow record batches by their number: of folders that `datasets` saved, and of the indices of Parquet files.

Batches are mapped, so a row is found without reading what is before it, and processes share them. Only pyarrow is
needed; no code of a data set is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...files import parse_json, read_bytes
from ..parquet import import_parquet
from ..rows import SHORT, Row, SourceError, first_line, make_row, take_pictures
from .storage import Stored

MAX_STATE = 1 << 24  # bytes of a state.json
BINARY = ("binary", "large_binary")


class ArrowRows:
    """Record batches of one form, one after the other."""

    def __init__(self, batches: list[Any]):
        self._batches = [batch for batch in batches if len(batch)]
        self._ends = list(accumulate(map(len, self._batches)))
        self.names = batches[0].schema.names if batches else []

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def fields(self, i: int) -> dict[str, Any]:
        """The values of row `i` by the names of their columns."""
        number = bisect_right(self._ends, i)
        batch, row = self._batches[number], i - (self._ends[number - 1] if number else 0)
        return {name: column[row].as_py() for name, column in zip(self.names, batch.columns)}


def make_arrow_row(file: Path, place: str, fields: dict[str, Any]) -> Row:
    """The row of these fields, with what is in base64 decoded."""
    row = make_row(file, place, fields)
    long = any(type(value) is str and len(value) > SHORT // 2 for value in fields.values())
    return take_pictures(row) if long else row


def identify(arrow: Any, batch: Any) -> bytes:
    """What tells the rows of a batch from others: all values, but of bytes their lengths only."""
    columns = [_without_bytes(arrow, column) for column in batch.columns]
    return arrow.RecordBatch.from_arrays(columns, names=batch.schema.names).serialize()


def _without_bytes(arrow: Any, column: Any) -> Any:
    kind = column.type
    if str(kind) in BINARY:
        return arrow.compute.binary_length(column)
    if arrow.types.is_struct(kind):
        parts = [_without_bytes(arrow, part) for part in column.flatten()]
        return arrow.StructArray.from_arrays(parts, names=[kind.field(i).name for i in range(kind.num_fields)])
    return column


# ---- folders of `datasets` -------------------------------------------------------------------------------------------


def list_saved(folder: str) -> list[str]:
    """The Arrow files of a folder that `datasets` saved, in their order. ValueError, SourceError."""
    path = Path(folder)
    if (path / "dataset_dict.json").is_file():
        parts = _load(path / "dataset_dict.json").get("splits")
        shown = (
            ", ".join(str(path / str(part)) for part in parts[:5]) if isinstance(parts, list) else "one of its folders"
        )
        raise SourceError(f"{folder}: holds several parts; give one of {shown}")
    if not (path / "state.json").is_file():
        raise ValueError(f"{folder}: is no folder that datasets saved (save_to_disk): it has no state.json")
    state = _load(path / "state.json")
    if state.get("_indices_files"):
        raise SourceError(f"{folder}: was saved with a selection of rows; load it and save it again to have them alone")
    files = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in files or []]
    if not names or not all(isinstance(name, str) and name and os.path.basename(name) == name for name in names):
        raise SourceError(f"{path / 'state.json'}: names no files of data in this folder")
    return [str(path / str(name)) for name in names]


def _load(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_bytes(path, MAX_STATE), str(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise SourceError(f"{path}: holds a {type(found).__name__}, not an object")
    return found


class ArrowTable:
    """Rows of one Arrow file, a stream of batches as `datasets` writes it, or one with a footer."""

    def __init__(self, stored: Stored):
        self._stored, self.name = stored, stored.name
        self._rows, self._identity = self._open(check=True)

    def _open(self, check: bool) -> tuple[ArrowRows, str]:
        arrow = import_parquet("a folder of datasets", "datasets")
        found = hashlib.sha256()
        try:
            mapped = arrow.memory_map(self.name)
            footer = self._stored.size > 16 and self._stored.read(0, 6) == b"ARROW1"
            reader = arrow.ipc.open_file(mapped) if footer else arrow.ipc.open_stream(mapped)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)] if footer else list(reader)
            if check:
                for batch in batches:
                    batch.validate(full=True)  # a place outside of the file would end the process
                    found.update(identify(arrow, batch))
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise SourceError(f"{self.name}: damaged or cut short ({first_line(error)})") from None
        return ArrowRows(batches), found.hexdigest()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._stored.read(0, 1)  # unless it has changed
        self._rows = self._open(check=False)[0]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Row:
        """Row `i`."""
        return make_arrow_row(Path(self.name), f"row {i}", self._rows.fields(i))

    def size_of_state(self) -> int:
        """The file is mapped: nothing."""
        return 0

    def add_to(self, total: Any) -> None:
        """Update a hash with all values, of bytes their lengths."""
        total.update(json.dumps(["arrow", self._identity]).encode())
