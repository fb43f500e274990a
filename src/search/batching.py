"""Searches that wait at the same time go through the vectors together, which takes less time than one after the other.

How much less depends on the machine and the number of rows: `python tests/bench/serve.py` measures twenty users.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

Search = Callable[[np.ndarray, int, Any], tuple[np.ndarray, np.ndarray]]


class _Waiting(NamedTuple):
    vector: np.ndarray
    wanted: int
    allowed: Any
    answer: Future


class Batcher:
    """One thread that searches: `search(vectors (n, width), count, allowed)` -> rows (n, count), scores (n, count).

    Python waits for it at its end, unlike for a daemon: torch aborts the process where a thread frees a tensor while
    the interpreter is being taken down.
    """

    def __init__(self, search: Search, most: int):
        """most: queries in one pass."""
        self._search, self._most = search, most
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(1, "search")

    def submit(self, vector: np.ndarray, count: int, allowed: Any = None) -> Future:
        """The future (rows, scores) of `count` results; searches with the same object `allowed` may share a pass."""
        waiting = _Waiting(vector, count, allowed, Future())
        self._waiting.put(waiting)
        self._pool.submit(self._work)
        return waiting.answer

    def close(self) -> None:
        """End the thread after what it was given."""
        self._pool.shutdown(wait=False)

    def _work(self) -> None:
        """Answer those that wait, as many as go together; none where the call before took them all."""
        batch: list[_Waiting] = []
        with contextlib.suppress(queue.Empty):
            while len(batch) < self._most:
                batch.append(self._waiting.get_nowait())
        for group in _group(batch):
            self._answer([one for one in group if one.answer.set_running_or_notify_cancel()])

    def _answer(self, group: list[_Waiting]) -> None:
        if not group:
            return
        try:
            most = max(one.wanted for one in group)
            rows, scores = self._search(np.stack([one.vector for one in group]), most, group[0].allowed)
            for one, found, values in zip(group, rows, scores):
                one.answer.set_result((found[: one.wanted], values[: one.wanted]))
        except BaseException as error:
            for one in group:
                if not one.answer.done():
                    one.answer.set_exception(error)


def _group(batch: Iterable[_Waiting]) -> Iterable[list[_Waiting]]:
    """By the identity of `allowed`, in the order of arrival."""
    groups: dict[int, list[_Waiting]] = {}
    for one in batch:
        groups.setdefault(id(one.allowed), []).append(one)
    return groups.values()
