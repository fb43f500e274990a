"""CLIP, ALIP and RWKV towers on real pictures with planted noise: who minds it, and do ALIP's gates find it?

python tests/bench/noise.py --data flickr8k/captions.jsonl [--extras] [--work logs/noise]

The set has several human sentences a picture and a split ({"image", "captions", "split"}; pictures beside it or in
images/). Of each training picture two sentences are drawn: one plays the raw text, the other the synthetic caption. Of
the raw texts a share is passed round in a ring, so that each belongs to another picture. Every method gets the same
records, steps, batch, schedule and augmentation, and is tested once, after its last step, on the clean test pictures:
nothing is chosen by a result. A seed is that of weights, data order, sentences and noise; methods share it.

ALIP's gates are those of its last checkpoint: all training pictures without augmentation, and the running means as
saved. `area` is the chance that a clean pair has a larger weight than a swapped one (0.5: the gate knows nothing). For
comparison: the area of the similarity in untrained towers, and of the share of words that both texts have.

--repeats: seeds 0, 1, ..; runs share the cores, --jobs at a time: seconds say nothing about speed. Finished runs are
kept in --work, interrupted ones go on where they stopped. Results hold numbers only, no text and no picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from figures import chance, draw_alip, draw_noise, shorten_recall
from harness import ROOT, Report, argument_parser

from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import parse, to_dict
from rwkv_clip.data.build import build_records
from rwkv_clip.data.image import open_picture
from rwkv_clip.data.records import RecordSet
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.factory import create_model, load_for_inference
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.losses import make_objective
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.training.main import run as train
from rwkv_clip.training.settings import Settings, load_settings

VIT, RWKV = "ViT-Ti-8", "RWKV-CLIP-Ti-8"  # one width, depth, picture and patch
GATED = {"objective": "alip", "text_choice": "all"}
METHODS = {
    "CLIP, raw": {"model": VIT, "text_choice": "first"},
    "CLIP, one of two": {"model": VIT, "text_choice": "one"},
    "ALIP": {"model": VIT, **GATED},
    "RWKV towers, one of two": {"model": RWKV, "text_choice": "one"},
    "RWKV towers, ALIP": {"model": RWKV, **GATED},
}
EXTRAS = {  # what is it in ALIP: two texts a step, or their weights? and its slow start?
    "extra: CLIP, both": {"model": VIT, "text_choice": "all"},
    "extra: ALIP, means from 0.4": {"model": VIT, **GATED, "gates": {"init": 0.4}},
}
PRESET = "flickr8k-small"  # learning rate, schedule and augmentation of everybody
SIDE = 64  # px of the stored training pictures; the towers see crops of them at 48
SIMILARITIES, WEIGHTS = ("S_tc", "S_xt", "S_xc"), ("Ws", "Wt", "Wc", "Ws Wt")  # t: raw, c: synthetic, x: picture
RECALLS = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
FIGURES = ROOT / "figure"


# ---- data ----------------------------------------------------------------------------------------------------------


def plant_noise(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Rows of {image, captions} -> {image, raw, synthetic, raw_of}: two sentences a picture, drawn by the seed; of
    round(share * rows) the raw one goes to the next in a ring in random order. `raw_of`: whose raw text it is."""
    draw = random.Random(f"noise {seed}")
    texts = [draw.sample(row["captions"], 2) for row in rows]
    ring = draw.sample(range(len(rows)), round(share * len(rows)))
    if len(ring) == 1:
        raise ValueError(f"share: {share} of {len(rows)} pictures is one, whose text has nobody to go to")
    source = list(range(len(rows)))
    for to, of in zip(ring, ring[1:] + ring[:1]):
        source[to] = of
    names = [row["image"] for row in rows]
    return [
        {"image": name, "raw": texts[of][0], "synthetic": texts[own][1], "raw_of": names[of]}
        for own, (name, of) in enumerate(zip(names, source))
    ]


