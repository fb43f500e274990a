"""The training data stream: batches of decoded pictures and token ids, the same for every loader and world
size.

A batch is a pure function of (records, seed, position). Global step s covers the positions from start + s * G
to start + (s + 1) * G of the endless `Order`, rank r the r-th part of them; an epoch may end inside a batch.
Loaders (here: PyTorch worker processes; `dali.py`) decide how fast the batches come, never what is in them.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import math
import multiprocessing
import signal
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rwkv_clip.errors import DATA, SETTING
from rwkv_clip.recordio import RecordSet

from .augment import Augmentation
from .order import Order
from .samples import DataError, Fault, Sample, SampleReader

__all__ = ["Batch", "DataError", "Order", "TorchLoader", "make_loader"]

log = logging.getLogger(__name__)

LOADERS = ("auto", "dali", "torch")
CHUNK = 32  # samples per message of a worker: 5 MB at 224 px, so small /dev/shm (64 MB in containers) will do
AHEAD = 2  # batches decoded ahead of the training step
NAMED = 10  # bad records that are named


class WorkerLost(RuntimeError):
    """A data worker's process is gone. Killed (-9) it is mostly a lack of memory, else its data ended it."""

    def __init__(self, pid: int | None, code: int | None):
        killed = code == -signal.SIGKILL
        remedy = "mostly a lack of memory: use fewer --workers" if killed else "--workers 0 shows why"
        super().__init__(f"data worker {pid} died with exit code {code}; {remedy}")
        self.exit_code = SETTING if killed else DATA


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


def decode_samples(reader: SampleReader, samples: list[Sample]) -> tuple[list[Sample], torch.Tensor]:
    """Decode on this CPU core -> the samples (bad ones replaced) and uint8 (B, 3, h, w)."""
    image = torch.empty(len(samples), 3, *reader.image_size, dtype=torch.uint8)
    samples = list(samples)
    for row, sample in enumerate(samples):
        samples[row], image[row] = reader.decode(sample)
    return samples, image


class _Chunks(Dataset):
    """Item i = chunk i % per_step of step i // per_step, decoded; what a worker process runs."""

    def __init__(self, reader: SampleReader, plan: Plan):
        self.reader, self.plan = reader, plan
        self.per_step = math.ceil(plan.local_batch / CHUNK)

    def __len__(self) -> int:
        return self.plan.steps * self.per_step

    def __getitem__(self, item: int):
        step, part = divmod(item, self.per_step)
        positions = self.plan.positions(step)[part * CHUNK : (part + 1) * CHUNK]
        try:
            samples, image = decode_samples(self.reader, self.reader.read(positions))
        except DataError as error:
            return error  # raised by the consumer: a worker's exception would arrive wrapped in its traceback
        faults = [sample.fault for sample in samples if sample.fault]
        return image, *stack_text(samples), faults


def _as_is(item):
    return item


def _start_worker(_worker: int) -> None:
    # A signal to the process group must let the main process save before it ends; it then ends its workers
    # itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _close(reference: weakref.ref) -> None:
    if (loader := reference()) is not None:
        loader.close()


class Loader:
    """What both loaders are: a plan, a tally of bad records, and `run`, which yields (batch, faults) step by
    step."""

    def __init__(self, plan: Plan, tally: Tally):
        self.plan, self.tally = plan, tally
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

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self.tally.clear()
        try:
            for batch, faults in self.run():
                self.tally.add(self.plan.local_batch, faults)
                yield batch
        finally:
            self.close()

    def run(self) -> Iterator[tuple[Batch, list[Fault]]]:
        """Yield each step's batch and the faults of the records that were replaced in it."""
        raise NotImplementedError

    def close(self) -> None:
        """End processes and threads; iterating again starts afresh from the beginning of the plan."""
        raise NotImplementedError


class TorchLoader(Loader):
    """Batches on the CPU (pinned for a CUDA device), decoded by `workers` processes, or in this one with
    0."""

    def __init__(self, reader: SampleReader, plan: Plan, tally: Tally, workers: int, device: torch.device):
        super().__init__(plan, tally)
        self._pin = device.type == "cuda"
        self._chunks = _Chunks(reader, plan)
        self._loader = DataLoader(
            self._chunks,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=max(2, math.ceil(AHEAD * self._chunks.per_step / workers)) if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default would draw from the global one and change the training
        )
        self._running: list[Iterator] = []
        self._processes: list = []

    def run(self) -> Iterator[tuple[Batch, list[Fault]]]:
        before = multiprocessing.active_children()
        self._running = [iter(self._loader)]
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        for step in range(self.plan.steps):
            chunks = []
            for _ in range(self._chunks.per_step):
                chunk = self._receive()
                if isinstance(chunk, DataError):
                    raise chunk
                chunks.append(chunk)
            image, text, ids, epochs, faults = zip(*chunks)
            shape = (self.plan.local_batch, *image[0].shape[1:])
            whole = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
            torch.cat(image, out=whole)
            batch = Batch(whole, torch.cat(text), torch.cat(ids), torch.cat(epochs), self.plan.first(step))
            yield batch, [fault for part in faults for fault in part]

    def _receive(self):
        try:
            return next(self._running[0])
        except (RuntimeError, OSError, EOFError) as error:  # torch's words for it depend on the moment
            # A dying process closes its pipes, the sentinel among them, a moment before it can be waited for.
            ended = wait([process.sentinel for process in self._processes], timeout=1)
            dead = [process for process in self._processes if process.sentinel in ended]
            for process in dead:
                process.join(timeout=5)
            if not dead:
                raise
            raise WorkerLost(dead[0].pid, dead[0].exitcode) from error

    def close(self) -> None:
        # torch ends its workers when its iterator is deleted, which the traceback of an error in it delays to
        # after the exit handlers. Private, but the same since torch 1.0; without workers there is no such
        # method.
        for iterator in self._running:
            getattr(iterator, "_shutdown_workers", int)()
        self._running.clear()
        for process in self._processes:  # one that is stuck would be waited for without end
            if process.is_alive():
                process.kill()
                process.join()
        self._processes.clear()


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
    more than max_bad records and more than the share max_bad_share are bad. ValueError for settings that do
    not fit.
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
    from .dali import DaliLoader

    return DaliLoader(reader, plan, tally, workers, device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
