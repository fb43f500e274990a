"""Attention in bfloat16 on a CPU, forward and backward: with torch's backward pass, and with ours in float32.

python tests/bench/attention.py [--repeats 9]

Shapes are those of the heads of ViTs and a text tower. Floor: seven products of (T, D) and (T, T) for each head, two of
them forward; at these sizes they take a small part of the time, exponentials and conversions the rest. Checked before:
values are torch's to the bit, gradients are as near to float64's as torch's, or nearer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Report, alternate, argument_parser
from torch import Tensor
from torch.nn import functional as F

from rwkv_clip.training.attention import wide_backward

SHAPES = {  # batch, heads, tokens, width of a head
    "ViT at 64 px, patch 8, batch 128": (128, 2, 65, 64),
    "ViT-B/32, batch 32": (32, 12, 50, 64),
    "ViT-B/16, batch 8": (8, 12, 197, 64),
    "text tower, 77 tokens, batch 32": (32, 8, 77, 64),
}
WAYS = {"torch": (torch.bfloat16, False), "ours": (torch.bfloat16, True), "torch, float32": (torch.float32, False)}


def make_call(shape: tuple[int, ...], dtype: torch.dtype, wide: bool) -> Callable[[], list[Tensor]]:
    """A call that returns the output and the gradients by query, key and value."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for _ in range(4)]
    inputs, gradient = [x.requires_grad_() for x in numbers[:3]], numbers[3]

    def call() -> list[Tensor]:
        with wide_backward(wide):
            out = F.scaled_dot_product_attention(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    return call


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a gradient."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found[1:], exact[1:]))


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    if args.device.type != "cpu":
        raise SystemExit("attention: on a GPU torch's own backward pass is used; use --device cpu")
    report = Report("attention", args.device, commit=args.commit)
    for case, shape in SHAPES.items():
        plain, ours = (make_call(shape, *WAYS[name])() for name in ("torch", "ours"))
        exact = make_call(shape, torch.float64, False)()
        report.gate(f"values, {case}", float(not torch.equal(plain[0], ours[0])), 0)
        report.gate(f"gradients, {case}", error(ours, exact), 1.05 * error(plain, exact))
        calls = {name: make_call(shape, *way) for name, way in WAYS.items()}
        times = alternate(calls, repeats=args.repeats, device=args.device)
        for name, seconds in times.items():
            goal = {"baseline": "torch", "goal": 1.5} if name == "ours" else {}
            report.add(case, name, seconds=seconds, **goal)
    report.finish(args.output)


if __name__ == "__main__":
    main()
