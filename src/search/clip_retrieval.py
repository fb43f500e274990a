"""clip-retrieval's files, both ways: img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet.

https://github.com/rom1504/clip-retrieval: `clip-retrieval inference` writes, `clip-retrieval index` and autofaiss
build indices of them for as many pictures as there are. Rows of all metadata files, in the order of their numbers, are
those of the matrices. The one place of the package that knows pyarrow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_clip.files import DamagedError, naming, write_whole

from .pictures import Pictures
from .rows import Fields, is_scalar, make_row
from .vectors import Vectors, encode_array, map_matrix

ROWS = 1_000_000  # of a file
BATCH = 8192  # rows that are looked through at a time
PATHS = ("image_path", "path", "file_name", "filename")
TEXTS = ("caption", "text")
IDS = ("key", "id", "image_path", "uid")


def import_parquet() -> Any:
    """pyarrow with its parquet. ImportError that names the extra."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("clip-retrieval's metadata need pyarrow: pip install -e '.[parquet]'") from None
    return pyarrow


def is_clip_retrieval(folder: Path) -> bool:
    """Whether the folder holds embeddings of images in clip-retrieval's layout."""
    return any((folder / "img_emb").glob("img_emb_*.npy"))


def read_clip_retrieval(folder: Path, images: Path | None) -> tuple[TableRows, Vectors]:
    """Rows and vectors. images: folder of the pictures; default: images/ in the folder, where `image_path` leads there.
    ValueError, DamagedError; ImportError without pyarrow."""
    matrices = [map_matrix(path) for path in _numbered(folder / "img_emb", "img_emb_*.npy")]
    vectors = Vectors.of(matrices, str(folder / "img_emb"))
    arrow = import_parquet()
    paths = _numbered(folder / "metadata", "metadata_*.parquet")
    if not paths:
        raise DamagedError(f"{folder}: holds img_emb, but no metadata/metadata_0.parquet, which says what the rows are")
    try:
        tables = [arrow.parquet.read_table(path) for path in paths]
        table = arrow.concat_tables(tables, promote_options="default")
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise DamagedError(f"{folder / 'metadata'}: cannot be read ({str(error).splitlines()[0]})") from None
    if len(table) != len(vectors):
        raise DamagedError(f"{folder}: {len(table)} rows of metadata, {len(vectors)} of img_emb; they do not fit")
    return TableRows(table, Pictures([images or folder / "images"])), vectors


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Files whose names end in a number, in its order."""
    found = [(int(match[1]), path) for path in folder.glob(pattern) if (match := re.search(r"_(\d+)\.\w+$", path.name))]
    return [path for _, path in sorted(found)]


class TableRows:
    """Rows of an Arrow table."""

    def __init__(self, table: Any, pictures: Pictures):
        self._table, self._pictures = table, pictures
        batches = (batch.to_pylist() for batch in table.to_batches(max_chunksize=BATCH))  # a row at a time is slow
        rows = ({"fields": _take_apart(values, 0)[2]} for batch in batches for values in batch)
        self._fields = Fields.survey(rows, len(table))

    def __len__(self) -> int:
        return len(self._table)

    def _take(self, row: int) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
        return _take_apart(self._table.slice(row, 1).to_pylist()[0], row)

    def describe(self, row: int) -> dict[str, Any]:
        """id, text and fields."""
        made = make_row(*self._take(row))
        return {key: made[key] for key in ("id", "text", "fields")}

    def picture(self, row: int) -> bytes:
        """The picture as it is stored. NoPicture."""
        return self._pictures.read(self._take(row)[3])

    def filters(self) -> dict[str, list]:
        """{field: its values}, of fields with few."""
        return self._fields.values

    def select(self, wanted: Mapping[str, Sequence]) -> np.ndarray:
        """bool (n,)."""
        return self._fields.select(wanted)


def _take_apart(values: Mapping[str, Any], row: int) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """(id, text, fields, place) of a row of metadata."""
    name = next((str(values[key]) for key in IDS if values.get(key) not in (None, "")), str(row))
    text = next((values[key] for key in TEXTS if isinstance(values.get(key), str)), "")
    path = next((values[key] for key in PATHS if isinstance(values.get(key), str)), None)
    fields = {key: value for key, value in values.items() if key not in (*PATHS, *TEXTS, "key") and is_scalar(value)}
    return name, text, fields, {} if path is None else {"file": path, "root": None}


def write_clip_retrieval(collection: Any, folder: Path) -> None:
    """Export a collection into a new folder: float16 embeddings, as clip-retrieval writes them, and metadata with
    `image_path` (the id), `caption`, and every field. ImportError without pyarrow, OSError."""
    arrow = import_parquet()
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, start in enumerate(range(0, len(collection), ROWS)):
        rows = range(start, min(start + ROWS, len(collection)))
        halves = collection.vectors.take(rows).astype(np.float16)
        write_whole(folder / "img_emb" / f"img_emb_{number}.npy", encode_array(halves))
        path = folder / "metadata" / f"metadata_{number}.parquet"
        with naming(path):
            arrow.parquet.write_table(_make_table(arrow, [collection.describe(row) for row in rows]), path)


def _make_table(arrow: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    """image_path, caption and the fields; a field of several types becomes text."""
    columns: dict[str, list] = {
        "image_path": [_clean(row["id"]) for row in rows],
        "caption": [_clean(row["text"]) for row in rows],
    }
    names = dict.fromkeys(name for row in rows for name in row["fields"])
    for name in names:
        values = [row["fields"].get(name) for row in rows]
        if len({type(value) for value in values if value is not None}) > 1:
            values = [None if value is None else str(value) for value in values]
        columns.setdefault(_clean(name), [_clean(v) if isinstance(v, str) else v for v in values])
    return arrow.table(columns)


def _clean(text: str) -> str:
    """Half surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
