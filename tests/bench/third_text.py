"""Does a third text help? RWKV towers on real pictures whose raw texts are damaged as those of the web are.

python tests/bench/third_text.py --data flickr8k/captions.jsonl --cifar10 cifar10 [--work logs/third-text]

The set has several human sentences a picture and a split ({"image", "captions", "split"}; pictures beside it or in
images/). Of each training picture one sentence plays the raw text, after damage: file-name words, cut, shuffled,
and a share goes to another picture. A terse caption made of a second sentence plays the synthetic one. Nouns of the
others, some lost and some wrong, are the tags. `python -m rwkv_clip.describe run` composes the third text by rules,
`data2rec.py` makes records, and one model is trained on each choice of texts with the same steps, batches, schedule
and augmentation. Every run is tested once, after its last step, on the clean test pictures and zero-shot on CIFAR-10:
nothing is chosen by a result. A seed is that of weights, data order, sentences and damage; the choices share it.

--repeats: seeds 0, 1, ..; runs share the cores, --jobs at a time: seconds say nothing about speed. Finished runs are
kept in --work, interrupted ones continue. Results hold numbers only, no text and no picture.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from figures import chance, draw_third_text, shorten_recall
from harness import ROOT, Report, argument_parser, run_python

from rwkv_clip.describe.words import find_nouns, is_colour, is_content, split_words

MODEL, PRESET = "RWKV-CLIP-Ti-8", "flickr8k-small"
CHOICES = {  # texts of the records, how one is chosen
    "raw": ("three", 1),
    "raw + synthetic": ("three", 2),
    "all three": ("three", 3),
    "generated only": ("generated", 1),
}
TEXTS = {"three": ("raw", "synthetic", "generated"), "generated": ("raw=generated",)}
SIDE = 64  # px of the stored training pictures; the towers see crops of them at 48
SWAPPED = 0.3  # of the raw texts that belong to another picture
NAMED, CUT, SHUFFLED, JUNK = 0.3, 0.3, 0.2, 0.2  # of the raw texts, each drawn on its own
LOST, WRONG = 0.3, 0.15  # of the tags
TERSE = 7  # words of a synthetic caption
FILE_NAMES = ("IMG_{n}.JPG", "DSC0{n}", "img {n}", "P{n}0 copy")
ENDINGS = (" | flickr", " - photo by me", " http://example.com/{n}", " #photo #nofilter", " (c) 2009")
RECALLS = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


# ---- data ----------------------------------------------------------------------------------------------------------


def damage(sentence: str, draw: random.Random) -> str:
    """A sentence as the web might have it."""
    words, number = sentence.rstrip(" .").split(), draw.randrange(1000, 9999)
    if draw.random() < CUT:
        words = words[: max(2, len(words) // 2)]
    if draw.random() < SHUFFLED:
        draw.shuffle(words)
    text = " ".join(words)
    if draw.random() < NAMED:
        text = f"{draw.choice(FILE_NAMES).format(n=number)} {text}"
    return text + draw.choice(ENDINGS).format(n=number) if draw.random() < JUNK else text


def make_terse(sentence: str) -> str:
    """A short caption by rules: no colours, the first words, no function word at the end."""
    words = [word for word in split_words(sentence) if not is_colour(word)][:TERSE]
    while len(words) > 1 and not is_content(words[-1]):
        words.pop()
    return " ".join(words).lower()


def draw_tags(sentences: list[str], nouns: list[str], draw: random.Random) -> list[tuple[str, float]]:
    """(name, score): nouns of the sentences without some, and some that are wrong."""
    own = list(dict.fromkeys(noun for sentence in sentences for noun in find_nouns(sentence)))
    kept = [(noun, round(draw.uniform(0.7, 1.0), 3)) for noun in own if draw.random() >= LOST]
    wrong = sum(draw.random() < WRONG for _ in own)
    return kept + [(draw.choice(nouns), round(draw.uniform(0.6, 0.9), 3)) for _ in range(wrong)]


def make_rows(rows: list[dict], seed: int) -> list[dict]:
    """{image, captions} -> {id, image, raw, synthetic, tags, tag_scores}."""
    draw = random.Random(f"third text {seed}")
    order = [draw.sample(row["captions"], len(row["captions"])) for row in rows]
    nouns = [noun for texts in order for sentence in texts for noun in find_nouns(sentence)]
    ring = draw.sample(range(len(rows)), round(SWAPPED * len(rows)))
    source = list(range(len(rows)))
    for to, of in zip(ring, ring[1:] + ring[:1]):
        source[to] = of
    made = []
    for place, (row, texts) in enumerate(zip(rows, order)):
        tags = draw_tags(texts[2:], nouns, draw)
        names, scores = zip(*dict(tags).items()) if tags else ((), ())
        texts = {"raw": damage(order[source[place]][0], draw), "synthetic": make_terse(texts[1])}
        made.append({"id": row["image"], "image": row["image"], **texts, "tags": names, "tag_scores": scores})
    return made


def write_data(args: argparse.Namespace, seed: int) -> dict:
    """Rows, the job that describes them, records of both kinds; returns numbers of the job's report."""
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    folder = args.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    source, job = folder / f"rows-{seed}.jsonl", folder / f"job-{seed}"
    if not (folder / f"done-{seed}").exists():
        made = make_rows([row for row in rows if row["split"] == "train"], seed)
        source.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        run_python(
            "-m", "rwkv_clip.describe", "run", "--input", source, "--output", job, "--images", find_images(args.data)
        )
        for kind, texts in TEXTS.items():
            more = ("--texts", *texts, "--context", 32, "--max-side", SIDE, "--overwrite")
            records = folder / f"{kind}-{seed}"
            run_python(ROOT / "data2rec.py", job / "texts.parquet", records, "--images", find_images(args.data), *more)
        (folder / f"done-{seed}").touch()
    return json.loads((job / "report.json").read_text())


