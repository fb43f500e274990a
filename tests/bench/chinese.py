"""Chinese-CLIP's way on real pictures, through the commands that a user types: caption file -> TSV and JSONL -> LMDB ->
training -> feature, KNN and recall files. Which towers learn Chinese best, and what does `--positives mask` change?

python tests/bench/chinese.py --data flickr8k/captions.jsonl [--work logs/chinese]

The set has Chinese sentences and a split ({"image", "captions_zh", "split"}; pictures beside it or in images/). Three
pairs of towers are trained from scratch on the first three quarters of the training pictures, with the same steps,
batches, schedule and augmentation. One of them is then fine-tuned on the last quarter, where every picture has one
sentence of its own and one that names only what and where ("a dog on grass"), which it shares with all pictures of that
kind: with and without equal texts among the negatives. Every run is tested once, after its last step, on the test
pictures: nothing is chosen by a result. `kinds` is the recall of the shared sentences, each with all its pictures.

Recalls come from the files that `knn` and `recall` write; a gate compares them with the evaluation inside the process.
--repeats: seeds 0, 1, ..; runs share the cores, --jobs at a time: seconds say nothing about speed. Finished runs are
kept in --work, interrupted ones continue. Results hold numbers only, no text and no picture.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from figures import draw_chinese
from harness import ROOT, Report, argument_parser, run_python

CONTEXT = 24  # of the published baselines; the longest sentence has 28 characters, 99 in 100 have up to 16
BERT = {"kind": "bert", "context": CONTEXT, "vocab": 21128, "width": 128, "depth": 2, "heads": 2, "ffn_width": 512}
BERT |= {"dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.05}  # its own keep so small a tower on a plateau
RWKV = {"context": CONTEXT, "vocab": 21128, "width": 128, "depth": 2, "heads": 2, "ffn_width": 384}
VIT_IMAGE = {"kind": "open_clip", "image_size": 48, "layers": 4, "width": 128, "patch_size": 8, "quick_gelu": True}
RWKV_IMAGE = {"image_size": [48, 48], "patch": 8, "width": 128, "depth": 4, "heads": 2, "ffn_width": 384}
SHARED = {"embed_dim": 128, "tokenizer": "bert-chinese", "resize_mode": "squash"}
MODELS = {
    "ViT + BERT": {"image": VIT_IMAGE, "text": BERT, **SHARED},
    "RWKV + BERT": {"image": RWKV_IMAGE, "text": BERT, **SHARED},
    "RWKV both ways": {"image": RWKV_IMAGE, "text": RWKV, **SHARED},
}
TUNED = "ViT + BERT"  # the towers of Chinese-CLIP
FINE_TUNINGS = {"fine-tuned": "pairs", "fine-tuned, --positives mask": "mask"}
PRESET = "flickr8k-small"
WAYS = {"text_to_image": "t2i", "image_to_text": "i2t"}
RECALLS = [f"{way}_R{k}" for way in WAYS.values() for k in (1, 5, 10)]

# What a shared sentence names: the first of these found in the sentences of a picture.
WHO = {"狗": "一只狗", "女孩": "一个女孩", "男孩": "一个男孩", "孩": "一个小孩", "女": "一个女人", "男": "一个男人"}
WHERE = {"雪": "雪地上", "草": "草地上", "水": "水里", "海": "海边", "山": "山上", "街": "街上", "路": "路上"}


# ---- data ----------------------------------------------------------------------------------------------------------


def name_kind(sentences: list[str]) -> str:
    """The sentence that a picture shares with others: who, where."""
    text = "".join(sentences)
    who = next((words for key, words in WHO.items() if key in text), "有人")
    where = next((f"在{words}" for key, words in WHERE.items() if key in text), "")
    return f"{who}{where}。"


def write_data(data: Path, work: Path) -> None:
    """TSV, JSONL and LMDB of the splits, by the commands."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    quarter = len(train) // 4
    splits = {
        "train": [(row["image"], row["captions_zh"]) for row in train[:-quarter]],
        "tune": [(row["image"], [row["captions_zh"][0], name_kind(row["captions_zh"])]) for row in train[-quarter:]],
        "test": [(row["image"], row["captions_zh"]) for row in test],
        "kinds": [(row["image"], [name_kind(row["captions_zh"])]) for row in test],
    }
    folder, root = work / "data", data.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for split, entries in splits.items():
        if (folder / f"{split}_texts.jsonl").exists():
            continue
        source = work / f"{split}.jsonl"
        lines = [json.dumps({"image": image, "captions": texts}, ensure_ascii=False) for image, texts in entries]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        images = str((root if root.is_dir() else data.parent).resolve())
        run("rwkv_clip.data.pairs", source, folder, "--split", split, "--images", images)
    run("rwkv_clip.data.lmdb", "--data-dir", folder, "--splits", ",".join(splits))


