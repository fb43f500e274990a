"""The training loop. It knows no method by name: model, objective, view rule and schedule are what the settings say.

A step is a pure function of (weights, optimizer state, step): the batch follows from the position, and what is random
in it from the samples or from (seed, step, piece of the batch), so no random state has to be saved for an exact resume.

A step only queues work: nothing in it waits for a GPU, which computes one step while the host prepares the next.

Data that stand still hold up nobody who has got a signal. One process saves at once. Of several ranks, which wait for
each other in every step, the one without data takes part with a blank batch, and the step is void on all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from rwkv_clip.config import Settings
from rwkv_clip.dist import PeerLost, World, mean_over_ranks
from rwkv_clip.factory import pixel_statistics
from rwkv_clip.transform import normalize

from .checkpointing import own_state, take_snapshot
from .data.augment import draw_drops, draw_views
from .data.torch_loader import Batch, Batches, Loader
from .faults.nonfinite import NumericsError, Statistics, Watch, gradient_norms
from .faults.signals import Interrupted, Preempted, Preemption
from .faults.watchdog import Heartbeat
from .gradients import Computed, GradientStep, Inputs
from .log import RunLog
from .optim import Schedule, build_optimizer, set_step, update_weights
from .parallel import Shares, distribute_model, has_shares
from .saver import Saver

__all__ = ["Meter", "NumericsError", "Progress", "Trainer", "train"]

MAX_LOGIT_SCALE = math.log(100)
SLICE = 0.1  # seconds between two looks at what may end the wait for data
PATIENCE = 1.0  # seconds after a signal in which data that are only late may still come


@dataclass
class Progress:
    """How far a run is: all that a resumption needs besides weights and optimizer state."""

    step: int = 0
    samples_seen: int = 0
    validated: int = 0  # the step of the last validation
    changes: list[dict[str, Any]] = field(default_factory=list)  # settings that --allow-change let differ, and when
    records: dict[str, Any] = field(default_factory=dict)  # number and digest of those trained on, where that is said


class Trainer:
    """Weights, optimizer and schedule of one run on this rank."""

    def __init__(self, model: nn.Module, objective: nn.Module, settings: Settings, world: World, epoch_samples: int):
        self.settings, self.world, self.epoch_samples = settings, world, epoch_samples
        # The released rule, samples // world // batch + 1, but without its empty step where the batch divides the data.
        self.total_steps = settings.max_steps or settings.epochs * math.ceil(epoch_samples / self.global_batch)
        self.model, self.objective = model.train(), objective.to(world.device)
        if settings.grad_checkpointing:
            model.set_grad_checkpointing(True)
        parallel = distribute_model(model, settings, world)
        self.gradients = GradientStep(model, parallel, self.objective, settings, world, self.normalize)
        self.shares = Shares(model)
        self.optimizer = build_optimizer(model, settings, self.shares)
        self.schedule = Schedule.from_settings(settings, self.total_steps)
        scaler = ShardedGradScaler if has_shares(settings, world) else torch.amp.GradScaler
        fp16 = settings.precision == "fp16"
        self.scaler = scaler(world.device.type, enabled=fp16, growth_interval=200)  # as released; torch's is 2000
        self.progress = Progress()
        # On the device from the start: a constant made in a step is a copy that the host waits for.
        self.pixel_statistics = [torch.tensor(values, device=world.device) for values in pixel_statistics(model)]
        self.watch = Watch(world, settings.max_nonfinite if settings.on_nonfinite == "skip" else 0)
        self.copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None

    @property
    def global_batch(self) -> int:
        return self.settings.batch_size * self.settings.accum_freq * self.world.size

    def normalize(self, image: Tensor) -> Tensor:
        """Stored pixels, uint8, as the model takes them."""
        return normalize(image, *self.pixel_statistics)

    def choose_view(self, batch: Batch) -> Tensor:
        """(B, V, T) -> one text per image, drawn by (seed, epoch, sample), or the first: (B, T); or all of them. Only
        the first --texts count."""
        text = batch.text[:, : self.settings.texts]
        if self.settings.views == "all":
            return text
        if self.settings.views == "first":
            return text[:, 0]
        drawn = draw_views(self.settings.seed, batch.epochs.numpy(), batch.ids.numpy(), text.shape[1])
        return text[torch.arange(len(drawn)), torch.from_numpy(drawn)]

    def draw_drops(self, batch: Batch) -> Tensor | None:
        """Stochastic depth's numbers for every branch and sample, float32 (branches, B); None for a model without."""
        branches = getattr(self.model, "drop_branches", 0)
        if not branches:
            return None
        return torch.from_numpy(
            draw_drops(self.settings.seed, batch.epochs.numpy(), batch.ids.numpy(), branches).astype(np.float32)
        )

    def step(self, batch: Batch) -> dict[str, Tensor | float]:
        """One optimizer step. Returns what the log shows; tensors stay on the device.

        NumericsError when the step before was not finite; `check` says it of this one.
        """
        return self._step(batch, void=False)

    def sit_out(self, blank: Batch) -> dict[str, Tensor | float]:
        """Take part in a step for which this rank, which has got a signal, has no data: it is void on all ranks."""
        return self._step(blank, void=True)

    def check(self) -> int:
        """Wait for the last step, and take back the steps that were void. Returns a signal that some rank has got, else
        0. NumericsError as by the watch."""
        self.watch.check()
        if self.watch.first_void is not None:
            steps = self.progress.step - self.watch.first_void
            self.progress.step -= steps
            self.progress.samples_seen -= steps * self.global_batch
        return self.watch.signal

    def _step(self, batch: Batch, void: bool) -> dict[str, Tensor | float]:
        set_step(self.optimizer, self.schedule, self.progress.step)
        inputs = Inputs(*self._to_device(batch.image, self.choose_view(batch)), self.draw_drops(batch))
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # where these are not the optimizer's own
        statistics = Statistics(self.model, self.objective)
        computed = self.gradients.run(self.progress.step, inputs, self.scaler.scale)
        losses = {name: value.detach() for name, value in computed.losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        values = {
            "loss": loss,
            "grad_norm": self._update(loss, batch, computed, statistics, void),
            "logit_scale": self.model.logit_scale.detach().exp(),
            "lr": self.schedule.lr(self.progress.step),
        }
        if len(losses) > 1:
            values |= losses
        self.progress.step += 1
        self.progress.samples_seen += self.global_batch
        return values | computed.report

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copies on a stream of their own: a GPU makes them while it still computes the step before."""
        if self.copies is None:
            return [tensor.to(self.world.device) for tensor in tensors]
        now = torch.cuda.current_stream(self.world.device)
        with torch.cuda.stream(self.copies):
            pinned = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
            sent = [tensor.to(self.world.device, non_blocking=True) for tensor in pinned]
        now.wait_stream(self.copies)
        for tensor in sent:
            tensor.record_stream(now)  # allocated on one stream, used on the other
        return sent

    def _update(self, loss: Tensor, batch: Batch, computed: Computed, statistics: Statistics, void: bool) -> Tensor:
        self.shares.take_gradients()
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.grad_clip_norm or float("inf")
        towers = gradient_norms(self.model)
        grad_norm = torch.linalg.vector_norm(torch.stack(list(towers.values())))
        nn.utils.clip_grads_with_norm_(self.shares.own.values(), limit, grad_norm)
        skip = self.watch.judge(loss, grad_norm, may_overflow=self.scaler.is_enabled(), void=void)
        update_weights(self.optimizer, skip)
        statistics.restore(skip)
        self._update_scale()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        features = (computed.image_features, computed.text_features)
        epoch = self.progress.samples_seen // self.epoch_samples
        self.watch.report(self.progress.step, batch.ids, loss, grad_norm, towers, features, epoch)
        return grad_norm

    def _update_scale(self) -> None:
        """After a bad step the scale falls, a void one leaves it. (Private, but `state_dict` waits for the device.)"""
        if self.scaler.is_enabled():
            kept = [(state, state.clone()) for state in (self.scaler._scale, self.scaler._growth_tracker)]
            self.scaler.update()
            for state, before in kept:
                state.copy_(torch.where(self.watch.void > 0, before, state))

    def save(self, saver: Saver | None, name: str, last: bool = False) -> None:
        """Have a checkpoint written by the main rank, which has a saver; `last`: wait until it is on the disk.

        NumericsError, and no checkpoint, when the last step or what is to be saved is not finite. StorageError as by
        the saver.
        """
        self.check()
        self.watch.check_finite(self.shares.own | own_state(self))
        weights, optim, state = take_snapshot(self, name)
        if saver:
            saver.save(self.progress.step, weights, optim, state, last)


class Meter:
    """Speed and waiting time between two log records, on a monotonic clock."""

    def __init__(self):
        self.started = time.monotonic()
        self.reset()

    def reset(self) -> None:
        self.begin, self.waited, self.samples, self.steps = time.monotonic(), 0.0, 0, 0

    def measure(self, steps_left: int) -> dict[str, float]:
        """samples_per_second, wait_share (of time spent waiting for data), eta_seconds, peak_memory_mb."""
        passed = max(time.monotonic() - self.begin, 1e-9)
        return {
            "samples_per_second": self.samples / passed,
            "wait_share": self.waited / passed,
            "eta_seconds": passed / max(self.steps, 1) * steps_left,
            "seconds": time.monotonic() - self.started,
            "peak_memory_mb": peak_memory_mb(),
        }


def peak_memory_mb() -> float:
    """Largest memory so far, in MiB: the device's where it is CUDA, else this process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def train(
    trainer: Trainer,
    loader: Loader,
    folder: Path,
    name: str,
    log: RunLog | None,
    validate: Callable[[], dict[str, float]],
    preemption: Preemption,
    heart: Heartbeat,
    saver: Saver | None,
) -> None:
    """Run the loader's steps: log, validate, save. Every rank calls this; only the main rank has a log and a saver.

    `validate()` returns metrics on the main rank and an empty dict elsewhere; Interrupted when a signal ends it early.
    Preempted, on all ranks after the same step and with it saved, when one of them has got a signal. PeerLost, with
    all saved, when the data of a process that is alone stand still for its timeout. StorageError when checkpoints
    cannot be written.
    """
    settings, progress, meter = trainer.settings, trainer.progress, Meter()
    heart.follow(lambda: progress.step)
    trainer.watch.open(folder, progress.step, preemption)
    batches, saved = iter(loader), progress.step
    signal, stuck = preemption.agree(trainer.world), ""
    while not signal:
        step, last = progress.step, progress.step == trainer.total_steps
        # First what is due after the last step, which a resumed run may have to make up for.
        validates = progress.validated < step and (last or _is_due(step, settings.val_every_n_steps))
        saves = saved < step and (last or _is_due(step, settings.save_every_n_steps))
        if (validates or saves) and (signal := trainer.check()):
            break
        if validates:
            _validate(progress, log, validate)
            meter.reset()
            signal = preemption.agree(trainer.world)
        if saves and not signal:
            with heart.busy("saving"):
                trainer.save(saver, name, last)
            saved = step
            meter.reset()
        if signal or last:
            break
        waiting = time.monotonic()
        stuck = _wait_for_data(batches, loader, trainer.world, preemption, heart)
        meter.waited += time.monotonic() - waiting
        if stuck and trainer.world.size == 1:
            signal = preemption.signal
            break
        if saver:
            saver.check()
        values = trainer.sit_out(loader.blank()) if stuck else trainer.step(next(batches))
        meter.samples += trainer.global_batch
        meter.steps += 1
        if log:
            log.advance()
        if _is_due(progress.step, settings.log_every_n_steps) or progress.step == trainer.total_steps:
            trainer.check()
            _write(trainer, log, meter, mean_over_ranks(values, trainer.world.device), loader.skipped)
            meter.reset()
        signal = trainer.watch.signal
    if signal or stuck:
        with heart.busy("saving"):
            trainer.save(saver, name, last=True)
        preemption.agree(trainer.world)  # torchrun ends all ranks when the first has gone: the main rank has to be done
        heart.leave(None)  # a loader that stands still may take longer to end than the others do
    if signal:
        raise Preempted(f"{Signals(signal).name} after step {progress.step}")
    if stuck:
        raise PeerLost(f"{stuck}; all is saved after step {progress.step}, --timeout {heart.timeout:g} waits longer")


