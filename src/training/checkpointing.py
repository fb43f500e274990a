"""What a checkpoint holds of a run, and how a run goes on from it: the same bits, or a refusal that says why."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rwkv_clip
from rwkv_clip.checkpoint import CheckpointError, read_tensors
from rwkv_clip.config import ConfigError, Settings, to_dict
from rwkv_clip.factory import read_fitting_weights, resolve_spec

from .checks import describe_records, flatten_table
from .optim import pack_state, unpack_state
from .parallel import whole_tensors

if TYPE_CHECKING:
    from .loop import Trainer

OBJECTIVE = "objective/"  # prefix of an objective's buffers among the optimizer's tensors

# What may differ between a run and its resumption without making it another run. The batch may be cut in other ways
# (--batch-size, --accum-freq, ranks) as long as the global batch is the same. Of the records it is the content that
# counts, not where they lie.
FREE_ON_RESUME = {
    *("train_data", "val_data", "val_split", "val_prefix", "pretrained", "logs", "name", "resume", "allow_change"),
    *("report_to", "device", "workers", "loader", "torchcompile", "grad_checkpointing", "parallel", "timeout"),
    *("batch_size", "accum_freq", "on_nonfinite", "max_nonfinite", "max_bad", "max_bad_share"),
    *("log_every_n_steps", "val_every_n_steps", "save_every_n_steps", "keep_checkpoints"),
}
WHOLE = ("global_batch", "total_steps")  # not settings, but what they come to
NEEDED = ("step", "samples_seen", "settings", "scaler", *WHOLE)

log = logging.getLogger(__name__)


def own_state(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's share of what a checkpoint holds besides weights; the run's own tensors."""
    optim = pack_state(trainer.optimizer, trainer.shares)
    return optim | {f"{OBJECTIVE}{key}": value for key, value in trainer.objective.state_dict().items()}


def take_snapshot(trainer: Trainer, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer and objective state, and JSON data, on the main rank; all ranks call this, others get none.

    The tensors are whole; those that the main rank holds itself are the run's own: copy them first.
    """
    optim = trainer.shares.mark_state(own_state(trainer))
    state = {
        "samples_seen": trainer.progress.samples_seen,
        "total_steps": trainer.total_steps,
        "global_batch": trainer.global_batch,
        "model": name,
        "spec": trainer.model.spec.to_json(),
        "settings": to_dict(trainer.settings),
        "scaler": trainer.scaler.state_dict(),
        "validated": trainer.progress.validated,
        **trainer.watch.state_dict(),
        "arithmetic": describe_arithmetic(trainer),
        "changes": trainer.progress.changes,
        "records": trainer.progress.records,
        "version": rwkv_clip.__version__,
    }
    lead = trainer.world.is_main
    return whole_tensors(trainer.model.state_dict(), lead), whole_tensors(optim, lead), state


def restore_snapshot(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Continue from a checkpoint of the same run.

    ConfigError lists every setting that makes it another run, unless --allow-change names it; CheckpointError when the
    checkpoint lacks something that the run needs.
    """
    missing = [key for key in NEEDED if key not in state]
    if missing:
        raise CheckpointError(f"{path / 'state.json'}: no {', '.join(missing)}; not a training run's checkpoint")
    changes = compare_runs(trainer, state)
    refused = [f"{key}: {then!r} -> {now!r}" for key, then, now in changes if key not in trainer.settings.allow_change]
    if refused:
        remedy = f"--allow-change {' '.join(line.partition(':')[0] for line in refused)}"
        raise ConfigError([f"resume: {path} belongs to a run with other settings; {remedy} goes on anyway", *refused])
    if trainer.settings.deterministic and state.get("arithmetic") != (own := describe_arithmetic(trainer)):
        began = state.get("arithmetic")
        log.warning("deterministic: the bits will differ, the checkpoint comes from %s, this is %s", began, own)
    trainer.shares.load_weights(read_fitting_weights(trainer.model, path))
    optim = read_tensors(path / "optim.safetensors")
    buffers = {key: optim.pop(key) for key in list(optim) if key.startswith(OBJECTIVE)}
    try:
        if all(key != "objective" for key, *_ in changes):  # another one begins with its own statistics
            trainer.objective.load_state_dict({key.removeprefix(OBJECTIVE): value for key, value in buffers.items()})
        unpack_state(trainer.optimizer, trainer.shares, trainer.shares.cut_state(optim))
        if trainer.scaler.is_enabled() or state["scaler"]:
            trainer.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: its optimizer, objective or scaler state does not fit ({error})") from None
    trainer.watch.load_state_dict(state)
    progress = trainer.progress
    progress.step, progress.samples_seen = state["step"], state["samples_seen"]
    progress.validated = state.get("validated", state["step"])  # absent before version 0.3
    version = state.get("version")
    if version != rwkv_clip.__version__:
        changes.append(("version", version, rwkv_clip.__version__))
        if trainer.world.is_main:
            silent = "" if state.get("records") else "; it does not say which records it comes from, so any are taken"
            about = version or "0.4 or before", rwkv_clip.__version__
            log.warning("%s: of version %s, this is %s%s", path, *about, silent)
    new = [{"step": progress.step, "setting": key, "from": then, "to": now} for key, then, now in changes]
    progress.changes = [*state.get("changes", []), *new]


def compare_runs(trainer: Trainer, state: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of everything that differs and matters. A setting that is newer than the checkpoint had its
    default then."""
    then = to_dict(Settings()) | state["settings"]
    now = to_dict(trainer.settings)
    free = FREE_ON_RESUME if trainer.settings.deterministic else FREE_ON_RESUME | {"max_ranks"}
    changes = [(key, then[key], now[key]) for key in now if key not in free and then[key] != now[key]]
    changes += _compare_models(trainer, state, [key for key, *_ in changes])
    whole = [(key, state[key], getattr(trainer, key)) for key in WHOLE]
    return changes + [change for change in whole if change[1] != change[2]] + _compare_records(trainer, state)


def _compare_models(trainer: Trainer, state: dict[str, Any], changed: list[str]) -> list[tuple[str, Any, Any]]:
    """The description behind an unchanged name, a file or what --pretrained makes of it; fields that are newer than the
    checkpoint had their defaults then."""
    if "model" in changed or "spec" not in state:
        return []
    specs = resolve_spec(state["spec"])[1].to_json(), trainer.model.spec.to_json()
    then, now = (flatten_table("", spec) for spec in specs)
    own = {"image.drop_path"} if "drop_path" in changed else set()  # a setting, too
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in own]
    return [("model", *({name: flat.get(name) for name in names} for flat in (then, now)))] if names else []


def _compare_records(trainer: Trainer, state: dict[str, Any]) -> list[tuple[str, str, str]]:
    then, now = state.get("records"), trainer.progress.records
    if not then or not now or then == now:  # versions before 0.5 say nothing of the records
        return []
    return [("train_data", describe_records(then), describe_records(now))]


def describe_arithmetic(trainer: Trainer) -> str:
    """What else decides the bits of a result: device, torch, and on a CPU the threads."""
    device = trainer.world.device.type
    threads = f" of {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device}{threads}, torch {torch.__version__}"
