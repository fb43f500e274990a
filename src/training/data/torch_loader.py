"""The training data stream: batches of decoded pictures and token ids, the same for every loader and world
size.

A batch is a pure function of (records, seed, position). Global step s covers the positions from start + s * G
to start + (s + 1) * G of the endless `Order`, rank r the r-th part of them; an epoch may end inside a batch.
Loaders (here: processes, `workers.py`; `dali.py`) decide how fast the batches come, never what is in them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import math
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rwkv_clip.data.records import RecordSet

from .augment import Augmentation
from ..faults.watchdog import place_of
from .order import Order
from .samples import DataError, Fault, Sample, SampleReader
from .workers import PATIENCE, Workers

__all__ = ["Batch", "DataError", "Order", "TorchLoader", "make_loader"]

log = logging.getLogger(__name__)

LOADERS = ("auto", "dali", "torch")
CHUNK = 32  # samples per message of a worker
AHEAD = 2  # batches made ahead of the training step
NAMED = 10  # bad records that are named


@dataclass
class Batch:
    """One rank's share of a global step. `position` is the global position of the step's first sample."""

    image: torch.Tensor  # uint8 (B, 3, h, w)
    text: torch.Tensor  # int64 (B, V, T)
    ids: torch.Tensor  # int64 (B,), record indices
    epochs: torch.Tensor  # int64 (B,)
    position: int


@dataclass(frozen=True)
class Plan:
    """Which positions this rank takes in each of `steps` global steps."""

    start: int
    steps: int
    global_batch: int
    rank: int
    world: int

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

    Each rank judges its own share of the data: more than max_bad / world of its samples and more than
    max_bad_share of those it has seen since the start.
    """

    def __init__(self, world: int, max_bad: int, max_bad_share: float):
        if max_bad < 0 or not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad: {max_bad} (>= 0), max_bad_share: {max_bad_share} (0 to 1)")
        self.world, self.max_bad, self.max_bad_share = world, max_bad, max_bad_share
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
        if faults and bad * self.world > self.max_bad and bad > self.max_bad_share * self.seen:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            raise DataError(
                f"{bad} of {self.seen} records are bad ({counts}), more than max_bad={self.max_bad} and "
                f"max_bad_share={self.max_bad_share:g} allow; the first are:\n  " + "\n  ".join(self.bad)
            )


