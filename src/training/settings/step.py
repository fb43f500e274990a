"""How a step is computed, and what it does to the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rwkv_clip.config import ranged

from ..optimizer_choice import ADAMW, choose_options, find_optimizer, try_optimizer

Precision = Literal["auto", "fp32", "amp", "amp_bf16"]


@dataclass(frozen=True)
class ParallelSettings:
    """How a step is computed: batch size, precision, devices and ranks."""

    batch_size: int = ranged(512, minimum=1)
    """Pairs per rank that the towers process at once; the pairs of all ranks and micro-batches are each other's
    negatives."""
    accum_freq: int = ranged(1, minimum=1)
    """Micro-batches per rank and step: batch_size x accum_freq x ranks pairs a step, in the memory of batch_size."""
    precision: Precision = "amp_bf16"
    """amp_bf16 (bfloat16) and amp (float16, with a gradient scaler) autocast the towers; weights, optimizer and loss
    stay float32. auto: amp_bf16 where the device computes in it, else fp32."""
    device: str | None = None
    """cpu, cuda or mps; default: the best present."""
    torchcompile: bool = False
    """Compile the towers with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What each rank holds of the model: all of it (ddp), a shard (fsdp), or a shard within its node (hsdp)."""
    use_bn_sync: bool = False
    """Batch norms, as ResNets have, normalise with the statistics of all ranks' rows."""
    deterministic: bool = False
    """The same bits on 1, 2, 4, .. --max-ranks ranks: micro-batches of a fixed size, summed in a fixed order."""
    max_ranks: int = ranged(8, minimum=1)
    """With --deterministic: the largest number of ranks, a power of two."""

    def problems(self) -> list[str]:
        found = []
        if self.max_ranks & (self.max_ranks - 1):
            found.append(f"max_ranks: {self.max_ranks} is not a power of two (1, 2, 4, 8, ..)")
        if self.use_bn_sync:
            apart = {
                "deterministic": (self.deterministic, "statistics depend on the number of ranks"),
                "accum_freq": (self.accum_freq > 1, "micro-batches are normalised one by one"),
                "torchcompile": (self.torchcompile, "a graph holds no exchange between ranks"),
            }
            found += [f"use_bn_sync: not with {name}: {why}; leave one out" for name, (on, why) in apart.items() if on]
        if self.deterministic and self.parallel != "ddp":
            found.append(f"deterministic: needs parallel ddp, not {self.parallel}")
        if self.device is not None and self.device.partition(":")[0] not in ("cpu", "cuda", "mps"):
            found.append(f"device: {self.device!r} is not cpu, cuda or mps")
        return found


