"""Train: `torchrun -m rwkv_clip.training.main -- --preset NAME [--setting value ..]`, or `python -m` for one process.

The lone `--` keeps torchrun from reading --logs as an abbreviation of its own --logs-specs.
Exit codes: 0 done, 2 a setting or a checkpoint, 3 the data, 4 numbers that are not finite, 5 another rank is lost, 75
stopped by a signal with everything saved (the same command goes on), 76 the run folder is in use or checkpoints cannot
be written; 1 and a traceback: an error of ours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from rwkv_clip.allocator import keep_freed_memory
from rwkv_clip.checkpoint import find_checkpoint, list_checkpoints, read_description
from rwkv_clip.config import ConfigError, Settings, check, list_presets, load_settings, to_dict
from rwkv_clip.dist import PeerLost, World, alone, autocast_dtype, fix_arithmetic, join_world, leave_world, tell
from rwkv_clip.errors import run_command
from rwkv_clip.model import create_model, image_size_of, preprocess_of, resolve_spec, tokenizer_of, vocab_of
from rwkv_clip.objective import make_objective
from rwkv_clip.recordio import RecordSet
from rwkv_clip.retrieval import evaluate_retrieval, load_retrieval

from .augment import Augmentation
from .data import make_loader
from .heartbeat import COLLECTIVES, Heartbeat, end_process, watch_peers
from .log import RunLog
from .loop import Trainer, train
from .parallel import WholeModel, has_shares
from .plot import plot_training
from .preempt import Preempted, Preemption, ignore_signals
from .runlock import hold_run
from .saver import Saver
from .snapshot import restore_snapshot

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


def check_records(records: RecordSet, spec: object, path: str, texts: int | None = None) -> None:
    """ConfigError when the records' tokens were not made for the model's text tower.

    That tell the side file and some records; each record read later is held against the same vocabulary."""
    tokenizer, vocab = tokenizer_of(spec), vocab_of(spec)
    problems = []
    if texts is not None and len(records.views) < texts:
        held = f"{len(records.views)} ({', '.join(records.views)})"
        problems.append(
            f"{path}: texts an image: {held}, --texts asks for {texts}; build records with more, or ask for fewer"
        )
    if records.tokenizer is not None and records.tokenizer != tokenizer.name:
        problems.append(f"{path}: tokens come from {records.tokenizer!r}, the model reads {tokenizer.name!r}")
    if records.context != tokenizer.context:
        problems.append(
            f"{path}: {records.context} tokens a text, the model's context is {tokenizer.context}; "
            f"build the records with --context {tokenizer.context}"
        )
    if vocab is not None:
        if records.vocab_size not in (None, vocab):
            problems.append(
                f"{path}: made with a vocabulary of {records.vocab_size}, the model's has {vocab}; "
                f"build the records for this model, or take a model for these records"
            )
        elif largest := records.limit_vocab(vocab):
            problems.append(
                f"{path}: holds the token id {largest}, the model's vocabulary ends at {vocab - 1}; "
                f"build the records with the tokenizer {tokenizer.name!r}"
            )
    if problems:
        raise ConfigError(problems)


def check_texts(records: RecordSet, settings: Settings, objective: torch.nn.Module) -> None:
    """ConfigError when the objective compares another number of texts per image than it would get."""
    held = min(len(records.views), settings.texts or len(records.views))
    given = held if settings.views == "all" else 1
    if objective.texts not in (None, given):
        raise ConfigError(
            [
                f"objective: {settings.objective} compares {objective.texts} texts of an image, but --views "
                f"{settings.views} and texts {', '.join(records.views[:held])} give it {given}; use --views all "
                f"--texts {objective.texts}, and records of as many"
            ]
        )


def make_validator(
    settings: Settings, model: torch.nn.Module, world: World, preemption: Preemption
) -> Callable[[], dict[str, float]]:
    """Retrieval on --val-data by the lead rank; reads the set now, so that a wrong path fails before training.

    Before the model is distributed; all ranks call the result. A signal ends it at the next picture (Interrupted): the
    time until the process is killed is for saving.
    """
    if settings.val_data is None:
        return dict
    data = load_retrieval(settings.val_data, split=settings.val_split) if world.is_lead else None
    whole = WholeModel(model, settings, world)
    preprocess, tokenizer = preemption.interrupts(preprocess_of(model)), tokenizer_of(model.spec)

    def validate() -> dict[str, float]:
        with whole.put_together() as net:
            if not world.is_lead:
                return {}
            with alone():
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


def claim_folder(logs: Path, name: str) -> str:
    """Make a run folder of that name and the time; its name. Runs that start in the same second get -2, -3 .."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"logs: {logs} cannot be made ({error.strerror}); name a folder that can"]) from None
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for free in itertools.chain([stamp], (f"{stamp}-{count}" for count in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (logs / free).mkdir()
            return free


def open_run(settings: Settings, world: World, name: str) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None). ConfigError when the folder holds another run already."""
    logs = Path(settings.logs)
    own_name = settings.name or tell(world, "name", claim_folder(logs, name) if world.is_lead else "")
    folder = logs / own_name
    has_run = folder.is_dir() and bool(list_checkpoints(folder))
    if world.restarted and settings.name and has_run:  # by torchrun, with the arguments of the first start
        return folder, find_checkpoint(folder)
    if settings.resume not in (None, "latest"):
        return folder, find_checkpoint(settings.resume)
    if settings.resume == "latest":
        return folder, find_checkpoint(folder) if has_run else None
    if has_run:
        raise ConfigError([f"name: {folder} holds a run already; add --resume latest to go on, or take another name"])
    return folder, None


def check_same_run(world: World, checkpoint: Path | None) -> None:
    """ConfigError where this rank does not go on from what the lead goes on from."""
    lead = tell(world, "checkpoint", checkpoint.name if checkpoint else "")
    if lead != (checkpoint.name if checkpoint else ""):
        own = f"{checkpoint}" if checkpoint else "no checkpoint"
        raise ConfigError(
            [
                f"logs: rank {world.rank} on {socket.gethostname()} sees {own}, rank 0 {lead or 'none'}; all nodes "
                f"have to share the storage of the run folder"
            ]
        )


def run(settings: Settings) -> Path:
    """Train as the settings say; returns the run folder."""
    name, spec = resolve_spec(settings.model)
    records = RecordSet(settings.train_data)
    check_records(records, spec, settings.train_data, settings.texts)
    objective = make_objective(settings.objective, settings.gates)
    check_texts(records, settings, objective)
    world = join_world(settings.device, COLLECTIVES)
    if world.device.type == "cpu":
        keep_freed_memory()
    if settings.deterministic:
        fix_arithmetic(world.device)
    folder, checkpoint = open_run(settings, world, name)
    check_same_run(world, checkpoint)
    with hold_run(folder, world), Preemption() as preemption:  # until now a signal just ends the process
        try:
            with watch_peers(world, settings.timeout, preemption) as heart:
                _train(settings, name, spec, records, objective, world, folder, checkpoint, preemption, heart)
        except PeerLost as lost:
            end_process(lost)
        except Preempted as stop:
            again = "the same command" if settings.resume == "latest" else f"--name {folder.name} --resume latest"
            raise Preempted(f"{stop}: all saved in {folder}; {again} goes on") from None
    return folder


def _train(
    settings: Settings,
    name: str,
    spec: object,
    records: RecordSet,
    objective: torch.nn.Module,
    world: World,
    folder: Path,
    checkpoint: Path | None,
    preemption: Preemption,
    heart: Heartbeat,
) -> None:
    torch.manual_seed(settings.seed)  # the same initial weights on every rank
    device = "cpu" if has_shares(settings, world) else world.device  # shares move by themselves
    model = create_model(spec, settings.pretrained, device=device, drop_path=settings.drop_path)
    validate = heart.busy("validation")(make_validator(settings, model, world, preemption))
    trainer = Trainer(model, objective, settings, world, len(records))
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
    log = None
    if world.is_lead:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(to_dict(settings), indent=1) + "\n")
        log = RunLog(folder, settings, trainer.progress.step, trainer.total_steps)
        begin = f"resumed at step {trainer.progress.step}" if checkpoint else "new run"
        log.say(
            f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device.type}; "
            f"{len(records):,} records, {trainer.total_steps:,} steps of {trainer.global_batch}; {begin} in {folder}"
        )
    try:
        with Saver(folder / "checkpoints", settings.keep_checkpoints) if log else contextlib.nullcontext() as saver:
            train(trainer, loader, folder, name, log, validate, preemption, heart, saver)
        if log:
            plot_training(folder)
            log.say(f"run folder: {folder}")
    finally:
        loader.close()
        if log:
            log.close()


def main() -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        code = run_command(_command, memory=MEMORY)
    finally:
        ignore_signals()
        leave_world()
    sys.exit(code)


def _command() -> int:
    try:
        run(read_command_line(sys.argv[1:]))
    except Preempted as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    main()
