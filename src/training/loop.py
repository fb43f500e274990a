"""The training loop: waits for data, takes steps, logs, evaluates, saves.

Stalled data never delay the response to a signal. A single process saves at once. Of several ranks, which wait for each
other in every step, the one without data takes part with a blank batch, and the step is void on all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import torch

from rwkv_clip.dist import PeerLost, World, mean_over_ranks

from .best import note_best
from .checkpointing import save_run
from .data.batch import Batches, Loader
from .evaluation import Evaluation
from .faults.signals import Interrupted, Preempted, Preemption
from .faults.watchdog import Watchdog
from .log import RunLog
from .saver import Saver
from .state import TrainState
from .trainer import Trainer

SLICE = 0.1  # seconds between checks of what may end the wait for data
PATIENCE = 1.0  # seconds after a signal during which late data may still arrive


@dataclass
class RunContext:
    """What the loop works with besides trainer and data. Only the main rank has a log and a saver."""

    folder: Path
    model: str  # its name
    evaluations: Sequence[Evaluation]
    preemption: Preemption
    watchdog: Watchdog
    log: RunLog | None = None
    saver: Saver | None = None


class Meter:
    """Speed and waiting time between two log records, on a monotonic clock."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.reset()

    def reset(self) -> None:
        self.begin, self.waited, self.samples, self.steps = time.monotonic(), 0.0, 0, 0

    def count(self, samples: int) -> None:
        """Count one finished step."""
        self.samples += samples
        self.steps += 1

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
    """Peak memory so far, in MiB: of the device if it is CUDA, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def train(trainer: Trainer, loader: Loader, run: RunContext) -> None:
    """Run the loader's steps: log, evaluate, save. Every rank calls this.

    Preempted, on all ranks after the same step and with it saved, when one of them has received a signal. PeerLost,
    with everything saved, when the data of a single process stall for its timeout. StorageError when checkpoints cannot
    be written.
    """
    state, log, watchdog, preemption, meter = trainer.state, run.log, run.watchdog, run.preemption, Meter()
    progress, world, every = state.progress, state.world, state.settings.log
    watchdog.follow(lambda: progress.step)
    state.watch.open(run.folder, progress.step, preemption)
    batches, saved = iter(loader), progress.step
    signal, stuck = preemption.agree(world), ""
    while not signal:
        step, last = progress.step, progress.step == state.total_steps
        # First what is due after the previous step, which a resumed run may still have to do.
        due = [one for one in run.evaluations if _is_evaluation_due(one, state, last)]
        saves = _is_due(step, every.save_every_n_steps) or _completes_epochs(state, every.save_frequency)
        saves = saved < step and (last or saves)
        if (due or saves) and (signal := trainer.check()):
            break
        if due:
            signal, better = _evaluate(due, state, run)
            saves = saves or better or saved == step  # what a resumed run made up for is not to be repeated
            meter.reset()
        if saves and not signal:
            _save(trainer, run, last)
            saved = step
            meter.reset()
        if signal or last:
            break
        waiting = time.monotonic()
        stuck = _wait_for_data(batches, loader, world, preemption, watchdog)
        meter.waited += time.monotonic() - waiting
        if stuck and world.size == 1:
            signal = preemption.signal
            break
        if run.saver:
            run.saver.check()
        values = trainer.sit_out(loader.blank()) if stuck else trainer.step(next(batches))
        meter.count(state.global_batch)
        if log:
            log.advance()
        if _is_due(progress.step, every.log_every_n_steps) or progress.step == state.total_steps:
            trainer.check()
            numbers = mean_over_ranks({**values, **trainer.measure()}, world.device)
            _write(trainer, log, meter, numbers, loader.skipped)
            meter.reset()
        signal = state.watch.signal
    if signal or stuck:
        _save(trainer, run, last=True)
        preemption.agree(world)  # torchrun ends all ranks once the first has exited: the main rank must be done
        watchdog.leave(None)  # a stalled loader may take longer to end than the other ranks do
    if signal:
        raise Preempted(f"{Signals(signal).name} after step {progress.step}")
    if stuck:
        remedy = f"raise --timeout ({watchdog.timeout:g}) to wait longer"
        raise PeerLost(f"{stuck}; all saved after step {progress.step}; {remedy}")


def _save(trainer: Trainer, run: RunContext, last: bool) -> None:
    """Have the main rank write a checkpoint; `last`: wait until it is on disk. NumericsError, and no checkpoint, when
    the last step or anything to be saved is not finite. StorageError as raised by the saver."""
    with run.watchdog.busy("saving"):
        trainer.check()
        save_run(trainer.state, run.saver, run.model, last)


def _wait_for_data(batches: Batches, loader: Loader, world: World, preemption: Preemption, watchdog: Watchdog) -> str:
    """Wait for the next batch and return "". If the data stall, return where, once there is a signal or, in a single
    process, once the timeout has passed."""
    began = time.monotonic()
    with watchdog.waiting(loader.place):
        while not batches.wait(SLICE):
            now = time.monotonic()
            late = preemption.signal and now - preemption.since > PATIENCE
            if late or (world.size == 1 and now - began > watchdog.timeout and not watchdog.is_starting):
                return f"no data for {now - began:.0f} s, waiting for {loader.place()}"
    return ""


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _is_evaluation_due(one: Evaluation, state: TrainState, last: bool) -> bool:
    step = state.progress.step
    due = _is_due(step, one.steps) or _completes_epochs(state, one.epochs) or (last and one.epochs != 0)
    return due and state.progress.evaluated.get(one.name, 0) < step


def _completes_epochs(state: TrainState, every: int | None) -> bool:
    """Whether the last step reached the end of an epoch whose number is a multiple of `every`. An epoch may end inside
    a batch: the step that takes it completes the epoch."""
    if not every:
        return False
    seen, samples = state.progress.samples_seen, every * state.epoch_samples
    return seen // samples > (seen - state.global_batch) // samples


def _write(trainer: Trainer, log: RunLog | None, meter: Meter, numbers: dict[str, float], skipped: dict) -> None:
    """Log the step that just finished, unless it was void."""
    progress = trainer.state.progress
    if log and trainer.state.watch.first_void is None:
        numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}  # a skipped step's
        speed = meter.measure(trainer.state.total_steps - progress.step)
        epoch = progress.samples_seen / trainer.state.epoch_samples
        log.write(progress.step, {"epoch": epoch, **numbers, **speed, "skipped": skipped})


def _evaluate(due: list[Evaluation], state: TrainState, run: RunContext) -> tuple[int, bool]:
    """Evaluate and log; (a signal that ended it, or 0; whether --keep-best finds the run better than ever). Each is
    noted when it is done: what a signal ends is done again by the run that resumes, and the others are not."""
    progress, signal = state.progress, 0
    metrics: dict[str, float] = {}
    for one in due:
        try:
            found = one.measure()
        except Interrupted:
            found = None
        signal = run.preemption.agree(state.world)
        if found is not None:
            progress.evaluated[one.name] = progress.step
            logged = {f"{one.prefix}{key}": value for key, value in found.items()}
            metrics |= logged
            if run.log and found:
                run.log.write(progress.step, logged)
                run.log.say(f"step {progress.step}: " + " ".join(f"{key} {value:.3f}" for key, value in found.items()))
        if signal:
            break
    better = note_best(state.settings.evaluation.keep_best, metrics, progress, state.world)
    if better and run.log:
        best = "the best {metric} so far, {value:.4f}, is kept as checkpoints/best".format(**progress.best)
        run.log.say(f"step {progress.step}: {best}")
    return signal, better
