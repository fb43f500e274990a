"""What is searched: rows with an id, a picture, a text and fields, their vectors, and the model that encodes queries.

A collection is opened from what `search index` wrote, from a folder of features that `eval.main features` wrote, or
from clip-retrieval's files. Nothing of its files is trusted, and pictures are given by row number only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .encoding import Model
from .vectors import Vectors


class Rows(Protocol):
    """The rows of a collection, by number."""

    def __len__(self) -> int: ...

    def describe(self, row: int) -> dict[str, Any]:
        """id, text and fields."""

    def picture(self, row: int) -> bytes:
        """The encoded picture as it is stored. LookupError where there is none."""

    def filters(self) -> dict[str, list]:
        """{field: its values}, of fields with few."""

    def select(self, wanted: Mapping[str, Sequence]) -> np.ndarray:
        """bool (n,): rows whose fields have one of these values each."""


class Collection:
    """What is searched. name: what to call it. model: None where nothing says what encodes queries."""

    def __init__(self, name: str, rows: Rows, vectors: Vectors, model: Model | None):
        assert len(rows) == len(vectors), f"{len(rows)} rows, {len(vectors)} vectors"
        self.name, self.vectors, self.model, self._rows = name, vectors, model, rows

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        images: str | Path | None = None,
        checkpoint: str | None = None,
        model: str | None = None,
        device: str | None = None,
    ) -> Collection:
        """The collection in a folder: an index, features, or clip-retrieval's files (img_emb/, metadata/).

        images: folder of the pictures, where it is not the one that the files name. checkpoint, model, device: what
        encodes queries; default: what made the vectors. ValueError for a folder that is none of these, DamagedError
        for one that does not hold together.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, row: int, max_side: int = 0) -> bytes:
        """The picture of a row, upright, as JPEG or PNG that any browser shows, at most `max_side` pixels on a side
        (0: as it is). IndexError beyond the rows, LookupError where a row has no picture, ImageError for one that
        cannot be read or is too large."""
        raise NotImplementedError

    def describe(self, row: int) -> dict[str, Any]:
        """{"id": str, "text": str, "fields": {name: str, number or bool}} of a row. IndexError beyond the rows."""
        return self._rows.describe(self._check(row))

    def filters(self) -> dict[str, list]:
        """{field: its values, in order} of fields that have few different ones."""
        return self._rows.filters()

    def select(self, wanted: Mapping[str, Sequence]) -> np.ndarray:
        """bool (n,), for `vectors.search`: rows whose fields have one of the given values each. ValueError for a field
        that is not among `filters`; a value that no row has selects none."""
        return self._rows.select(wanted)

    def _check(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row
