"""From a query to an answer: encode, mix, search, describe; for many users at once, and for no more than can wait.

Encoding and describing run in a small pool of threads, searches in one thread that takes those that wait together
(batching.py), pictures in a pool of their own: a page full of thumbnails does not hold up a search.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np

from .batching import Batcher
from .collection import Collection
from .encoding import Model
from .query import MAX_DEPTH, MAX_LETTERS, MAX_RESULTS, MAX_UPLOAD, Query, RequestError, shorten
from .thumbnails import Thumbnails, name_type
from .vectors import Vectors, mix

MOST_SEARCHES, MOST_PICTURES = 64, 512  # that are under way or wait; more are told to come again
MOST_TOGETHER = 32  # queries in one pass over the vectors
WORKERS, PICTURE_WORKERS = 2, 2
EXAMPLES, EXAMPLE_LETTERS = 4, 120
MOST_COUNTED = 20_000_000  # rows times values up to which the values of fields are counted
Result = TypeVar("Result")


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
        self.version = secrets.token_hex(4)  # of what the rows are: another start may have another index
        self.fields = {name: {show_value(v): v for v in values} for name, values in collection.filters().items()}
        self._searches, self._pictures = Room(MOST_SEARCHES), Room(MOST_PICTURES)
        self._workers = ThreadPoolExecutor(WORKERS, "encode")
        self._painters = ThreadPoolExecutor(PICTURE_WORKERS, "picture")
        # An engine's answer to one query may depend on the others that it gets with it.
        together = MOST_TOGETHER if isinstance(collection.vectors, Vectors) else 1
        self._batcher = Batcher(collection.vectors.search, together)
        self._thumbnails = Thumbnails(collection.picture)
        self._allowed = lru_cache(maxsize=32)(self._select)  # a byte a row; the same object for the same filters
        self._about = cache(self._find_about)

    def close(self) -> None:
        """End the threads after what they are doing."""
        self._batcher.close()
        for pool in (self._workers, self._painters):
            pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, query: Query) -> dict[str, Any]:
        """{"results": [..], "total": .., "query": .., "milliseconds": ..} as JSON has it. RequestError, ImageError."""
        rows, scores, total, times = await self.find(query)
        start = time.perf_counter()
        results = await self._run(self._workers, lambda: [self._result(*pair) for pair in zip(rows, scores)])
        times["describe"] = _since(start)
        times["total"] = round(sum(times.values()), 3)
        return {"results": results, "total": total, "query": query.to_json(), "milliseconds": times}

    async def find(self, query: Query) -> tuple[list[int], list[float | None], int, dict[str, float]]:
        """Rows, scores, how many rows were searched, and milliseconds by step. Without a query: rows in their order,
        without scores."""
        with self._searches:
            start = time.perf_counter()
            allowed, vector = await self._run(self._workers, lambda: self._prepare(query))
            times = {"encode": _since(start)}
            start, last = time.perf_counter(), query.offset + query.k
            if vector is None:
                found = range(len(self.collection)) if allowed is None else np.flatnonzero(allowed)
                rows = [int(row) for row in found[query.offset : last]]
                scores: list[float | None] = [None] * len(rows)
            else:
                wanted = min(last, len(self.collection))
                answer = await asyncio.wrap_future(self._batcher.submit(vector, wanted, allowed))
                rows, scores = (part[query.offset :].tolist() for part in answer)
            times["search"] = _since(start)
        return rows, scores, len(self.collection) if allowed is None else int(np.count_nonzero(allowed)), times

    async def describe(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Id, text and metadata of rows."""
        return await self._run(self._workers, lambda: [self._describe(row) for row in rows])

    async def picture(self, row: int, side: int = 0) -> tuple[bytes, str]:
        """A row's picture, of at most `side` pixels on a side (0: as it is), and its media type."""
        if side:
            data = await self._paint(lambda: self._thumbnails.make(row, side))
        else:
            data = await self._paint(lambda: self.collection.picture(row))
        return data, name_type(data)

    async def about(self) -> dict[str, Any]:
        """Model, rows, fields with their values, and texts to try."""
        return await self._run(self._workers, self._about)

    async def _paint(self, work: Callable[[], Result]) -> Result:
        with self._pictures:
            try:
                return await self._run(self._painters, work)
            except (OSError, LookupError, ValueError) as error:
                # the reason may name a file of this machine
                raise RequestError("this row's picture cannot be read", 404) from error

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def _prepare(self, query: Query) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self._allowed(tuple(query.filters.items())), self._encode(query)

    def _select(self, filters: tuple[tuple[str, tuple[str, ...]], ...]) -> np.ndarray | None:
        if not filters:
            return None
        wanted = {name: [self.fields[name].get(value, value) for value in values] for name, values in filters}
        return self.collection.select(wanted)

    def _encode(self, query: Query) -> np.ndarray | None:
        """The unit vector (width,), float32, that is searched for; None where nothing was asked."""
        seen = self._see(query)
        if not query.text:
            return seen
        said = to_unit(self._model().encode_text(query.text))
        if seen is None:
            return said
        mixed = mix(said, seen, query.weight)
        if mixed is None:
            raise RequestError("text and picture are opposite, and their mixture has no direction; change the weight")
        return mixed

    def _see(self, query: Query) -> np.ndarray | None:
        """The vector of what is not a text."""
        if query.picture is not None:
            return to_unit(self._model().encode_picture(query.picture))
        if query.row is not None:
            return to_unit(self.collection.vectors.take(np.array([query.row]))[0])
        if query.vector is not None:
            given = to_unit(np.asarray(query.vector, np.float32))
            width = self.collection.vectors.width
            if len(given) != width:
                raise RequestError(f"embedding_input: {len(given)} numbers; this model's vectors have {width}")
            return given
        return None

    def _model(self) -> Model:
        if self.collection.model is None:
            raise RequestError(
                "no model is known for this collection: search by a row, or start with --checkpoint", 501
            )
        return self.collection.model

    def _describe(self, row: int) -> dict[str, Any]:
        """Id, text and the fields beside them, as JSON says them."""
        about = self.collection.describe(row)
        own = {"id": about.get("id", row), "text": about.get("text") or ""}
        return to_plain({**about.get("fields", {}), **own})

    def _result(self, row: int, score: float | None) -> dict[str, Any]:
        about = self._describe(row)
        own = {"id": about.pop("id"), "row": row, "score": None if score is None else round(float(score), 6)}
        own |= {"image": f"/api/picture/{row}", "thumbnail": f"/api/thumbnail/{row}", "text": about.pop("text")}
        return own | {name: value for name, value in about.items() if name not in own}

    def _find_about(self) -> dict[str, Any]:
        rows, texts = len(self.collection), []
        for row in range(0, rows, max(1, rows // 64)):
            text = self._describe(row)["text"]
            if 0 < len(text) <= EXAMPLE_LETTERS:
                texts.append(text)
        shortest = sorted(dict.fromkeys(texts), key=len)[:EXAMPLES]
        counted = rows * sum(map(len, self.fields.values())) <= MOST_COUNTED
        fields: dict[str, list[dict[str, Any]]] = {}
        for name, values in self.fields.items():
            fields[name] = [{"value": shown, "count": None} for shown in values]
            for one, value in zip(fields[name], values.values()) if counted else ():
                one["count"] = int(self.collection.select({name: [value]}).sum())
        return {
            "name": self.collection.name,
            "version": self.version,
            "model": name_model(getattr(self.collection.model, "checkpoint", "")),
            "rows": rows,
            "fields": fields,
            "examples": [text for text in dict.fromkeys(texts) if text in shortest],
            "limits": {"letters": MAX_LETTERS, "bytes": MAX_UPLOAD, "k": MAX_RESULTS, "depth": MAX_DEPTH},
        }


def name_model(checkpoint: str) -> str:
    """What to call a model by its checkpoint: the last two parts of a path, which tell no more of this machine."""
    return "/".join(PurePath(checkpoint).parts[-2:])


def show_value(value: Any) -> str:
    """A field's value as a filter has it: true, 3, 0.5, a text."""
    return value if isinstance(value, str) else json.dumps(to_plain(value))


def to_unit(vector: np.ndarray) -> np.ndarray:
    """The vector (width,) at length 1, float32. RequestError of one without a direction."""
    flat = np.asarray(vector, np.float64).reshape(-1)
    length = float(np.linalg.norm(flat))
    if not (math.isfinite(length) and length > 0):
        raise RequestError("the query has no direction: its vector is zero or not finite")
    return (flat / length).astype(np.float32)


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
