"""Time and memory per token of the B/16 image towers from 224 to 2048 px, with a plot: ours is linear.

python tests/bench/resolution.py [--sizes 224 448 1024 2048 --tokens 3136]

Every size encodes about the same number of tokens (at least one picture), so that a small batch does not flatter the
larger sizes. bfloat16 weights, open_clip's ViT-B/16 with positions resized to the size. Peak memory is what a call adds
to weights and pixels, in a process of its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from figures import draw_resolution
from harness import ROOT, Report, alternate, argument_parser, peak_memory
from models import NO_PEER, check, has_open_clip, make_inputs, make_open_clip, make_ours

NAMES = {"ours": "RWKV-CLIP-B-16", "open_clip ViT-B-16": "ViT-B-16"}
FIGURE = ROOT / "figure" / "resolution.png"
LIMIT = 1.3  # per token at any size over per token at the smallest


def tokens_of(size: int) -> int:
    return (size // 16) ** 2


def prepare(label: str, size: int, batch: int, device: str) -> Callable[[], torch.Tensor]:
    """Model and pixels; the call encodes them. Something small has run before: threads and libraries are there."""
    where = torch.device(device)
    if label == "ours":
        model = make_ours(NAMES[label], where, "bf16").eval()
    else:
        model = make_open_clip(NAMES[label], where, "bf16", size)
    image, _ = make_inputs(batch, size, where, torch.bfloat16)
    warm = image[:1, :, :64, :64] if label == "ours" else image[:1, :, :size, :size] if size <= 224 else None

    @torch.inference_mode()
    def call(pixels: torch.Tensor = image) -> torch.Tensor:
        return model.encode_image(pixels)

    if warm is not None:
        call(warm.contiguous())
    return call


def measure(report: Report, size: int, args) -> dict[str, tuple[float, float]]:
    """Rows of a size; (seconds, MiB) per token by contender."""
    batch = max(1, args.tokens // tokens_of(size))
    labels = list(NAMES) if has_open_clip() else ["ours"]
    calls = {label: prepare(label, size, batch, str(args.device)) for label in labels}
    repeats = args.repeats if batch * tokens_of(size) <= 2 * args.tokens else 1
    times = alternate(calls, repeats=repeats, warmup=min(repeats - 1, 1), device=args.device)
    del calls
    found, case = {}, f"{size} px, batch {batch}"
    for label in NAMES:
        if label not in labels:
            report.missing(case, label, NO_PEER)
            continue
        peak = peak_memory(prepare, label, size, batch, str(args.device), device=args.device)
        seconds, tokens = statistics.median(times[label]), batch * tokens_of(size)
        per_token = {"microseconds_per_token": 1e6 * seconds / tokens, "kib_per_token": 1024 * peak / tokens}
        beside = {"baseline": "open_clip ViT-B-16"} if label == "ours" and len(labels) > 1 else {}
        report.add(case, label, seconds=times[label], **beside, **per_token, peak_mib=peak)
        found[label] = seconds / tokens, peak / tokens
    return found


def main() -> None:
    parser = argument_parser(__doc__, repeats=2)
    parser.add_argument("--sizes", nargs="+", type=int, help="image sides in px (224 448 1024, on a GPU 2048 too)")
    parser.add_argument("--tokens", type=int, help="tokens per call (CPU: 3136; GPU: 65536)")
    parser.add_argument("--plot", type=Path, default=FIGURE, help="picture of the result (figure/resolution.png)")
    args = parser.parse_args()
    args.sizes = args.sizes or ([224, 448, 1024] if args.device.type == "cpu" else [224, 448, 1024, 2048])
    args.tokens = args.tokens or (3136 if args.device.type == "cpu" else 65536)
    report = Report("resolution", args.device, commit=args.commit)
    model = make_ours(NAMES["ours"], args.device, "bf16").eval()
    check(report, NAMES["ours"], model, 224)
    check(report, f"{NAMES['ours']} at 272 px", model, 272)
    del model
    found = {size: measure(report, size, args) for size in sorted(args.sizes)}
    first = min(found)
    for size in list(found)[1:]:
        for column, what in enumerate(("time", "peak memory")):
            value = found[first]["ours"][column] / found[size]["ours"][column]
            report.ratio(f"{size} px", f"{what} per token, {first} px over here", value, goal=1 / LIMIT)
    path = report.finish(args.output)
    try:
        draw_resolution(args.plot, json.loads(path.read_text()))
    except ImportError:
        print(f"no plot at {args.plot.name}: pip install matplotlib")


if __name__ == "__main__":
    main()
