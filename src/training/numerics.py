"""Non-finite numbers: kept from the weights on the device, reported one step later, so that no step waits for a GPU.

From the first bad step on the optimizer is told to skip, on all ranks, until the host has read the verdict and stops
the run. The steps queued in between change nothing: the weights stay those before the bad step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_clip.dist import World, max_over_ranks

NAMED = 8  # records that an error names


class NumericsError(RuntimeError):
    """Loss or gradient is not finite. The weights of the step before are intact."""


@dataclass(frozen=True)
class Verdict:
    """One step's numbers on their way to the host: failed (0 or 1), loss, gradient norm."""

    step: int
    records: list[int]
    rank: int
    numbers: Tensor
    arrival: torch.cuda.Event | None

    def check(self) -> None:
        """Wait for the numbers. NumericsError if they are not finite on some rank."""
        if self.arrival is not None:
            self.arrival.synchronize()
        failed, loss, grad_norm = self.numbers.tolist()
        if failed:
            raise NumericsError(
                f"step {self.step}: loss {loss:g}, gradient norm {grad_norm:g}; "
                f"records {self.records}.. on rank {self.rank}. Try a lower --lr or --precision fp32"
            )


class Watch:
    """Judges every step on the device; `report` and `check` tell the host."""

    def __init__(self, world: World):
        self._world, self._failed = world, torch.zeros((), device=world.device)
        self._pending: Verdict | None = None

    def judge(self, loss: Tensor, grad_norm: Tensor, may_overflow: bool) -> Tensor:
        """1. where the optimizer must skip this step, else 0.: float scalar on the device, equal on all ranks.

        may_overflow: a gradient scaler is at work; it answers to gradients that are not finite, and only a loss that is
        not is an error.
        """
        overflow = ~grad_norm.isfinite()
        failed = ~loss.isfinite() if may_overflow else ~loss.isfinite() | overflow
        self._failed = max_over_ranks(torch.maximum(self._failed, failed.float()))
        return torch.maximum(self._failed, overflow.float())

    def report(self, step: int, ids: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """Send this step's verdict to the host and check the one of the step before."""
        numbers = torch.stack((self._failed, loss.float(), grad_norm.float()))
        arrival = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)  # pinned, so the host goes on
            arrival = torch.cuda.Event()
            arrival.record()
        verdict = Verdict(step, ids[:NAMED].tolist(), self._world.rank, numbers.cpu(), arrival)
        before, self._pending = self._pending, verdict
        if before is not None:
            before.check()

    def check(self) -> None:
        """Wait for the last step. Before anything that leaves the device for good: a log line, a checkpoint."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.check()
