"""Chinese-CLIP's evaluation from an LMDB to recall: features, top-10 predictions and recall, both ways.

python tests/bench/chinese_files.py --cn-clip FOLDER [--data flickr8k/captions.jsonl --split test --images 500]

Peer: the released scripts, one after the other, in a process whose imports are done. They are copied from --cn-clip
(which holds cn_clip/) into a temporary folder, get the small model's two configuration files there, and run on a CPU:
`.cuda()` and torch.cuda.set_device do nothing. Ours are the commands for the same steps with the same weights, as the
released code saved them. --data: JSON lines {"image", "captions_zh", "split"} with pictures in `images` beside it; else
a set is drawn. Predictions are compared before any time is printed.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib
import io
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, Report, argument_parser, clock
from PIL import Image

from rwkv_clip.eval.main import main as evaluate

VISION = {"image_resolution": 224, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 32}
TEXT = {
    "vocab_size": 21128,
    "text_attention_probs_dropout_prob": 0.1,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 128,
    "text_initializer_range": 0.02,
    "text_intermediate_size": 512,
    "text_max_position_embeddings": 512,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}
NAMES = {"--vision-model": "ViT-B-16", "--text-model": "RBT3-chinese"}  # whose configurations are replaced
GOAL = 3.0
Steps = dict[str, Callable[[], None]]


def write_set(folder: Path, args) -> None:
    """test_imgs.tsv, test_texts.jsonl and the LMDB."""
    images, texts = [], []
    for picture, captions in real_set(args) if args.data else drawn_set(args):
        texts += [{"text_id": len(texts) + i, "text": c, "image_ids": [len(images)]} for i, c in enumerate(captions)]
        images.append(f"{len(images)}\t{base64.b64encode(picture).decode()}\n")
    (folder / "test_imgs.tsv").write_text("".join(images))
    (folder / "test_texts.jsonl").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts))
    command = [sys.executable, "-m", "rwkv_clip.data.lmdb", "--data_dir", str(folder), "--splits", "test"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def real_set(args) -> Iterator[tuple[bytes, list[str]]]:
    path, count = Path(args.data), 0
    for row in map(json.loads, path.read_text().splitlines()):
        if args.split in ("all", row["split"]) and count < args.images:
            count += 1
            yield (path.parent / "images" / row["image"]).read_bytes(), row["captions_zh"]


def drawn_set(args) -> Iterator[tuple[bytes, list[str]]]:
    rng, words = np.random.default_rng(0), "红绿蓝黄大小狗猫人车树水山路在上下里外跑看走站"
    for _ in range(args.images):
        content = io.BytesIO()
        pixels = Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
        pixels.resize((224, 224), Image.Resampling.BICUBIC).save(content, "jpeg", quality=85)
        yield content.getvalue(), ["".join(rng.choice(list(words), 10)) + "。" for _ in range(5)]


def prepare_code(source: Path, folder: Path, width: int) -> None:
    """A copy of the released code with the small model's configuration, and its checkpoint."""
    shutil.copytree(source / "cn_clip", folder / "code" / "cn_clip")
    configs = folder / "code" / "cn_clip" / "clip" / "model_configs"
    vision = {"embed_dim": width, **VISION}
    (configs / f"{NAMES['--vision-model']}.json").write_text(json.dumps(vision))
    (configs / f"{NAMES['--text-model']}.json").write_text(json.dumps(TEXT))
    (folder / "model.json").write_text(json.dumps(vision | TEXT))
    sys.path.insert(0, str(folder / "code"))
    from cn_clip.clip.model import CLIP

    torch.manual_seed(0)
    weights = CLIP(**vision, **TEXT).float().state_dict()
    state = {"epoch": 1, "step": 1, "name": "small", "state_dict": {f"module.{k}": v for k, v in weights.items()}}
    torch.save(state, folder / "small.pt")


def released_steps(folder: Path) -> Steps:
    def script(name: str, *arguments: object) -> None:
        before, sys.argv = sys.argv, [name, *map(str, arguments)]
        try:
            runpy.run_module(f"cn_clip.eval.{name}", run_name="__main__")
        finally:
            sys.argv = before

    out, texts = folder / "theirs", folder / "test_texts.jsonl"
    out.mkdir()
    shutil.copytree(folder / "lmdb" / "test" / "imgs", out / "imgs")  # LMDB may be opened once in a process
    features = ("--image-feats", out / "i.jsonl", "--text-feats", out / "t.jsonl")
    names = [part for pair in NAMES.items() for part in pair]
    extract = ["--extract-image-feats", "--extract-text-feats", "--image-data", out / "imgs"]
    extract += ["--text-data", texts, "--image-feat-output-path", out / "i.jsonl", "--text-feat-output-path"]
    extract += [out / "t.jsonl", "--resume", folder / "small.pt", "--precision", "fp32", *names]
    shutil.copy(texts, out)
    return {
        "features": lambda: script("extract_features", *extract),
        "top-10, text to image": lambda: script("make_topk_predictions", *features, "--output", out / "t2i.jsonl"),
        "top-10, image to text": lambda: script("make_topk_predictions_tr", *features, "--output", out / "i2t.jsonl"),
        "recall": lambda: (
            script("evaluation", texts, out / "t2i.jsonl", out / "t2i.json"),
            script("transform_ir_annotation_to_tr", "--input", out / "test_texts.jsonl"),
            script("evaluation_tr", out / "test_texts.tr.jsonl", out / "i2t.jsonl", out / "i2t.json"),
        ),
    }