def run(module: str, *arguments: object, log: Path | None = None) -> str:
    """One command in a process of its own, see `run_python`."""
    return run_python("-m", module, *arguments, log=log)


# ---- one run -------------------------------------------------------------------------------------------------------


def name_run(label: str, seed: int) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split()) + f"-{seed}"


def make_flags(args: argparse.Namespace, label: str, seed: int) -> dict[str, object]:
    """Flags of a training run that decide its result."""
    budget = {"batch-size": args.batch_size, "seed": seed, "workers": 0, "loader": "torch", "text-choice": "first"}
    if label in MODELS:
        model = args.work / "models" / f"{name_run(label, seed)[:-2]}.json"
        return {**budget, "model": model, "train-data": args.work / "data/lmdb/train", "epochs": args.epochs}
    start = args.work / "runs" / name_run(TUNED, seed)
    tuning = {"pretrained": start, "positives": FINE_TUNINGS[label], "lr": 2e-4, "epochs": args.tuning_epochs}
    model = args.work / "models" / f"{name_run(TUNED, seed)[:-2]}.json"
    return {**budget, "model": model, "train-data": args.work / "data/lmdb/tune", **tuning}


def run_method(args: argparse.Namespace, label: str, seed: int) -> dict:
    """Train, write the files, read the recalls: the result of a run, kept in the work folder."""
    flags, name = make_flags(args, label, seed), name_run(label, seed)
    kept, wanted = args.work / "results" / f"{name}.json", {key: str(value) for key, value in flags.items()}
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["flags"] != wanted:
            raise SystemExit(f"{kept} was made with {result['flags']}; take another --work")
        return result
    folder = args.work / "runs" / name
    log = args.work / f"{name}.txt"
    given = [part for key, value in flags.items() for part in (f"--{key}", value)]
    place = ("--logs", folder.parent, "--name", name, "--resume", "latest")
    run("rwkv_clip.training.main", "--preset", PRESET, *given, "--val-every-n-steps", "None", *place, log=log)
    result = {"method": label, "seed": seed, "flags": wanted, **test_files(args, folder, "test", log)}
    result["kinds"] = {key: value for key, value in test_files(args, folder, "kinds", log).items() if key in RECALLS}
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result["duplicates"] = [step["duplicates"] for step in steps if "duplicates" in step][-1:]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result) + "\n")
    return result


