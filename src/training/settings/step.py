"""How a step is computed, and what it does to the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rwkv_clip.config import ranged

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
    batch: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Pairs in a step."""

    def problems(self) -> list[str]:
        if (self.lr is None) != (self.batch is None):
            return [f"published: lr {self.lr} and batch {self.batch}; set both or neither"]
        return []


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    epochs: int = ranged(32, minimum=1)
    """Passes over the records."""
    max_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Stop (and complete the schedule) after this many steps instead of after --epochs."""
    lr: float = ranged(1e-3, above=0)
    published: PublishedSettings = field(default=PublishedSettings())
    """Of a recipe: a run with a quarter of its batch or less, but not a lower --lr, is warned."""
    wd: float = ranged(0.2, minimum=0)
    decay: Literal["all", "matrices"] = "matrices"
    """Weight decay on every parameter (as released) or only on tensors of two or more dimensions."""
    beta1: float = ranged(0.9, minimum=0, below=1)
    beta2: float = ranged(0.98, minimum=0, below=1)
    eps: float = ranged(1e-8, above=0)
    schedule: Literal["onecycle", "cosine", "constant"] = "cosine"
    """One-cycle: lr/25 up to lr, down to lr/25/1e4, both cosine. Cosine: linear warm-up, then down to 0."""
    cycle_beta1: bool = False
    """One-cycle only: cycle beta1 0.95 -> 0.85 -> 0.95 inversely to the learning rate, as the released recipe does."""
    warmup: int | None = field(default=None, metadata={"limits": {"minimum": 0}})
    """Steps of warm-up; default: --warmup-fraction of all steps."""
    warmup_fraction: float = ranged(0.1, minimum=0, below=1)
    """Fraction of all steps spent warming up, unless --warmup counts them."""
    grad_clip_norm: float | None = field(default=1.0, metadata={"limits": {"above": 0}})

    def problems(self) -> list[str]:
        if self.cycle_beta1 and self.schedule != "onecycle":
            return [f"cycle_beta1: needs schedule onecycle, not {self.schedule}"]
        return []