def our_steps(folder: Path) -> Steps:
    def command(*arguments: object) -> None:
        assert evaluate(list(map(str, arguments))) == 0

    out, texts = folder / "ours", folder / "test_texts.jsonl"
    out.mkdir()
    features = ("--image-feats", out / "i.jsonl", "--text-feats", out / "t.jsonl")
    extract = ["--to", "chinese-clip", "--checkpoint", folder / "small.pt", "--model", folder / "model.json"]
    extract += ["--data", texts, "--image-feat-output-path", out / "i.jsonl", "--text-feat-output-path"]
    extract += [out / "t.jsonl", "--device", "cpu", "--logs", out / "logs"]
    shutil.copy(texts, out)

    def encode() -> None:
        shutil.rmtree(out / "logs", ignore_errors=True)  # nothing comes from a cache
        command("features", *extract)

    return {
        "features": encode,
        "top-10, text to image": lambda: command("knn", *features, "--output", out / "t2i.jsonl"),
        "top-10, image to text": lambda: command("knn", *features, "--direction", "i2t", "--output", out / "i2t.jsonl"),
        "recall": lambda: (
            command("recall", texts, out / "t2i.jsonl", out / "t2i.json"),
            command("invert", "--input", out / "test_texts.jsonl"),
            command("recall", out / "test_texts.tr.jsonl", out / "i2t.jsonl", out / "i2t.json"),
        ),
    }


def import_all() -> None:
    """What either side imports on the way."""
    for name in (
        "cn_clip.training.main",
        "cn_clip.eval.data",
        "rwkv_clip.factory",
        "open_clip",
        "transformers",
        "lmdb",
    ):
        importlib.import_module(name)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """`.cuda()` and torch.cuda.set_device do nothing inside."""
    before = torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.set_device
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *arguments, **named: self
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.set_device = before


def time_steps(steps: Steps) -> dict[str, np.ndarray]:
    """Seconds and CPU seconds of each step and of all."""
    seconds = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name, step in steps.items():
            gc.collect()  # the scripts leave their LMDB open
            seconds[name] = np.array(clock(step))
    return seconds | {"all": sum(seconds.values())}


def compare(report: Report, folder: Path, case: str) -> None:
    """Predictions: their features differ from ours in the last bits, so near ties may fall the other way."""
    for way in ("t2i", "i2t"):
        lines = [(folder / who / f"{way}.jsonl").read_text().splitlines() for who in ("ours", "theirs")]
        wrong = sum(a != b for a, b in zip(*lines)) + abs(len(lines[0]) - len(lines[1]))
        report.gate(f"{case}: {way} lines that differ, of {len(lines[0])}", wrong, len(lines[0]) / 20)


def measure(report: Report, args, folder: Path) -> None:
    write_set(folder, args)
    prepare_code(args.cn_clip, folder, args.width)
    ours, theirs = our_steps(folder), released_steps(folder)
    case = f"{f'{Path(args.data).parent.name} {args.split}' if args.data else 'drawn set'}, width {args.width}"
    runs: dict[str, list[dict[str, np.ndarray]]] = {"ours": [], "released": []}
    import_all()
    for turn in range(args.repeats):
        for name, steps in (("ours", ours), ("released", theirs)):
            with on_cpu() if name == "released" else contextlib.nullcontext():
                found = time_steps(steps)
            runs[name].append(found)
        if not turn:
            compare(report, folder, case)
    for step in [*ours, "all"]:
        cpu = {}
        for name in ("released", "ours"):
            seconds, own = np.array([run[step] for run in runs[name]]), name == "ours"
            cpu[name] = float(np.median(seconds[:, 1]))
            goal = GOAL if own and step == "all" else None
            base = "released" if own else None
            report.add(
                f"{case}: {step}", name, seconds=seconds[:, 0].tolist(), baseline=base, goal=goal, cpu_s=cpu[name]
            )
    report.ratio(f"{case}: {step}", "CPU seconds, released / ours", cpu["released"] / cpu["ours"], goal=GOAL)


def main() -> None:
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--cn-clip", type=Path, help="folder with the released code (holds cn_clip/)")
    parser.add_argument("--data", help="JSON lines with `captions_zh`; default: a drawn set")
    parser.add_argument("--split", default="test", help="its split, or all (test)")
    parser.add_argument("--images", type=int, default=500, help="images of the set, at most (500)")
    parser.add_argument("--width", type=int, default=512, help="numbers per feature (512)")
    args = parser.parse_args()
    args.device = torch.device("cpu")
    report = Report("chinese_files", args.device, commit=args.commit)
    if args.cn_clip is None:
        report.missing("LMDB to recall", "released", "no --cn-clip FOLDER of the released code was given")
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(report, args, Path(folder))
    report.finish(args.output)


if __name__ == "__main__":
    main()
