"""From a query to an answer: encode, mix, search, describe; for many users at once, and for no more than can wait.

Encoding and describing run in a small pool of threads, searches in one thread that takes those that wait together
(batching.py), pictures in a pool of their own: a page full of thumbnails does not hold up a search.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from rwkv_clip.data.image import inspect_image

from .batching import Batcher
from .query import Query, RequestError, shorten
from .thumbnails import Thumbnails, show_picture

MOST_SEARCHES, MOST_PICTURES = 64, 512  # that are under way or wait; more are told to come again
WORKERS, PICTURE_WORKERS = 2, 2
EXAMPLES, EXAMPLE_LETTERS = 6, 72
SMALLEST = 1e-6  # length of a sum of two unit vectors that still has a direction
Result = TypeVar("Result")


class Vectors(Protocol):
    """Unit vectors of all rows."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores (queries, k) of the best, ties in the order of rows."""

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """Vectors (rows, width), float32."""


class Collection(Protocol):
    """What the server needs of a collection of pictures."""

    vectors: Vectors

    def __len__(self) -> int: ...
    def picture(self, row: int) -> bytes: ...
    def describe(self, row: int) -> dict[str, Any]: ...
    def filters(self) -> Mapping[str, Mapping[str, int]]: ...
    def select(self, filters: Mapping[str, Sequence[str]]) -> np.ndarray: ...
    def encode_text(self, text: str) -> np.ndarray: ...
    def encode_picture(self, data: bytes) -> np.ndarray: ...


class Busy(RequestError):
    """More requests wait than are served in good time."""

    def __init__(self) -> None:
        super().__init__("busy: too many requests wait; try again in a second", 503, {"Retry-After": "1"})


class Room:
    """How many may be inside at the same time, of one event loop. RequestError (503) beyond."""

    def __init__(self, most: int):
        self.most, self.inside = most, 0

    def __enter__(self) -> None:
        if self.inside >= self.most:
            raise Busy()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


