"""An ordered map over worker processes with a bounded number of items in flight.

No worker outlives its parent, however that ends, and none continues for longer than one item when it stops.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process, resource_tracker

from .errors import INTERRUPTED, SETTING, STOPPED

PR_SET_PDEATHSIG = 1  # of prctl(2)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CHUNK = 16  # items per task: an image takes milliseconds, so tasks stay short and queues small


class WorkerDied(RuntimeError):
    """A worker process ended by itself or was killed."""

    exit_code = SETTING


def map_ordered(function: Callable, items: Iterable, workers: int, chunk: int = CHUNK) -> Iterator:
    """function(item) for every item, in order, by `workers` processes, which take `chunk` items at a time; 1 runs in
    this one. WorkerDied."""
    if workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    waiting: deque = deque()
    # spawn: a fork of a process that has threads (torch's, tqdm's) may hang
    context = get_context("spawn")
    _start_tracker()
    ended, ending = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function, ended, is_main_thread()))
    try:
        while True:
            while len(waiting) < 4 * workers and (taken := list(islice(items, chunk))):
                waiting.append(pool.submit(_work, taken))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        time.sleep(0.1)  # a signal that ended the workers may be on its way to this process, too
        raise WorkerDied(
            "a worker process died, most likely because memory ran out; use fewer --workers; complete shards are "
            "kept, and the same command continues"
        ) from None
    finally:
        ending.close()
        pool.shutdown(cancel_futures=True)
        ended.close()


def is_main_thread() -> bool:
    """Whether what this thread starts has a parent as long as this process lives, for `follow_parent`."""
    return threading.current_thread() is threading.main_thread()


def follow_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal once the thread that started it has ended, SIGKILL included.

    This also reaches a stopped process, which cannot watch its parent. Outside Linux it does nothing."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _heed_signals() -> None:
    """From now on the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt(number), which ends the work in good
    order, and a second one ends this process at once. A signal that is ignored, as nohup has it, stays so."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def work_until_stopped(work: Callable[[], int | None], told: str) -> int:
    """The exit code of work(). A first signal (see `_heed_signals`) ends it in good order: then `told` is printed to
    standard error, and the code is INTERRUPTED for Ctrl-C, else STOPPED."""
    _heed_signals()
    try:
        return work() or 0
    except KeyboardInterrupt as stopped:
        print(told, file=sys.stderr)
        return INTERRUPTED if stopped.args == (signal.SIGINT,) else STOPPED


def _stop(number: int, _: object) -> None:
    for other in STOPPING:
        if signal.getsignal(other) == _stop:
            signal.signal(other, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def _start_tracker() -> None:
    """Start multiprocessing's tracker with SIGHUP blocked, which a closing terminal sends to all: it must outlive this
    process, and then ends by itself. It ignores SIGINT and SIGTERM already."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker process: what it does with every item, and whether it is to stop.
_function: Callable | None = None
_stopping = threading.Event()


def _start_worker(function: Callable, ended: connection.Connection, by_main_thread: bool) -> None:
    global _function
    _function = function
    if by_main_thread:
        follow_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the parent ends the workers
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "runs in a worker process only"
    threading.Thread(target=_watch, args=(ended, parent.sentinel), daemon=True).start()


def _watch(ended: connection.Connection, parent: int) -> None:
    connection.wait([ended, parent])
    _stopping.set()
    connection.wait([parent])
    os._exit(1)  # no process is left to take results, and the main thread may be waiting for tasks


def _work(chunk: list) -> list:
    assert _function is not None, "_start_worker sets it"
    return [_function(item) for item in chunk if not _stopping.is_set()]
