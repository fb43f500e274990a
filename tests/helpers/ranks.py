"""Runs on several gloo ranks, in processes forked from one that has imported everything: 0.3 s instead of 3 s."""

import hashlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rwkv_clip.training.main", "torch._dynamo", "open_clip", "helpers.warm"])


def free_port() -> int:
    """A TCP port on loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank: int, world: int, port: int, folder: str, function: Callable, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        os._exit(99)


def start_ranks(world: int, folder: Path, function: Callable, *arguments) -> list[multiprocessing.Process]:
    """Start `function(*arguments)` on `world` ranks; an exception's traceback goes to `folder/error<rank>`."""
    port = free_port()
    ranks = [
        CONTEXT.Process(target=_child, args=(rank, world, port, str(folder), function, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(world: int, folder: Path, function: Callable, *arguments, timeout: float = 120) -> None:
    """The same, to the end; AssertionError with the traceback unless all ranks return."""
    ranks = start_ranks(world, folder, function, *arguments)
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    errors = "".join(path.read_text() for path in sorted(Path(folder).glob("error*")))
    assert codes == [0] * world, f"exit codes {codes}\n{errors}"


def train_logging_ids(settings: dict, log: str | None = None) -> None:
    """A training run by its settings. log: prefix of files that get the record ids of every step, one per rank."""
    from rwkv_clip.config import parse
    from rwkv_clip.dist import leave_world
    from rwkv_clip.training import loop
    from rwkv_clip.training.main import run
    from rwkv_clip.training.settings import Settings

    if log:
        step = loop.Trainer.step

        def logged(self, batch):
            with open(f"{log}.{self.state.progress.step:03}.{self.state.world.rank}", "w") as file:
                file.write(" ".join(map(str, batch.ids.tolist())))
            return step(self, batch)

        loop.Trainer.step = logged
    run(parse(Settings, settings))
    leave_world()


def read_ids(log: str) -> list[list[int]]:
    """Record ids of every step in the order of the global batch."""
    steps: dict[str, list[int]] = {}
    for path in sorted(Path(log).parent.glob(f"{Path(log).name}.*.*")):
        steps.setdefault(path.name.split(".")[-2], []).extend(map(int, path.read_text().split()))
    return list(steps.values())


def digest(checkpoint: Path) -> str:
    """sha256 of the bits of weights, optimizer and objective state."""
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name in ("model", "optim"):
        for key, value in sorted(load_file(checkpoint / f"{name}.safetensors").items()):
            found.update(key.encode() + value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
