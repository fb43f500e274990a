"""One image block and one text block of B/32, forward and forward + backward, beside their matrix products alone.

python tests/bench/block.py [--batch 8 --compile]

"torch" is the block in plain torch operations under autocast (on a CPU: the native pointwise kernels switched off),
"ours" the block as it runs; "compiled" has inductor fuse either. "products" runs a block's matrix products and nothing
else, on bfloat16 tensors that lie ready: the floor that everything else is measured against. bytes_per_element is the
least traffic of the rest: what has to cross memory between the products with everything in between fused, per element
of (B, T, C) and forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from harness import Report, alternate, argument_parser
from torch import Tensor, nn

from rwkv_clip.models.rwkv import ImageTowerConfig, TextTowerConfig
from rwkv_clip.models.rwkv_block import IMAGE_STYLE, TEXT_STYLE, Block
from rwkv_clip.ops.block import native

CASES = {  # style, configuration, grid
    "image T 49 N 80": (IMAGE_STYLE, ImageTowerConfig(), (7, 7)),
    "text T 77 N 64": (TEXT_STYLE, TextTowerConfig(), (77,)),
}
# Residual in and out twice in float32 (16); behind LayerNorm: mixing's first input, five mixtures, two mixtures (16);
# decay in float32 (4); y and gate in, their product out (6); value and gate of the channel mix in (4).
BYTES = 46


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Without the native pointwise kernels."""
    with mock.patch.object(native, "supports", lambda x: False):
        yield


def make_block(case: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    style, config, _ = CASES[case]
    block = Block(config, style, first=False)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return block.to(device, dtype)


def products_of(block: Block, rows: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Operands of a block's matrix products at `rows` tokens."""
    att, ffn = block.att, block.ffn
    linears = (att.receptance, att.key, att.value, att.gate, att.output, ffn.key, ffn.receptance, ffn.value)
    weights = [x.weight.T for x in linears] + [att.time_maa_w1, att.time_decay_w1, att.time_decay_w2]
    pairs = [(torch.randn(rows, w.shape[0]), w) for w in weights] + [(torch.randn(5, rows, 32), att.time_maa_w2)]
    return [tuple(x.detach().to(device, torch.bfloat16).requires_grad_() for x in pair) for pair in pairs]


def check(report: Report, case: str, device: torch.device) -> None:
    """Value and gradients of a block under autocast, and in float32, against plain torch in float64."""
    grid = CASES[case][2]
    x = torch.randn(2, torch.Size(grid).numel(), 640, generator=torch.Generator().manual_seed(0)).to(device)
    found = {}
    for label, dtype, amp in (("float64", torch.float64, False), ("float32", torch.float32, False),
                              ("autocast", torch.float32, True)):  # fmt: skip
        block, own = make_block(case, device, dtype), x.to(dtype, copy=True).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            y = block(own, grid)
        y.square().sum().backward()
        found[label] = [y.detach(), own.grad, torch.cat([p.grad.flatten() for p in block.parameters()])]
    for label, limit in (("float32", 1e-5), ("autocast", 3e-2)):
        for what, ours, exact in zip(("value", "input gradient", "weight gradients"), found[label], found["float64"]):
            report.gate(f"{case}: {what}, {label}", (ours.double() - exact).norm() / exact.norm(), limit)


def contenders(case: str, args) -> dict[str, Callable[[bool], None]]:
    """Calls that take whether to go backward."""
    grid, device = CASES[case][2], args.device
    x = torch.randn(args.batch, torch.Size(grid).numel(), 640, device=device, requires_grad=True)
    block = make_block(case, device)
    products = products_of(block, args.batch * x.shape[1], device)

    def run(forward: Callable, plain: bool, backward: bool) -> None:
        with torch_only() if plain else contextlib.nullcontext(), torch.set_grad_enabled(backward):
            with torch.autocast(device.type, torch.bfloat16):
                y = forward(x, grid)
            if backward:
                y.backward(x)

    def multiply(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            outs = [a @ b for a, b in products]
            if backward:
                torch.autograd.backward(outs, outs)

    calls = {"torch": lambda b: run(block, True, b), "ours": lambda b: run(block, False, b), "products": multiply}
    if args.compile or device.type == "cuda":
        compiled, formulas = (torch.compile(make_block(case, device), fullgraph=True) for _ in range(2))
        calls["ours, compiled"] = lambda b: run(compiled, False, b)
        if device.type == "cpu":  # elsewhere they are the same
            calls["torch, compiled"] = lambda b: run(formulas, True, b)
    return calls


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, help="samples (CPU: 8; GPU: 512)")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too (a minute)")
    args = parser.parse_args()
    args.batch = args.batch or (8 if args.device.type == "cpu" else 512)
    report = Report("block", args.device, commit=args.commit)
    for case in CASES:
        check(report, case, args.device)
        calls = contenders(case, args)
        for step, backward in (("forward", False), ("forward + backward", True)):
            timed = {label: lambda call=call: call(backward) for label, call in calls.items()}  # noqa: B023
            times = alternate(timed, repeats=args.repeats, device=args.device)
            elements = args.batch * torch.Size(CASES[case][2]).numel() * 640
            for label, seconds in times.items():
                floor = {"bytes_per_element": BYTES, "elements": elements} if label == "ours" and not backward else {}
                beside = {"baseline": "torch"} if label.startswith("ours") else {}
                report.add(f"{case}, batch {args.batch}, {step}", label, seconds=seconds, **beside, **floor)
    report.finish(args.output)


if __name__ == "__main__":
    main()
