"""Non-finite numbers: kept out of the weights on the device, reported one step later, so that no step waits for a GPU.

A step whose loss or gradient is not finite is skipped by the optimizer, on all ranks. When more of them than are
tolerated (none with --on-nonfinite stop) come in a row, the optimizer keeps skipping until the host has read the
verdict and stops the run: the weights stay those from before the first bad step.

The verdict travels in one small all-reduce per step, and with it the signals that ranks received (`signals.py`), so
that all ranks know both at the same step.

A step is void when a rank had a signal but no data for it. It is skipped on all ranks, and so are all later ones, until
the host has read the verdict and the run stops where it was before that step.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_clip.dist import World, gather, max_over_ranks
from rwkv_clip.errors import NUMERICS

from .signals import Preemption

NAMED = 8  # records that an error names
REPORT = "nonfinite.jsonl"
log = logging.getLogger(__name__)


class NumericsError(RuntimeError):
    """Loss or gradient is not finite. The weights of the step before are intact."""

    exit_code = NUMERICS


class Statistics:
    """Copies, made before a step, of buffers that a forward pass changes, such as running means."""

    def __init__(self, *modules: nn.Module):
        self._kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]

    def restore(self, skip: Tensor) -> None:
        """Restore them where `skip` is 1: a skipped step leaves no trace."""
        for buffer, before in self._kept:
            buffer.copy_(torch.where(skip > 0, before, buffer))


@dataclass(frozen=True)
class Verdict:
    """What is to be reported about a step if it is bad. Its numbers (bad steps in a row, signal, whether it is void,
    loss, gradient norm, norms of `towers`) are being copied to the host."""

    step: int
    epoch: int
    ids: Tensor
    finite: Tensor  # bool (B,), on the device: ids whose features are finite
    towers: list[str]
    numbers: Tensor
    arrival: torch.cuda.Event | None

    def read(self) -> list[float]:
        """Wait for the numbers."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.numbers.tolist()


