"""What the crash tests run in a process of one thread, so that it can fork: each writes what it saw as JSON."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from helpers.smallrun import SmallRun, digest_folder
from helpers.syscalls import exit_at, watch_calls
from rwkv_clip import serialization
from rwkv_clip.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint
from rwkv_clip.config import parse
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.training import main
from rwkv_clip.training.settings import Settings

UNTIL = 5  # steps of a small run
KILLED = 137


def fork(function: Callable, *arguments) -> int:
    """Process id of a child that runs `function(*arguments)` and ends without cleaning up: code 0, 99 if it raises."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            function(*arguments)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    return child


def wait(child: int) -> int:
    """Its exit code, 137 when it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return KILLED if code == -signal.SIGKILL else code


def intact(folder: Path) -> list[str]:
    """Names of the checkpoints that verify, oldest first."""
    good = []
    for path in list_checkpoints(folder) if folder.is_dir() else []:
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(path)
            good.append(path.name)
    return good


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".old", ".aside")))


# ---- every call ------------------------------------------------------------------------------------------------------


def crash_everywhere(base: str, go_back: bool, names: tuple[str, ...], seen: str) -> None:
    """From the checkpoints in `base`, step and save once, dying at each call in turn; then resume and run to the end.

    go_back: resume from step 2 by name, though there may be a later one, as the same command would. names: of calls."""
    serialization.CHUNK = 1024  # several writes per file
    base, rows = Path(base), []
    start = base / "step-00000002" if go_back else None

    def save(folder: Path, number: int, when: str) -> None:
        run = SmallRun(folder, start=start and folder / start.name)
        run.step()
        with watch_calls(exit_at(number, when), names=("write",) if when == "half" else names):
            run.save(last=True)

    known = {}  # by the state of the files: the resumption is a function of it
    for when in ("before", "after", "half"):
        number, code = 0, KILLED
        while code == KILLED:
            number += 1
            folder = base.with_name(f"{base.name} {when} {number}")
            shutil.copytree(base, folder)
            code = wait(fork(save, folder, number, when))
            state = digest_folder(folder)
            if state not in known:
                row = {"intact": intact(folder)}
                run = SmallRun(folder, start=start and folder / start.name)
                row |= {"resumed": run.progress, "cleaned": not any(n.endswith(".tmp") for n in leftovers(folder))}
                row |= {"digest": run.run(UNTIL).digest(), "names": sorted(p.name for p in folder.iterdir())}
                known[state] = row
            rows.append({"call": number, "when": when, "code": code, **known[state]})
            shutil.rmtree(folder)
    Path(seen).write_text(json.dumps(rows))


# ---- a real run ------------------------------------------------------------------------------------------------------


def train(settings: dict, **changes) -> None:
    """`rwkv_clip.training.main.run`, silent and without its plot."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main.plot_training = lambda folder: None
    main.run(parse(Settings, {**settings, **changes}))


def snapshot_every_call(settings: dict, step: int, snapshots: str) -> None:
    """A run that copies its folder before and after every call of the save of `step`: what a kill there would leave."""
    folder = Path(settings["logs"]) / settings["name"]

    def copy(number: int, name: str, arguments: tuple, when: str) -> None:
        shutil.copytree(folder, Path(snapshots) / f"{number:03d} {when} {name}", copy_function=shutil.copyfile)

    with watch_calls(copy, begin=re.compile(f"step-{step:08d}.tmp")):
        train(settings)


def resume_snapshots(settings: dict, step: int, snapshots: str, seen: str) -> None:
    """Resume each different snapshot."""
    rows, known = [], {}
    make_tokenizer("clip-bpe")  # once, not in every child
    assert wait(fork(snapshot_every_call, settings, step, snapshots)) == 0
    for path in sorted(Path(snapshots).iterdir()):
        state = digest_folder(path / "checkpoints")
        if state not in known:
            row = {"intact": intact(path), "code": wait(fork(train, settings | {"logs": snapshots, "name": path.name}))}
            row |= {"left": leftovers(path / "checkpoints"), "final": final_digest(path)}
            known[state] = row
        rows.append({"at": path.name, **known[state]})
        shutil.rmtree(path)
    Path(seen).write_text(json.dumps([rows, len(known)]))


def final_digest(folder: Path) -> dict[str, str]:
    """sha256 of the newest checkpoint's tensors, by its name."""
    newest = max(intact(folder), default=None)
    if newest is None:
        return {}
    files = json.loads((folder / "checkpoints" / newest / "MANIFEST.json").read_text())["files"]
    return {newest: files["model.safetensors"]["sha256"] + files["optim.safetensors"]["sha256"]}


def kill_at_random(settings: dict, kills: int, seed: int, seen: str) -> None:
    """Start, kill, start again .. ; a run that gets to its end is compared and a new one begins."""
    rng, logs = random.Random(seed), Path(settings["logs"])
    make_tokenizer("clip-bpe")
    assert wait(fork(train, settings | {"name": "warm"})) == 0  # compiles what is to be compiled
    began = time.monotonic()
    assert wait(fork(train, settings | {"name": "whole"})) == 0
    life = time.monotonic() - began
    reference, rows, runs, done = final_digest(logs / "whole"), [], [], 0
    while done < kills or not runs[-1]["whole"]:
        if not runs or runs[-1]["whole"]:
            runs.append({"whole": False, "starts": 0})
        folder = logs / f"run{len(runs)}"
        runs[-1]["starts"] += 1
        child, delay = fork(train, settings | {"name": folder.name}), rng.uniform(0, life)
        if done < kills:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        if code == KILLED:
            done += 1
            written = folder / "checkpoints"
            saving = written.is_dir() and bool(leftovers(written))
            rows.append({"saving": saving, "intact": intact(folder)})
        else:
            runs[-1] |= {"whole": True, "code": code, "same": final_digest(folder) == reference}
            runs[-1]["left"] = leftovers(folder / "checkpoints")
            shutil.rmtree(folder)
    Path(seen).write_text(json.dumps([rows, runs]))
