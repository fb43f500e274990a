"""Ranks and collectives: the only reader of RANK, LOCAL_RANK and WORLD_SIZE. One process is a world of one.

torchrun's store outlives the processes that it restarts, and so does what they wrote to it. So the ranks of each start
first agree on a name (`_agree_on_name`), which prefixes all their keys. Without this, gloo and NCCL of a restarted run
find the addresses of processes that are gone, and `--max-restarts` never works (torch 2.5 and later).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .device import choose_device
from .errors import PEER, explain
from .processes import follow_parent

TIMEOUT = timedelta(minutes=10)  # of a collective, by default
JOINING = timedelta(minutes=5)  # for all ranks to join: imports from a slow disk differ by minutes
ANSWERING = timedelta(minutes=30)  # for an answer of the main rank, which may have to read large checkpoints for it
DELIVERING = 5.0  # seconds that a failing main rank waits for the others to read its error


class PeerLost(RuntimeError):
    """Another rank is dead, silent or stuck, so this one cannot continue; names it and when it was last seen."""

    exit_code = PEER


class MainRankFailed(RuntimeError):
    """The main rank failed in work for all ranks; carries its message and exit code."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """This process's place among all ranks."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = field(default=None, repr=False, compare=False)  # None in a world of one
    restarted: bool = False  # torchrun restarted this run after a failure
    local_size: int = 1  # ranks on this rank's node

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch() -> tuple[int, int]:
    """(rank, number of ranks) that torchrun gave this process, before it joins; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def count_lone_tasks() -> int:
    """How many tasks srun started without torchrun, each of which would be a world of one; 1 elsewhere."""
    return 1 if "WORLD_SIZE" in os.environ else int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def join_world(device: str | None = None, timeout: timedelta = TIMEOUT) -> World:
    """Join the process group that torchrun started, or be a world of one. NCCL on CUDA, gloo elsewhere.

    timeout: of every collective. PeerLost when a rank does not join within five minutes; ValueError where one has a
    different kind of device.
    """
    kind = choose_device(device)
    rank, size = read_launch()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if kind.type == "cuda" and kind.index is None:
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if kind.type == "cuda":
        torch.cuda.set_device(kind)
    if size == 1:
        return World(rank, size, kind, restarted=restarted)
    follow_parent(signal.SIGCONT)  # a rank that is stopped while torchrun is killed continues, and finds out
    try:
        store = next(dist.rendezvous("env://", rank, size, timeout=JOINING))[0]
        name = _agree_on_name(store, rank, size)
        _check_kinds(dist.PrefixStore(name, store), rank, size, kind)
        dist.init_process_group(
            "nccl" if kind.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"{name}/group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except dist.DistError as error:
        if (found := explain(error)) is not None:  # the port is in use
            raise ValueError(f"rank {rank} on {socket.gethostname()}: {found[1]}") from None
        raise PeerLost(f"rank {rank} waited {JOINING} for the other {size - 1} ranks ({first_line(error)})") from None
    # A separate connection: torch's is blocked while a collective waits for a key.
    own = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=JOINING)
    # Each torchrun counts its own restarts: with several nodes, the one that failed knows of it, and the others may
    # not.
    count = torch.tensor(float(restarted), device=kind)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, kind, dist.PrefixStore(name, own), bool(max_over_ranks(count).item()), local_size)


def _agree_on_name(store: dist.Store, rank: int, size: int) -> str:
    """A name that all ranks of this start share and no earlier start on the same store had.

    The main rank answers every token that it finds, including those that earlier processes left; only a rank that still
    waits for its answer counts itself.
    """
    token = secrets.token_hex(8)
    if rank > 0:
        store.set(f"rwkv_clip/token/{rank}", token)
        name = store.get(f"rwkv_clip/answer/{token}").decode()
        store.add(name, 1)
        return name
    answered: set[bytes] = set()
    until = time.monotonic() + JOINING.total_seconds()
    while store.add(token, 0) < size - 1:
        if time.monotonic() > until:
            raise dist.DistStoreError("not all of them joined")
        for other in set(store.multi_get([f"rwkv_clip/token/{r}" for r in range(1, size)])) - answered:
            store.set(f"rwkv_clip/answer/{other.decode()}", token)
            answered.add(other)
        time.sleep(0.01)
    return token


def _check_kinds(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """ValueError, on all ranks, unless their devices are of one kind: otherwise they could not communicate, and would
    wait."""
    store.set(f"device/{rank}", f"{device.type} on {socket.gethostname()}")
    first, *others = [kind.decode() for kind in store.multi_get([f"device/{r}" for r in range(size)])]
    for other, kind in enumerate(others, 1):
        if kind.split()[0] != first.split()[0]:
            raise ValueError(f"device: rank {other} has {kind}, rank 0 has {first}; give all ranks one --device")


def ask_main(world: World, what: str, work: Callable[[], Any]) -> Any:
    """What `work()` returns on the main rank, JSON data, on every rank. `what` names the question; ask each only once.

    An error of the main rank is raised there and, as MainRankFailed with its message and exit code, on the others.
    """
    if world.store is None:
        return work()
    if world.is_main:
        try:
            answer = work()
        except BaseException as error:
            code, text = explain(error) or (PEER, f"rank 0 failed ({type(error).__name__}: {first_line(error)})")
            world.store.set(f"answer/{what}", json.dumps({"error": text, "code": code}))
            until = time.monotonic() + DELIVERING
            while world.store.add(f"received/{what}", 0) < world.size - 1 and time.monotonic() < until:
                time.sleep(0.01)  # the store may end with this process
            raise
        world.store.set(f"answer/{what}", json.dumps({"answer": answer}))
        return answer
    try:
        world.store.wait([f"answer/{what}"], ANSWERING)
        reply = json.loads(world.store.get(f"answer/{what}"))
        world.store.add(f"received/{what}", 1)
    except dist.DistError as error:
        raise PeerLost(f"rank {world.rank} got no answer from rank 0 ({first_line(error)})") from None
    if "error" in reply:
        raise MainRankFailed(reply["error"], reply["code"])
    return reply["answer"]


def judge_all(world: World, what: str, facts: dict[str, Any], judge: Callable[[list[dict[str, Any]]], None]) -> None:
    """Call `judge` on the main rank with the facts (JSON data) of all ranks in rank order; errors as by `ask_main`.

    PeerLost for a rank that sends none.
    """
    if (store := world.store) is None:
        return judge([facts])
    store.set(f"fact/{what}/{world.rank}", json.dumps(facts))

    def work() -> None:
        received = []
        for rank in range(world.size):
            try:
                received.append(json.loads(store.get(f"fact/{what}/{rank}")))
            except dist.DistError as error:
                raise PeerLost(f"rank {rank} sent nothing before the run began ({first_line(error)})") from None
        judge(received)

    return ask_main(world, what, work)


def first_line(error: BaseException) -> str:
    """An error in one line, for messages."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def leave_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """(rank, world size) of the current process group; (0, 1) without one and inside `single_process()`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _single else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rank, size = rank_and_size()
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = slice(rank * len(x), (rank + 1) * len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss depends on these rows; DDP divides the sum by the number of ranks afterwards.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(x: Tensor) -> Tensor:
    """(B, ...) on every rank -> (world * B, ...) in rank order; gradients flow back to the rank they belong to.

    Every rank must hold the same B.
    """
    return x if rank_and_size()[1] == 1 else _Gather.apply(x)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Elementwise sum over ranks, the same on all of them; not differentiable. `x` is unchanged."""
    return _reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks, the same on all of them; not differentiable. `x` is unchanged."""
    return _reduce(x, dist.ReduceOp.MAX)


def _reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if rank_and_size()[1] == 1:
        return x
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, operation)
    return result


def mean_over_ranks(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Numbers averaged over ranks; every rank passes the same keys."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.tensor([float(value) for value in values.values()], dtype=dtype, device=device)
    return dict(zip(values, (sum_over_ranks(numbers) / rank_and_size()[1]).tolist()))


_single = False


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process is a world of one: `gather` and the sums over ranks return their input.

    So every rank can compute an objective on the features of all, in an order that does not depend on their number.
    """
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before
