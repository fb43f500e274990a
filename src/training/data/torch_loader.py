"""The PyTorch loader: batches decoded on the CPU by worker processes (`workers.py`), or by this process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .batch import Batch, Chunk, Loader, Plan, Tally, stack_samples
from .samples import Fault, SampleReader
from .workers import Workers

CHUNK = 32  # samples per message of a worker


class _Chunks:
    """Item i = chunk i % per_step of step i // per_step, decoded; what a worker process makes."""

    def __init__(self, reader: SampleReader, plan: Plan):
        self.reader, self.plan = reader, plan
        self.per_step = math.ceil(plan.local_batch / CHUNK)

    def __len__(self) -> int:
        return self.plan.steps * self.per_step

    def rows(self, item: int) -> slice:
        """The rows of its batch that a chunk fills."""
        start = item % self.per_step * CHUNK
        return slice(start, min(start + CHUNK, self.plan.local_batch))

    def shape(self, item: int) -> tuple[int, ...]:
        rows = self.rows(item)
        return rows.stop - rows.start, *self.reader.shape

    def fill(self, item: int, image: Tensor) -> Chunk:
        """Pixels into `image`, uint8 (B, V, 3, h, w); returns the rest of the samples."""
        positions = self.plan.positions(item // self.per_step)[self.rows(item)]
        return stack_samples(self.reader.decode_all(self.reader.read(positions), image))


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
            shape = self.plan.local_batch, *self.reader.shape
            image = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            chunks = []
            for item in range(step * self._chunks.per_step, (step + 1) * self._chunks.per_step):
                self._item = item
                chunks.append(make(item, image[self._chunks.rows(item)]))
            yield self.assemble(step, image, chunks)

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
