"""Chinese-CLIP's top-k predictions: files of features in, a file of predictions out.

python tests/bench/knn.py [--items 30000 --width 512] [--queries 200] [--cn-clip FOLDER of the released code]

Both are timed in this process, imports done, reading and writing included: ours in full, as a call of the command. The
released way takes one query at a time: a float32 product with the gallery in chunks of 32,768, and Python's sort of all
(id, score) pairs. It gets `--queries` queries and a tenth of them; the difference is what a query takes, and the line
through both gives what all take (--queries as many as --items: in full). --cn-clip: the file make_topk_predictions.py
itself, `.cuda()` taken out; else its steps as written here. The predictions of the sample are compared before any time
is printed. Seconds are those of the least disturbed call; CPU seconds count all threads.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Report, argument_parser, clock

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


def run_plainly(image_file: Path, text_file: Path, output: Path) -> None:
    """Predictions, one query after the other."""
    texts, images, lines = read_plainly(text_file, "text"), read_plainly(image_file, "image"), []
    for text, feature in zip(texts[0], texts[1]):
        pairs = []
        for ids, part in zip(
            (images[0][i : i + CHUNK] for i in range(0, len(images[0]), CHUNK)), images[1].split(CHUNK)
        ):
            pairs += zip(ids, (feature[None] @ part.T)[0].tolist())
        best = sorted(pairs, key=lambda pair: pair[1], reverse=True)[:10]
        lines.append(json.dumps({"text_id": text, "image_ids": [image for image, _ in best]}) + "\n")
    output.write_text("".join(lines))


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


def extrapolate(taken: dict[int, list[tuple[float, float]]], count: int) -> np.ndarray:
    """(seconds, CPU seconds) of `count` queries, on the line through the least of those of two numbers of queries."""
    (few, low), (many, high) = ((queries, np.min(times, axis=0)) for queries, times in taken.items())
    each = (high - low) / (many - few)
    if (each <= 0).any():
        raise SystemExit(f"{many} queries took no longer than {few}: this machine is too busy; give more --queries")
    return low + each * (count - few)


def measure(report: Report, args, folder: Path) -> None:
    images, texts, output = folder / "i.img_feat.jsonl", folder / "t.txt_feat.jsonl", folder / "predictions.jsonl"
    write_features(images, "image", args.items, args.width, 0)
    write_features(texts, "text", args.items, args.width, 1)
    few, found = folder / "few.jsonl", folder / "found.jsonl"
    arguments = ["knn", "--image-feats", str(images), "--text-feats", str(texts), "--output", str(output)]
    name, run = (
        ("released script", partial(run_released, args.cn_clip)) if args.cn_clip else ("released way", run_plainly)
    )

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert evaluate(arguments) == 0

    queries = min(args.queries, args.items)
    case = f"{args.items} x {args.items} x {args.width}"
    own, taken = [], {max(1, queries // 10): [], queries: []}
    for turn in range(args.repeats):
        own.append(clock(ours))
        for number, times in taken.items():
            with open(texts) as file:
                few.write_text("".join(line for _, line in zip(range(number), file)))
            times.append(clock(lambda: run(images, few, found)))
            gc.collect()
        if not turn:
            lines = list(zip(found.read_text().splitlines(), output.read_text().splitlines()))
            assert len(lines) == queries
            # Exact sums and float32 may order two neighbours differently, some 1e-8 apart.
            report.gate(
                f"{case}: lines that differ, of {queries}", sum(a != b for a, b in lines), max(1, queries / 1000)
            )
    kind = "in full" if queries == args.items else f"extrapolated from {' and '.join(map(str, taken))} queries"
    (theirs, their_cpu), (seconds, cpu) = extrapolate(taken, args.items), np.min(own, axis=0)
    report.add(case, f"{name}, {kind}", seconds=float(theirs), cpu_s=their_cpu)
    report.add(case, "ours, in full", seconds=float(seconds), cpu_s=cpu, baseline=f"{name}, {kind}", goal=GOAL)
    report.ratio(case, f"CPU seconds, {name} / ours", their_cpu / cpu, goal=GOAL)


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--items", type=int, default=30000, help="images, and as many texts (30000)")
    parser.add_argument("--width", type=int, default=512, help="numbers per feature (512)")
    parser.add_argument("--queries", type=int, default=200, help="queries of the released way that are timed (200)")
    parser.add_argument("--cn-clip", type=Path, help="folder with the released code (holds cn_clip/)")
    args = parser.parse_args()
    if args.queries < 2:
        parser.error("--queries: two or more")
    args.device = torch.device("cpu")
    report = Report("knn", args.device, commit=args.commit)
    with tempfile.TemporaryDirectory() as folder:
        measure(report, args, Path(folder))
    report.finish(args.output)


if __name__ == "__main__":
    main()
