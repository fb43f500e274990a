"""The optimizer of a run, and schedules, which are pure functions of the step and keep no state of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .optimizer_choice import choose_options, find_optimizer
from .parallel import Shards
from .parameter_groups import build_groups
from .settings import OptimizerSettings

# torch's OneCycleLR, which the released recipe uses: start = peak / 25, end = start / 1e4, beta1 0.95 -> 0.85 -> 0.95.
START_DIVISOR, END_DIVISOR = 25.0, 1e4
BETA1_HIGH, BETA1_LOW = 0.95, 0.85
FUSED = ("cpu", "cuda")  # devices whose fused AdamW is used; it reads the learning rate and a skip flag on the device


@dataclass(frozen=True)
class Schedule:
    """Learning rate and beta1 of every step 0 .. total - 1. warmup: steps, not always a whole number."""

    kind: str
    peak: float
    total: int
    warmup: float
    beta1: float
    cycle_beta1: bool = False
    cooldown: int = 0  # steps, of const-cooldown
    end: float = 0.0  # learning rate that the cool-down goes to
    power: float = 1.0

    @classmethod
    def from_settings(cls, settings: OptimizerSettings, total: int, epoch: int = 0) -> Schedule:
        """The schedule of `total` steps. epoch: steps of one."""
        warmup = settings.warmup_fraction * total if settings.warmup is None else settings.warmup
        schedule = cls(settings.schedule, settings.lr, total, warmup, settings.beta1, settings.cycle_beta1)
        if settings.epochs_cooldown is None:
            return schedule
        steps = round(settings.epochs_cooldown * epoch)
        return replace(schedule, cooldown=steps, end=settings.lr_cooldown_end, power=settings.lr_cooldown_power)

    def lr(self, step: int) -> float:
        """Learning rate that step `step` uses."""
        if self.kind == "constant":
            return self.peak
        if self.kind == "onecycle":
            start = self.peak / START_DIVISOR
            return self._cycle(step, start, self.peak, start / END_DIVISOR)
        warm = int(self.warmup)
        if step < warm:
            return self.peak * (step + 1) / warm
        if self.kind == "const-cooldown":  # open_clip's, which counts the cool-down from the end
            if step < self.total - self.cooldown:
                return self.peak
            left = (self.total - step) / self.cooldown
            return left**self.power * (self.peak - self.end) + self.end
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.total - warm, 1)))

    def beta1_at(self, step: int) -> float:
        """First momentum coefficient that step `step` uses."""
        if self.cycle_beta1:
            return self._cycle(step, BETA1_HIGH, BETA1_LOW, BETA1_HIGH)
        return self.beta1

    def _cycle(self, step: int, start: float, peak: float, end: float) -> float:
        """Cosine from start to peak over the warm-up, then from peak to end."""
        turn, last = self.warmup - 1, self.total - 1
        if step <= turn:
            done, low, high = step / turn if turn > 0 else 1.0, start, peak
        else:
            done, low, high = (step - max(turn, 0)) / max(last - max(turn, 0), 1), peak, end
        return high + (low - high) / 2 * (1 + math.cos(math.pi * done))


def build_optimizer(shards: Shards, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that --opt names for what this rank holds of the trained parameters; AdamW is fused where the
    device has it."""
    choice, betas = find_optimizer(settings.opt), (settings.beta1, settings.beta2)
    options = choose_options(choice, settings.opt_kwargs, betas, settings.eps, settings.momentum)
    groups = build_groups(shards, settings, choice)
    if choice is not None:
        return choice.build(groups, settings.lr, options)
    device = next(iter(shards.own.values())).device
    fused = device.type in FUSED
    if fused:
        # As a tensor, the learning rate changes without a new graph. Float64 on a CPU, the same bits as a Python
        # number; GPUs read float32.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        groups = [{**group, "lr": torch.tensor(settings.lr, dtype=dtype, device=device)} for group in groups]
    return torch.optim.AdamW(groups, settings.lr, betas, settings.eps, fused=fused, **dict(options))


def set_step(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Put a step's learning rate, times the group's `lr_scale`, and beta1, where it changes, into every group. Fused
    kernels take beta1 as a number only."""
    for group in optimizer.param_groups:
        rate = schedule.lr(step) * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if schedule.cycle_beta1:
            group["betas"] = (schedule.beta1_at(step), *group["betas"][1:])


def update_weights(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One optimizer step; where `skip` is 1, neither weights nor optimizer state change.

    skip: float scalar on the device. Fused kernels read it there; without them the host waits for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined] # GradScaler's way, too: it belongs to this step
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip.item():
        optimizer.step()