def write_records(data: Path, work: Path, share: float, seed: int) -> Path:
    """Records of the training pictures with noise; beside them which texts are swapped. Returns the prefix."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    planted = plant_noise([row for row in rows if row["split"] == "train"], share, seed)
    folder, root = work / "data", data.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"seed-{seed}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in planted), encoding="utf-8")
    built = build_records(
        str(source),
        str(folder / f"train-{seed}"),
        images=str(root if root.is_dir() else data.parent),
        texts=("raw", "synthetic"),
        context=32,
        max_side=SIDE,
        overwrite=True,
    )
    assert built.count == len(planted), f"{built}"  # rows and records have the same numbers
    (folder / f"swapped-{seed}.json").write_text(json.dumps([row["raw_of"] != row["image"] for row in planted]))
    return folder / f"train-{seed}"


# ---- one run -------------------------------------------------------------------------------------------------------


def make_settings(args: argparse.Namespace, label: str, seed: int) -> Settings:
    """Settings of a run: the budget of all, and what the method is."""
    name = "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
    budget = {"epochs": args.epochs, "batch_size": args.batch_size, "max_steps": args.max_steps, "texts": 2}
    place = {"train_data": str(args.work / "data" / f"train-{seed}"), "logs": str(args.work / "runs")}
    place |= {"name": f"{name}-{seed}", "resume": "latest", "device": str(args.device), "workers": 0, "loader": "torch"}
    own = {"seed": seed, "val_every_n_steps": None, **(METHODS | EXTRAS)[label]}
    return parse(Settings, {**budget, **place, **own}, load_settings(PRESET))


def run_method(task: tuple[argparse.Namespace, str, int]) -> dict:
    """Train, test, measure the gates: the result of a run, kept in the work folder."""
    args, label, seed = task
    settings = make_settings(args, label, seed)
    started = time.monotonic()
    folder = Path(settings.run.logs) / settings.run.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "out.txt", "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        train(settings)
    seconds = time.monotonic() - started
    loaded = load_for_inference(folder, device=args.device)
    tested = evaluate_retrieval(
        FeatureExtractor.of(loaded, args.device), load_retrieval(args.data, split="test")
    ).metrics
    result = {"method": label, "seed": seed, "seconds": round(seconds, 1), "settings": kept_settings(args, settings)}
    result |= tested
    result["parameters"] = sum(p.numel() for p in loaded.model.parameters())
    if settings.loss.objective == "alip":
        result["gates"] = measure_gates(settings, loaded, folder, args)
    path = kept_file(args, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return result


def kept_settings(args: argparse.Namespace, settings: Settings) -> dict:
    """What makes a result another one: the settings without folders, and the share of noise."""
    places = ("train_data", "logs", "name", "resume", "device")
    return {key: value for key, value in to_dict(settings).items() if key not in places} | {"share": args.share}


def kept_file(args: argparse.Namespace, settings: Settings) -> Path:
    return args.work / "results" / f"{settings.run.name}.json"


def read_kept(args: argparse.Namespace, label: str, seed: int) -> dict | None:
    """The result of a finished run; SystemExit if it was made with other settings."""
    settings = make_settings(args, label, seed)
    path = kept_file(args, settings)
    if not path.exists():
        return None
    result, now = json.loads(path.read_text()), kept_settings(args, settings)
    other = [f"{key} {result['settings'].get(key)}" for key in now if result["settings"].get(key) != now[key]]
    if other:
        raise SystemExit(f"{path} was made with {', '.join(other)}; take another --work")
    return result


def measure_gates(settings: Settings, loaded, folder: Path, args: argparse.Namespace) -> dict:
    """Weights that the trained gates give clean and swapped training pairs: means and area."""
    records = RecordSet(settings.data.train_data)
    swapped = np.array(json.loads((args.work / "data" / f"swapped-{settings.run.seed}.json").read_text()))
    extractor = FeatureExtractor.of(loaded, args.device)
    images = extractor.encode_images(lambda i: open_picture(records.sample(i)[0]), len(records))
    tokens = np.stack([records.sample(i)[1] for i in range(len(records))])  # (n, 2, T)
    texts = extractor.encode_tokens(tokens.reshape(-1, records.context))
    objective = make_objective(settings.loss).eval()
    saved = read_tensors(find_checkpoint(folder) / "optim.safetensors")["objective/mean_similarity"]
    objective.load_state_dict({"mean_similarity": saved})
    similarities = objective.similarities(images, texts.view(len(records), 2, -1))
    sample, pairs = objective.weigh(similarities)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    logged = torch.tensor([last[f"momentum_{name}_sim"] for name in ("text", "raw", "caption")])
    found = {"mean_similarity": saved.tolist(), "restored": float((logged - objective.mean_similarity).abs().max())}
    for name, column in zip(SIMILARITIES, similarities.numpy().T):
        found[name] = compare(column, swapped)
    values = (sample, pairs[:, 0], pairs[:, 1], sample * pairs[:, 0])
    for name, column in zip(WEIGHTS, (value.numpy() for value in values)):
        found[name] = compare(column, swapped)
    return found


def measure_untrained(args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """What finds swapped texts without any training: words that both texts of a record have, and towers as created."""
    rows = [json.loads(line) for line in (args.work / "data" / f"seed-{seed}.jsonl").read_text().splitlines()]
    swapped = np.array([row["raw_of"] != row["image"] for row in rows])
    words = [(set(row["raw"].lower().split()), set(row["synthetic"].lower().split())) for row in rows]
    found = {"words in common": compare(np.array([len(a & b) / len(a | b) for a, b in words]), swapped)}
    records = RecordSet(str(args.work / "data" / f"train-{seed}"))
    tokens = np.stack([records.sample(i)[1] for i in range(len(records))])
    for model in (VIT, RWKV):
        torch.manual_seed(seed)
        extractor = FeatureExtractor(create_model(model), None, None, args.device)
        texts = extractor.encode_tokens(tokens.reshape(-1, records.context))
        raw, synthetic = texts.view(len(records), 2, -1).unbind(1)
        similarity = torch.nn.functional.cosine_similarity(raw, synthetic).numpy()
        found[f"S_tc of an untrained {model}"] = compare(similarity, swapped)
    return found


def compare(values: np.ndarray, swapped: np.ndarray) -> dict[str, float]:
    """Means of clean and swapped, and the area."""
    clean, other = values[~swapped], values[swapped]
    return {"clean": float(clean.mean()), "swapped": float(other.mean()), "area": area_of(clean, other)}


def area_of(clean: np.ndarray, swapped: np.ndarray) -> float:
    """Chance that one of `clean` is larger than one of `swapped`, equal ones counted half (area under the ROC)."""
    ordered = np.sort(swapped)
    below, upto = np.searchsorted(ordered, clean, "left"), np.searchsorted(ordered, clean, "right")
    return float((below + upto).mean() / (2 * len(swapped)))


# ---- all runs ------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, labels: list[str]) -> list[dict]:
    """Results of all methods and seeds; what is kept is not run again."""
    extra = [label for label in labels if label in EXTRAS]  # last, whatever the seed
    tasks = [(args, label, seed) for seed in range(args.repeats) for label in labels if label in METHODS]
    tasks += [(args, label, seed) for seed in range(args.repeats) for label in extra]
    todo = [task for task in tasks if read_kept(*task) is None]
    unmade = {seed for seed in range(args.repeats) if not (args.work / "data" / f"swapped-{seed}.json").exists()}
    for seed in sorted(unmade | {seed for _, _, seed in todo}):
        write_records(args.data, args.work, args.share, seed)
    print(f"{len(tasks) - len(todo)} runs are finished, {len(todo)} to do", flush=True)
    with contextlib.ExitStack() as stack:
        results = map(run_method, todo)
        if args.jobs > 1 and todo:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads leave the cores to the other runs
            threads = max(1, torch.get_num_threads() // args.jobs)
            pool = multiprocessing.get_context("spawn").Pool(args.jobs, torch.set_num_threads, (threads,), 1)
            results = stack.enter_context(pool).imap_unordered(run_method, todo)
        for done in results:
            what = f"{done['method']}, seed {done['seed']}: mean recall {100 * done['mean_recall']:.2f} %"
            print(f"{what}, {done['seconds']:.0f} s", flush=True)
    return [read_kept(*task) for task in tasks]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Mean, least, largest."""
    return statistics.fmean(values), min(values), max(values)


