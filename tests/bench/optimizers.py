"""What an average of the weights and other optimizers cost: a whole training step of the trainer, seconds and state.

python tests/bench/optimizers.py [--model RWKV-CLIP-Ti-8 --batch 64 --opts lion muon]

Every contender trains weights of its own on the same batches, in turn: AdamW (fused, the baseline), AdamW with
--ema-decay, AdamW with rates by tower and layer, and optimizers by name. State: bytes of what the optimizer keeps over
the bytes of the weights, which AdamW does with 2. Checked first: the average against its formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Report, alternate, argument_parser
from models import make_ours

from rwkv_clip.config import parse
from rwkv_clip.dist import World
from rwkv_clip.losses import InfoNCE
from rwkv_clip.training.data.batch import Batch
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.state import TrainState
from rwkv_clip.training.trainer import Trainer

EMA = {"ema_decay": 0.9998}
LAYERS = {"layer_decay_image": 0.7, "layer_decay_text": 0.7, "lr_text": 5e-5}


def make_trainer(args, **changes: object) -> tuple[Trainer, Callable[[], None]]:
    """(trainer, call): a call is one step on the same batch."""
    fixed = {"lr": 1e-4, "batch_size": args.batch, "precision": "auto", "schedule": "constant", "max_steps": 10**6}
    settings = parse(Settings, fixed | changes)
    model = make_ours(args.model, args.device)
    trainer = Trainer(TrainState(model, InfoNCE(), settings, World(0, 1, args.device), 10**6))
    g = torch.Generator().manual_seed(1)
    image = torch.randint(256, (args.batch, 3, *model.image_size), generator=g, dtype=torch.uint8)
    text = torch.randint(1, 49407, (args.batch, 1, model.context_length), generator=g)
    ids = torch.arange(args.batch)
    batch = Batch(image, text, ids, torch.zeros_like(ids), 0)
    return trainer, lambda: trainer.step(batch)


def check_average(report: Report, args) -> None:
    """Three steps' average against its formula in float64."""
    trainer, step = make_trainer(args, **EMA)
    own, average = trainer.state.shards.own, trainer.state.average
    exact = {name: p.detach().double() for name, p in own.items()}
    for number in range(3):
        step()
        decay = min(EMA["ema_decay"], (1 + number) / (10 + number))
        exact = {name: decay * value + (1 - decay) * own[name].detach().double() for name, value in exact.items()}
    error = max(
        float((average.kept[name] - value).norm() / value.norm().clamp(min=1e-3)) for name, value in exact.items()
    )
    report.gate("the average of three steps against its formula in float64", error, 1e-6)


def main() -> None:
    parser = argument_parser(__doc__, repeats=9)
    parser.add_argument("--model", default="RWKV-CLIP-Ti-8", help="preset")
    parser.add_argument("--batch", type=int, default=64, help="pairs per step")
    parser.add_argument("--opts", nargs="*", default=["lion", "adafactor", "muon"], help="names that --opt takes")
    args = parser.parse_args()
    report = Report("optimizers", args.device, commit=args.commit)
    check_average(report, args)
    ways: dict[str, dict] = {"adamw": {}, "adamw, average": EMA, "adamw, rates by layer": LAYERS}
    ways |= {opt: {"opt": opt} for opt in args.opts}
    made = {name: make_trainer(args, **changes) for name, changes in ways.items()}
    weights = sum(p.nbytes for p in made["adamw"][0].state.model.parameters())
    case = f"{args.model} ({weights / 4e6:.1f} million parameters), batch {args.batch}"
    times = alternate({name: call for name, (_, call) in made.items()}, repeats=args.repeats, device=args.device)
    for name, seconds in times.items():
        state = made[name][0].state
        kept = [t for slots in state.optimizer.state.values() for t in slots.values() if isinstance(t, torch.Tensor)]
        total = sum(t.nbytes for t in kept) + sum(
            t.nbytes for t in (state.average.kept if state.average else {}).values()
        )
        base = None if name == "adamw" else "adamw"
        report.add(case, name, seconds=seconds, baseline=base, state_over_weights=total / weights)
    report.finish(args.output)


if __name__ == "__main__":
    main()
