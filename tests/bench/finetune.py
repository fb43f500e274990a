"""Four ways to fine-tune one checkpoint: what each costs and what comes out, on real pictures.

python tests/bench/finetune.py --data flickr8k/captions.jsonl [--work logs/finetune]

The set has several sentences a picture and a split ({"image", "captions", "split"}; pictures beside it or in images/).
A tiny model is trained from scratch on one half of the training pictures. From its checkpoint the other half is learned
in four ways, with the same steps, batches and schedule: all weights; adapters alone (LoRA); the text tower alone (LiT);
all weights at a larger picture size. Each is tested once, after its last step, on the clean test pictures, and so is
the checkpoint that they start from.

train seconds: of the training loop, one process with one thread; runs come one after another. cpu seconds: of the whole
command, with its start and its checkpoints, which other processes on the machine hardly change.
peak: resident memory of the training process, with all that it imports. --repeats: seeds 0, 1, .. of the fine-tuning.
Finished runs are kept in --work, interrupted ones continue. Results hold numbers only.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from pathlib import Path

from figures import chance, shorten_recall
from harness import ROOT, Report, argument_parser, run_python
from third_text import RECALLS, find_images, test

from rwkv_clip.checkpoint import find_checkpoint, read_tensors

MODEL, PRESET = "RWKV-CLIP-Ti-8", "flickr8k-small"
SIDE, LARGER = 96, 64  # px of the stored pictures, of the way that is not at the model's 48
WAYS = {  # flags of each; {base} is the run that they start from
    "full": {"pretrained": "{base}", "lr": 3e-4},
    "LoRA, rank 16": {"pretrained": "{base}", "lora-rank": 16, "lora-alpha": 32, "lr": 2e-3},
    "LiT, image tower locked": {"pretrained": "{base}", "lock-image": True, "lr": 3e-4},
    f"full at {LARGER} px": {"pretrained": "{base}", "force-image-size": LARGER, "lr": 3e-4},
}


def write_records(args: argparse.Namespace) -> None:
    """Records of both halves of the training pictures, every other one."""
    folder = args.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    for name, half in (("before", rows[::2]), ("after", rows[1::2])):
        if (folder / f"{name}.done").exists():
            continue
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in half), encoding="utf-8")
        texts = ("--texts", "captions.0", "captions.1", "captions.2", "--context", 32, "--max-side", SIDE)
        images = ("--images", find_images(args.data))
        run_python(ROOT / "data2rec.py", source, folder / name, *images, *texts, "--overwrite")
        (folder / f"{name}.done").touch()


def train(args: argparse.Namespace, name: str, half: str, seed: int, flags: dict) -> Path:
    """Train, or go on, or take what is finished: the run folder."""
    folder = args.work / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"model": MODEL, "batch-size": args.batch_size, "seed": seed, **flags}
    flags |= {"workers": 0, "loader": "torch", "val-every-n-steps": None, "train-data": args.work / "data" / half}
    given = [part for key, value in flags.items() for part in (f"--{key}", *([] if value is True else [value]))]
    place = ("--logs", folder.parent, "--name", name, "--resume", "latest")
    if not (folder / "measured.json").exists():
        before = spent()
        run_python("-m", "rwkv_clip.training.main", "--preset", PRESET, *given, *place, log=folder / "train.txt")
        with open(folder / "cpu.txt", "a") as kept:  # a line for each start
            kept.write(f"{spent() - before}\n")
    return folder


def spent() -> float:
    """CPU seconds of the processes that have ended here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """What a run took, what it trained, and its recalls; kept in its folder."""
    kept = folder / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if "seconds" in row][-1]
    checkpoint = find_checkpoint(folder)
    optim = read_tensors(checkpoint / "optim.safetensors")
    found = {
        "seconds": last["seconds"],
        "cpu_seconds": sum(map(float, (folder / "cpu.txt").read_text().split())),
        "peak_mib": last["peak_memory_mb"],
        "trained": sum(value.numel() for key, value in optim.items() if key.endswith("/exp_avg")),
        "checkpoint_mib": sum(file.stat().st_size for file in checkpoint.iterdir()) / 2**20,
    }
    found |= test(folder, "retrieval", "--data", args.data, "--split", "test", "--gallery", 0)
    found["mean_recall"] = statistics.fmean(found[name] for name in RECALLS)
    kept.write_text(json.dumps(found) + "\n")
    return found


def run_all(args: argparse.Namespace) -> list[dict]:
    """Results of the checkpoint and of all ways and seeds."""
    write_records(args)
    base = train(args, "base", "before", 0, {"epochs": args.base_epochs})
    results = [{"way": "before", "seed": 0, **measure(args, base)}]
    for seed in range(args.repeats):
        for way, flags in WAYS.items():
            name = f"{way.split(',')[0].replace(' ', '-')}-{seed}"
            given = {key: str(base) if value == "{base}" else value for key, value in flags.items()}
            folder = train(args, name, "after", seed, {"epochs": args.epochs, **given})
            results.append({"way": way, "seed": seed, **measure(args, folder)})
            print(f"{way}, seed {seed}: mean recall {100 * results[-1]['mean_recall']:.2f} %", flush=True)
    return results


def report_runs(report: Report, results: list[dict]) -> None:
    """A row for each way: medians of what it took, means of its recalls in percent."""
    images, captions = results[0]["images"], results[0]["captions"]
    case = f"{images} test pictures"
    report.add(case, "chance", **chance(images, captions))
    for way in ("before", *WAYS):
        own = [result for result in results if result["way"] == way]
        cost = {
            name: statistics.median(run[name] for run in own)
            for name in ("seconds", "cpu_seconds", "peak_mib", "trained", "checkpoint_mib")
        }
        recalls = {shorten_recall(name): 100 * statistics.fmean(run[name] for run in own) for name in RECALLS}
        cost["train_seconds"] = cost.pop("seconds")
        report.add(case, way, **cost, mean_recall=100 * statistics.fmean(run["mean_recall"] for run in own), **recalls)
    report.facts |= {"preset": PRESET, "model": MODEL, "runs": results}


def read_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True, help="caption file of the set: {image, captions, split}")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "finetune", help="data, runs, results")
    parser.add_argument("--base-epochs", type=int, default=20, help="of the checkpoint that all start from (20)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args(arguments)
    if not args.data.exists():
        parser.error(f"--data {args.data}: not there, nothing was measured; the set cannot be shipped")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = read_command_line(arguments)
    results = run_all(args)
    report = Report("finetune", args.device, commit=args.commit)
    report_runs(report, results)
    report.finish(args.output)


if __name__ == "__main__":
    main()
