"""What a checkpoint holds of a run, and how a run resumes from it: with the same bits, or with an error that says why
not."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkv_clip
from rwkv_clip.checkpoint import AVERAGE, CheckpointError, read_tensors
from rwkv_clip.config import ConfigError, flat_names, to_dict
from rwkv_clip.factory import read_fitting_weights, resolve_spec
from rwkv_clip.models.adapters import kept_state, name_kept
from rwkv_clip.models.freezing import FreezeSettings
from rwkv_clip.weights import BIAS

from .best import recall_best
from .checks import describe_records, flatten_table
from .optimizer_state import drop_state, pack_numbers, pack_state, unpack_state
from .parallel import copy_whole, load_whole, whole_tensors
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
        "train_data_upsampling_factors",  # their effect counts, see `_compare_records`
        "dataset_type",
        "csv_separator",
        "csv_img_key",
        "csv_caption_key",
        "image_folder",
        "index",
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
    *("distill_model", "distill_pretrained", "distill_features"),  # their content is compared
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
    averaged = {f"ema/{key}": tensor for key, tensor in state.average.kept.items()} if state.average else {}
    state.watch.check_finite(own | pack_state(state.optimizer, own) | dict(buffers) | averaged)
    weights, optim, facts = take_snapshot(state, name)
    average = state.average.gather(weights, state.world.is_main) if state.average else None
    if saver:
        progress, best = state.progress, state.progress.best.get("step") == state.progress.step
        saver.save(progress.step, weights, optim, facts, last, average, best)
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
        "sources": dict(state.objective.sources),
        "version": rwkv_clip.__version__,
    }
    if numbers := pack_numbers(state.optimizer, state.shards.own):
        facts["optimizer"] = numbers
    if state.base is not None:
        facts["adapters"] = state.base.describe(state.settings.adapters.scale)
    keep, weights = state.world.is_main, {name_kept(key): value for key, value in kept_state(state.model).items()}
    return whole_tensors(weights, keep), whole_tensors(optim, keep), facts


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
    _load_tensors(state, path, {key for key, *_ in changes}, facts.get("optimizer"))
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


def _load_tensors(state: TrainState, path: Path, changed: set[str], numbers: dict[str, Any] | None) -> None:
    """Weights, optimizer, objective and average; an objective or optimizer other than the checkpoint's starts with its
    own state, and so does the optimizer for parameters that were frozen then, or that the model has for the objective.
    changed: names of settings."""
    same_objective = "objective" not in changed
    may_begin = not same_objective or bool(changed & set(flat_names(FreezeSettings)))
    begun_anew = bool(changed & {"opt", "opt_kwargs"})
    if "model" in changed and not begun_anew:
        _check_shapes(state, path)
    _load_weights(state, path, () if same_objective else (BIAS,))
    optim = read_tensors(path / "optim.safetensors")
    objective = {key.removeprefix(OBJECTIVE): optim.pop(key) for key in list(optim) if key.startswith(OBJECTIVE)}
    own = state.shards.own
    if not same_objective:
        optim = {key: value for key, value in optim.items() if not key.startswith("objective.")}
        own = {name: parameter for name, parameter in own.items() if not name.startswith("objective.")}
        if BIAS not in own:
            optim, numbers = drop_state(BIAS, optim, numbers)
    try:
        if same_objective:
            load_whole(state.objective, objective)
        if not begun_anew:
            unpack_state(state.optimizer, own, state.shards.cut_state(optim), may_begin, numbers)
        if state.average and (path / AVERAGE).exists():
            state.average.load(read_tensors(path / AVERAGE), () if same_objective else (BIAS,))
        elif state.average:
            state.average.restart()
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its optimizer or objective state does not fit ({error})") from None


def _check_shapes(state: TrainState, path: Path) -> None:
    """CheckpointError where positions would be resized, for the optimizer's state would not be."""
    held = read_tensors(path / "model.safetensors")
    for name, parameter in state.shards.whole():
        if parameter.requires_grad and name in held and held[name].shape != parameter.shape:
            shapes = f"{tuple(held[name].shape)} there and {tuple(parameter.shape)} here"
            raise CheckpointError(
                f"{path}: {name} has the shape {shapes}, so the optimizer's state does not fit; begin a new run with "
                f"--pretrained {path}"
            )