def stack_text(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (B, V, T), record ids (B,) and epochs (B,), all int64."""
    text = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    ids = torch.tensor([sample.id for sample in samples], dtype=torch.int64)
    return text, ids, torch.tensor([sample.epoch for sample in samples], dtype=torch.int64)


def decode_samples(reader: SampleReader, samples: list[Sample], image: torch.Tensor) -> list[Sample]:
    """Decode on this CPU core into `image`, uint8 (B, 3, h, w); returns the samples, bad ones replaced."""
    samples = list(samples)
    for row, sample in enumerate(samples):
        samples[row], image[row] = reader.decode(sample)
    return samples


def faults_of(samples: list[Sample]) -> list[Fault]:
    """Those of the records that were replaced."""
    return [sample.fault for sample in samples if sample.fault]


class _Chunks:
    """Item i = chunk i % per_step of step i // per_step, decoded; what a worker process makes."""

    def __init__(self, reader: SampleReader, plan: Plan):
        self.reader, self.plan = reader, plan
        self.per_step = math.ceil(plan.local_batch / CHUNK)

    def __len__(self) -> int:
        return self.plan.steps * self.per_step

    def rows(self, item: int) -> slice:
        """Where in its batch a chunk lies."""
        start = item % self.per_step * CHUNK
        return slice(start, min(start + CHUNK, self.plan.local_batch))

    def shape(self, item: int) -> tuple[int, ...]:
        rows = self.rows(item)
        return rows.stop - rows.start, 3, *self.reader.image_size

    def fill(self, item: int, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Fault]]:
        """Pixels into `image`; texts, ids and epochs as `stack_text` has them, and faults."""
        positions = self.plan.positions(item // self.per_step)[self.rows(item)]
        samples = decode_samples(self.reader, self.reader.read(positions), image)
        return *(part.numpy() for part in stack_text(samples)), faults_of(samples)


# ---- loaders ---------------------------------------------------------------------------------------------------------


def _close(reference: weakref.ref) -> None:
    if (loader := reference()) is not None:
        loader.close()


class Loader:
    """What all loaders are: a plan, a tally of bad records, and `run`, which makes (batch, faults) step by step, in a
    thread of its own and up to AHEAD batches ahead."""

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
        if device.type == "cuda" and device.index is None:  # the one of this thread; a new thread has the first
            device = torch.device("cuda", torch.cuda.current_device())
        self._current = Feed()
        thread = threading.Thread(target=_fill, args=(self._current, self.run, device), name="loader", daemon=True)
        thread.start()  # where there is none to be had, there is none to be ended
        self._thread = thread
        return Batches(self, self._current)

    def start(self) -> None:
        """What has to be done in the thread that iterates, before the one that makes the batches."""

    def run(self) -> Iterator[tuple[Batch, list[Fault]]]:
        """Yield each step's batch and the faults of the records that were replaced in it."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Let who waits inside `run` for somebody else come back."""

    def place(self) -> str:
        """Where `run` stands."""
        thread = self._thread
        return f"the loader at {place_of(thread.ident if thread else None)}"

    def blank(self) -> Batch:
        """A batch of the right shape that says nothing."""
        rows, layout = self.plan.local_batch, self.reader.records.layout
        zeros = torch.zeros(rows, dtype=torch.int64)
        image = torch.zeros(rows, 3, *self.reader.image_size, dtype=torch.uint8)
        text = torch.zeros(rows, len(layout.text_names), layout.context, dtype=torch.int64)
        return Batch(image, text, zeros, zeros, self.plan.start)

    def close(self) -> None:
        """End processes and threads; iterating again starts afresh from the beginning of the plan."""
        self._current.stop()
        self.interrupt()
        if self._thread is not None:
            self._thread.join(PATIENCE)  # one that hangs in the kernel is left to itself
            self._thread = None


class Feed:
    """What passes from the thread that makes batches to the one that takes them."""

    def __init__(self):
        # Not a SimpleQueue: its `get` with a timeout waits for ever where a signal comes just as the time is over.
        self.permits, self.ready = threading.Semaphore(AHEAD), queue.Queue()
        self.stopped = False

    def stop(self) -> None:
        """Nobody takes any more."""
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
    """Iterator over the batches of a loader. An error of the loader is raised as it is."""

    def __init__(self, loader: Loader, feed: Feed):
        self._loader, self._feed = loader, feed
        self._next: Any = None

    def wait(self, seconds: float) -> bool:
        """Whether there is within so many seconds what `next` returns or raises."""
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
        """As `close` of the loader, unless that has begun anew."""
        if not self._feed.stopped:
            self._loader.close()

    def __del__(self):
        if not self._feed.stopped:  # waits for nothing: any thread may collect garbage
            self._feed.stop()
            self._loader.interrupt()


class TorchLoader(Loader):
    """Batches on the CPU (pinned for a CUDA device), decoded by `workers` processes, or with 0 by this one."""

    def __init__(self, reader: SampleReader, plan: Plan, tally: Tally, workers: int, device: torch.device):
        super().__init__(reader, plan, tally, device)
        self._count = workers
        self._chunks = _Chunks(reader, plan)
        self._workers: Workers | None = None
        self._item = 0

    def start(self) -> None:
        if self._count:
            self._workers = Workers(self._chunks, self._count)

    def run(self) -> Iterator[tuple[Batch, list[Fault]]]:
        make = self._workers.receive if self._workers else self._chunks.fill
        for step in range(self.plan.steps):
            shape = (self.plan.local_batch, 3, *self.reader.image_size)
            pin = self.device.type == "cuda"
            image, chunks = torch.empty(shape, dtype=torch.uint8, pin_memory=pin), []
            for item in range(step * self._chunks.per_step, (step + 1) * self._chunks.per_step):
                self._item = item
                chunks.append(make(item, image[self._chunks.rows(item)]))
            *arrays, faults = zip(*chunks)
            text, ids, epochs = (torch.from_numpy(np.concatenate(parts)) for parts in arrays)
            yield Batch(image, text, ids, epochs, self.plan.first(step)), [fault for part in faults for fault in part]

    def interrupt(self) -> None:
        if self._workers:
            self._workers.kill()

    def place(self) -> str:
        workers = self._workers
        return workers.place(self._item) if workers else super().place()

    def close(self) -> None:
        super().close()
        if self._workers:
            self._workers.close()
            self._workers = None


def make_loader(
    records: RecordSet,
    *,
    image_size: int | tuple[int, int],
    global_batch: int,
    steps: int,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    loader: str = "auto",
    device: str | torch.device = "cpu",
    max_bad: int = 100,
    max_bad_share: float = 0.001,
    augmentation: Augmentation = Augmentation(),
):
    """Iterable of `steps` batches from position `start` (samples seen so far, over all ranks) on.

    loader: "torch" (worker processes), "dali", or "auto": DALI where it is installed and `device` is a GPU.
    workers: processes (torch) or threads (DALI). With DALI on a GPU the pictures arrive there, else on the
    CPU. Attributes: skipped (reason -> count), bad (the first ten), close(). Iterating raises DataError when
    more than max_bad records and more than the share max_bad_share are bad, WorkerLost when a process dies.
    ValueError for settings that do not fit.
    """
    if loader not in LOADERS:
        raise ValueError(f"loader: {loader!r} is not known; use one of {', '.join(LOADERS)}")
    if workers < 0:
        raise ValueError(f"workers: {workers}; use 0 to decode in the training process")
    device = torch.device(device)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size: {image_size} is not a picture; use a positive number or (height, width)")
    plan = Plan(start, steps, global_batch, rank, world)
    tally = Tally(world, max_bad, max_bad_share)
    reader = SampleReader(records, seed, size, augmentation)
    if loader == "auto":
        loader = "dali" if device.type == "cuda" and _has_dali() else "torch"
    if loader == "torch":
        return TorchLoader(reader, plan, tally, workers, device)
    from .dali_loader import DaliLoader

    return DaliLoader(reader, plan, tally, workers, device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
