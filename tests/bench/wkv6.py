"""WKV6: every backend of this machine, forward and forward + backward, in float32 and bfloat16 (decay and u float32).

python tests/bench/wkv6.py [--batch 8] [--upstream ../RWKV-CLIP]      # --batch is 512 by default on a GPU

On a CPU the baseline is the plain recurrence (`reference`). On a GPU it is the released kernels with their casts, from
a checkout given by --upstream (compiled as they are, into the cache of our own; never part of this repository), beside
them flash-linear-attention, if installed, called once per direction. The share of the memory roofline is that of the
bytes that a forward pass has to move, at the speed of a plain copy measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Report, alternate, argument_parser
from torch import Tensor

from rwkv_clip.ops import available_backends, wkv6
from rwkv_clip.ops.build import architecture_flags, build_library, find_nvcc, load_library

try:
    from fla.ops.rwkv6 import chunk_rwkv6
except ImportError:
    chunk_rwkv6 = None

SHAPES = {  # T, H, N, share of the batch
    "B/32 image": (49, 8, 80, 1),
    "text": (77, 10, 64, 1),
    "B/16 image": (196, 8, 80, 1),
    "B/16 image of 512 px": (1024, 8, 80, 8),
}
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
PEER_BOUND = 1e-2  # fast maths, TF32
GOALS = {"cpp": (5, 4), "cuda": (5, 8)}  # forward, forward + backward, over the baseline; fla: FLA_GOAL
FLA_GOAL = 5
ROOFLINE_GOAL = 0.6
Op = Callable[..., Tensor]


class Released(torch.autograd.Function):
    """The released kernels as the released code calls them: float32 copies of all inputs, float32 results."""

    @staticmethod
    def forward(ctx, library, r, k, v, w, u):
        log_w, y = -torch.exp(w.float()), torch.empty(v.shape, device=v.device)
        ctx.library = library
        ctx.save_for_backward(r, k, v, log_w, u)
        _call(library._Z12cuda_forwardiiiiPfS_S_S_S_S_, r.shape, r.float(), k.float(), v.float(), log_w, u, y)
        return y

    @staticmethod
    def backward(ctx, gy):
        r, k, v, log_w, u = ctx.saved_tensors
        grads = [torch.empty(r.shape, device=r.device) for _ in range(4)]
        gu = torch.empty(r.shape[0], *u.shape, device=u.device)
        inputs = (r.float(), k.float(), v.float(), log_w, u, gy)
        _call(ctx.library._Z13cuda_backwardiiiiPfS_S_S_S_S_S_S_S_S_S_, r.shape, *inputs, *grads, gu)
        return None, *grads, gu.sum(0)


def _call(function, shape: torch.Size, *tensors: Tensor) -> None:
    b, t, h, n = shape
    function(b, t, h * n, h, *(ctypes.c_void_p(x.data_ptr()) for x in tensors))


def build_released(checkout: Path, t: int, n: int) -> ctypes.CDLL:
    """The released .cu for one length and head size, with its own flags; the torch header it names goes unused."""
    folder = Path(tempfile.gettempdir()) / "rwkv_clip_bench_headers" / "ATen"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ATen.h").touch()
    flags = ["--use_fast_math", "-O3", "-Xptxas", "-O3", "--extra-device-vectorization", f"-D_N_={n}", f"-D_T_={t}"]
    arch = architecture_flags([torch.cuda.get_device_capability()], find_nvcc())
    source = checkout / "model" / "cuda_image" / "wkv6_cuda.cu"
    flags = [*flags, *arch, f"-I{folder.parent}"]
    return load_library(build_library("wkv6_released", [source], flags=flags, compiler="nvcc"))


def fla_both_ways(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    log_w = -torch.exp(w.float())
    forwards, _ = chunk_rwkv6(r, k, v, log_w, u, scale=1.0)
    flipped = [x.flip(1) for x in (r, k, v, log_w)]
    backwards, _ = chunk_rwkv6(*flipped, torch.zeros_like(u), scale=1.0)
    return forwards + backwards.flip(1)


def make_inputs(
    b: int, t: int, h: int, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """gy and leaves r, k, v, w, u; the decay in the range of fresh models."""
    g = torch.Generator().manual_seed(0)
    r, k, v, gy = (torch.randn(b, t, h, n, generator=g).to(device, dtype) for _ in range(4))
    w = (torch.rand(b, t, h, n, generator=g) * 5 - 6).to(device)
    return gy, [x.requires_grad_() for x in (r, k, v, w, torch.randn(h, n, generator=g).to(device))]


def step(op: Op, leaves: list[Tensor], gy: Tensor) -> list[Tensor]:
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def error_of(op: Op, t: int, h: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of y and the five gradients against the product tree in float64."""
    gy, leaves = make_inputs(2, t, h, n, dtype, device)
    gy = gy.to(op(*leaves).dtype)
    exact = step(wkv6, [x.detach().double().requires_grad_() for x in leaves], gy.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(step(op, leaves, gy), exact))


