"""Images per second of the image towers in bfloat16, beside open_clip's ViT of the same size, and texts.

python tests/bench/encode.py [--models RWKV-CLIP-B-32 RWKV-CLIP-B-16 --batches 1 8]

Each contender as it is fastest: on a CPU eager with bfloat16 weights (a compiled ViT is slower there, see --compile),
on a GPU both eager and compiled.
"""

from __future__ import annotations

import torch
from harness import Report, alternate, argument_parser
from models import NO_PEER, PEERS, check, has_open_clip, make_inputs, make_open_clip, make_ours
from torch import nn


def contenders(name: str, device: torch.device, compiled: bool) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"ours": make_ours(name, device, "bf16").eval()}
    if has_open_clip():
        found[f"open_clip {PEERS[name]}"] = make_open_clip(PEERS[name], device, "bf16")
    return found


def measure(report: Report, name: str, models: dict[str, nn.Module], batch: int, args) -> None:
    """Rows of one model and batch size."""
    image, text = make_inputs(batch, 224, args.device, torch.bfloat16)
    calls = {}
    for label, model in models.items():
        calls[label] = lambda model=model: model.encode_image(image)
        if args.compile or args.device.type == "cuda":
            encode = torch.compile(model.encode_image)
            calls[f"{label}, compiled"] = lambda encode=encode: encode(image)
    with torch.inference_mode():
        times = alternate(calls, repeats=args.repeats, device=args.device)
        texts = {label: lambda model=model: model.encode_text(text) for label, model in models.items()}
        text_times = alternate(texts, repeats=args.repeats, device=args.device) if name.endswith("32") else {}
    peers = [label for label in times if label.startswith("open_clip")]
    fastest = min(peers, key=lambda label: sorted(times[label])[len(times[label]) // 2], default=None)
    for case, measured, best, goal in (
        (f"{name}, batch {batch}", times, fastest, 1.0),
        (f"{name} text, batch {batch}", text_times, peers[0] if peers else None, None),
    ):
        for label, seconds in measured.items():
            own = label.startswith("ours") and best is not None
            rate = {"per_second": batch / sorted(seconds)[len(seconds) // 2]}
            report.add(case, label, seconds=seconds, baseline=best if own else None, goal=goal if own else None, **rate)
        if measured and not peers:
            report.missing(case, f"open_clip {PEERS[name]}", NO_PEER)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PEERS), default=list(PEERS), help="presets")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (CPU: 1 8; GPU: 1 256 1024)")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too (minutes)")
    args = parser.parse_args()
    report = Report("encode", args.device, commit=args.commit)
    for name in args.models:
        models = contenders(name, args.device, args.compile)
        check(report, name, models["ours"], 224)
        for batch in args.batches or ([1, 8] if args.device.type == "cpu" else [1, 256, 1024]):
            measure(report, name, models, batch, args)
    report.finish(args.output)


if __name__ == "__main__":
    main()
