"""The state of a run on this rank: shared by the trainer, which changes it, and by checkpoints, which store it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from rwkv_clip.base_weights import Base
from rwkv_clip.dist import World
from rwkv_clip.losses import Objective
from rwkv_clip.models.specification import ContrastiveModel

from .averaging import make_average
from .faults.nonfinite import FiniteGuard
from .optim import build_optimizer
from .parallel import Shards, distribute_model, is_sharded
from .settings import Settings

VALIDATION, EVALUATION = "validation", "evaluation"  # on --val-data, of --eval


@dataclass
class Progress:
    """How far a run has come: all that resuming needs besides weights and optimizer state."""

    step: int = 0
    samples_seen: int = 0
    evaluated: dict[str, int] = field(default_factory=dict)  # the step at which each evaluation was done last
    best: dict[str, Any] = field(default_factory=dict)  # metric, value and step of the best so far by --keep-best
    changes: list[dict[str, Any]] = field(default_factory=list)  # settings that --allow-change let differ, and when
    records: dict[str, Any] = field(default_factory=dict)  # number and digest of those trained on, where known


class TrainState:
    """Model, objective, optimizer and progress of one run.

    parallel: the model to call in training. shards: what this rank holds of the parameters. epoch_samples: records in
    an epoch.
    """

    def __init__(
        self, model: ContrastiveModel, objective: Objective, settings: Settings, world: World, epoch_samples: int
    ):
        self.settings, self.world, self.epoch_samples = settings, world, epoch_samples
        self.model, self.objective = model.train(), objective.to(world.device)
        if settings.parallel.grad_checkpointing:
            model.set_grad_checkpointing(True)
        self.parallel = distribute_model(model, self.objective, settings.parallel, world)
        self.shards = Shards(model, self.objective)
        self.optimizer = build_optimizer(self.shards, settings.optimizer)
        self.average = make_average(self.shards, settings.optimizer)
        scaler = ShardedGradScaler if is_sharded(settings.parallel, world) else torch.amp.GradScaler
        fp16 = settings.parallel.precision == "amp"
        self.scaler = scaler(world.device.type, enabled=fp16, growth_interval=200)  # as released; torch's is 2000
        self.watch = FiniteGuard(world, settings.faults.max_nonfinite if settings.faults.on_nonfinite == "skip" else 0)
        self.progress = Progress()
        self.base: Base | None = None  # the weights that adapters belong to

    @property
    def global_batch(self) -> int:
        """Pairs of a step, over all ranks."""
        return self.settings.parallel.batch_size * self.settings.parallel.accum_freq * self.world.size

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch; the last one may reach into the next."""
        return math.ceil(self.epoch_samples / self.global_batch)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run. The released rule, samples // world // batch + 1, but without its empty step where
        the batch divides the data."""
        settings = self.settings.optimizer
        return settings.max_steps or settings.epochs * self.epoch_steps

    def take_back(self, first: int) -> None:
        """Undo the count of the steps from `first` on, which changed nothing."""
        steps = self.progress.step - first
        self.progress.step -= steps
        self.progress.samples_seen -= steps * self.global_batch