def _wait_for_data(batches: Batches, loader: Loader, world: World, preemption: Preemption, heart: Heartbeat) -> str:
    """Until the next batch is there: "". What the data stand still at once there is a signal, or, where this process is
    alone, once the timeout is over."""
    began = time.monotonic()
    with heart.waiting(loader.place):
        while not batches.wait(SLICE):
            now = time.monotonic()
            late = preemption.signal and now - preemption.since > PATIENCE
            if late or (world.size == 1 and now - began > heart.timeout and not heart.is_starting):
                return f"no data for {now - began:.0f} s, waiting for {loader.place()}"
    return ""


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _write(trainer: Trainer, log: RunLog | None, meter: Meter, numbers: dict[str, float], skipped: dict) -> None:
    """A record of the step that was just done; not of a void one."""
    if log and trainer.watch.first_void is None:
        numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}  # a skipped step's
        speed = meter.measure(trainer.total_steps - trainer.progress.step)
        epoch = trainer.progress.samples_seen / trainer.epoch_samples
        log.write(trainer.progress.step, {"epoch": epoch, **numbers, **speed, "skipped": skipped})


def _validate(progress: Progress, log: RunLog | None, validate: Callable[[], dict[str, float]]) -> None:
    try:
        metrics = validate()
    except Interrupted:
        return
    progress.validated = progress.step
    if log and metrics:
        log.write(progress.step, {f"val_{key}": value for key, value in metrics.items()})
        log.say(f"step {progress.step}: " + " ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
