"""An ordered map over worker processes with a bounded number of items under way."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context

CHUNK = 16  # items per task: a picture takes milliseconds, so tasks stay short and queues small


def map_ordered(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) for every item, in order, by `workers` processes; 1 works in this one."""
    if workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    waiting: deque = deque()
    # spawn: a fork of a process that has threads (torch's, tqdm's) may stand still
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (function,))
    try:
        while True:
            while len(waiting) < 4 * workers and (chunk := list(islice(items, CHUNK))):
                waiting.append(pool.submit(_work, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError("a worker process died (out of memory?); run again: complete shards are kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable | None = None  # in a worker process: what it does with every item


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers


def _work(chunk: list) -> list:
    return [_function(item) for item in chunk]