@dataclass(frozen=True)
class PublishedSettings:
    """What a recipe's learning rate was published with."""

    lr: float | None = field(default=None, metadata={"limits": {"above": 0}})
    """Learning rate."""
    batch: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Pairs in a step."""

    def problems(self) -> list[str]:
        if (self.lr is None) != (self.batch is None):
            return [f"published: lr {self.lr} and batch {self.batch}; set both or neither"]
        return []


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its schedule."""

    epochs: int = ranged(32, minimum=1)
    """Passes over the records."""
    max_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Stop (and complete the schedule) after this many steps instead of after --epochs."""
    opt: str = "adamw"
    """Optimizer: adamw, or another of timm or torch by name (lion, adafactor, muon, sgd, ..; timm/NAME, torch/NAME)."""
    opt_kwargs: tuple[str, ...] = ()
    """Options of the optimizer, KEY=VALUE with values as Python writes them."""
    momentum: float | None = field(default=None, metadata={"limits": {"minimum": 0, "below": 1}})
    """Of optimizers that have it; default: the optimizer's own, of timm's 0.9."""
    lr: float = ranged(1e-3, above=0)
    """Learning rate at its peak."""
    lr_image: float | None = field(default=None, metadata={"limits": {"above": 0}})
    """Learning rate of the image tower; default: --lr. The schedule is that of --lr."""
    lr_text: float | None = field(default=None, metadata={"limits": {"above": 0}})
    """Learning rate of the text tower; default: --lr."""
    layer_decay_image: float | None = field(default=None, metadata={"limits": {"above": 0, "maximum": 1}})
    """Each layer of the image tower learns at this multiple of the next one's rate, the last at the tower's (timm)."""
    layer_decay_text: float | None = field(default=None, metadata={"limits": {"above": 0, "maximum": 1}})
    """The same for the text tower."""
    published: PublishedSettings = field(default=PublishedSettings())
    """Of a recipe: a run with a quarter of its batch or less, but not a lower --lr, is warned."""
    wd: float = ranged(0.2, minimum=0)
    """Weight decay."""
    decay: Literal["all", "matrices"] = "matrices"
    """Weight decay on every parameter (as released) or only on tensors of two or more dimensions."""
    beta1: float = ranged(0.9, minimum=0, below=1)
    """Of AdamW, and of others that have a pair of betas."""
    beta2: float = ranged(0.98, minimum=0, below=1)
    """The same for the second moment."""
    eps: float = ranged(1e-8, above=0)
    """Added to the root of the second moment: by AdamW, and by others whose own is 1e-8."""
    schedule: Literal["onecycle", "cosine", "constant", "const-cooldown"] = "cosine"
    """One-cycle: lr/25 up to lr, down to lr/25/1e4, both cosine. Cosine: linear warm-up, then down to 0.
    const-cooldown: linear warm-up, lr, then down to --lr-cooldown-end over the last --epochs-cooldown."""
    cycle_beta1: bool = False
    """One-cycle only: cycle beta1 0.95 -> 0.85 -> 0.95 inversely to the learning rate, as the released recipe does."""
    warmup: int | None = field(default=None, metadata={"limits": {"minimum": 0}})
    """Steps of warm-up; default: --warmup-fraction of all steps."""
    warmup_fraction: float = ranged(0.1, minimum=0, below=1)
    """Fraction of all steps spent warming up, unless --warmup counts them."""
    epochs_cooldown: float | None = field(default=None, metadata={"limits": {"minimum": 0}})
    """const-cooldown: epochs at the end in which the learning rate falls."""
    lr_cooldown_end: float = ranged(0.0, minimum=0)
    """const-cooldown: learning rate at the end."""
    lr_cooldown_power: float = ranged(1.0, above=0)
    """const-cooldown: power of the fall; 1 is linear."""
    grad_clip_norm: float | None = field(default=1.0, metadata={"limits": {"above": 0}})
    """Largest norm of all gradients together; None: no limit."""
    ema_decay: float | None = field(default=None, metadata={"limits": {"above": 0, "below": 1}})
    """Keep an average of the weights: a step adds 1 - this of the new ones. It is validated, too, and saved."""
    ema_warmup: bool = True
    """Average faster at first: with a decay of (1 + step) / (10 + step) until that is --ema-decay (TensorFlow's)."""

    def problems(self) -> list[str]:
        found = self._problems_of_schedule()
        if self.momentum is not None or self.opt_kwargs or self.opt.lower() != ADAMW:
            try:
                choice = find_optimizer(self.opt)
                betas = (self.beta1, self.beta2)
                options = choose_options(choice, self.opt_kwargs, betas, self.eps, self.momentum)
                if self.cycle_beta1 and choice and not choice.has_betas:
                    found.append(f"cycle_beta1: {choice} has no beta1; use another --schedule")
                if problem := try_optimizer(choice, options).problem:
                    found.append(f"opt: {choice or ADAMW} {problem}")
            except ValueError as error:
                found.append(str(error))
        return found

    def _problems_of_schedule(self) -> list[str]:
        found = []
        if self.cycle_beta1 and self.schedule != "onecycle":
            found.append(f"cycle_beta1: needs schedule onecycle, not {self.schedule}")
        cools = self.schedule == "const-cooldown"
        if cools and self.epochs_cooldown is None:
            found.append("epochs_cooldown: not set; schedule const-cooldown needs the epochs that the end takes")
        for name, default in (("epochs_cooldown", None), ("lr_cooldown_end", 0.0), ("lr_cooldown_power", 1.0)):
            if not cools and getattr(self, name) != default:
                found.append(f"{name}: is for schedule const-cooldown, not {self.schedule}; leave it out")
        if cools and self.max_steps is None and (self.epochs_cooldown or 0) > self.epochs:
            found.append(f"epochs_cooldown: {self.epochs_cooldown:g} of {self.epochs} epochs; use at most as many")
        if self.lr_cooldown_end > self.lr:
            found.append(f"lr_cooldown_end: {self.lr_cooldown_end:g} is more than lr, {self.lr:g}")
        if self.ema_decay is None and not self.ema_warmup:
            found.append("ema_warmup: is for --ema-decay, which is not set")
        return found

    @property
    def takes_shards(self) -> bool:
        """Whether the optimizer works on shards as on whole parameters. ValueError as `problems`."""
        choice = find_optimizer(self.opt)
        options = choose_options(choice, self.opt_kwargs, (self.beta1, self.beta2), self.eps, self.momentum)
        return try_optimizer(choice, options).sharded