def contenders(report: Report, case: str, args: argparse.Namespace, t: int, h: int, n: int, dtype) -> dict[str, Op]:
    """What can run here; a peer that cannot is reported as missing."""
    ops: dict[str, Op] = {
        name: lambda *x, name=name: wkv6(*x, backend=name)
        for name in available_backends(args.device)
        if args.device.type == "cpu" or name != "reference"  # keeps too much for its gradients at B = 512
    }
    for name, op in ops.items():
        report.gate(f"{case}, {name}", error_of(op, t, h, n, dtype, args.device), BOUNDS[dtype])
    if args.device.type == "cpu":
        return ops
    peers: dict[str, Op] = {}
    if args.upstream is None:
        report.missing(case, "released", "needs --upstream")
    else:
        library = build_released(args.upstream, t, n)
        peers["released"] = lambda *x: Released.apply(library, *x)
    if chunk_rwkv6 is None:
        report.missing(case, "fla", "flash-linear-attention is not installed")
    else:
        peers["fla"] = fla_both_ways
    for name, op in peers.items():
        error = error_of(op, t, h, n, dtype, args.device)
        if error <= PEER_BOUND:
            ops[name] = op
        else:
            report.missing(case, name, f"its result is off by {error:.1g}")
    return ops


def copy_bandwidth(args: argparse.Namespace) -> float:
    """Bytes per second that a plain copy of 1 GiB reads and writes."""
    x = torch.empty(2**30, dtype=torch.int8, device=args.device)
    times = alternate({"copy": lambda y=torch.empty_like(x): y.copy_(x)}, repeats=args.repeats, device=args.device)
    return 2 * 2**30 / sorted(times["copy"])[args.repeats // 2]


def measure(report: Report, args: argparse.Namespace, name: str, dtype: torch.dtype, bandwidth: float) -> None:
    t, h, n, share = SHAPES[name]
    batch = max(1, args.batch // share)
    case = f"{name}, T {t} H {h} N {n}, B {batch}, {str(dtype).removeprefix('torch.')}"
    ops = contenders(report, case, args, t, h, n, dtype)
    gy, leaves = make_inputs(batch, t, h, n, dtype, args.device)
    detached = [x.detach() for x in leaves]
    baseline = "reference" if args.device.type == "cpu" else "released" if "released" in ops else "tree"
    for i, (suffix, run) in enumerate(
        {
            "forward": lambda op, _: lambda: op(*detached),
            "forward + backward": lambda op, gy: lambda: step(op, leaves, gy),
        }.items()
    ):
        calls = {x: run(op, gy.float() if x == "released" else gy) for x, op in ops.items()}  # its y is float32
        times = alternate(calls, repeats=args.repeats, device=args.device)
        for contender, seconds in times.items():
            goal = GOALS[contender][i] if contender in GOALS and share == 1 and baseline != "tree" else None
            report.add(f"{case}: {suffix}", contender, seconds=seconds, baseline=baseline, goal=goal)
        if "cuda" in times and "fla" in times:
            middle = {x: sorted(seconds)[args.repeats // 2] for x, seconds in times.items()}
            report.ratio(f"{case}: {suffix}", "cuda over fla", middle["fla"] / middle["cuda"], goal=FLA_GOAL)
        if "cuda" in times and suffix == "forward":
            moved = gy.numel() * (4 * gy.element_size() + 4)
            reached = moved / sorted(times["cuda"])[args.repeats // 2] / bandwidth
            report.ratio(f"{case}: {suffix}", "share of the copy's bandwidth", reached, goal=ROOFLINE_GOAL)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, help="samples; an eighth at 512 px (8, on a GPU 512)")
    parser.add_argument("--upstream", type=Path, help="checkout of the released RWKV-CLIP (GPU only)")
    args = parser.parse_args()
    args.batch = args.batch or (8 if args.device.type == "cpu" else 512)
    if args.upstream and not (args.upstream / "model" / "cuda_image" / "wkv6_cuda.cu").exists():
        parser.error(
            f"--upstream {args.upstream}: no model/cuda_image/wkv6_cuda.cu there; give a checkout of RWKV-CLIP"
        )
    report = Report("wkv6", args.device, commit=args.commit)
    bandwidth = copy_bandwidth(args) if args.device.type == "cuda" else 0.0
    for name in SHAPES:
        for dtype in BOUNDS:
            measure(report, args, name, dtype, bandwidth)
    if args.device.type == "cpu":
        for name, (t, h, n, share) in SHAPES.items():
            for contender in ("cuda", "released", "fla"):
                report.missing(f"{name}, T {t} H {h} N {n}, B {512 // share}, GPU", contender, "run it on a GPU")
    report.finish(args.output)


if __name__ == "__main__":
    main()
