"""AdamW, its parameter groups, and schedules, which are pure functions of the step and keep no state of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .parallel import Shards
from .settings import OptimizerSettings

# torch's OneCycleLR, which the released recipe uses: start = peak / 25, end = start / 1e4, beta1 0.95 -> 0.85 -> 0.95.
START_DIVISOR, END_DIVISOR = 25.0, 1e4
BETA1_HIGH, BETA1_LOW = 0.95, 0.85
SLOTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for every parameter
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

    @classmethod
    def from_settings(cls, settings: OptimizerSettings, total: int) -> Schedule:
        warmup = settings.warmup_fraction * total if settings.warmup is None else settings.warmup
        return cls(settings.schedule, settings.lr, total, warmup, settings.beta1, settings.cycle_beta1)

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


def build_optimizer(shards: Shards, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW, fused where the device has it, for what this rank holds of the trained parameters.

    decay=matrices exempts tensors of fewer than two dimensions (after squeezing): norms, biases, mixing coefficients,
    temperature."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in shards.whole():
        if parameter.requires_grad:
            matrix = sum(side > 1 for side in parameter.shape) > 1  # of the whole: a shard may have one row
            (decayed if settings.decay == "all" or matrix else spared).append(shards.own[name])
    groups = [{"params": decayed, "weight_decay": settings.wd}, {"params": spared, "weight_decay": 0.0}]
    device = next(iter(shards.own.values())).device
    fused = device.type in FUSED
    # As a tensor, the learning rate changes without a new graph. Float64 on a CPU, the same bits as a Python number;
    # GPUs read float32.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=torch.tensor(settings.lr, dtype=dtype, device=device) if fused else settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=fused,
    )


def set_step(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Put a step's learning rate and beta1 into every group. Fused kernels take beta1 as a number only."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(schedule.lr(step))
        else:
            group["lr"] = schedule.lr(step)
        group["betas"] = (schedule.beta1_at(step), group["betas"][1])


def update_weights(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """One optimizer step; where `skip` is 1, neither weights nor optimizer state change.

    skip: float scalar on the device. Fused kernels read it there; without them the host waits for it.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip  # type: ignore[attr-defined] # GradScaler's way, too: it belongs to this step
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip.item():
        optimizer.step()


def pack_state(optimizer: torch.optim.Optimizer, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Optimizer state as tensors named `parameter/slot`; independent of the order of groups. own: by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in own.items()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def unpack_state(
    optimizer: torch.optim.Optimizer,
    own: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    may_begin: bool = False,
) -> None:
    """Inverse of `pack_state`. ValueError when the state of a parameter of `own` is missing or left over.

    may_begin: parameters without any state begin to train now, as after another freezing."""
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in own:
            raise ValueError(f"optim.safetensors: {key} belongs to no parameter of this model")
        parameter = own[name]
        # AdamW's step counters are float32 and live with the parameter when the fused kernel is used.
        dtype = torch.float32 if slot == "step" else parameter.dtype
        optimizer.state[parameter][slot] = value.to(parameter.device, dtype)
    wanted = [f"{name}/{slot}" for name, p in own.items() if p.requires_grad for slot in SLOTS]
    if may_begin:
        held = {key.rpartition("/")[0] for key in tensors}
        wanted = [key for key in wanted if key.rpartition("/")[0] in held]
    lacking = [key for key in wanted if key not in tensors]
    if tensors and lacking:
        raise ValueError(f"optim.safetensors: {len(lacking)} tensors are missing, the first is {lacking[0]}")
