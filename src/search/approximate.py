"""Indices of faiss and usearch, made in memory of all vectors when a collection is opened."""

from __future__ import annotations

from typing import Any

import numpy as np

from .vectors import Vectors


class FaissEngine:
    """An index that faiss's index_factory makes of `factory`: Flat, HNSW32, IVF1024,SQfp16 .. ValueError where it
    cannot, ImportError without faiss."""

    def __init__(self, vectors: Vectors, factory: str):
        try:
            import faiss
        except ImportError:
            raise ImportError("engine: faiss is not installed; pip install -e '.[faiss]', or use exact") from None
        try:
            self._index = faiss.index_factory(vectors.width, factory, faiss.METRIC_INNER_PRODUCT)
            if not self._index.is_trained:
                self._index.train(vectors.take(_sample(len(vectors))))
            for block in vectors.blocks():
                self._index.add(block)
        except RuntimeError as error:
            reason = str(error).strip().rsplit(": ", 1)[-1]
            raise ValueError(
                f"engine: faiss cannot make {factory!r} of {len(vectors)} rows ({reason}); try faiss:Flat"
            ) from None

    def find(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and similarities, best first."""
        scores, rows = self._index.search(query[None].astype(np.float32), k)
        return rows[0][rows[0] >= 0].astype(np.int64), scores[0][rows[0] >= 0].astype(np.float64)


class UsearchEngine:
    """A graph of usearch over half-precision vectors. ImportError without it."""

    def __init__(self, vectors: Vectors):
        try:
            import usearch.index
        except ImportError:
            raise ImportError("engine: usearch is not installed; pip install usearch, or use exact") from None
        self._index: Any = usearch.index.Index(ndim=vectors.width, metric="ip", dtype="f16")
        at = 0
        for block in vectors.blocks():
            self._index.add(np.arange(at, at + len(block)), block)
            at += len(block)

    def find(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and similarities, best first."""
        found = self._index.search(query.astype(np.float32), k)
        return np.asarray(found.keys).astype(np.int64), 1.0 - np.asarray(found.distances).astype(np.float64)


def _sample(count: int, most: int = 200_000) -> np.ndarray:
    """Rows to train on, spread over all."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
