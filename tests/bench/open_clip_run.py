"""open_clip's own trainer and ours, side by side: one small ViT-CLIP, one CSV, the same initial weights and settings.

python tests/bench/open_clip_run.py --data flickr8k/captions.jsonl [--work logs/open-clip] [--repeats 3]

Both commands are what a user types (`open_clip_train.main` and `rwkv_clip.training.main`), each alone on the machine
and with all its cores. Equal: model, weights at the start, pairs, batch, steps, optimizer, schedule, clipping,
precision, the range of crops. Different: what each draws at random (order and crops), and how the programs are made.

    learning   loss of every logged step, recall of the test pictures by one evaluation, seeds 0, 1, ..
    speed      pairs a second while training (median of the logged windows), seconds from start to end of the process
    memory     the process's largest resident memory, in these runs and in a few steps of a large batch
    a kill     both are killed in the middle of an epoch and resumed: the pairs that each trains again, and by how much
               the final weights differ from those of the run that was not killed

Finished runs are kept in --work. Results hold numbers only, no text and no picture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from figures import chance, draw_open_clip, shorten_recall
from harness import ROOT, Report, argument_parser, run_python

import rwkv_clip
from rwkv_clip.checkpoint import read_weights

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
NAME = "ViT-small"
PEER = """
import sys, open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""
BATCH, LARGE, LARGE_STEPS = 128, 1024, 4
EVERY = 10  # steps between two log lines
SHARED = {"lr": 1e-3, "wd": 0.2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "grad-clip-norm": 1.0}
CROPS = {"crop-area": (0.9, 1.0), "crop-aspect": (0.75, 1.3333333333333333), "flip": 0.0, "interpolation": "bicubic"}
RECALLS = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
LINE = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/\d+ .*?Batch \(t\): ([\d.]+),.*?Contrastive_loss: ([\d.]+)")


# ---- what both are given -------------------------------------------------------------------------------------------


