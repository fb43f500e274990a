"""Images and texts per second of the towers as they serve, beside open_clip's of the same size, and the time from the
launch of Python to the first feature.

python tests/bench/encode.py [--models RWKV-CLIP-B-32 RWKV-CLIP-B-16 --batches 1 8 --precisions bf16 fp32]

Each contender as it is fastest: on a CPU eager (a compiled ViT is slower there, see --compile), ours with packed
weights where `models/packed.py` has them, open_clip's with bfloat16 weights and under autocast; on a GPU both eager and
compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Report, alternate, argument_parser, clock, run_python
from models import NO_PEER, PEERS, check, has_open_clip, make_inputs, make_open_clip, make_ours
from torch import Tensor, nn

from rwkv_clip.hub import save_pretrained
from rwkv_clip.models.packed import pack_weights

SLOW = 3
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Model = Callable[[str, Tensor], Tensor]  # a method's name and its input -> features
START = """
import sys
from PIL import Image
from rwkv_clip.device import keep_freed_memory
from rwkv_clip.factory import load_for_inference
from rwkv_clip.features import FeatureExtractor
keep_freed_memory()
extractor = FeatureExtractor.of(load_for_inference(sys.argv[1], precision=sys.argv[2]), "cpu", workers=0)
extractor.encode_query(image=Image.new("RGB", (640, 480)))
"""


def call(model: nn.Module, autocast: bool = False) -> Model:
    def run(method: str, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return getattr(model, method)(x)

    return run


def contenders(ours: nn.Module, name: str, device: torch.device, precision: str, compiled: bool) -> dict[str, Model]:
    """Label -> how to encode with it."""
    found = {"ours": call(ours if compiled else pack_weights(ours))}
    if has_open_clip():
        peer = make_open_clip(PEERS[name], device, precision)
        found[f"open_clip {PEERS[name]}"] = call(peer)
        if precision == "bf16":
            found[f"open_clip {PEERS[name]}, autocast"] = call(make_open_clip(PEERS[name], device), autocast=True)
    return found


def measure(report: Report, name: str, precision: str, models: dict[str, Model], batch: int, args) -> None:
    """Rows of one model, precision and batch size."""
    inputs = dict(zip(("image", "text"), make_inputs(batch, 224, args.device, DTYPES[precision])))
    for side in ("image", "text") if name.endswith("32") else ("image",):
        calls = {}
        for label, model in models.items():
            own = inputs[side].float() if label.endswith("autocast") and side == "image" else inputs[side]
            calls[label] = lambda model=model, x=own, method=f"encode_{side}": model(method, x)
            if args.compile or args.device.type == "cuda":
                encode = torch.compile(model)
                calls[f"{label}, compiled"] = lambda encode=encode, x=own, method=f"encode_{side}": encode(method, x)
        case = f"{name} {side}, {precision}, batch {batch}"
        with torch.inference_mode():
            for label in find_slow(calls) if args.device.type == "cpu" else []:  # a GPU's calls return at once
                report.missing(case, label, f"over {SLOW} times the fastest")
                del calls[label]
            times = alternate(calls, repeats=args.repeats, device=args.device)
        add_rows(report, case, times, batch)
        if not has_open_clip():
            report.missing(case, f"open_clip {PEERS[name]}", NO_PEER)


def find_slow(calls: dict[str, Callable[[], object]]) -> list[str]:
    """Contenders that are far from the fastest, as autocast is for more than a few pictures on some processors: they
    would take most of the bench's time."""
    times = {label: min(clock(call)[0] for _ in range(2)) for label, call in calls.items()}
    return [label for label, seconds in times.items() if seconds > SLOW * min(times.values())]


def add_rows(report: Report, case: str, times: dict[str, list[float]], batch: int) -> None:
    """Ours beside the peer's fastest form."""
    peers = [label for label in times if label.startswith("open_clip")]
    fastest = min(peers, key=lambda label: sorted(times[label])[len(times[label]) // 2], default=None)
    for label, seconds in times.items():
        beside = {"baseline": fastest, "goal": 1.0} if label.startswith("ours") and fastest else {}
        report.add(case, label, seconds=seconds, per_second=batch / sorted(seconds)[len(seconds) // 2], **beside)


def measure_start(report: Report, name: str, model: nn.Module, precision: str, repeats: int) -> None:
    """From the launch of Python to the first feature, with a checkpoint in float32 on disk and the kernels built."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_pretrained(model, path)
        times = [clock(lambda: run_python("-c", START, path, precision))[0] for _ in range(repeats)]
    report.add(f"{name}, {precision}, launch to the first feature", "ours", seconds=times)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PEERS), default=list(PEERS), help="presets")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (CPU: 1 8; GPU: 1 256 1024)")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), help="of the weights (CPU: both; GPU: bf16)")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too, unpacked (minutes)")
    args = parser.parse_args()
    on_cpu = args.device.type == "cpu"
    report = Report("encode", args.device, commit=args.commit)
    for name in args.models:
        for precision in args.precisions or (["bf16", "fp32"] if on_cpu else ["bf16"]):
            ours = make_ours(name, args.device, precision).eval()
            check(report, name, ours, 224)
            if on_cpu and precision == "fp32" and name == args.models[0]:
                for kind in DTYPES:
                    measure_start(report, name, ours, kind, min(5, args.repeats))
            models = contenders(ours, name, args.device, precision, args.compile)
            for batch in args.batches or ([1, 8] if on_cpu else [1, 256, 1024]):
                measure(report, name, precision, models, batch, args)
    report.finish(args.output)


if __name__ == "__main__":
    main()
