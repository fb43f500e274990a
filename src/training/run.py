"""Run folders: which one a run writes, who owns it, and which checkpoint it resumes from.

One process at a time writes a run folder; `run.lock` in it stays, to name the last owner. The main rank takes ownership
of the folder, then chooses the checkpoint to resume from; it tells the other ranks, which compare that with what they
see of the folder.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_clip.checkpoint import find_checkpoint, list_checkpoints
from rwkv_clip.config import ConfigError
from rwkv_clip.dist import World, ask_main, judge_all
from rwkv_clip.files import hash_file, hold, new_folder

from .settings import RunSettings


@contextlib.contextmanager
def open_run(settings: RunSettings, world: World, model: str) -> Iterator[tuple[Path, Path | None]]:
    """(run folder, checkpoint to resume from or None); the folder is owned inside the block. A run without a name is
    named after the model and the time.

    InUse, at once, when another process owns it. ConfigError when it already holds another run, CheckpointError when
    there is nothing intact to resume from, OSError when it cannot be written. All ranks raise the main rank's errors.
    """
    logs = Path(settings.logs)
    with contextlib.ExitStack() as owned:

        def begin() -> dict[str, str | None]:
            name = settings.name or claim_folder(logs, model)
            _make_folder(logs, "logs")
            _make_folder(logs / name, "name")
            lock, remedy = logs / name / "run.lock", "wait for it, end it, or use another --name"
            owned.enter_context(hold(lock, str(logs / name), remedy, keep=True))
            checkpoint = _choose_checkpoint(settings, world, logs / name)
            digest = hash_file(checkpoint / "MANIFEST.json") if checkpoint else None
            return {"name": name, "checkpoint": str(checkpoint) if checkpoint else None, "manifest": digest}

        told = ask_main(world, "run", begin)
        folder, checkpoint = logs / told["name"], told["checkpoint"] and Path(told["checkpoint"])
        if checkpoint and world.size > 1:
            name = checkpoint.name
            checkpoint = _find_same(settings, folder, name, told["manifest"])
            seen = {"host": socket.gethostname(), "seen": checkpoint is not None}
            judge_all(world, "checkpoint", seen, lambda ranks: _check_seen(ranks, folder / "checkpoints" / name))
        yield folder, checkpoint


def claim_folder(logs: Path, name: str) -> str:
    """Make a run folder named after `name` and the time; returns its name. Runs that start in the same second get -2,
    -3 .."""
    _make_folder(logs, "logs")
    return new_folder(logs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").name


def _make_folder(path: Path, setting: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError([f"{setting}: {path} cannot be created ({error.strerror}); name a folder that can"]) from None


def _resumed_path(settings: RunSettings, folder: Path) -> Path:
    """Where to look for the checkpoint to resume from."""
    return folder if settings.resume in (None, "latest") else Path(settings.resume)


def _choose_checkpoint(settings: RunSettings, world: World, folder: Path) -> Path | None:
    """The checkpoint folder to resume from, verified; None to start a new run."""
    has_run = bool(list_checkpoints(folder))
    again = world.restarted and settings.name and has_run  # by torchrun, with the arguments of the first start
    if settings.resume is None and has_run and not again:
        raise ConfigError([f"name: {folder} already holds a run; resume it by --resume latest, or use another name"])
    if again:
        return find_checkpoint(folder)
    if settings.resume is None or (settings.resume == "latest" and not has_run):
        return None
    found = find_checkpoint(_resumed_path(settings, folder))
    if found.is_dir():
        return found
    raise ConfigError(
        [
            f"resume: {found} is a file of weights; a run resumes from a run folder or a checkpoint folder in it; "
            f"--pretrained {found} starts a new run with these weights"
        ]
    )


def _find_same(settings: RunSettings, folder: Path, name: str, manifest: str) -> Path | None:
    """The main rank's checkpoint as this rank sees it; None where it does not, or sees another one."""
    start = _resumed_path(settings, folder)
    for path in (start, start / "checkpoints" / name, start / name, folder / "checkpoints" / name):
        with contextlib.suppress(OSError):
            if path.name == name and hash_file(path / "MANIFEST.json") == manifest:
                return path
    return None


def _check_seen(ranks: list[dict[str, Any]], path: Path) -> None:
    blind = [f"rank {rank} on {one['host']}" for rank, one in enumerate(ranks) if not one["seen"]]
    if blind:
        raise ConfigError(
            [
                f"logs: {blind[0]} does not see {path} as rank 0 on {ranks[0]['host']} does; all nodes must share "
                f"the storage of the run folder"
            ]
        )