def write_data(args: argparse.Namespace) -> int:
    """The CSV that both read, its pictures beside it, and the model's description; returns the number of pairs."""
    folder, root = args.work / "data", args.data.parent / "images"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["image"], text) for row in rows if row["split"] == "train" for text in row["captions"][: args.texts]]
    pairs = pairs[: len(pairs) // LARGE * LARGE]  # open_clip drops an unfilled batch
    for image in {image for image, _ in pairs}:
        to = folder / "images" / image
        if not to.exists():
            shutil.copyfile((root if root.is_dir() else args.data.parent) / image, to)
    lines = ["filepath\ttitle", *(f"images/{image}\t{' '.join(text.split())}" for image, text in pairs)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{NAME}.json").write_text(json.dumps(MODEL))
    return len(pairs)


def write_weights(args: argparse.Namespace, seed: int, report: Report) -> Path:
    """Initial weights, made by open_clip; both packages must compute the same with them."""
    path, described = args.work / "data" / f"initial-{seed}.pt", args.work / "data" / f"{NAME}.json"
    open_clip.add_model_config(described)
    torch.manual_seed(seed)
    theirs = open_clip.create_model(NAME).eval()
    torch.save(theirs.state_dict(), path)
    ours = rwkv_clip.create_model(described, pretrained=path).eval()
    image, text = torch.randn(4, 3, 64, 64), torch.randint(1, 49000, (4, 32))
    with torch.no_grad():
        for one, other in zip(ours(image, text), theirs(image, text)):
            report.gate(f"initial model {seed}", (one - other).abs().max().item(), 1e-5)
    return path


# ---- the two programs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: its folder's name, and what makes it another run."""

    name: str
    seed: int
    epochs: int
    batch: int = BATCH
    steps: int | None = None  # fewer than the epochs have


def ours(args: argparse.Namespace, job: Job) -> list[object]:
    """The command of our trainer. Saves are as far apart as they are by default or half an epoch, the nearer."""
    flags = {
        "train-data": "train.csv",
        "model": f"{NAME}.json",
        "pretrained": f"initial-{job.seed}.pt",
        **SHARED,
        **CROPS,
    }
    flags |= {"batch-size": job.batch, "epochs": job.epochs, "warmup": args.warmup, "seed": job.seed}
    flags |= {
        "precision": args.precision,
        "workers": args.workers_ours,
        "loader": "torch",
        "log-every-n-steps": EVERY,
        "logs": "../ours",
    }
    flags |= {"save-every-n-steps": min(1000, max(1, args.pairs // job.batch // 2)), "name": job.name}
    if job.steps:
        flags["max-steps"] = job.steps
    given = [
        part for key, value in flags.items() for part in (f"--{key}", *(value if isinstance(value, tuple) else [value]))
    ]
    return [sys.executable, "-m", "rwkv_clip.training.main", *given, "--resume", "latest"]


def theirs(args: argparse.Namespace, job: Job) -> list[object]:
    """The command of open_clip's trainer."""
    flags = {"train-data": "train.csv", "dataset-type": "csv", "model": NAME, "pretrained": f"initial-{job.seed}.pt"}
    flags |= {**SHARED, "batch-size": job.batch, "epochs": job.epochs, "warmup": args.warmup, "seed": job.seed}
    flags |= {
        "precision": args.precision,
        "workers": args.workers_open_clip,
        "log-every-n-steps": EVERY,
        "logs": "../open_clip",
        "name": job.name,
    }
    given = [part for key, value in flags.items() for part in (f"--{key}", value)]
    return [sys.executable, "-c", PEER, f"{NAME}.json", *given, "--resume", "latest"]


PROGRAMS: dict[str, Callable[[argparse.Namespace, Job], list[object]]] = {"ours": ours, "open_clip": theirs}


def run(args: argparse.Namespace, program: str, job: Job, stop: Callable[[], bool] | None = None) -> dict[str, float]:
    """Run a program to its end, or until `stop()` says to kill it; seconds and MiB of its largest process."""
    log = args.work / program / f"{job.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(log, "a", encoding="utf-8") as out:
        command = list(map(str, PROGRAMS[program](args, job)))
        process = subprocess.Popen(command, cwd=args.work / "data", stdout=out, stderr=out, start_new_session=True)
        while stop is not None and process.poll() is None:
            if stop():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {}
            time.sleep(0.02)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{program}, {job.name}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    return {"seconds": time.monotonic() - began, "peak_mib": usage.ru_maxrss / 1024}


def read_log(args: argparse.Namespace, program: str, job: Job) -> list[dict[str, float]]:
    """step, loss and seconds_per_step (mean since the line before) of every log line."""
    folder = args.work / program / job.name
    if program == "ours":
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [
            {"step": line["step"], "loss": line["loss"], "seconds_per_step": job.batch / line["samples_per_second"]}
            for line in lines
            if "loss" in line
        ]
    found, steps = [], args.pairs // job.batch
    for epoch, seen, seconds, loss in LINE.findall((folder / "out.log").read_text()):
        # they log the first step of an epoch, too, alone in its window
        step = int(epoch) * steps + int(seen) // job.batch
        found.append({"step": step, "loss": float(loss), "seconds_per_step": float(seconds)})
    return found


def weights_of(args: argparse.Namespace, program: str, job: Job) -> Path:
    """What a finished run left."""
    folder = args.work / program / job.name
    return folder if program == "ours" else folder / "checkpoints" / f"epoch_{job.epochs}.pt"


def measure_run(args: argparse.Namespace, program: str, seed: int) -> dict:
    """Train and test with one seed; kept in the work folder."""
    kept = args.work / "results" / f"{program}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    job = Job(f"seed-{seed}", seed, args.epochs)
    shutil.rmtree(args.work / program / job.name, ignore_errors=True)  # a half one has no seconds
    result = {"method": program, "seed": seed, **run(args, program, job)}
    lines = read_log(args, program, job)
    result |= {"pairs_per_second": BATCH / statistics.median(x["seconds_per_step"] for x in lines[1:]), "curve": lines}
    result |= test(args, program, job)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result) + "\n")
    return result


def test(args: argparse.Namespace, program: str, job: Job) -> dict[str, float]:
    """Recall on the test pictures."""
    out, model = args.work / "eval" / f"{program}-{job.name}", args.work / "data" / f"{NAME}.json"
    more = () if program == "ours" else ("--model", model)
    where = ("--checkpoint", weights_of(args, program, job), "--data", args.data, "--split", "test", "--gallery", 0)
    run_python("-m", "rwkv_clip.eval.main", "retrieval", *where, *more, "--logs", out, "--name", "retrieval")
    newest = max(out.glob("retrieval*/result.json"), key=lambda path: path.stat().st_mtime)
    (entry,) = json.loads(newest.read_text())["results"]
    metrics = {name: entry["metrics"][name] for name in RECALLS}
    return {
        **metrics,
        "images": entry["images"],
        "captions": entry["captions"],
        "mean_recall": statistics.fmean(metrics.values()),
    }


# ---- a kill in the middle of an epoch ------------------------------------------------------------------------------


def measure_kill(args: argparse.Namespace, program: str) -> dict[str, float]:
    """Kill at 0.7 of the second epoch, go on with the same command."""
    steps, job = args.pairs // BATCH, Job("killed", 0, args.epochs)
    shutil.rmtree(args.work / program / job.name, ignore_errors=True)
    due = steps + int(0.7 * steps)
    run(args, program, job, stop=lambda: last_step(args, program, job) >= due)
    killed = last_step(args, program, job)
    folder = args.work / program / job.name
    (folder / ("log.jsonl" if program == "ours" else "out.log")).rename(folder / "before.txt")
    run(args, program, job)
    first = first_step(args, program, job)
    whole, again = (weights_of(args, program, Job(name, 0, args.epochs)) for name in ("seed-0", "killed"))
    whole, again = read_final(whole), read_final(again)
    scale = max(tensor.abs().max().item() for tensor in whole.values())
    apart = max((whole[key] - again[key]).abs().max().item() for key in whole)
    return {
        "killed_at_step": killed,
        "resumed_at_step": first,
        "pairs_again": (killed - first) * BATCH,
        "weights_apart": apart / scale,
    }


def last_step(args: argparse.Namespace, program: str, job: Job) -> int:
    try:
        return max((line["step"] for line in read_log(args, program, job)), default=0)
    except (OSError, ValueError):  # not there yet, or a line is being written
        return 0


def first_step(args: argparse.Namespace, program: str, job: Job) -> int:
    """The step at which a resumed run began, by what it says itself."""
    if program == "ours":
        said = (args.work / program / f"{job.name}.txt").read_text()
        return int(re.findall(r"resumed at step (\d+)", said)[-1])
    epoch = re.findall(
        r"resuming checkpoint .* \(epoch (\d+)\)", (args.work / program / job.name / "out.log").read_text()
    )[-1]
    return int(epoch) * (args.pairs // BATCH)


def read_final(path: Path) -> dict[str, torch.Tensor]:
    """Floating-point weights of a run."""
    return {key: value.double() for key, value in read_weights(path).items() if value.is_floating_point()}


# ---- all of it -----------------------------------------------------------------------------------------------------


def report_runs(report: Report, runs: list[dict], args: argparse.Namespace) -> None:
    """Rows: learning and speed by program, means over the seeds and the recalls' least and largest."""
    case = f"{args.pairs:,} pairs, {args.epochs} epochs of {args.pairs // BATCH} steps, {args.repeats} seeds"
    report.add(case, "chance", **chance(runs[0]["images"], runs[0]["captions"]))
    for program in PROGRAMS:
        own = [one for one in runs if one["method"] == program]
        figures = {shorten_recall(name): 100 * statistics.fmean(one[name] for one in own) for name in RECALLS}
        recalls = [100 * one["mean_recall"] for one in own]
        figures |= {
            "mean_recall": statistics.fmean(recalls),
            "recall_least": min(recalls),
            "recall_largest": max(recalls),
        }
        figures |= {"last_loss": statistics.fmean(one["curve"][-1]["loss"] for one in own)}
        figures |= {key: statistics.median(one[key] for one in own) for key in ("pairs_per_second", "peak_mib")}
        seconds = [one["seconds"] for one in own]
        over = {} if program == "open_clip" else {"baseline": "open_clip", "goal": 1.3}
        report.add(case, program, seconds=seconds, **over, **figures)
    speed = {
        program: statistics.median(one["pairs_per_second"] for one in runs if one["method"] == program)
        for program in PROGRAMS
    }
    report.ratio(case, "pairs a second, ours / open_clip", speed["ours"] / speed["open_clip"], goal=1.3)


def report_rest(report: Report, args: argparse.Namespace) -> None:
    """Memory of a large batch, and the kill."""
    peaks = {}
    for program in PROGRAMS:
        job = Job(f"batch-{LARGE}", 0, 1, LARGE, LARGE_STEPS if program == "ours" else None)
        shutil.rmtree(args.work / program / job.name, ignore_errors=True)
        peaks[program] = run(args, program, job)["peak_mib"]
        report.add(f"a batch of {LARGE:,}", program, peak_mib=peaks[program])
    report.ratio(f"a batch of {LARGE:,}", "memory, open_clip / ours", peaks["open_clip"] / peaks["ours"], goal=1.0)
    for program in PROGRAMS:
        report.add("killed in the second epoch", program, **measure_kill(args, program))


def read_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, required=True, help="caption file of the set: {image, captions, split}")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "open-clip", help="data, runs, results")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--texts", type=int, default=3, help="captions of a picture, a pair each (3)")
    parser.add_argument("--precision", default="amp_bf16", help="of both: amp_bf16, in which both are fastest, or fp32")
    parser.add_argument("--warmup", type=int, default=50, help="steps (50)")
    parser.add_argument("--workers-ours", type=int, default=2, help="loader processes of our trainer (2)")
    parser.add_argument("--workers-open-clip", type=int, default=2, help="loader processes of open_clip's trainer (2)")
    parser.add_argument("--figures", type=Path, default=ROOT / "figure", help="folder of the picture (figure)")
    args = parser.parse_args(arguments)
    if not args.data.exists():
        parser.error(f"--data {args.data}: not there, nothing was measured; the set cannot be shipped")
    args.data, args.work = args.data.resolve(), args.work.resolve()
    return args


def main(arguments: list[str] | None = None) -> None:
    args = read_command_line(arguments)
    args.pairs = write_data(args)
    report = Report("open_clip_run", args.device, commit=args.commit)
    for seed in range(args.repeats):
        write_weights(args, seed, report)
    runs = []
    for seed in range(args.repeats):
        for program in PROGRAMS:
            done = measure_run(args, program, seed)
            speed, recall = f"{done['pairs_per_second']:.0f} pairs/s", f"mean recall {100 * done['mean_recall']:.2f} %"
            print(f"{program}, seed {seed}: {done['seconds']:.0f} s, {speed}, {recall}", flush=True)
            runs.append(done)
    report_runs(report, runs, args)
    report_rest(report, args)
    report.facts |= {"workers": [args.workers_ours, args.workers_open_clip], "batch": BATCH, "runs": runs}
    content = json.loads(report.finish(args.output).read_text())
    args.figures.mkdir(parents=True, exist_ok=True)
    draw_open_clip(args.figures / "open_clip_run.png", content)


if __name__ == "__main__":
    main()
