"""Rows of a collection: what is known of each picture, and the fields that a search may be narrowed by.

A row is JSON: {"id": "a.jpg", "text": "..", "fields": {"year": 2020}, "place": {..}}, and in an index also "stamp" and
"hash", by which a later run knows its picture.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_clip.files import DamagedError, parse_json, read_bytes, write_json, write_whole

from .pictures import Pictures
from .vectors import AGAIN, encode_array

MOST_VALUES = 50  # different ones of a field that a search can be narrowed by
MOST_FIELDS = 32
MOST_LETTERS = 1000  # of a value that is kept
MOST_TEXT = 10_000  # letters of a row's text
MAX_JSON = 1 << 24
Scalar = str | int | float | bool


def make_row(name: str, text: str, fields: Mapping[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """A row of what a source holds: texts and numbers, of bounded length and number."""
    kept: dict[str, Scalar] = {}
    for field, value in fields.items():
        if len(kept) < MOST_FIELDS and isinstance(field, str) and is_scalar(value):
            kept[field] = value[:MOST_LETTERS] if isinstance(value, str) else value
    return {"id": name, "text": text[:MOST_TEXT], "fields": kept, "place": place}


def is_scalar(value: Any) -> bool:
    """Whether JSON and all readers of JSON can hold it as one value."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 53
    return isinstance(value, (str, bool)) or (isinstance(value, float) and math.isfinite(value))


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A line of JSON; what UTF-8 cannot encode (a name) becomes an escape, which JSON reads back."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


# ---- fields to narrow a search by ------------------------------------------------------------------------------------


class Fields:
    """Fields with few values. values: {field: its values, in order}; codes: int8 (n, fields), the number of a row's
    value of each, -1 for none."""

    def __init__(self, values: dict[str, list[Scalar]], codes: np.ndarray):
        self.values, self.codes = values, codes

    @classmethod
    def survey(cls, rows: Iterable[Mapping[str, Any]], count: int) -> Fields:
        """Of all rows' `fields`, `count` in all."""
        columns: dict[str, np.ndarray | None] = {}  # None: too many values
        numbers: dict[str, dict[tuple[type, Scalar], int]] = {}
        for place, row in enumerate(rows):
            for field, value in row["fields"].items():
                if field not in columns:
                    columns[field] = np.full(count, -1, np.int8) if len(columns) < 4 * MOST_FIELDS else None
                    numbers[field] = {}
                column, known = columns[field], numbers[field]
                if column is None:
                    continue
                number = known.setdefault((type(value), value), len(known))
                if number == MOST_VALUES:
                    columns[field] = None
                else:
                    column[place] = number
        found, values = [], {}
        for field, column in columns.items():
            if column is None or len(numbers[field]) < 2:
                continue
            order = sorted(numbers[field], key=lambda pair: (pair[0].__name__ == "str", pair[0].__name__, pair[1]))
            new = np.array([*map(order.index, numbers[field]), -1], np.int8)  # of each old number; that of none last
            found.append(new[column])
            values[field] = [value for _, value in order]
        return cls(values, np.stack(found, 1) if found else np.zeros((count, 0), np.int8))

    def write(self, folder: Path) -> None:
        """filters.npy and filters.json."""
        write_whole(folder / "filters.npy", encode_array(self.codes))
        write_json(folder / "filters.json", self.values)

    @classmethod
    def read(cls, folder: Path, count: int) -> Fields:
        """Those that `write` wrote. DamagedError."""
        values = parse_json(read_bytes(folder / "filters.json", MAX_JSON), str(folder / "filters.json"))
        try:
            codes = np.load(folder / "filters.npy", allow_pickle=False)
        except ValueError as error:
            raise DamagedError(f"{folder / 'filters.npy'}: cannot be read ({error}); {AGAIN}") from None
        if not isinstance(values, dict) or codes.dtype != np.int8 or codes.shape != (count, len(values)):
            raise DamagedError(f"{folder}: filters.json and filters.npy do not fit the rows; {AGAIN}")
        return cls(values, codes)

    def select(self, wanted: Mapping[str, Sequence]) -> np.ndarray:
        """bool (n,): rows with one of the wanted values in each field. ValueError for a field that is not here."""
        chosen = np.ones(len(self.codes), bool)
        names = list(self.values)
        for field, values in wanted.items():
            if field not in self.values:
                raise ValueError(f"filter: {field!r} is not one of {', '.join(map(repr, names)) or 'none'}")
            texts = {str(value) for value in values}  # an address holds texts only
            numbers = [i for i, value in enumerate(self.values[field]) if str(value) in texts]
            chosen &= np.isin(self.codes[:, names.index(field)], numbers)
        return chosen


# ---- rows ------------------------------------------------------------------------------------------------------------


class ListedRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence[dict[str, Any]], pictures: Pictures):
        self._rows: Sequence[dict[str, Any]] | Lines = rows
        self._pictures = pictures
        self._fields = Fields.survey(rows, len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self, row: int) -> dict[str, Any]:
        """id, text and fields."""
        return {key: self._rows[row][key] for key in ("id", "text", "fields")}

    def picture(self, row: int) -> bytes:
        """The picture as it is stored. NoPicture."""
        return self._pictures.read(self._rows[row]["place"])

    def filters(self) -> dict[str, list]:
        """{field: its values}, of fields with few."""
        return self._fields.values

    def select(self, wanted: Mapping[str, Sequence]) -> np.ndarray:
        """bool (n,)."""
        return self._fields.select(wanted)


class IndexedRows(ListedRows):
    """Rows of an index, read from its file as they are asked for."""

    def __init__(self, folder: Path, pictures: Pictures, count: int):
        lines = Lines(folder / "rows.jsonl")
        if len(lines) != count:
            raise DamagedError(f"{folder / 'rows.jsonl'}: {len(lines)} rows, not {count}; {AGAIN}")
        self._rows, self._pictures, self._fields = lines, pictures, Fields.read(folder, count)


class Lines:
    """The rows of a file of JSON lines, memory-mapped."""

    def __init__(self, path: Path):
        self._path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        found = np.flatnonzero(np.frombuffer(self._map, np.uint8) == 10) + 1
        if size and (not len(found) or found[-1] != size):
            raise DamagedError(f"{path}: cut short; {AGAIN}")
        self._ends = np.concatenate([[0], found])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = parse_json(bytes(self._map[self._ends[row] : self._ends[row + 1]]), f"{self._path}: line {row + 1}")
        if not isinstance(found, dict) or not {"id", "text", "fields", "place"} <= found.keys():
            raise DamagedError(f"{self._path}: line {row + 1} is no row of an index; {AGAIN}")
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))