def report_runs(report: Report, results: list[dict], args: argparse.Namespace) -> None:
    """Rows: recall in percent by method, then the gates; the recalls of every run beside them."""
    images, captions = results[0]["images"], results[0]["captions"]
    case = f"{images} test pictures, {args.repeats} seeds"
    report.add(case, "chance", **chance(images, captions))
    for label in dict.fromkeys(result["method"] for result in results):
        own = [result for result in results if result["method"] == label]
        figures = {shorten_recall(name): 100 * statistics.fmean(run[name] for run in own) for name in RECALLS}
        names = ("mean_recall", "least", "largest")
        figures |= dict(zip(names, spread([100 * run["mean_recall"] for run in own])))
        report.add(case, label, **figures, run_seconds=statistics.fmean(run["seconds"] for run in own))
    for label in dict.fromkeys(result["method"] for result in results if "gates" in result):
        own = [result["gates"] for result in results if result["method"] == label]
        for gates in own:
            report.gate(f"{label}: running means of the checkpoint against the log", gates["restored"], 1e-6)
        found = {name: [gates[name] for gates in own] for name in SIMILARITIES + WEIGHTS}
        report_areas(report, f"gates of {label}", found)
    untrained = [measure_untrained(args, seed) for seed in range(args.repeats)]
    report_areas(report, "without training", {name: [found[name] for found in untrained] for name in untrained[0]})
    report.facts |= {"jobs": args.jobs, "preset": PRESET, "runs": [summarize(run) for run in results]}