def find_images(data: Path) -> Path:
    """The pictures beside a caption file."""
    root = data.parent / "images"
    return (root if root.is_dir() else data.parent).resolve()


# ---- one run -------------------------------------------------------------------------------------------------------


def run_choice(args: argparse.Namespace, label: str, seed: int) -> dict:
    """Train and test: the result of a run, kept in the work folder."""
    kind, texts = CHOICES[label]
    name = re.sub("[^a-z]+", "-", label) + f"-{seed}"
    flags = {"model": MODEL, "epochs": args.epochs, "batch-size": args.batch_size, "seed": seed, "texts": texts}
    flags |= {"text-choice": "one", "workers": 0, "loader": "torch", "val-every-n-steps": None}
    kept, wanted = args.work / "results" / f"{name}.json", {key: str(value) for key, value in flags.items()}
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["flags"] != wanted:
            raise SystemExit(f"{kept} was made with {result['flags']}; take another --work")
        return result
    folder = args.work / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    given = [part for key, value in flags.items() for part in (f"--{key}", value)]
    place = ("--logs", folder.parent, "--name", name, "--resume", "latest")
    records = args.work / "data" / f"{kind}-{seed}"
    train = ("-m", "rwkv_clip.training.main", "--preset", PRESET, "--train-data", records)
    run_python(*train, *given, *place, log=folder / "train.txt")
    result = {"method": label, "seed": seed, "flags": wanted}
    result |= test(folder, "retrieval", "--data", args.data, "--split", "test", "--gallery", 0)
    if args.cifar10:
        tested = test(folder, "classification", "--dataset", "cifar10", "--data", args.cifar10)
        result["cifar10"] = tested["top1"]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result) + "\n")
    return result


def test(folder: Path, task: str, *arguments: object) -> dict:
    """The metrics of an evaluation of a run."""
    out = folder / "eval"
    run_python("-m", "rwkv_clip.eval.main", task, "--checkpoint", folder, *arguments, "--logs", out, "--name", task)
    newest = max(out.glob(f"{task}*/result.json"), key=lambda path: path.stat().st_mtime)
    (entry,) = json.loads(newest.read_text())["results"]
    return {**entry["metrics"], **{name: entry[name] for name in ("images", "captions") if name in entry}}


# ---- all runs ------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> list[dict]:
    """Results of all choices and seeds."""
    jobs = {seed: write_data(args, seed) for seed in range(args.repeats)}
    args.described = jobs[0]
    tasks = [(label, seed) for seed in range(args.repeats) for label in CHOICES]
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in pool.map(lambda task: run_choice(args, *task), tasks):
            more = f", CIFAR-10 {100 * done['cifar10']:.2f} %" if "cifar10" in done else ""
            recall = statistics.fmean(done[name] for name in RECALLS)
            print(f"{done['method']}, seed {done['seed']}: mean recall {100 * recall:.2f} %{more}", flush=True)
            results.append({**done, "mean_recall": recall})
    return results


def report_runs(report: Report, results: list[dict], args: argparse.Namespace) -> None:
    """Rows of figures in percent: means over the seeds, the least and the largest mean recall and accuracy."""
    images, captions = results[0]["images"], results[0]["captions"]
    case = f"{images} test pictures, {args.repeats} seeds"
    report.add(case, "chance", **chance(images, captions))
    for label in CHOICES:
        own = [result for result in results if result["method"] == label]
        figures = {shorten_recall(name): 100 * statistics.fmean(run[name] for run in own) for name in RECALLS}
        for name in ("mean_recall", "cifar10"):
            if all(name in run for run in own):
                values = [100 * run[name] for run in own]
                spread = {name: statistics.fmean(values), f"{name}_least": min(values), f"{name}_largest": max(values)}
                figures |= spread
        report.add(case, label, **figures)
    kept = ("method", "seed", "images", "captions", "mean_recall", "cifar10", *RECALLS)
    runs = [{name: run[name] for name in kept if name in run} for run in results]
    report.facts |= {"jobs": args.jobs, "preset": PRESET, "model": MODEL, "runs": runs}


def read_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, required=True, help="caption file of the set: {image, captions, split}")
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10's class folders")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "third-text", help="data, runs, results")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--figures", type=Path, default=ROOT / "figure", help="folder of the picture (figure)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args(arguments)
    for name in ("data", "cifar10"):
        if (path := getattr(args, name)) and not path.exists():
            parser.error(f"--{name} {path}: not there, nothing was measured; the sets cannot be shipped")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = read_command_line(arguments)
    results = run_all(args)
    report = Report("third_text", args.device, commit=args.commit)
    report_runs(report, results, args)
    content = json.loads(report.finish(args.output).read_text())
    args.figures.mkdir(parents=True, exist_ok=True)
    draw_third_text(args.figures / "third_text.png", content)


if __name__ == "__main__":
    main()
