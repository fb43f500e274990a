"""Train: `torchrun -m rwkv_clip.training.main -- --preset NAME [--setting value ..]`, or `python -m` for one process.

The lone `--` keeps torchrun from reading --logs as an abbreviation of its own --logs-specs.
Exit codes: 0 done, 2 a setting or a checkpoint, 3 the data, 4 non-finite numbers, 5 another rank is lost, 75 stopped by
a signal with everything saved (the same command resumes), 76 the run folder is in use or checkpoints cannot be written;
1 with a traceback: a bug.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_clip.errors import run_command

from .command_line import print_help, read_command_line
from .help_text import wants_help

if __name__ == "__main__" and wants_help(sys.argv[1:]):  # before what follows, which takes seconds to import
    sys.exit(run_command(lambda: print_help(sys.argv[1:])))

import torch
from torch import nn

from rwkv_clip.base_weights import Base, find_base
from rwkv_clip.checkpoint import read_description
from rwkv_clip.config import ConfigError, to_dict
from rwkv_clip.data.mixture import Mixture, describe_shares, identify, open_mixture
from rwkv_clip.data.records import Records, open_records
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.device import autocast_dtype, fix_arithmetic, keep_freed_memory
from rwkv_clip.dist import PeerLost, World, join_world, leave_world, single_process
from rwkv_clip.factory import change_spec, create_model, holds_weights, preprocess_of, resolve_spec
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.files import write_whole
from rwkv_clip.losses import Objective, make_objective
from rwkv_clip.models.adapters import add_adapters, check_peft
from rwkv_clip.models.freezing import freeze_parameters
from rwkv_clip.models.specification import ContrastiveModel, ModelSpec
from rwkv_clip.retrieval import evaluate_retrieval

from .attention import pays, wide_backward
from .batch_norm import synchronize_norms
from .best import recall_best
from .checkpointing import restore_snapshot
from .checks import (
    check_batch,
    check_objective,
    check_ranks,
    check_records,
    check_sources,
    check_texts,
    check_weights,
    warn_of_precision,
    warn_of_rate,
)
from .data import make_loader
from .data.batch import Loader, Plan
from .evaluation import EvalSet, Evaluation, make_evaluator, open_sets
from .faults.signals import Preempted, Preemption, ignore_signals
from .faults.watchdog import COLLECTIVES, Watchdog, end_process, watch_peers
from .log import RunLog
from .loop import RunContext, train
from .parallel import WholeModel, is_sharded
from .plot import plot_training
from .run import open_run
from .saver import Saver
from .settings import Settings
from .state import EVALUATION, VALIDATION, TrainState
from .teachers import add_teacher
from .trainer import Trainer
from .validation import measure_batches

# The remedy when host or GPU memory runs out.
MEMORY = "use a smaller --batch-size with a larger --accum-freq (same negatives), --grad-checkpointing, fewer --workers"


def make_validator(
    settings: Settings, model: ContrastiveModel, whole: WholeModel, preemption: Preemption
) -> Callable[[], dict[str, float]]:
    """Retrieval, loss and in-batch accuracies on --val-data by the main rank; reads the set now, so that a wrong path
    fails before training.

    Call before the model is distributed; all ranks call the result. A signal ends it at the next image (Interrupted):
    the time left until the process is killed is for saving.
    """
    data, parallel, world = settings.data, settings.parallel, whole.world
    if data.val_data is None:
        return dict
    pairs = load_retrieval(data.val_data, split=data.val_split) if world.is_main else None
    preprocess, tokenizer = preemption.interrupts(preprocess_of(model)), model.spec.tokenizer()

    def validate() -> dict[str, float]:
        with whole.gathered() as net:
            if net is None or pairs is None:  # on all but the main rank
                return {}
            with single_process():
                autocast = autocast_dtype(parallel.precision, world.device)
                extractor = FeatureExtractor(net, preprocess, tokenizer, world.device, parallel.batch_size, autocast)
                found = evaluate_retrieval(extractor, pairs, data.val_prefix)
                size = data.val_batch_size or parallel.batch_size
                batches = measure_batches(found, pairs.all_pairs, net.logit_scale, size, settings.run.seed)
        return {key: value for key, value in (found.metrics | batches).items() if isinstance(value, float)}

    return validate


def make_evaluations(
    work: Work, model: ContrastiveModel, preemption: Preemption, watchdog: Watchdog
) -> list[Evaluation]:
    """What is measured during the run: --val-data by the main rank, --eval by all. Call before the model is
    distributed."""
    settings, found = work.settings, []
    if settings.data.val_data is None and not work.sets:
        return []
    whole = WholeModel(model, settings.parallel, work.world, everywhere=bool(work.sets))
    if settings.data.val_data is not None:
        validate = watchdog.busy("validation")(make_validator(settings, model, whole, preemption))
        often = settings.log.val_every_n_steps, settings.log.val_frequency
        found.append(Evaluation(VALIDATION, validate, *often, prefix="val_"))
    if work.sets:
        evaluate = watchdog.busy("evaluation")(make_evaluator(work.sets, settings, model, whole, preemption))
        often = settings.evaluation.eval_every_n_steps, settings.evaluation.zeroshot_frequency
        found.append(Evaluation(EVALUATION, evaluate, *often))
    return found


@dataclass(frozen=True)
class Work:
    """What a run does on this rank, checked before anything is written or built."""

    settings: Settings
    name: str  # of the model
    source: ModelSpec  # as it is named
    spec: ModelSpec  # as it is trained, of another size perhaps
    records: Records
    objective: Objective
    world: World
    sets: list[EvalSet]  # of --eval
    base: Base | None = None  # of adapters


def prepare(settings: Settings) -> Work:
    """Read what the settings name, join the other ranks, and compare all ranks. ConfigError, RecordError."""
    name, source = resolve_spec(settings.model.model)
    spec = change_spec(source, settings.model.overrides)
    path, factors, texts = settings.data.train_data, settings.data.train_data_upsampling_factors, settings.data.texts
    assert path is not None, "read_command_line asks for it"
    reading = settings.data.reading()
    records = open_mixture(path, factors, texts, lambda place: open_records(place, spec.tokenizer(), reading))
    check_records(records, spec, path, texts)
    base = None if settings.adapters.lora_rank is None else _find_base(settings)
    torch.manual_seed(settings.run.seed)  # the same initial parameters on every rank
    objective = make_objective(settings.loss)
    check_objective(settings.loss.objective, objective)
    check_texts(records, settings, objective)
    world = join_world(settings.parallel.device, COLLECTIVES)
    warn_of_precision(settings.parallel.precision, world)
    check_ranks(settings, spec, records, world)
    check_batch(settings.parallel, world, len(records))
    objective = add_teacher(objective, settings, spec, records, world.device)
    check_sources(objective, world)
    warn_of_rate(settings, world)
    return Work(settings, name, source, spec, records, objective, world, open_sets(settings, spec, world), base)


def _find_base(settings: Settings) -> Base:
    """The weights that adapters belong to. ConfigError without any, ImportError without peft."""
    check_peft()
    model, place = settings.model.model, settings.model.pretrained
    if place is None and not holds_weights(model):
        raise ConfigError(["lora_rank: adapters need weights to belong to; name them with --pretrained"])
    return find_base(place or model)


def run(settings: Settings) -> Path:
    """Train as the settings say; returns the run folder."""
    work = prepare(settings)
    world = work.world
    if world.device.type == "cpu":
        keep_freed_memory()
    if settings.parallel.deterministic:
        fix_arithmetic(world.device)
    # Until here a signal simply ends the process.
    with open_run(settings.run, world, work.name) as (folder, checkpoint), Preemption() as preemption:
        try:
            with watch_peers(world, settings.faults.timeout, preemption) as watchdog:
                _train(work, folder, checkpoint, preemption, watchdog)
        except PeerLost as lost:
            end_process(lost)
        except Preempted as stop:
            again = "the same command" if settings.run.resume == "latest" else f"--name {folder.name} --resume latest"
            raise Preempted(f"{stop}: all saved in {folder}; {again} resumes") from None
    return folder


def _train(work: Work, folder: Path, checkpoint: Path | None, preemption: Preemption, watchdog: Watchdog) -> None:
    settings, world = work.settings, work.world
    model = _make_model(work)
    if checkpoint is None:
        check_weights((model, work.objective), world)
    evaluations = make_evaluations(work, model, preemption, watchdog)
    state = TrainState(model, work.objective, settings, world, work.records.epoch_samples)
    state.base = work.base
    state.progress.records = identify(work.records)
    trainer = Trainer(state)
    if checkpoint is not None:
        facts = read_description(checkpoint)
        assert facts is not None, "open_run gives folders only"
        restore_snapshot(state, checkpoint, facts)
    if (average := state.average) is not None:
        told = functools.partial(preemption.agree, world)
        evaluations = [replace(one, measure=average.validated(one.measure, told)) for one in evaluations]
    context = RunContext(folder, work.name, evaluations, preemption, watchdog)
    with contextlib.ExitStack() as ended:
        if world.is_main:
            log = _open_log(work, folder, state, resumed=checkpoint is not None)
            context.log = ended.enter_context(contextlib.closing(log))
            context.saver = Saver(folder / "checkpoints", settings.log.keep_checkpoints)
            recall_best(context.saver.folder, settings.evaluation.keep_best, state.progress)
        loader = ended.enter_context(contextlib.closing(_open_loader(work, state)))
        with context.saver or contextlib.nullcontext(), wide_backward(pays(settings.parallel, world)):
            train(trainer, loader, context)
        if context.log:
            _plot(folder)
            context.log.say(f"run folder: {folder}")


def _make_model(work: Work) -> ContrastiveModel:
    """The model with its initial weights, the same on every rank, and its frozen parameters."""
    settings, world, begins = work.settings, work.world, work.objective.begins
    torch.manual_seed(settings.run.seed)
    device = "cpu" if is_sharded(settings.parallel, world) else world.device  # sharding moves it
    weights = {**to_dict(settings.model), **settings.model.overrides}
    del weights["model"]
    if holds_weights(settings.model.model) and weights["pretrained"] is None:
        weights["pretrained"] = settings.model.model
    own = getattr(work.spec, "description", None) or work.spec.to_json()
    bias = None if own.get("init_logit_bias") is not None else begins.get("logit_bias")
    model = create_model(work.source, device=device, **weights, init_logit_bias=bias)
    if "logit_scale" in begins and weights["pretrained"] is None and own.get("init_logit_scale") is None:
        nn.init.constant_(model.logit_scale, begins["logit_scale"])
    freeze_parameters(model, settings.freezing)
    if settings.parallel.use_bn_sync:
        synchronize_norms(model)
    if work.base is not None:
        torch.manual_seed(settings.run.seed)
        add_adapters(model, settings.adapters)
    return model


def _open_loader(work: Work, state: TrainState) -> Loader:
    """Batches of the remaining steps."""
    plan = Plan(
        global_batch=state.global_batch,
        steps=state.total_steps - state.progress.step,
        start=state.progress.samples_seen,
        rank=work.world.rank,
        world=work.world.size,
    )
    return make_loader(
        work.records,
        plan,
        state.model.spec.image_size,
        work.settings.data,
        seed=work.settings.run.seed,
        views=work.objective.image_views,
        keys="image_keys" in (*work.objective.needs, *work.objective.recalls),
        device=work.world.device,
    )


def _open_log(work: Work, folder: Path, state: TrainState, resumed: bool) -> RunLog:
    # In ASCII, which holds any name of a path.
    write_whole(folder / "settings.json", [json.dumps(to_dict(work.settings), indent=1).encode() + b"\n"])
    log = RunLog(folder, work.settings, state.progress.step, state.total_steps)
    parameters, trained = (
        sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad or frozen)
        for frozen in (True, False)
    )
    share = "" if trained == parameters else f", {trained:,} of which train,"
    begin = f"resumed at step {state.progress.step}" if resumed else "new run"
    log.say(
        f"{work.name}: {parameters:,} parameters{share} on {work.world.size} x {work.world.device.type}; "
        f"{len(work.records):,} records, {state.total_steps:,} steps of {state.global_batch}; {begin} in {folder}"
    )
    if isinstance(work.records, Mixture):
        log.say("\n".join(describe_shares(work.records)))
    return log


def _plot(folder: Path) -> None:
    try:
        plot_training(folder)
    except Exception as error:  # a disk without room, a broken installation: the run is finished and saved anyway
        logging.getLogger(__name__).warning("training.png is not drawn (%s); its data are in log.jsonl", error)


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