def _load_weights(state: TrainState, path: Path, changed: tuple[str, ...]) -> None:
    """changed: names of weights that only one of checkpoint and model may have."""
    if state.base is None:
        return load_whole(state.model, read_fitting_weights(state.model, path, changed))
    kept = {name_kept(key): value for key, value in kept_state(state.model).items()}
    tensors = read_tensors(path / "model.safetensors")
    for name in changed:
        if (name in kept) != (name in tensors):
            kept.pop(name, None)
            tensors.pop(name, None)
    try:
        copy_whole(kept, tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: its adapters do not fit ({error})") from None


def compare_runs(state: TrainState, facts: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of everything that differs and matters. A setting newer than the checkpoint counts as having
    had its default."""
    then = to_dict(Settings()) | update_names(facts["settings"])
    now = to_dict(state.settings)
    free = FREE_ON_RESUME if state.settings.parallel.deterministic else FREE_ON_RESUME | {"max_ranks"}
    changes = [(key, then[key], now[key]) for key in now if key not in free and then[key] != now[key]]
    changes += _compare_models(state, facts, [key for key, *_ in changes])
    changes += _compare_bases(state, facts)
    whole = [(key, facts[key], getattr(state, key)) for key in WHOLE]
    begun, sources = facts.get("sources", {}), state.objective.sources
    whole += [(key, begun.get(key), sources.get(key)) for key in dict.fromkeys((*begun, *sources))]
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


def _compare_bases(state: TrainState, facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The weights that adapters belong to, by content."""
    then, now = facts.get("adapters"), state.base
    if not then or now is None or then.get("sha256") == now.sha256:
        return []
    return [("pretrained", f"{then.get('base')} ({str(then.get('sha256'))[:12]})", f"{now.path} ({now.sha256[:12]})")]


def _compare_records(state: TrainState, facts: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Sources of other content, or of another number; and factors, where they change the samples of an epoch."""
    then, now = facts.get("records"), state.progress.records
    if not now or then == now or not (then or "sources" in now):  # versions before 0.5 do not describe the records
        return []
    before, after = (_sources_of(one or {"count": "unknown"}) for one in (then, now))
    if len(before) != len(after):
        return [("train_data", _list_sources(before), _list_sources(after))]
    pairs = list(zip(before, after))
    other = [(old, new) for old, new in pairs if any(old.get(key) != new[key] for key in ("count", "digest"))]
    changes = []
    if other:
        changes.append(("train_data", _list_sources(old for old, _ in other), _list_sources(new for _, new in other)))
    if any(old.get("factor") != new["factor"] and old.get("samples") != new["samples"] for old, new in pairs):
        changes.append(("train_data_upsampling_factors", _list_factors(before), _list_factors(after)))
    return changes


def _sources_of(records: dict[str, Any]) -> list[dict[str, Any]]:
    """What `identify` says of each source; records without sources are one."""
    sources = records.get("sources")
    if isinstance(sources, list) and all(isinstance(source, dict) for source in sources):
        return sources
    return [{"factor": 1.0, "samples": records.get("count"), **records}]


def _list_factors(sources: Iterable[dict[str, Any]]) -> str:
    return "::".join(str(source.get("factor")).removesuffix(".0") for source in sources)


def _list_sources(sources: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"{source.get('name', '')} {describe_records(source)}".strip() for source in sources)


def describe_arithmetic(state: TrainState) -> str:
    """What else determines the bits of a result: device, torch version, and on a CPU the number of threads."""
    device = state.world.device.type
    threads = f" of {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device}{threads}, torch {torch.__version__}"
