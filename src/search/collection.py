"""What is searched: rows with an id, a picture, a text and fields, their vectors, and the model that encodes queries.

A collection is opened from what `search index` wrote, from a folder of features that `eval.main features` wrote, or
from clip-retrieval's files. Nothing of its files is trusted, and pictures are given by row number only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_clip.data.image import ImageError

from .clip_retrieval import is_clip_retrieval, read_clip_retrieval
from .encoding import Model
from .engines import Searcher, attach_engine
from .features import is_features, open_features
from .indexing import read_index
from .parts import PICTURES
from .pictures import Pictures, show_upright
from .rows import IndexedRows
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
        self.name, self.model, self._rows = name, model, rows
        self.vectors: Searcher = vectors
        self._exact = vectors

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
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; `search index` writes one")
        root = Path(images) if images is not None else None
        if root is not None and not root.is_dir():
            raise FileNotFoundError(f"images: {root}: no such folder")
        rows: Rows
        if about := read_index(folder):
            roots = [root] if root else [Path(name) for name in about.get("roots", [])]
            pictures = Pictures(roots, about.get("records"), folder / PICTURES, bool(about.get("outside")))
            data = folder / about["data"]
            rows, vectors = IndexedRows(data, pictures, about["rows"]), Vectors.open(data)
        elif is_clip_retrieval(folder):
            rows, vectors = read_clip_retrieval(folder, root)
        elif is_features(folder):
            about, rows, vectors = open_features(folder, root)
        else:
            raise ValueError(f"{folder}: holds no index of pictures, no features and no img_emb of clip-retrieval")
        return cls(folder.resolve().name, rows, vectors, _find_model(about, folder, checkpoint, model, device))

    def attach(self, engine: str, name: str) -> None:
        """Search by another engine from now on, see `engines.attach_engine`."""
        self.vectors = attach_engine(self._exact, engine, name)

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, row: int, max_side: int = 0) -> bytes:
        """The picture of a row, upright, as JPEG or PNG that any browser shows, at most `max_side` pixels on a side
        (0: as it is). IndexError beyond the rows, LookupError where a row has no picture, ImageError for one that
        cannot be read or is too large."""
        try:
            data = self._rows.picture(self._check(row))
        except OSError as error:
            raise ImageError(f"row {row}: cannot be read ({error.strerror})") from None
        return show_upright(data, max_side, f"row {row}")

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


def _find_model(
    about: dict[str, Any], folder: Path, checkpoint: str | None, model: str | None, device: str | None
) -> Model | None:
    """What encodes queries: the checkpoint that is given, or the one that made the vectors, by its sha256."""
    named = checkpoint or _find_again(about.get("checkpoint"), folder)
    if not named:
        return None
    return Model(
        named,
        model or _find_again(about.get("model_setting"), folder),
        device=device,
        precision=about.get("precision") or "fp32",
        digest=about.get("checkpoint_sha256"),
        prefix=about.get("prefix") or "",
    )


def _find_again(place: Any, folder: Path) -> str | None:
    """A file or folder that about.json names, also relative to a folder above; a name stays a name."""
    if not isinstance(place, str) or not place or Path(place).exists():
        return place or None
    above = (parent / place for parent in folder.resolve().parents)
    return next((str(path) for path in above if path.exists()), place)
