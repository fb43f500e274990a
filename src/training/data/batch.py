"""The training data stream: batches of decoded images and token ids, the same for every loader and world size.

A batch is a pure function of (records, seed, position). Global step s covers the positions from start + s * G to
start + (s + 1) * G of the endless `Order`, rank r the r-th slice of them; an epoch may end inside a batch. Loaders
(`torch_loader.py`, `dali_loader.py`) decide how fast the batches arrive, never what is in them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..faults.process import place_of
from .samples import DataError, Fault, Sample, SampleReader

log = logging.getLogger(__name__)

AHEAD = 2  # batches made ahead of the training step
NAMED = 10  # bad records that are named
PATIENCE = 5.0  # seconds to wait for the thread of a closed loader; one that hangs in the kernel may never end

# What a batch holds for some samples besides pixels.
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Fault]]


@dataclass
class Batch:
    """One rank's slice of a global step. `position` is the global position of the step's first sample."""

    image: Tensor  # uint8 (B, 3, h, w), or (B, V, 3, h, w) with V > 1 views of each image
    text: Tensor  # int64 (B, N, T)
    ids: Tensor  # int64 (B,), record indices
    epochs: Tensor  # int64 (B,); in a mixture passes of each record's source
    position: int
    image_keys: Tensor | None = None  # int64 (B,), of the encoded images, where the loader was asked for them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which positions this rank takes in each of `steps` global steps, from position `start` (samples seen so far, over
    all ranks) on."""

    global_batch: int
    steps: int
    start: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.global_batch < 1 or self.world < 1 or self.global_batch % self.world:
            raise ValueError(
                f"global_batch: {self.global_batch} does not divide among {self.world} processes; use a multiple"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: {self.rank} is not in a world of {self.world}")
        if self.start < 0 or self.steps < 0:
            raise ValueError(f"start: {self.start}, steps: {self.steps}: both must be at least 0")

    @property
    def local_batch(self) -> int:
        """Samples per step on this rank."""
        return self.global_batch // self.world

    def first(self, step: int) -> int:
        """Global position of the first sample of global step `step`, counted from `start`."""
        return self.start + step * self.global_batch

    def positions(self, step: int) -> np.ndarray:
        """This rank's positions in global step `step`: int64 (local_batch,)."""
        begin = self.first(step) + self.rank * self.local_batch
        return np.arange(begin, begin + self.local_batch, dtype=np.int64)


class Tally:
    """Counts replaced records as their batches are delivered, and stops the run when they are too many.

    Each rank judges its own slice of the data: more than max_bad / world of its samples and more than max_bad_fraction
    of those it has seen since the start.
    """

    def __init__(self, world: int, max_bad: int, max_bad_fraction: float):
        self.world, self.max_bad, self.max_bad_fraction = world, max_bad, max_bad_fraction
        self.clear()

    def clear(self) -> None:
        """Count from zero."""
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self.bad: list[str] = []

    def add(self, samples: int, faults: list[Fault]) -> None:
        """Count one batch. DataError above the threshold."""
        self.seen += samples
        for fault in faults:
            self.skipped[fault.reason] += 1
            log.warning("position %d replaced (%s): %s", fault.position, fault.reason, fault.message)
            if len(self.bad) < NAMED:
                self.bad.append(fault.message)
        bad = self.skipped.total()
        if faults and bad * self.world > self.max_bad and bad > self.max_bad_fraction * self.seen:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            raise DataError(
                f"{bad} of {self.seen} records are bad ({counts}), more than max_bad={self.max_bad} and "
                f"max_bad_fraction={self.max_bad_fraction:g} allow; the first are:\n  " + "\n  ".join(self.bad)
            )


def stack_samples(samples: list[Sample]) -> Chunk:
    """Token ids (B, N, T), record ids (B,), epochs (B,) and keys of the images (B,), or (0,) where there are none, all
    int64; and the faults of replaced records."""
    text = np.stack([sample.tokens for sample in samples])
    ids, epochs = (np.array(column, np.int64) for column in zip(*((sample.id, sample.epoch) for sample in samples)))
    keys = np.array([sample.key for sample in samples if sample.key is not None], np.int64)
    return text, ids, epochs, keys, [sample.fault for sample in samples if sample.fault]


# ---- what all loaders are --------------------------------------------------------------------------------------------


def _close(reference: weakref.ref) -> None:
    if (loader := reference()) is not None:
        loader.close()


class Loader:
    """A plan, a tally of bad records, and `run`, which makes (batch, faults) step by step, in its own thread and up to
    AHEAD batches ahead."""

    def __init__(self, reader: SampleReader, plan: Plan, tally: Tally, device: torch.device):
        self.reader, self.plan, self.tally, self.device = reader, plan, tally, device
        self._current, self._thread = Feed(), None
        # Exit handlers run last to first. multiprocessing's sends SIGTERM, which the workers ignore, and then
        # waits for them, so they must have ended before.
        atexit.register(_close, weakref.ref(self))

    @property
    def skipped(self) -> dict[str, int]:
        """Replaced records per reason."""
        return dict(self.tally.skipped)

    @property
    def bad(self) -> list[str]:
        """The first ten replaced records and what is wrong with them."""
        return list(self.tally.bad)

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Batches:
        self.close()
        self.tally.clear()
        self.start()
        device = self.device
        if device.type == "cuda" and device.index is None:  # this thread's current one; a new thread has the first
            device = torch.device("cuda", torch.cuda.current_device())
        self._current = Feed()
        thread = threading.Thread(target=_fill, args=(self._current, self.run, device), name="loader", daemon=True)
        thread.start()  # where no thread can be started, there is none to join
        self._thread = thread
        return Batches(self, self._current)

    def start(self) -> None:
        """Prepare in the iterating thread, before the thread that makes the batches starts."""

    def run(self) -> Iterator[tuple[Batch, list[Fault]]]:
        """Yield each step's batch and the faults of the records that were replaced in it."""
        raise NotImplementedError

    def assemble(self, step: int, image: Tensor, chunks: list[Chunk]) -> tuple[Batch, list[Fault]]:
        """What `run` yields, from pixels (B, V, 3, h, w) and the rest of the samples, chunk after chunk."""
        *columns, faults = zip(*chunks)
        text, ids, epochs, keys = (torch.from_numpy(np.concatenate(column)) for column in columns)
        known = keys if self.reader.keys else None
        return Batch(image.squeeze(1), text, ids, epochs, self.plan.first(step), known), list(chain(*faults))

    def interrupt(self) -> None:
        """Wake up whatever waits inside `run`."""

    def place(self) -> str:
        """Where `run` is at the moment, for messages."""
        thread = self._thread
        return f"the loader at {place_of(thread.ident if thread else None)[0]}"

    def blank(self) -> Batch:
        """A batch of the right shape, all zeros; its images have keys of their own, as no image has (below 0)."""
        rows, layout = self.plan.local_batch, self.reader.records.layout
        ids = torch.zeros(rows, dtype=torch.int64)
        image = torch.zeros(rows, *self.reader.shape, dtype=torch.uint8)
        text = torch.zeros(rows, layout.width // layout.context, layout.context, dtype=torch.int64)
        first = self.plan.rank * rows
        keys = -1 - torch.arange(first, first + rows) if self.reader.keys else None
        return Batch(image.squeeze(1), text, ids, ids, self.plan.start, keys)

    def close(self) -> None:
        """End processes and threads; iterating again starts from the beginning of the plan."""
        self._current.stop()
        self.interrupt()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            self._thread = None


class Feed:
    """What passes from the thread that makes batches to the one that takes them."""

    def __init__(self):
        # Not a SimpleQueue: its `get` with a timeout waits forever if a signal arrives just as the timeout expires.
        self.permits, self.ready = threading.Semaphore(AHEAD), queue.Queue()
        self.stopped = False

    def stop(self) -> None:
        """No more batches are taken."""
        self.stopped = True
        self.permits.release()


def _fill(feed: Feed, run: Callable[[], Iterator], device: torch.device) -> None:
    """The thread: hand over what `run` yields, then the StopIteration or the error that ends it."""
    items = run()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            feed.permits.acquire()
            if feed.stopped:
                return
            feed.ready.put(next(items))
    except BaseException as error:
        feed.ready.put(error)
    finally:
        items.close()


class Batches:
    """Iterator over the batches of a loader. An error of the loader is raised unchanged."""

    def __init__(self, loader: Loader, feed: Feed):
        self._loader, self._feed = loader, feed
        self._next: Any = None

    def wait(self, seconds: float) -> bool:
        """Whether the next item, a batch or an error, arrives within that time."""
        if self._next is None:
            with contextlib.suppress(queue.Empty):
                self._next = self._feed.ready.get(timeout=seconds)
        return self._next is not None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._feed.stopped:
            raise StopIteration
        item, self._next = self._feed.ready.get() if self._next is None else self._next, None
        try:
            if isinstance(item, BaseException):
                raise item
            self._feed.permits.release()
            batch, faults = item
            self._loader.tally.add(len(batch.ids), faults)
        except BaseException:
            self._loader.close()
            raise
        if batch.image.is_cuda:  # allocated on the loader's stream, used on the caller's
            batch.image.record_stream(torch.cuda.current_stream(batch.image.device))
        return batch

    def close(self) -> None:
        """Close the loader, unless it has been iterated again."""
        if not self._feed.stopped:
            self._loader.close()

    def __del__(self):
        if not self._feed.stopped:  # waits for nothing: any thread may collect garbage
            self._feed.stop()
            self._loader.interrupt()
