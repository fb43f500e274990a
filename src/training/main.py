"""Train: `torchrun -m rwkv_clip.training.main -- --preset NAME [--setting value ..]`, or `python -m` for one process.

The lone `--` keeps torchrun from reading --logs as an abbreviation of its own --logs-specs.
Exit codes: 0 done, 2 a setting or a checkpoint, 3 the data, 4 numbers that are not finite, 5 another rank is lost, 75
stopped by a signal with everything saved (the same command goes on), 76 the run folder is in use or checkpoints cannot
be written; 1 and a traceback: an error of ours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from rwkv_clip.checkpoint import read_description
from rwkv_clip.config import ConfigError, Settings, check, list_presets, load_settings, to_dict
from rwkv_clip.data.records import RecordSet
from rwkv_clip.device import autocast_dtype, fix_arithmetic, keep_freed_memory
from rwkv_clip.dist import PeerLost, World, join_world, leave_world, single_process
from rwkv_clip.errors import run_command
from rwkv_clip.factory import ModelSpec, create_model, image_size_of, preprocess_of, resolve_spec, tokenizer_of
from rwkv_clip.files import write_whole
from rwkv_clip.losses.objective import make_objective
from rwkv_clip.retrieval import evaluate_retrieval, load_retrieval

from .checkpointing import restore_snapshot
from .checks import check_batch, check_ranks, check_records, check_texts, check_weights
from .data.augment import Augmentation
from .data.torch_loader import make_loader
from .faults.signals import Preempted, Preemption, ignore_signals
from .faults.watchdog import COLLECTIVES, Heartbeat, end_process, watch_peers
from .log import RunLog
from .loop import Trainer, train
from .parallel import WholeModel, has_shares
from .plot import plot_training
from .run import open_run
from .saver import Saver

# What to do where memory runs out, the host's or the GPU's.
MEMORY = "use a smaller --batch-size with a larger --accum-freq (same negatives), --grad-checkpointing, fewer --workers"


def read_command_line(arguments: list[str]) -> Settings:
    """Preset (`--preset NAME or path`), then overrides. ConfigError lists every value that does not fit."""
    arguments, preset = [a for a in arguments if a != "--"], None  # some releases of torchrun pass it on
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            preset = value if equals else "".join(arguments[i + 1 : i + 2])
            if not preset:
                raise ConfigError([f"preset: needs a value; shipped: {', '.join(list_presets('recipes'))}"])
            del arguments[i : i + (1 if equals else 2)]
            break
    description = f"{__doc__}\nShipped presets (--preset): {', '.join(list_presets('recipes'))}."
    settings = tyro.cli(
        Settings,
        args=arguments,
        default=load_settings(preset),
        prog="rwkv_clip.training.main",
        description=description,
    )
    problems = check(settings)
    if settings.train_data is None:
        problems.append("train_data: not set; name the records (prefix, folder or glob), made by data2rec.py")
    if settings.resume == "latest" and settings.name is None:
        problems.append("name: --resume latest needs the run's name")
    if problems:
        raise ConfigError(problems)
    return settings


def make_validator(
    settings: Settings, model: torch.nn.Module, world: World, preemption: Preemption
) -> Callable[[], dict[str, float]]:
    """Retrieval on --val-data by the main rank; reads the set now, so that a wrong path fails before training.

    Before the model is distributed; all ranks call the result. A signal ends it at the next picture (Interrupted): the
    time until the process is killed is for saving.
    """
    if settings.val_data is None:
        return dict
    data = load_retrieval(settings.val_data, split=settings.val_split) if world.is_main else None
    whole = WholeModel(model, settings, world)
    preprocess, tokenizer = preemption.interrupts(preprocess_of(model)), tokenizer_of(model.spec)

    def validate() -> dict[str, float]:
        with whole.put_together() as net:
            if not world.is_main:
                return {}
            with single_process():
                metrics = evaluate_retrieval(
                    net,
                    data,
                    preprocess,
                    tokenizer,
                    device=world.device,
                    batch_size=settings.batch_size,
                    autocast=autocast_dtype(settings.precision, world.device),
                    prefix=settings.val_prefix,
                ).metrics
        return {key: value for key, value in metrics.items() if isinstance(value, float)}

    return validate


@dataclass(frozen=True)
class Work:
    """What a run is to do on this rank, checked before anything is written or built."""

    settings: Settings
    name: str  # of the model
    spec: ModelSpec
    records: RecordSet
    objective: torch.nn.Module
    world: World


def prepare(settings: Settings) -> Work:
    """Read what the settings name, join the other ranks, and hold all against each other. ConfigError, RecordError."""
    name, spec = resolve_spec(settings.model)
    records = RecordSet(settings.train_data)
    check_records(records, spec, settings.train_data, settings.texts)
    objective = make_objective(settings.objective, settings.gates)
    check_texts(records, settings, objective)
    world = join_world(settings.device, COLLECTIVES)
    check_ranks(settings, spec, records, world)
    check_batch(settings, world, len(records))
    return Work(settings, name, spec, records, objective, world)


def run(settings: Settings) -> Path:
    """Train as the settings say; returns the run folder."""
    work = prepare(settings)
    world = work.world
    if world.device.type == "cpu":
        keep_freed_memory()
    if settings.deterministic:
        fix_arithmetic(world.device)
    # Until now a signal just ends the process.
    with open_run(settings, world, work.name) as (folder, checkpoint), Preemption() as preemption:
        try:
            with watch_peers(world, settings.timeout, preemption) as heart:
                _train(work, folder, checkpoint, preemption, heart)
        except PeerLost as lost:
            end_process(lost)
        except Preempted as stop:
            again = "the same command" if settings.resume == "latest" else f"--name {folder.name} --resume latest"
            raise Preempted(f"{stop}: all saved in {folder}; {again} goes on") from None
    return folder


def _train(work: Work, folder: Path, checkpoint: Path | None, preemption: Preemption, heart: Heartbeat) -> None:
    settings, world, records = work.settings, work.world, work.records
    torch.manual_seed(settings.seed)  # the same initial weights on every rank
    device = "cpu" if has_shares(settings, world) else world.device  # shares move by themselves
    model = create_model(work.spec, settings.pretrained, device=device, drop_path=settings.drop_path)
    if checkpoint is None:
        check_weights(model, world)
    validate = heart.busy("validation")(make_validator(settings, model, world, preemption))
    trainer = Trainer(model, work.objective, settings, world, len(records))
    trainer.progress.records = {"count": len(records), "digest": records.digest}
    if checkpoint is not None:
        restore_snapshot(trainer, checkpoint, read_description(checkpoint))
    loader = make_loader(
        records,
        image_size=image_size_of(model),
        global_batch=trainer.global_batch,
        steps=trainer.total_steps - trainer.progress.step,
        seed=settings.seed,
        start=trainer.progress.samples_seen,
        rank=world.rank,
        world=world.size,
        workers=settings.workers,
        loader=settings.loader,
        device=world.device,
        max_bad=settings.max_bad,
        max_bad_share=settings.max_bad_share,
        augmentation=Augmentation(settings.crop_area, settings.crop_aspect, settings.flip),
    )
    log = _open_log(work, folder, trainer, resumed=checkpoint is not None) if world.is_main else None
    try:
        with Saver(folder / "checkpoints", settings.keep_checkpoints) if log else contextlib.nullcontext() as saver:
            train(trainer, loader, folder, work.name, log, validate, preemption, heart, saver)
        if log:
            _plot(folder)
            log.say(f"run folder: {folder}")
    finally:
        loader.close()
        if log:
            log.close()


def _open_log(work: Work, folder: Path, trainer: Trainer, resumed: bool) -> RunLog:
    write_whole(folder / "settings.json", [json.dumps(to_dict(work.settings), indent=1).encode() + b"\n"])
    log = RunLog(folder, work.settings, trainer.progress.step, trainer.total_steps)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    begin = f"resumed at step {trainer.progress.step}" if resumed else "new run"
    log.say(
        f"{work.name}: {parameters:,} parameters on {work.world.size} x {work.world.device.type}; "
        f"{len(work.records):,} records, {trainer.total_steps:,} steps of {trainer.global_batch}; {begin} in {folder}"
    )
    return log


def _plot(folder: Path) -> None:
    try:
        plot_training(folder)
    except Exception as error:  # a disk without room, a broken installation: the run is done and saved all the same
        logging.getLogger(__name__).warning("training.png is not drawn (%s); log.jsonl has all it would show", error)


def main() -> None:
    """Command line."""
    try:
        code = run_command(_command, memory=MEMORY)
    finally:
        ignore_signals()
        leave_world()
    sys.exit(code)


def _command() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")  # to the stream that cannot fail
    try:
        run(read_command_line(sys.argv[1:]))
    except Preempted as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    main()