class Service:
    """Answers queries to one collection; its coroutines belong to one event loop."""

    def __init__(self, collection: Collection):
        self.collection = collection
        self.name = str((getattr(collection, "about", None) or {}).get("name", "pictures"))
        self.fields = {name: dict(values) for name, values in collection.filters().items()}
        self._searches, self._pictures = Room(MOST_SEARCHES), Room(MOST_PICTURES)
        self._workers = ThreadPoolExecutor(WORKERS, "encode")
        self._painters = ThreadPoolExecutor(PICTURE_WORKERS, "picture")
        self._batcher = Batcher(collection.vectors.search)
        self._thumbnails = Thumbnails(collection.picture)
        self._allowed = lru_cache(maxsize=32)(self._select)  # a byte a row; the same object for the same filters

    def close(self) -> None:
        """End the threads after what they are doing."""
        self._batcher.close()
        for pool in (self._workers, self._painters):
            pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, query: Query) -> dict[str, Any]:
        """{"results": [..], "query": .., "milliseconds": ..}: the answer as JSON has it. RequestError, ImageError."""
        rows, scores, times = await self.find(query)
        start = time.perf_counter()
        results = await self._run(self._workers, lambda: [self._result(*pair) for pair in zip(rows, scores)])
        times["describe"] = _since(start)
        times["total"] = round(sum(times.values()), 3)
        return {"results": results, "query": query.to_json(), "milliseconds": times}

    async def find(self, query: Query) -> tuple[list[int], list[float | None], dict[str, float]]:
        """Rows, scores and milliseconds by step. Without a query: rows in their order, without scores."""
        with self._searches:
            start = time.perf_counter()
            allowed = await self._run(self._workers, lambda: self._allowed(tuple(query.filters.items())))
            vector = await self._run(self._workers, lambda: self._encode(query))
            times = {"encode": _since(start)}
            start, last = time.perf_counter(), query.offset + query.k
            if vector is None:
                found = np.arange(len(self.collection)) if allowed is None else np.flatnonzero(allowed)
                rows = found[query.offset : last].tolist()
                scores: list[float | None] = [None] * len(rows)
            else:
                wanted = min(last, len(self.collection))
                answer = await asyncio.wrap_future(self._batcher.submit(vector, wanted, allowed))
                rows, scores = (part[query.offset :].tolist() for part in answer)
            times["search"] = _since(start)
        kept = [(row, score) for row, score in zip(rows, scores) if row >= 0]  # fewer are allowed than were asked for
        return [row for row, _ in kept], [score for _, score in kept], times

    async def describe(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Id, text and metadata of rows."""
        return await self._run(self._workers, lambda: [to_plain(self.collection.describe(row)) for row in rows])

    async def thumbnail(self, row: int, side: int) -> bytes:
        """A JPEG of at most `side` pixels on a side."""
        return await self._paint(lambda: self._thumbnails.make(row, side))

    async def picture(self, row: int) -> tuple[bytes, str]:
        """A row's picture and its media type."""
        return await self._paint(lambda: show_picture(self.collection.picture(row), f"row {row}"))

    async def about(self) -> dict[str, Any]:
        """Model, rows, fields with their values, and texts to try."""
        return await self._run(self._workers, self._about)

    async def _paint(self, work: Callable[[], Result]) -> Result:
        with self._pictures:
            try:
                return await self._run(self._painters, work)
            except (OSError, ValueError) as error:
                # the reason may name a file of this machine
                raise RequestError("this row's picture cannot be read", 404) from error

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def _select(self, filters: tuple[tuple[str, tuple[str, ...]], ...]) -> np.ndarray | None:
        return self.collection.select(dict(filters)) if filters else None

    def _encode(self, query: Query) -> np.ndarray | None:
        """The unit vector (width,), float32, that is searched for; None where nothing was asked."""
        seen = self._see(query)
        if not query.text:
            return seen
        said = to_unit(self.collection.encode_text(query.text))
        return said if seen is None else mix(said, seen, query.weight)

    def _see(self, query: Query) -> np.ndarray | None:
        """The vector of what is not a text."""
        if query.picture is not None:
            inspect_image(query.picture, "picture")
            return to_unit(self.collection.encode_picture(query.picture))
        if query.row is not None:
            return to_unit(self.collection.vectors.take([query.row])[0])
        if query.vector is not None:
            given = to_unit(np.asarray(query.vector, np.float32))
            width = self.collection.vectors.take([0]).shape[1] if len(self.collection) else len(given)
            if len(given) != width:
                raise RequestError(f"embedding_input: {len(given)} numbers; this model's vectors have {width}")
            return given
        return None

    def _result(self, row: int, score: float | None) -> dict[str, Any]:
        about = to_plain(self.collection.describe(row))
        text = about.pop("text", None)
        own = {"id": about.pop("id", row), "row": row, "score": None if score is None else round(float(score), 6)}
        own |= {"image": f"/api/picture/{row}", "thumbnail": f"/api/thumbnail/{row}", "text": text or ""}
        return own | {name: value for name, value in about.items() if name not in own}

    def _about(self) -> dict[str, Any]:
        rows, texts = len(self.collection), []
        for row in range(0, rows, max(1, rows // 64)):
            text = self.collection.describe(row).get("text")
            if isinstance(text, str) and 0 < len(text) <= EXAMPLE_LETTERS:
                texts.append(text)
        step = max(1, len(texts) // EXAMPLES)
        fields = {
            name: [{"value": value, "count": int(count)} for value, count in values.items()]
            for name, values in self.fields.items()
        }
        known = to_plain(dict(getattr(self.collection, "about", {}) or {}))
        return {**known, "rows": rows, "fields": fields, "examples": to_plain(list(dict.fromkeys(texts[::step]))[:EXAMPLES])}


def to_unit(vector: np.ndarray) -> np.ndarray:
    """The vector (width,) at length 1, float32. RequestError of one without a direction."""
    flat = np.asarray(vector, np.float64).reshape(-1)
    length = float(np.linalg.norm(flat))
    if not (math.isfinite(length) and length > 0):
        raise RequestError("the query has no direction: its vector is zero or not finite")
    return (flat / length).astype(np.float32)


def mix(text: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray:
    """weight * text + (1 - weight) * other of unit vectors, at length 1 again."""
    total = weight * text.astype(np.float64) + (1 - weight) * other.astype(np.float64)
    if np.linalg.norm(total) < SMALLEST:
        raise RequestError("text and picture are opposite, and their mixture has no direction; change the weight")
    return to_unit(total)


def to_plain(value: Any) -> Any:
    """As JSON can say it: numbers that are not finite are None, anything unknown is its text."""
    if isinstance(value, Mapping):
        return {str(name): to_plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else shorten(value, 1_000)


def _since(start: float) -> float:
    return round(1e3 * (time.perf_counter() - start), 3)
