"""Indices of faiss and usearch, made in memory of all vectors when a collection is opened."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from .vectors import Vectors

# The packages' own numbers find 4, 8 and 0.6 of the 10 nearest (HNSW32, usearch, IVF1024: tests/bench/search.py).
WIDE = 256  # candidates of a graph that a search keeps; faiss: 16, usearch: 64
LEAST_LISTS, SHARE_OF_LISTS = 32, 8  # inverted lists that a search reads, and of all the one part in so many; faiss: 1


class FaissEngine:
    """An index that faiss's index_factory makes of `factory`: Flat, HNSW32, IVF1024,SQfp16 .. After a colon come
    parameters as faiss's ParameterSpace knows them: HNSW32:efSearch=512, IVF1024,Flat:nprobe=32. ValueError where it
    cannot, ImportError without faiss."""

    def __init__(self, vectors: Vectors, factory: str):
        try:
            import faiss
        except ImportError:
            raise ImportError("engine: faiss is not installed; pip install -e '.[faiss]', or use exact") from None
        kind, _, parameters = factory.partition(":")
        try:
            self._index = faiss.index_factory(vectors.width, kind, faiss.METRIC_INNER_PRODUCT)
            self._search_widely(faiss, parameters)
            if not self._index.is_trained:
                self._index.train(vectors.take(_sample(len(vectors))))
            for block in vectors.blocks():
                self._index.add(block)
        except RuntimeError as error:
            reason = str(error).strip().rsplit(": ", 1)[-1]
            raise ValueError(
                f"engine: faiss cannot make {factory!r} of {len(vectors)} rows ({reason}); try faiss:Flat"
            ) from None

    def _search_widely(self, faiss: Any, parameters: str) -> None:
        space, lists = faiss.ParameterSpace(), faiss.try_extract_index_ivf(self._index)
        if lists is not None:
            read = min(lists.nlist, max(LEAST_LISTS, lists.nlist // SHARE_OF_LISTS))
            space.set_index_parameter(self._index, "nprobe", read)
        with contextlib.suppress(RuntimeError):  # no graph
            space.set_index_parameter(self._index, "efSearch", WIDE)
        space.set_index_parameters(self._index, parameters)

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
        self._index: Any = usearch.index.Index(ndim=vectors.width, metric="ip", dtype="f16", expansion_search=WIDE)
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
