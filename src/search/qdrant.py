"""Qdrant: vectors and rows into a collection of a server or of its local mode, and searches in it.

https://qdrant.tech/documentation; a target is an address (http://localhost:6333), :memory:, or a folder for the local
mode, which is for trials: it holds all in memory. A point's id is the row's number, its payload id, text and fields.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .collection import Collection

BATCH = 256  # points that are sent at a time


def import_qdrant() -> Any:
    """qdrant_client. ImportError that names the extra."""
    try:
        import qdrant_client
    except ImportError:
        raise ImportError("qdrant needs its client: pip install -e '.[qdrant]'") from None
    return qdrant_client


def connect(target: str) -> Any:
    """A client of the server, or of the folder of the local mode."""
    package = import_qdrant()
    if target == ":memory:":
        return package.QdrantClient(":memory:")
    if "://" in target:
        return package.QdrantClient(url=target, timeout=60)
    return package.QdrantClient(path=target)


@contextlib.contextmanager
def reaching(target: str) -> Iterator[None]:
    """Requests to a server: ConnectionError, in one line, where it does not answer or refuses."""
    errors = import_qdrant().http.exceptions
    try:
        yield
    except errors.ApiException as error:
        reason = " ".join(str(error).split())[:300]
        raise ConnectionError(f"qdrant: {target} does not do what it is asked for ({reason})") from None


def write_qdrant(collection: Collection, target: str, name: str, client: Any = None) -> None:
    """Export a collection into a new collection `name` of Qdrant. client: one that is connected already.

    ValueError where there is one of that name, ConnectionError where the server does not answer.
    """
    own = client is None
    client = connect(target) if own else client
    try:
        with reaching(target):
            _write(collection, target, name, client)
    finally:
        if own:
            client.close()


def _write(collection: Collection, target: str, name: str, client: Any) -> None:
    models = import_qdrant().models
    if client.collection_exists(name):
        raise ValueError(f"collection: {target} has a collection {name!r} already; give another name")
    parameters = models.VectorParams(size=collection.vectors.width, distance=models.Distance.DOT, on_disk=True)
    client.create_collection(name, vectors_config=parameters)
    at = 0
    for block in collection.vectors.blocks():
        for start in range(0, len(block), BATCH):
            part = block[start : start + BATCH]
            points = [
                models.PointStruct(id=at + i, vector=vector.tolist(), payload=_clean(collection.describe(at + i)))
                for i, vector in enumerate(part)
            ]
            client.upsert(name, points=points, wait=True)
            at += len(part)


class QdrantEngine:
    """Searches in what `write_qdrant` wrote. ValueError where there is no such collection, or one of another width;
    ConnectionError where the server does not answer."""

    def __init__(self, target: str, name: str, width: int, client: Any = None):
        if client is None and "://" not in target and target != ":memory:" and not Path(target).is_dir():
            raise ValueError(f"engine: {target}: no such folder; write it: search export --to qdrant")
        self._client, self._name, self._target = client or connect(target), name, target
        with reaching(target):
            problem = self._find_problem(target, width)
        if problem:
            self._client.close()  # a folder is open for one client only
            raise ValueError(f"engine: {problem}")

    def _find_problem(self, target: str, width: int) -> str:
        if not self._client.collection_exists(self._name):
            return f"{target} has no collection {self._name!r}; write it: search export --to qdrant"
        size = self._client.get_collection(self._name).config.params.vectors.size
        return "" if size == width else f"{self._name!r} of {target} has vectors of {size} numbers, not {width}"

    def find(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and similarities, best first."""
        with reaching(self._target):
            points = self._client.query_points(self._name, query=query.tolist(), limit=k, with_payload=False).points
        return np.array([point.id for point in points], np.int64), np.array([point.score for point in points])


def _clean(value: Any) -> Any:
    """Half surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks."""
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
