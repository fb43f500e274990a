"""Engines beyond the exact search: whatever finds near rows, as the vectors of a collection.

An engine's order among near equals is its own, and an approximate one misses some. exact needs nothing; faiss and
usearch hold an index in this process; qdrant and lancedb are asked for what `search export` gave them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from .vectors import Vectors

EXACT = "exact"
FORMS = "exact, faiss:FACTORY (faiss:HNSW32), usearch, qdrant:TARGET or lancedb:FOLDER"
MORE = 4  # times as many are asked for, where too few of those found are allowed


class Searcher(Protocol):
    """What a collection's `vectors` can do."""

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> np.ndarray: ...

    def blocks(self) -> Iterator[np.ndarray]: ...

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...


class Engine(Protocol):
    """An engine that holds the rows of a collection."""

    def find(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 (at most k,) and similarities float64, best first, of a query float32 (C,)."""


class EngineVectors:
    """The vectors of a collection, searched by an engine."""

    def __init__(self, vectors: Vectors, engine: Engine):
        self._vectors, self._engine = vectors, engine

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self._vectors.width

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows, float32 (m, C)."""
        return self._vectors.take(rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """All vectors in order, float32 (some, C) at a time."""
        return self._vectors.blocks()

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Vectors.search`, but as good as the engine is. Fewer than k where the engine finds fewer for one of the
        queries."""
        found = [self._search_one(query, k, allowed) for query in queries]
        count = min((len(rows) for rows, _ in found), default=0)
        rows = np.array([rows[:count] for rows, _ in found], np.int64).reshape(len(queries), count)
        return rows, np.array([scores[:count] for _, scores in found], np.float64).reshape(len(queries), count)

    def _search_one(self, query: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        asked = k = min(k, len(self))
        while True:
            rows, scores = self._engine.find(query, asked) if asked else (np.empty(0, np.int64), np.empty(0))
            found, inside = len(rows), (rows >= 0) & (rows < len(self))  # an engine may hold more than the collection
            rows, scores = rows[inside], scores[inside]
            if allowed is not None:
                rows, scores = rows[allowed[rows]], scores[allowed[rows]]
            if len(rows) >= k or asked >= len(self) or found < asked:
                return rows[:k], scores[:k]
            asked = min(asked * MORE, len(self))


def attach_engine(vectors: Vectors, engine: str, name: str) -> Searcher:
    """`vectors`, searched by the engine that a text like those of FORMS names; name: of the collection or table that
    the engine holds. ValueError for another text, ImportError where its package is missing."""
    kind, _, rest = engine.partition(":")
    found: Engine
    if engine == EXACT:
        return vectors
    if kind in ("faiss", "usearch"):
        from .approximate import FaissEngine, UsearchEngine

        found = FaissEngine(vectors, rest or "Flat") if kind == "faiss" else UsearchEngine(vectors)
    elif kind == "qdrant" and rest:
        from .qdrant import QdrantEngine

        found = QdrantEngine(rest, name, vectors.width)
    elif kind == "lancedb" and rest:
        from .lancedb import LanceEngine

        found = LanceEngine(rest, name, vectors.width)
    else:
        raise ValueError(f"engine: {engine!r} is none of {FORMS}")
    return EngineVectors(vectors, found)
