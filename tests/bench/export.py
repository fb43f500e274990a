"""Exported models in ONNX Runtime: images and texts per second, and what int8 costs in recall.

python tests/bench/export.py [--batches 1 8 --skip-text]
python tests/bench/export.py --checkpoint RUN --data captions.jsonl --split test --calibration-split train

Speed: RWKV-CLIP-B-32 (random weights) as exported, in float32 and int8, beside open_clip's ViT-B/32 exported by the
same command into the same ONNX Runtime, and beside ours in torch in float32 and bfloat16; all in turn, on torch's
number of threads. Recall (with --checkpoint and --data): of a trained model in torch, ONNX and both kinds of int8.
Needs the extra `onnx`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Report, alternate, argument_parser
from models import NO_PEER, has_open_clip, make_inputs, make_open_clip, make_ours
from torch import Tensor, nn

from rwkv_clip.exporting import graphs
from rwkv_clip.exporting.calibration import read_calibration
from rwkv_clip.exporting.parts import LEAST_COSINE, Part, compare, make_parts, record
from rwkv_clip.models.packed import pack_weights

OURS, PEER = "RWKV-CLIP-B-32", "ViT-B-32"
REST = 0.05  # seconds until the threads of an ONNX Runtime session sleep
FORMS = ("float32", "int8 dynamic", "int8 static")


def write_forms(report: Report, name: str, model: nn.Module, sides: list[str], folder: Path) -> dict:
    """(side, form) -> a function that runs the file. A gate holds the float32 files to the model's features."""
    found = {}
    for part in make_parts(model, tuple(model.spec.image_size)):
        if part.side not in sides:
            continue
        plain = folder / f"{name}-{part.file}.onnx"
        graphs.write_graph(record(part), part, plain)
        cosine, _ = compare(part, graphs.open_graph(plain, part))
        report.gate(f"{name}: {part.side} features of the exported file, 1 - cosine", 1 - cosine, 1 - LEAST_COSINE)
        examples = [part.make_input(8, False) for _ in range(2)]
        found |= {(part.side, form): run for form, run in run_forms(part, plain, examples).items()}
    return found


def run_forms(part: Part, plain: Path, examples: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Form -> a function that runs a part in it; the int8 files are written beside `plain`."""
    found = {FORMS[0]: graphs.open_graph(plain, part)}
    for form, way in zip(FORMS[1:], ("dynamic", "static")):
        path = plain.with_suffix(f".{way}.onnx")
        graphs.quantize_graph(plain, path, part, way, examples)
        found[form] = graphs.open_graph(path, part)
    return found


def measure_speed(report: Report, args, folder: Path) -> None:
    sides = ["image"] if args.skip_text else ["image", "text"]
    models = {OURS: make_ours(OURS, args.device).eval()}
    if has_open_clip():
        from rwkv_clip.factory import create_model

        models[PEER] = create_model(PEER)
        models[PEER].load_state_dict(make_open_clip(PEER, args.device).state_dict())
    forms = {name: write_forms(report, name, model, sides, folder) for name, model in models.items()}
    half = pack_weights(make_ours(OURS, args.device, "bf16").eval())
    pack_weights(models[OURS])  # as it serves; it has been exported
    for side in sides:
        for batch in args.batches:
            inputs = dict(zip(("image", "text"), make_inputs(batch, 224, args.device, torch.float32)))[side]
            calls = {
                f"{name}, ONNX {form}": lambda run=run, x=inputs: run(x)
                for name, runs in forms.items()
                for (of, form), run in runs.items()
                if of == side
            }
            for label, model, x in (("float32", models[OURS], inputs), ("bfloat16", half, inputs)):
                x = x.bfloat16() if label == "bfloat16" and side == "image" else x
                calls[f"{OURS}, torch {label}"] = lambda m=model, x=x, name=f"encode_{side}": getattr(m, name)(x)
            with torch.inference_mode():
                times = alternate(calls, repeats=args.repeats, device=args.device, rest=REST)
            add_rows(report, f"{side}, batch {batch}", times, batch)


def add_rows(report: Report, case: str, times: dict[str, list[float]], batch: int) -> None:
    for label, seconds in times.items():
        rate = batch / sorted(seconds)[len(seconds) // 2]
        peer = label.replace(OURS, PEER)
        beside = peer if label != peer and peer in times else None
        report.add(case, label, seconds=seconds, baseline=beside, goal=1.0 if beside else None, per_second=rate)
    if not any(label.startswith(PEER) for label in times):
        report.missing(case, PEER, NO_PEER)


def measure_recall(report: Report, args, folder: Path) -> None:
    """Recall of a checkpoint on a retrieval set, in torch and in each exported form."""
    from rwkv_clip.data.retrieval_set import load_retrieval
    from rwkv_clip.factory import load_for_inference
    from rwkv_clip.metrics import recall_at_k

    loaded, data = load_for_inference(args.checkpoint), load_retrieval(args.data, split=args.split)
    pictures = torch.stack([loaded.preprocess(data.open(i)) for i in range(len(data.image_names))])
    inputs = {"image": pictures, "text": data.tokenize(loaded.tokenizer)[0]}
    examples = read_calibration(args.calibration or args.data, loaded, args.calibration_split)
    features: dict[str, dict[str, Tensor]] = {"torch float32": {}, **{f"ONNX {form}": {} for form in FORMS}}
    for part in make_parts(loaded.model, tuple(loaded.model.spec.image_size)):
        plain = folder / f"trained-{part.file}.onnx"
        graphs.write_graph(record(part), part, plain)
        runs = {f"ONNX {form}": run for form, run in run_forms(part, plain, examples[part.side]).items()}
        for label, run in {"torch float32": part.encode, **runs}.items():
            with torch.inference_mode():
                rows = torch.cat([run(batch) for batch in inputs[part.side].split(64)])
            features[label][part.side] = nn.functional.normalize(rows.float(), dim=-1)
    for label, sides in features.items():
        found = recall_at_k(sides["image"], sides["text"], torch.from_numpy(data.right_images))
        figures = {key: value for key, value in found.items() if "R@1" in key or key == "mean_recall"}
        report.add(f"recall, {len(pictures)} pictures", label, **figures)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes (1 8)")
    parser.add_argument("--skip-text", action="store_true", help="measure images only")
    parser.add_argument("--checkpoint", help="a trained model: measure recall, not speed")
    parser.add_argument("--data", help="set for retrieval: JSON lines of image and captions, or what --val-data takes")
    parser.add_argument("--split", help="its split")
    parser.add_argument("--calibration", help="set that static int8 is calibrated with (--data)")
    parser.add_argument("--calibration-split", help="its split")
    args = parser.parse_args()
    args.device = torch.device("cpu")  # ONNX Runtime's provider here
    report = Report("export_recall" if args.checkpoint else "export", args.device)
    try:
        graphs.import_libraries()
    except ImportError as error:
        report.missing("all", "ONNX Runtime", str(error))
        report.finish(args.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        (measure_recall if args.checkpoint else measure_speed)(report, args, Path(folder))
    report.finish(args.output)


if __name__ == "__main__":
    main()