def summarize(run: dict) -> dict:
    """What the pictures show of a run; the rest stays in the work folder."""
    return {name: run[name] for name in ("method", "seed", "images", "captions", "mean_recall", *RECALLS)}


def report_areas(report: Report, case: str, found: dict[str, list[dict[str, float]]]) -> None:
    """A row for each quantity: means of clean and swapped pairs over the seeds; mean, least and largest area."""
    for name, own in found.items():
        means = {part: statistics.fmean(one[part] for one in own) for part in ("clean", "swapped")}
        areas = dict(zip(("area", "area_least", "area_largest"), spread([one["area"] for one in own])))
        report.add(case, name, **means, **areas)


# ---- command line --------------------------------------------------------------------------------------------------


def read_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, required=True, help="caption file of the set: {image, captions, split}")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "noise", help="records, runs, results")
    parser.add_argument("--share", type=float, default=0.3, help="of the raw texts that are swapped (0.3)")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--extras", action="store_true", help="the rows that explain the others too")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the pictures (figure)")
    args = parser.parse_args(arguments)
    if not args.data.is_file():
        parser.error(f"--data {args.data}: no such file, nothing was measured; Flickr8k cannot be shipped")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = read_command_line(arguments)
    results = run_all(args, [*METHODS, *EXTRAS] if args.extras else list(METHODS))
    report = Report("noise", args.device, commit=args.commit)
    report_runs(report, results, args)
    content = json.loads(report.finish(args.output).read_text())
    args.figures.mkdir(parents=True, exist_ok=True)
    draw_alip(args.figures / "alip_weights.png", content)
    draw_noise(args.figures / "flickr8k_noise.png", content)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pool is ended, and its runs save
    main()
