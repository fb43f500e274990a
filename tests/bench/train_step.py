"""One training step (both towers, loss, backward, fused AdamW) under bfloat16 autocast: pairs per second.

python tests/bench/train_step.py [--models RWKV-CLIP-B-32 --batch 8 --compile]

Beside open_clip's ViT of the same size on the same inputs, each also compiled on a GPU (on a CPU with --compile). FLOPs
count matrix products, convolutions and attention, three times the forward pass; "pairs per FLOP" is the ratio that
takes the models' different FLOPs out. MFU is against the data sheet's dense bfloat16 rate, the share of a large matrix
product measured in the same run stands beside it. Ours drops paths at the released rate with --drop-path 0.3.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Report, alternate, argument_parser
from models import (
    NO_PEER,
    PEERS,
    check,
    contrastive_loss,
    count_flops,
    has_open_clip,
    make_inputs,
    make_open_clip,
    make_ours,
)
from released import load_released
from torch import nn

DATA_SHEET = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}  # dense bfloat16 FLOP/s, SXM


def make_step(model: nn.Module, inputs: tuple, device: torch.device, compiled: bool) -> Callable[[], None]:
    """A step on fixed inputs. Every contender steps its own weights."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            image, text, scale = forward(*inputs)[:3]
        contrastive_loss(image, text, scale).backward()
        optimizer.step()

    return step


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of one large bfloat16 product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = alternate({"product": lambda: a @ b}, repeats=9, warmup=3, device=device)["product"]
    return 2 * side**3 / statistics.median(seconds)


def check_gradients(report: Report, name: str, drop_path: float, device: torch.device) -> None:
    """Gradients under autocast against float32 ones, on two samples."""
    image, text = make_inputs(2, 224, device, torch.float32)
    found = []
    for enabled in (False, True):
        model = make_ours(name, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            out = model(image, text)
        contrastive_loss(*out).backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    error = 1 - torch.nn.functional.cosine_similarity(*found, dim=0)
    report.gate(f"{name}: direction of the gradient under autocast", error, 2e-2)


def add_released(report: Report, name: str, ours: nn.Module, inputs: tuple, args) -> nn.Module | None:
    """The released model, checked against ours with its weights; None, and a row that says why, where it cannot run."""
    case = f"{name}, batch {args.batch}"
    if args.upstream is None or args.device.type != "cuda":
        why = "needs an NVIDIA GPU" if args.upstream else "no checkout given: --upstream PATH"
        return report.missing(case, "released", why)
    model = load_released(args.upstream, name, args.drop_path, args.device)
    twin = copy.deepcopy(ours).eval()
    twin.load_state_dict(model.inner.state_dict())
    with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16):
        pairs = list(zip(("image", "text"), twin(*(x[:8] for x in inputs)), model.eval()(*(x[:8] for x in inputs))))
    for what, own, other in pairs:
        error = (own.float() - other.float()).norm() / other.float().norm()
        report.gate(f"{name}: {what} features against the released code's", error, 3e-2)
    return model


def measure(report: Report, name: str, args) -> None:
    """Rows of one model."""
    inputs = make_inputs(args.batch, 224, args.device, torch.float32)
    peer = f"open_clip {PEERS[name]}"
    models = {"ours": make_ours(name, args.device, drop_path=args.drop_path)}
    check(report, name, models["ours"].eval(), 224)
    check_gradients(report, name, args.drop_path, args.device)
    if has_open_clip():
        models[peer] = make_open_clip(PEERS[name], args.device)
    released = add_released(report, name, models["ours"], inputs, args)
    steps, flops = {}, {}
    for label, model in models.items():
        flops[label] = 3 * args.batch * count_flops(model, 224)
        steps[label] = make_step(model, inputs, args.device, False)
        if args.compile or args.device.type == "cuda":
            flops[f"{label}, compiled"] = flops[label]
            steps[f"{label}, compiled"] = make_step(model, inputs, args.device, True)
    if released is not None:  # the same FLOPs as ours
        steps["released"], flops["released"] = make_step(released, inputs, args.device, False), flops["ours"]
    times = alternate(steps, repeats=args.repeats, device=args.device)
    medians = {label: statistics.median(seconds) for label, seconds in times.items()}
    best_peer = min((label for label in times if label.startswith(peer)), key=medians.get, default=None)
    case, rate = f"{name}, batch {args.batch}", matrix_rate(args.device)
    for label, seconds in times.items():
        own = label.startswith("ours") and best_peer is not None
        figures = {"pairs_per_second": args.batch / medians[label], "tflops": flops[label] / medians[label] / 1e12}
        report.add(
            case, label, seconds=seconds, baseline=best_peer if own else None, goal=1.0 if own else None, **figures
        )
    best = min((label for label in times if label.startswith("ours")), key=medians.get)
    if released is not None:
        report.ratio(case, f"{best} over released", medians["released"] / medians[best], goal=3.3)
    if best_peer is None:
        report.missing(case, peer, NO_PEER)
    else:
        per_flop = (flops[best] / medians[best]) / (flops[best_peer] / medians[best_peer])
        report.ratio(case, f"pairs per second per FLOP, {best} over {best_peer}", per_flop, goal=1.0)
    report.ratio(case, f"{best}: share of a large product's rate", flops[best] / medians[best] / rate)
    known = [peak for key, peak in DATA_SHEET.items() if key in report.facts["device"]]
    if known:
        report.ratio(
            case, f"{best}: MFU of {known[0] / 1e12:g} TFLOP/s", flops[best] / medians[best] / known[0], goal=0.4
        )


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--models", nargs="+", choices=list(PEERS), help="presets (CPU: B-32; GPU: both)")
    parser.add_argument("--batch", type=int, help="pairs per step (CPU: 8; GPU: 512)")
    parser.add_argument("--drop-path", type=float, default=0.0, help="of the image tower")
    parser.add_argument("--upstream", type=Path, help="checkout of the released code (GPU; one model at a time)")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too (minutes)")
    args = parser.parse_args()
    if args.upstream and args.models is None:
        args.models = ["RWKV-CLIP-B-32"]  # the released code takes its sizes from the environment, once per process
    args.batch = args.batch or (8 if args.device.type == "cpu" else 512)
    report = Report("train_step", args.device, commit=args.commit)
    for name in args.models or (["RWKV-CLIP-B-32"] if args.device.type == "cpu" else list(PEERS)):
        measure(report, name, args)
    report.finish(args.output)


if __name__ == "__main__":
    main()
