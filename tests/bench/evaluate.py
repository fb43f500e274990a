"""Ranking of 5,000 pictures x 25,000 captions, and a whole retrieval evaluation, beside the real clip_benchmark.

python tests/bench/evaluate.py [--images 5000 --captions 5 --width 512] [--model ViT-B-32 --pictures 64]
python tests/bench/evaluate.py --data flickr8k/captions.jsonl --split test   # a real set, all of it

Both tools get the same weights (an open_clip model of random weights), files and threads, in one process, in turn. The
metric part is clip_benchmark's own `evaluate` with encoders that hand out finished features. Needs clip_benchmark
(pip install -e '.[clip-benchmark]'); without it only ours is measured. Figures have to agree before a time is printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import Report, alternate, argument_parser
from models import make_open_clip
from PIL import Image
from torch import Tensor, nn

from rwkv_clip.data.retrieval_set import RetrievalSet, load_retrieval
from rwkv_clip.features import DECODE_WORKERS, FeatureExtractor
from rwkv_clip.metrics import RECALL_AT, recall_at_k
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.transform import val_transform

PEER = "clip_benchmark"
WORDS = ("a", "dog", "two", "children", "in", "snow", "red", "ball", "man", "on", "bicycle", "water", "runs")


class Finished(nn.Module):
    """A model whose inputs are the features."""

    def encode_image(self, image: Tensor) -> Tensor:
        return image

    def encode_text(self, text: Tensor) -> Tensor:
        return text


def peer_recalls(model: nn.Module, batches: object, tokenizer, device: torch.device) -> dict[str, float]:
    """What clip_benchmark finds; its progress bars are not shown."""
    from clip_benchmark.metrics import zeroshot_retrieval

    with contextlib.redirect_stderr(io.StringIO()):
        ks = list(RECALL_AT)
        return zeroshot_retrieval.evaluate(model, batches, tokenizer, device.type, amp=False, recall_k_list=ks)


def difference(ours: dict, theirs: dict[str, float]) -> float:
    """The largest difference of hits."""
    ways = {"image_retrieval": ("text_to_image", "captions"), "text_retrieval": ("image_to_text", "image_queries")}
    return max(
        abs(ours[f"{way}_hits@{k}"] - round(theirs[f"{name}_recall@{k}"] * ours[queries]))
        for name, (way, queries) in ways.items()
        for k in RECALL_AT
    )


def measure_ranking(report: Report, args) -> None:
    """The metric part: features are there. Captions resemble their picture, so that about half are found."""
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(args.images * args.captions) // args.captions
    image = torch.nn.functional.normalize(torch.randn(args.images, args.width, generator=g), dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(len(owner), args.width, generator=g), dim=-1)
    text = torch.nn.functional.normalize(image[owner] + 6 * noise, dim=-1)
    image, text = image.to(args.device), text.to(args.device)

    def batches() -> Iterator[tuple[Tensor, list[Tensor]]]:
        for pictures, captions in zip(image.split(64), text.split(64 * args.captions)):
            yield pictures, captions.view(len(pictures), args.captions, -1)

    contenders = {"ours": lambda: recall_at_k(image, text, owner)}
    if has_peer():
        contenders[PEER] = lambda: peer_recalls(Finished(), batches(), torch.stack, args.device)
    case = f"ranking {args.images} x {len(owner)} x {args.width}"
    if has_peer():
        report.gate(f"{case}: hits", difference(contenders["ours"](), contenders[PEER]()), 0)
    warmup = 0 if has_peer() else 1
    report_times(report, case, alternate(contenders, repeats=args.repeats, warmup=warmup, device=args.device), 3.0)


def measure_evaluation(report: Report, args, folder: Path) -> None:
    """Files to figures: decoding, both towers, ranking."""
    data = load_retrieval(args.data, split=args.split) if args.data else load_retrieval(draw_set(folder, args))
    model, tokenizer = make_open_clip(args.model, args.device), make_tokenizer()
    preprocess = val_transform(model.visual.image_size)

    def ours() -> dict:
        return evaluate_retrieval(FeatureExtractor(model, preprocess, tokenizer, args.device), data).metrics

    contenders = {"ours": ours}
    if has_peer():
        batches = peer_batches(data, preprocess, folder)
        contenders[PEER] = lambda: peer_recalls(model, batches, tokenizer, args.device)
    found = {}
    for name, call in contenders.items():
        contenders[name] = lambda name=name, call=call: found.__setitem__(name, call())
    times = alternate(contenders, repeats=1 if args.data else args.repeats, warmup_fraction=0, device=args.device)
    case = f"{data.name if args.data else 'drawn set'}, {len(data.image_names)} x {len(data.captions)}, {args.model}"
    if has_peer():
        # Features differ in the last bits (other batches), so near ties may fall the other way.
        report.gate(f"{case}: hits", difference(found["ours"], found[PEER]), max(1, len(data.captions) / 1000))
    report_times(report, case, times, 1.0, pictures=len(data.image_names))


def peer_batches(data: RetrievalSet, preprocess, folder: Path):
    """clip_benchmark's loader of the same pictures and captions."""
    from clip_benchmark.datasets.builder import get_dataset_collate_fn
    from clip_benchmark.datasets.flickr import Flickr

    root = Path(data.path).parent
    root = root if (root / data.image_names[0]).is_file() else root / "images"
    lines = [f"{data.image_names[owner]},{text}" for owner, text in zip(data.image_of_caption, data.captions)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    pictures = Flickr(str(root), str(folder / "captions.txt"), transform=preprocess)
    collate = get_dataset_collate_fn("flickr8k")
    return torch.utils.data.DataLoader(pictures, batch_size=64, num_workers=DECODE_WORKERS, collate_fn=collate)


def draw_set(folder: Path, args) -> Path:
    """Pictures of 500 x 375 as JPEG, five captions each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(args.pictures):
        pixels = rng.integers(0, 256, (25, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        texts = [f"{' '.join(rng.choice(WORDS, 8))} {number}" for _ in range(args.captions)]
        rows.append({"image": f"{number}.jpg", "captions": texts})
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def has_peer() -> bool:
    return importlib.util.find_spec("clip_benchmark") is not None


def report_times(report: Report, case: str, times: dict[str, list[float]], goal: float, pictures: int = 0) -> None:
    """Rows of a case; ours aims at `goal` times the peer's speed."""
    for name, seconds in times.items():
        own = name == "ours" and PEER in times
        figures = {"pictures_per_second": pictures / sorted(seconds)[len(seconds) // 2]} if pictures else {}
        report.add(case, name, seconds=seconds, baseline=PEER if own else None, goal=goal if own else None, **figures)
    if PEER not in times:
        report.missing(case, PEER, "clip-benchmark is not installed")


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--images", type=int, default=5000, help="pictures of the ranking (5000)")
    parser.add_argument("--captions", type=int, default=5, help="captions of each (5)")
    parser.add_argument("--width", type=int, default=512, help="numbers per feature (512)")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model of the evaluation (ViT-B-32)")
    parser.add_argument("--pictures", type=int, default=64, help="pictures of the drawn set (64)")
    parser.add_argument("--data", help="caption file of a real set instead, whose pictures are .jpg")
    parser.add_argument("--split", help="its split")
    args = parser.parse_args()
    report = Report("evaluate", args.device, commit=args.commit)
    measure_ranking(report, args)
    with tempfile.TemporaryDirectory() as folder:
        measure_evaluation(report, args, Path(folder))
    report.finish(args.output)


if __name__ == "__main__":
    main()
