"""Chinese-CLIP's top-k predictions: files of features in, a file of predictions out.

python tests/bench/knn.py [--items 30000 --width 512] [--queries 200, 0: all] [--cn-clip FOLDER of the released code]

Ours is timed in full, as a command whose imports are done. The released way takes one query at a time: a float32
product with the gallery in chunks of 32,768, and Python's sort of all (id, score) pairs. Reading its files is timed in
full, its search on the first `--queries` queries, and what all of them take is extrapolated from these. It runs on a
CPU without copies to a GPU. --cn-clip: the file make_topk_predictions.py itself, `.cuda()` taken out, on the same
queries and on one, to tell what a query takes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import Report, alternate, argument_parser

from rwkv_clip.eval.main import main as evaluate

CHUNK = 32768
GOAL = 100.0  # times the released speed


def write_features(path: Path, kind: str, count: int, width: int, seed: int) -> None:
    """Random unit vectors as the released extract_features.py writes them."""
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    with open(path, "w") as file:
        for number, row in enumerate(torch.nn.functional.normalize(vectors, dim=-1)):
            file.write(json.dumps({f"{kind}_id": number, "feature": row.tolist()}) + "\n")


def read_plainly(path: Path, kind: str) -> tuple[list[int], torch.Tensor]:
    ids, features = [], []
    with open(path) as file:
        for line in file:
            row = json.loads(line)
            ids.append(row[f"{kind}_id"])
            features.append(row["feature"])
    return ids, torch.tensor(features)


def search_plainly(texts: tuple[list[int], torch.Tensor], images: tuple[list[int], torch.Tensor], count: int) -> str:
    """Lines of predictions, one query after the other."""
    lines = []
    for text, feature in zip(texts[0], texts[1]):
        pairs = []
        for ids, part in zip(
            (images[0][i : i + CHUNK] for i in range(0, len(images[0]), CHUNK)), images[1].split(CHUNK)
        ):
            pairs += zip(ids, (feature[None] @ part.T)[0].tolist())
        best = sorted(pairs, key=lambda pair: pair[1], reverse=True)[:count]
        lines.append(json.dumps({"text_id": text, "image_ids": [image for image, _ in best]}) + "\n")
    return "".join(lines)


def run_released(folder: Path, images: Path, texts: Path, output: Path) -> None:
    """The released script, patched to run on a CPU."""
    source = (folder / "cn_clip" / "eval" / "make_topk_predictions.py").read_text().replace(".cuda()", "")
    arguments = ["--image-feats", str(images), "--text-feats", str(texts), "--output", str(output)]
    before, sys.argv = sys.argv, ["make_topk_predictions.py", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, "make_topk_predictions.py", "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = before


def measure(report: Report, args, folder: Path) -> None:
    images, texts, output = folder / "i.img_feat.jsonl", folder / "t.txt_feat.jsonl", folder / "predictions.jsonl"
    write_features(images, "image", args.items, args.width, 0)
    write_features(texts, "text", args.items, args.width, 1)
    arguments = ["knn", "--image-feats", str(images), "--text-feats", str(texts), "--output", str(output)]

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert evaluate(arguments) == 0

    queries = args.queries or args.items
    scale = args.items / queries
    times = alternate({"ours": ours}, repeats=args.repeats, warmup=1, device=args.device)
    start = time.perf_counter()
    read = read_plainly(texts, "text"), read_plainly(images, "image")
    reading = time.perf_counter() - start
    sample = read[0][0][:queries], read[0][1][:queries]
    start = time.perf_counter()
    found = search_plainly(sample, read[1], 10)
    searching = time.perf_counter() - start
    contenders = {"released way": reading + scale * searching}
    if args.cn_clip:
        seconds = []
        for number in (1, queries):  # the difference is that of the queries, without reading the gallery
            few = folder / "few.jsonl"
            with open(texts) as file:
                few.write_text("".join(line for _, line in zip(range(number), file)))
            start = time.perf_counter()
            run_released(args.cn_clip, images, few, folder / "released.jsonl")
            seconds.append(time.perf_counter() - start)
        contenders["released script"] = seconds[0] + (args.items - 1) * (seconds[1] - seconds[0]) / (queries - 1)
        found = (folder / "released.jsonl").read_text()
    kind = "in full" if queries == args.items else f"extrapolated from {queries} queries"
    case = f"{args.items} x {args.items} x {args.width}"
    lines = zip(found.splitlines(), output.read_text().splitlines())
    # Exact sums and float32 may order two neighbours differently, some 1e-8 apart.
    report.gate(f"{case}: lines that differ, of {queries}", sum(a != b for a, b in lines), max(1, queries / 1000))
    for name, seconds in contenders.items():
        report.add(case, f"{name}, {kind}", seconds=[seconds])
    base = f"{list(contenders)[-1]}, {kind}"
    report.add(case, "ours, in full", seconds=times["ours"], baseline=base, goal=GOAL)


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--items", type=int, default=30000, help="images, and as many texts (30000)")
    parser.add_argument("--width", type=int, default=512, help="numbers per feature (512)")
    parser.add_argument(
        "--queries", type=int, default=200, help="queries of the released way that are timed (200; 0: all)"
    )
    parser.add_argument("--cn-clip", type=Path, help="folder with the released code (holds cn_clip/)")
    args = parser.parse_args()
    args.device = torch.device("cpu")
    report = Report("knn", args.device, commit=args.commit)
    with tempfile.TemporaryDirectory() as folder:
        measure(report, args, Path(folder))
    report.finish(args.output)


if __name__ == "__main__":
    main()
