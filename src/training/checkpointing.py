"""What a checkpoint holds of a run, and how a run resumes from it: with the same bits, or with an error that says why
not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkv_clip
from rwkv_clip.checkpoint import CheckpointError, read_tensors
from rwkv_clip.config import ConfigError, flat_names, to_dict
from rwkv_clip.factory import read_fitting_weights, resolve_spec
from rwkv_clip.models.freezing import FreezeSettings

from .best import recall_best
from .checks import describe_records, flatten_table
from .optim import pack_state, unpack_state
from .parallel import load_whole, whole_tensors
from .saver import Saver
from .settings import Settings, update_names
from .state import EVALUATION, VALIDATION, TrainState

OBJECTIVE = "objective/"  # prefix of an objective's parameters and buffers among the optimizer's tensors

# What may differ when a run is resumed without making it another run. The batch may be divided in other ways
# (--batch-size, --accum-freq, ranks) as long as the global batch is the same. Of the records the content counts, not
# the location.
FREE_ON_RESUME = {
    *(
        "train_data",
        "val_data",
        "val_split",
        "val_prefix",
        "pretrained",
        "pretrained_image",
        "pretrained_text",
        "logs",
        "name",
        "resume",
        "allow_change",
    ),
    *("report_to", "device", "workers", "loader", "torchcompile", "grad_checkpointing", "parallel", "timeout"),
    *("batch_size", "accum_freq", "on_nonfinite", "max_nonfinite", "max_bad", "max_bad_fraction"),
    *("log_every_n_steps", "val_every_n_steps", "save_every_n_steps", "keep_checkpoints"),
    *("report_training_batch_acc", "val_batch_size", "val_frequency", "save_frequency"),
    *("eval", "imagenet_val", "imagenet_v2", "zeroshot_frequency", "eval_every_n_steps", "keep_best"),
    *("wandb_project_name", "wandb_notes", "wandb_tags"),
    "published",
}
WHOLE = ("global_batch", "total_steps")  # not settings, but derived from them
NEEDED = ("step", "samples_seen", "settings", "scaler", *WHOLE)

log = logging.getLogger(__name__)


def save_run(state: TrainState, saver: Saver | None, name: str, last: bool = False) -> None:
    """Have the rank with a saver write a checkpoint; all ranks call this, after a check of the last step. name: of the
    model. `last`: wait until it is on disk.

    NumericsError, and no checkpoint, when anything to be saved is not finite. StorageError as raised by the saver."""
    own, buffers = state.shards.own, state.objective.named_buffers(prefix="objective")
    state.watch.check_finite(own | pack_state(state.optimizer, own) | dict(buffers))
    weights, optim, facts = take_snapshot(state, name)
    if saver:
        progress, best = state.progress, state.progress.best.get("step") == state.progress.step
        saver.save(progress.step, weights, optim, facts, last, best)
        if best:
            recall_best(saver.folder, state.settings.evaluation.keep_best, progress)


def take_snapshot(state: TrainState, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer and objective state, and JSON data, on the main rank; all ranks call this, the others get
    none.

    The tensors are whole; those that the main rank holds itself are not copied: copy them before the run continues.
    """
    optim = state.shards.mark_state(pack_state(state.optimizer, state.shards.own))
    optim |= {f"{OBJECTIVE}{key}": value for key, value in state.objective.state_dict().items()}
    facts = {
        "samples_seen": state.progress.samples_seen,
        "total_steps": state.total_steps,
        "global_batch": state.global_batch,
        "model": name,
        "spec": state.model.spec.to_json(),
        "settings": to_dict(state.settings),
        "scaler": state.scaler.state_dict(),
        "validated": state.progress.evaluated.get(VALIDATION, 0),
        "evaluated": state.progress.evaluated.get(EVALUATION, 0),
        "best": state.progress.best,
        **state.watch.state_dict(),
        "arithmetic": describe_arithmetic(state),
        "changes": state.progress.changes,
        "records": state.progress.records,
        "version": rwkv_clip.__version__,
    }
    keep = state.world.is_main
    return whole_tensors(state.model.state_dict(), keep), whole_tensors(optim, keep), facts


