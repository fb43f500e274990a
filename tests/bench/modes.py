"""What the modes of a training step cost: --deterministic and --accum-freq beside the plain step, time and memory.

python tests/bench/modes.py [--model RWKV-CLIP-B-32 --batch 32]

The same gradients, the same fused AdamW, one process. Deterministic: the batch in 4 pieces whose gradients are added as
a tree (`--max-ranks 4`). Accumulated: a quarter of the batch at a time with all negatives, so everything is encoded
twice; the floor is 4/3 of the plain time, as a backward pass counts two forward passes.
"""

from __future__ import annotations

import functools

import torch
from harness import Report, alternate, argument_parser, peak_memory
from models import make_inputs, make_ours

from rwkv_clip.config import Settings, parse
from rwkv_clip.dist import World
from rwkv_clip.objective import make_objective
from rwkv_clip.training.step import GradientStep, Inputs

MODES = {
    "plain": {},
    "deterministic": {"deterministic": True, "max_ranks": 4},
    "accumulated": {"accum_freq": 4},
}


def make_step(mode: str, name: str, batch: int, device: str):
    """(model, call): a call is one step, gradients and update, of a model of its own."""
    device = torch.device(device)
    model = make_ours(name, device).train()
    changes = MODES[mode]
    settings = parse(Settings, {"batch_size": batch // changes.get("accum_freq", 1), "precision": "bf16", **changes})
    gradients = GradientStep(
        model, model, make_objective("infonce"), settings, World(0, 1, device), lambda pixels: pixels
    )
    inputs = Inputs(*make_inputs(batch, 224, device, torch.float32), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients.run(0, inputs, lambda loss: loss)
        optimizer.step()

    return model, call


def prepare(mode: str, name: str, batch: int, device: str):
    """A call for `peak_memory`, after one that makes the optimizer's state."""
    call = make_step(mode, name, batch, device)[1]
    call()
    return call


def flat_gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--model", default="RWKV-CLIP-B-32")
    parser.add_argument("--batch", type=int, help="pairs per step, a multiple of 4 (CPU: 32; GPU: 512)")
    args = parser.parse_args()
    batch = args.batch or (32 if args.device.type == "cpu" else 512)
    report = Report("modes", args.device, commit=args.commit)
    made = {mode: make_step(mode, args.model, batch, str(args.device)) for mode in MODES}
    for _, call in made.values():
        call()
    exact = flat_gradients(made["plain"][0])
    for mode in list(MODES)[1:]:  # cut in another way, bfloat16 products are rounded in another way
        error = (flat_gradients(made[mode][0]) - exact).norm() / exact.norm()
        report.gate(f"{mode}: gradients against the plain step's", float(error), 2e-2)
    case = f"{args.model}, batch {batch}"
    calls = {mode: call for mode, (_, call) in made.items()}
    times = alternate(calls, repeats=args.repeats, warmup=1, device=args.device)
    del made, calls, exact
    goals = {"deterministic": 1 / 1.1, "accumulated": 0.75}
    for mode, seconds in times.items():
        measured = functools.partial(peak_memory, prepare, mode, args.model, batch, str(args.device))
        report.add(
            case, mode, seconds=seconds, baseline="plain", goal=goals.get(mode), peak_mib=measured(device=args.device)
        )
    report.finish(args.output)


if __name__ == "__main__":
    main()
