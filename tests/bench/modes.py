"""What the modes of a training step cost: --deterministic and --accum-freq beside the plain step, time and memory.

python tests/bench/modes.py [--model RWKV-CLIP-B-32 --batch 64 --ranks 1 2]

The same gradients, the same fused AdamW. Deterministic: a global batch in 2 pieces (`--max-ranks 2`), whose gradients
are added as a tree; on 2 ranks each computes one piece, as with DDP, and only the exchange differs, on 1 rank both.
Each piece costs what does not grow with its pairs (on a CPU: converting weights and gradients, packing them for
products). Accumulated: a quarter of the batch at a time with all negatives, so everything is encoded twice; the floor
is 4/3 of the plain time, as a backward pass counts two forward passes. On a CPU several ranks have one thread each.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness import Report, alternate, argument_parser, peak_memory
from models import make_ours

from rwkv_clip.config import parse
from rwkv_clip.dist import World, join_world, leave_world
from rwkv_clip.losses import InfoNCE
from rwkv_clip.training.gradients import GradientStep, Inputs
from rwkv_clip.training.parallel import distribute_model
from rwkv_clip.training.settings import Settings

MODES = {
    "plain": {},
    "deterministic": {"deterministic": True, "max_ranks": 2},
    "accumulated": {"accum_freq": 4},
}
GOALS = {"deterministic": 1 / 1.1, "accumulated": 0.75}


def make_step(mode: str, name: str, batch: int, world: World) -> tuple[torch.nn.Module, Callable[[], None]]:
    """(model, call): a call is one step, gradients and update, of a model of its own. batch: of all ranks."""
    model = make_ours(name, world.device).train()
    share = batch // world.size
    changes = {"batch_size": share // MODES[mode].get("accum_freq", 1), "precision": "amp_bf16", **MODES[mode]}
    settings = parse(Settings, changes)
    parallel = distribute_model(model, settings, world)
    gradients = GradientStep(model, parallel, InfoNCE(), settings, world, lambda pixels: pixels)
    g = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, *model.image_size, generator=g)
    text = torch.randint(1, 49407, (batch, model.context_length), generator=g)
    rows = slice(world.rank * share, (world.rank + 1) * share)
    inputs = Inputs(image[rows].to(world.device), text[rows].to(world.device), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients.run(0, inputs, lambda loss: loss)
        optimizer.step()

    return model, call


def prepare(mode: str, name: str, batch: int, device: str) -> Callable[[], None]:
    """A call for `peak_memory`, after one that makes the optimizer's state."""
    call = make_step(mode, name, batch, World(0, 1, torch.device(device)))[1]
    call()
    return call


def compare(world: World, name: str, batch: int, repeats: int) -> dict:
    """Seconds of every mode on this rank, and how far its gradients are from the plain ones."""
    made = {mode: make_step(mode, name, batch, world) for mode in MODES}
    for _, call in made.values():
        call()
    gradients = {mode: torch.cat([p.grad.flatten() for p in model.parameters()]) for mode, (model, _) in made.items()}
    exact = gradients["plain"]
    errors = {mode: float((found - exact).norm() / exact.norm()) for mode, found in gradients.items()}
    del gradients, exact
    calls = {mode: call for mode, (_, call) in made.items()}
    return {"errors": errors, "seconds": alternate(calls, repeats=repeats, warmup=1, device=world.device)}


def work(rank: int, size: int, port: int, device: str, file: str, arguments: tuple) -> None:
    """One of several ranks; the first leaves what it found in `file`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    world = join_world(device)
    found = compare(world, *arguments)
    if rank == 0:
        torch.save(found, file)
    leave_world()


def run_ranks(size: int, device: str, arguments: tuple) -> dict:
    """`compare` on several ranks of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        file = str(Path(folder) / "found")
        torch.multiprocessing.spawn(work, (size, port, device, file, arguments), nprocs=size)
        return torch.load(file, weights_only=True)


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--model", default="RWKV-CLIP-B-32")
    parser.add_argument("--batch", type=int, help="pairs per step, a multiple of 8 (CPU: 32; GPU: 512)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (1 2)")
    args = parser.parse_args()
    cpu = args.device.type == "cpu"
    batch = args.batch or (32 if cpu else 512)
    report = Report("modes", args.device, commit=args.commit)
    for ranks in args.ranks:
        case = f"{args.model}, batch {batch}, {ranks} rank{'s' * (ranks > 1)}"
        if not cpu and ranks > torch.cuda.device_count():
            report.missing(case, "plain", f"needs {ranks} GPUs")
            continue
        arguments = (args.model, batch, args.repeats)
        alone = ranks == 1
        found = (
            compare(World(0, 1, args.device), *arguments) if alone else run_ranks(ranks, str(args.device), arguments)
        )
        for mode in GOALS:  # cut in another way, bfloat16 products are rounded in another way
            report.gate(f"{mode} on {ranks}: gradients against the plain step's", found["errors"][mode], 2e-2)
        for mode, seconds in found["seconds"].items():
            more = {}
            if alone:
                measured = functools.partial(peak_memory, prepare, mode, args.model, batch, str(args.device))
                more["peak_mib"] = measured(device=args.device)
            report.add(case, mode, seconds=seconds, baseline="plain", goal=GOALS.get(mode), **more)
    report.finish(args.output)


if __name__ == "__main__":
    main()