def test_files(args: argparse.Namespace, folder: Path, split: str, log: Path) -> dict:
    """Recalls in percent by the files of a split, and the largest difference to the evaluation inside the process."""
    data, out = args.work / "data", folder / split
    out.mkdir(exist_ok=True)
    images, texts = out / "imgs.jsonl", out / "texts.jsonl"
    run(
        *("rwkv_clip.eval.main", "features", "--checkpoint", folder, "--data", data / f"{split}_texts.jsonl"),
        *("--to", "chinese-clip", "--image-feat-output-path", images, "--text-feat-output-path", texts),
        *("--logs", out, "--name", "features"),
        log=log,
    )
    run("rwkv_clip.eval.main", "invert", "--input", data / f"{split}_texts.jsonl", log=log)
    found: dict[str, float] = {}
    for way, gold in (("t2i", f"{split}_texts.jsonl"), ("i2t", f"{split}_texts.tr.jsonl")):
        predictions, scores = out / f"{way}_predictions.jsonl", out / f"{way}.json"
        files = ("--image-feats", images, "--text-feats", texts, "--direction", way, "--top-k", 10)
        run("rwkv_clip.eval.main", "knn", *files, "--output", predictions, log=log)
        run("rwkv_clip.eval.main", "recall", data / gold, predictions, scores, "--strict", log=log)
        scored = json.loads(scores.read_text())["scoreJson"]
        found |= {f"{way}_R{k}": scored[f"r{k}"] for k in (1, 5, 10)}
    found["mean_recall"] = statistics.fmean(found[name] for name in RECALLS)
    inside = ("retrieval", "--checkpoint", folder, "--data", data / f"{split}_texts.jsonl", "--gallery", 0)
    run("rwkv_clip.eval.main", *inside, "--logs", out, "--name", "inside", log=log)
    newest = max(out.glob("inside*/result.json"), key=lambda path: path.stat().st_mtime)
    (entry,) = json.loads(newest.read_text())["results"]
    own = {f"{short}_R{k}": 100 * entry["metrics"][f"{way}_R@{k}"] for way, short in WAYS.items() for k in (1, 5, 10)}
    found["difference"] = max(abs(own[name] - found[name]) for name in RECALLS)
    return found | {"images": entry["images"], "captions": entry["captions"]}


# ---- all runs ------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> list[dict]:
    """Results of all methods and seeds."""
    for label, spec in MODELS.items():
        path = args.work / "models" / f"{name_run(label, 0)[:-2]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(spec))
    write_data(args.data, args.work)
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for labels in (MODELS, FINE_TUNINGS):  # what is fine-tuned must be trained
            tasks = [(label, seed) for seed in range(args.repeats) for label in labels]
            for done in pool.map(lambda task: run_method(args, *task), tasks):
                print(f"{done['method']}, seed {done['seed']}: mean recall {done['mean_recall']:.2f} %", flush=True)
                results.append(done)
    return results


def report_runs(report: Report, results: list[dict], args: argparse.Namespace) -> None:
    """Rows of recalls in percent: means over the seeds, and the least and the largest mean recall."""
    report.gate("recall files against the evaluation in the process, points", max(r["difference"] for r in results), 0)
    case = f"{results[0]['images']} test pictures, {results[0]['captions']} sentences, {args.repeats} seeds"
    for label in [*MODELS, *FINE_TUNINGS]:
        own = [result for result in results if result["method"] == label]
        means = [result["mean_recall"] for result in own]
        figures = {name: statistics.fmean(result[name] for result in own) for name in RECALLS}
        figures |= {"mean_recall": statistics.fmean(means), "least": min(means), "largest": max(means)}
        figures["kinds_t2i_R10"] = statistics.fmean(result["kinds"]["t2i_R10"] for result in own)
        report.add(case, label, **figures)
    report.facts |= {"jobs": args.jobs, "preset": PRESET, "runs": list(map(summarize, results))}


def summarize(run: dict) -> dict:
    """What the picture shows of a run, recalls as fractions; the rest stays in the work folder."""
    kept = {name: run[name] for name in ("method", "seed", "images", "captions", "mean_recall", "kinds", "duplicates")}
    return kept | {f"{way}_R@{k}": run[f"{short}_R{k}"] / 100 for way, short in WAYS.items() for k in (1, 5, 10)}


def read_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, required=True, help="caption file of the set: {image, captions_zh, split}")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "chinese", help="data, runs, results")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tuning-epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--figures", type=Path, default=ROOT / "figure", help="folder of the picture (figure)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args(arguments)
    if not args.data.is_file():
        parser.error(f"--data {args.data}: no such file, nothing was measured; Flickr8k cannot be shipped")
    if not re.search('"captions_zh"', args.data.open(encoding="utf-8").readline()):
        parser.error(f"--data {args.data}: its first line has no captions_zh, the Chinese sentences")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = read_command_line(arguments)
    results = run_all(args)
    report = Report("chinese", args.device, commit=args.commit)
    report_runs(report, results, args)
    content = json.loads(report.finish(args.output).read_text())
    args.figures.mkdir(parents=True, exist_ok=True)
    draw_chinese(args.figures / "flickr8k_chinese.png", content)


if __name__ == "__main__":
    main()