class FiniteGuard:
    """Judges every step on the device; the host learns of it through `report` and `check`.

    tolerated: bad steps in a row that the run survives; 0 stops at the first. `signal`, `in_a_row` and `first_void` are
    what `check` last learned about signals that ranks have received, the current row of bad steps and the first void
    step: all equal on all ranks. `void`, on the device: 1 from a void step on.
    """

    def __init__(self, world: World, tolerated: int = 0):
        self.signal, self.in_a_row = 0, 0
        self.first_void: int | None = None
        self._world, self._tolerated = world, tolerated
        self._row = torch.zeros((), device=world.device)
        self.void = torch.zeros((), device=world.device)
        self._preemption, self._path = Preemption(), None
        self._pending: Verdict | None = None

    def open(self, folder: Path, first_step: int, preemption: Preemption) -> None:
        """Pass on signals, and report bad steps in a file of `folder`, from which steps that will be repeated are
        removed."""
        self._preemption, self._path = preemption, folder / REPORT
        if self._world.is_main and self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            self._path.write_text("".join(line for line in lines if _is_before(line, first_step)))

    def judge(self, loss: Tensor, grad_norm: Tensor, may_overflow: bool, void: bool = False) -> Tensor:
        """1. where the optimizer must skip this step, else 0.: float scalar on the device, equal on all ranks.

        may_overflow: a gradient scaler is in use and handles non-finite gradients; only a non-finite loss is an error.
        void: this rank has no data for the step.
        """
        overflow = ~grad_norm.isfinite()
        failed = ~loss.isfinite() if may_overflow else ~loss.isfinite() | overflow
        known = [
            torch.full((), float(x), device=self._world.device) for x in (self._preemption.signal, void)
        ]  # no copy from the host
        found = max_over_ranks(torch.stack((failed.float(), overflow.float(), *known)))
        failed, overflow, self._signal, void = found
        self.void = torch.maximum(self.void, void)
        failed = torch.maximum(failed, (self._row > self._tolerated).float())  # over the limit: no more updates
        self._row = torch.where(self.void > 0, self._row, failed * (self._row + 1))
        failed = torch.maximum(failed, self.void)
        return torch.maximum(failed, overflow)

    def report(
        self,
        step: int,
        ids: Tensor,
        loss: Tensor,
        grad_norm: Tensor,
        towers: Mapping[str, Tensor] | None = None,
        features: Iterable[Tensor] = (),
        epoch: int = 0,
    ) -> None:
        """Send this step's verdict to the host and check that of the previous step.

        towers: gradient norms by tower. features: this rank's, (B, ..) each in the order of `ids`.
        """
        towers = towers or {}
        numbers = (self._row, self._signal, self.void, loss, grad_norm, *towers.values())
        numbers = torch.stack([x.float() for x in numbers])
        arrival = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)  # pinned, so the host continues
            arrival = torch.cuda.Event()
            arrival.record()
        finite = torch.ones(len(ids), dtype=torch.bool, device=self._world.device)
        for tensor in features:
            finite &= tensor.isfinite().flatten(1).all(1)
        verdict = Verdict(step, epoch, ids, finite, list(towers), numbers.cpu(), arrival)
        before, self._pending = self._pending, verdict
        if before is not None:
            self._examine(before)

    def check(self) -> None:
        """Wait for the verdict of the last step. Call before writing a log line or a checkpoint."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._examine(pending)

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """NumericsError on all ranks when a tensor to be saved is not finite on any of them."""
        names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        # A finite sum has finite terms, and takes a tenth of the time. A non-finite one may be an overflow.
        sums = [tensors[name].detach().sum(dtype=torch.float32) for name in names]
        sums = torch.stack([total.to(self._world.device) for total in sums])  # some optimizers count on the host
        suspects = max_over_ranks((~sums.isfinite()).float()).tolist()
        names = [name for name, suspect in zip(names, suspects) if suspect]
        if not names:
            return
        wrong = [(~tensors[name].isfinite().all()).float().to(self._world.device) for name in names]
        bad = max_over_ranks(torch.stack(wrong)).tolist()
        found = [name for name, flag in zip(names, bad) if flag]
        if found:
            others = f" and {len(found) - 1} others" if len(found) > 1 else ""
            raise NumericsError(f"{found[0]}{others}: not finite; nothing is saved")

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs. After `check`."""
        return {"nonfinite_in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue the count of a checkpoint; those of versions before 0.3 have none."""
        self.in_a_row = min(state.get("nonfinite_in_a_row", 0), self._tolerated)
        self._row.fill_(self.in_a_row)

    def _examine(self, verdict: Verdict) -> None:
        """Read a step's verdict. All ranks get here at the same step and describe a bad one together. NumericsError
        beyond the limit."""
        row, signal, void, *_ = verdict.read()
        self.in_a_row, self.signal = int(row), max(self.signal, int(signal))
        if void:
            self.first_void = verdict.step if self.first_void is None else self.first_void
        if not row or void:
            return
        record = self._describe(verdict)
        rank, ids = next(iter(record["records"].items()))
        text = (
            f"step {verdict.step}: loss {float(record['loss']):g}, gradient norm {float(record['grad_norm']):g}; "
            f"records {ids[:NAMED]}{'..' if len(ids) > NAMED else ''} on rank {rank}"
        )
        if self._path is not None:
            text += f" (all: {self._path})"
            if self._world.is_main:
                self._write(record)
        if self.in_a_row > self._tolerated:
            reason = f"; {self.in_a_row} steps in a row, --max-nonfinite {self._tolerated}" if self._tolerated else ""
            raise NumericsError(f"{text}{reason}. Try a lower --lr or --precision fp32")
        if self._world.is_main:
            log.warning("%s; skipped, %d of at most %d in a row", text, self.in_a_row, self._tolerated)

    def _describe(self, verdict: Verdict) -> dict:
        """A line of the report. Numbers are means over ranks; records are those with non-finite features, by rank, or
        all records of the step where all features are finite."""
        device = self._world.device
        numbers = gather(verdict.numbers[None, 3:].to(device)).cpu()
        ids, finite = gather(torch.stack((verdict.ids.to(device), verdict.finite.long()))[None]).cpu().unbind(1)
        named = [rank[mask == 0].tolist() for rank, mask in zip(ids, finite)]
        by_features = any(named)
        named = named if by_features else ids.tolist()
        loss, grad_norm, *towers = (_plain(x) for x in numbers.mean(0).tolist())
        return {
            "step": verdict.step,
            "epoch": verdict.epoch,
            "policy": "skip" if self._tolerated else "stop",
            "in_a_row": self.in_a_row,
            "loss": loss,
            "grad_norm": grad_norm,
            "towers": dict(zip(verdict.towers, towers)),
            "ranks": [rank for rank, row in enumerate(numbers) if not row.isfinite().all()],
            "found_by": "features" if by_features else "step",
            "records": {str(rank): found for rank, found in enumerate(named) if found},
        }

    def _write(self, record: dict) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk must not hide the reason
            log.warning("%s: cannot be written (%s)", self._path, error.strerror)


def _is_before(line: str, step: int) -> bool:
    """Whether a line of the report belongs to an earlier step; one that a full disk cut off does not."""
    try:
        return json.loads(line)["step"] < step
    except ValueError:
        return False


def _plain(number: float) -> float | str:
    """JSON has no non-finite numbers: "nan", "inf", "-inf"."""
    return number if math.isfinite(number) else str(number)
