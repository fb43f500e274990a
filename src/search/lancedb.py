"""LanceDB: vectors and rows into a table of a folder (or of s3://, gs://), and searches in it.

https://lancedb.github.io/lancedb; columns are row, id, text, fields (JSON) and vector. Without an index of its own a
search reads all; `table.create_index(metric="dot")` is for tables beyond a million rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .collection import Collection


def import_lancedb() -> tuple[Any, Any]:
    """lancedb, and the pyarrow that comes with it. ImportError that names the extra."""
    try:
        import lancedb
        import pyarrow
    except ImportError:
        raise ImportError("lancedb is not installed: pip install -e '.[lancedb]'") from None
    return lancedb, pyarrow


def write_lancedb(collection: Collection, target: str, name: str) -> None:
    """Export a collection into a new table `name` of the database in `target`. ValueError where there is one."""
    package, arrow = import_lancedb()
    database, width = package.connect(target), collection.vectors.width
    if _has_table(database, name):
        raise ValueError(f"collection: {target} has a table {name!r} already; give another name")
    vector = arrow.list_(arrow.float32(), width)
    text = arrow.string()
    columns = [("row", arrow.int64()), ("id", text), ("text", text), ("fields", text), ("vector", vector)]
    schema = arrow.schema(columns)

    def batches() -> Iterator[Any]:
        at = 0
        for block in collection.vectors.blocks():
            rows = [collection.describe(at + i) for i in range(len(block))]
            arrays = [
                arrow.array(range(at, at + len(block)), arrow.int64()),
                arrow.array([_clean(row["id"]) for row in rows], text),
                arrow.array([_clean(row["text"]) for row in rows], text),
                arrow.array([json.dumps(row["fields"]) for row in rows], text),
                arrow.FixedSizeListArray.from_arrays(arrow.array(block.reshape(-1)), width),
            ]
            yield arrow.RecordBatch.from_arrays(arrays, schema=schema)
            at += len(block)

    database.create_table(name, data=batches(), schema=schema)


class LanceEngine:
    """Searches in what `write_lancedb` wrote. ValueError where there is no such table, or one of another width."""

    def __init__(self, target: str, name: str, width: int):
        package, _ = import_lancedb()
        if "://" not in target and not Path(target).is_dir():  # which `connect` would make
            raise ValueError(f"engine: {target}: no such folder; write it: search export --to lancedb")
        database = package.connect(target)
        if not _has_table(database, name):
            raise ValueError(f"engine: {target} has no table {name!r}; write it: search export --to lancedb")
        self._table = database.open_table(name)
        size = self._table.schema.field("vector").type.list_size
        if size != width:
            raise ValueError(f"engine: {name!r} of {target} has vectors of {size} numbers, not {width}; export again")

    def find(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and similarities, best first; LanceDB's distance is 1 - dot product."""
        asked = self._table.search(query.astype(np.float32)).distance_type("dot").limit(k)
        found = asked.select(["row", "_distance"]).to_arrow()
        return found["row"].to_numpy().astype(np.int64), 1.0 - found["_distance"].to_numpy().astype(np.float64)


def _has_table(database: Any, name: str) -> bool:
    try:
        database.open_table(name)
    except (ValueError, FileNotFoundError):
        return False
    return True


def _clean(text: str) -> str:
    """Half surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode()