def restore_snapshot(state: TrainState, path: Path, facts: dict[str, Any]) -> None:
    """Resume from a checkpoint of the same run. facts: its state.json.

    ConfigError lists every setting that would make it another run, unless --allow-change names it; CheckpointError when
    the checkpoint lacks something that the run needs.
    """
    missing = [key for key in NEEDED if key not in facts]
    if missing:
        raise CheckpointError(f"{path / 'state.json'}: no {', '.join(missing)}; not a training run's checkpoint")
    settings, progress = state.settings, state.progress
    changes = compare_runs(state, facts)
    refused = [f"{key}: {then!r} -> {now!r}" for key, then, now in changes if key not in settings.run.allow_change]
    if refused:
        remedy = f"--allow-change {' '.join(line.partition(':')[0] for line in refused)}"
        raise ConfigError([f"resume: {path} belongs to a run with other settings; {remedy} resumes anyway", *refused])
    if settings.parallel.deterministic and facts.get("arithmetic") != (own := describe_arithmetic(state)):
        began = facts.get("arithmetic")
        log.warning("deterministic: the bits will differ, the checkpoint was made on %s, this is %s", began, own)
    _load_tensors(state, path, {key for key, *_ in changes})
    try:
        if state.scaler.is_enabled() or facts["scaler"]:
            state.scaler.load_state_dict(facts["scaler"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: its scaler state does not fit ({error})") from None
    state.watch.load_state_dict(facts)
    progress.step, progress.samples_seen = facts["step"], facts["samples_seen"]
    progress.evaluated[VALIDATION] = facts.get("validated", facts["step"])  # absent before version 0.3
    progress.evaluated[EVALUATION], progress.best = facts.get("evaluated", 0), facts.get("best", {})
    version = facts.get("version")
    if version != rwkv_clip.__version__:
        changes.append(("version", version, rwkv_clip.__version__))
        if state.world.is_main:
            silent = "" if facts.get("records") else "; it does not say which records it was trained on: any pass"
            about = version or "0.4 or before", rwkv_clip.__version__
            log.warning("%s: written by version %s, this is %s%s", path, *about, silent)
    new = [{"step": progress.step, "setting": key, "from": then, "to": now} for key, then, now in changes]
    progress.changes = [*facts.get("changes", []), *new]


def _load_tensors(state: TrainState, path: Path, changed: set[str]) -> None:
    """Weights, optimizer and objective; an objective other than the checkpoint's starts with its own state, and so does
    AdamW for parameters that were frozen then. changed: names of settings."""
    same_objective, other_freezing = "objective" not in changed, bool(changed & set(flat_names(FreezeSettings)))
    load_whole(state.model, read_fitting_weights(state.model, path))
    optim = read_tensors(path / "optim.safetensors")
    objective = {key.removeprefix(OBJECTIVE): optim.pop(key) for key in list(optim) if key.startswith(OBJECTIVE)}
    own = state.shards.own
    if not same_objective:
        optim = {key: value for key, value in optim.items() if not key.startswith("objective.")}
        own = {name: parameter for name, parameter in own.items() if not name.startswith("objective.")}
    try:
        if same_objective:
            load_whole(state.objective, objective)
        unpack_state(state.optimizer, own, state.shards.cut_state(optim), may_begin=other_freezing)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its optimizer or objective state does not fit ({error})") from None


def compare_runs(state: TrainState, facts: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of everything that differs and matters. A setting newer than the checkpoint counts as having
    had its default."""
    then = to_dict(Settings()) | update_names(facts["settings"])
    now = to_dict(state.settings)
    free = FREE_ON_RESUME if state.settings.parallel.deterministic else FREE_ON_RESUME | {"max_ranks"}
    changes = [(key, then[key], now[key]) for key in now if key not in free and then[key] != now[key]]
    changes += _compare_models(state, facts, [key for key, *_ in changes])
    whole = [(key, facts[key], getattr(state, key)) for key in WHOLE]
    return changes + [change for change in whole if change[1] != change[2]] + _compare_records(state, facts)


def _compare_models(state: TrainState, facts: dict[str, Any], changed: list[str]) -> list[tuple[str, Any, Any]]:
    """The model description where the name is unchanged: its file may differ, or what --pretrained makes of it. Fields
    newer than the checkpoint count as having had their defaults."""
    if "model" in changed or "spec" not in facts:
        return []
    specs = resolve_spec(facts["spec"])[1].to_json(), state.model.spec.to_json()
    then, now = (flatten_table("", spec) for spec in specs)
    own = {"image.drop_path"} if "drop_path" in changed else set()  # a setting, too
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in own]
    then, now = ({name: flat.get(name) for name in names} for flat in (then, now))
    return [("model", then, now)] if names else []


def _compare_records(state: TrainState, facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    then, now = facts.get("records"), state.progress.records
    if not then or not now or then == now:  # versions before 0.5 do not describe the records
        return []
    return [("train_data", describe_records(then), describe_records(now))]


def describe_arithmetic(state: TrainState) -> str:
    """What else determines the bits of a result: device, torch version, and on a CPU the number of threads."""
    device = state.world.device.type
    threads = f" of {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device}{threads}, torch {torch.__version__}"
