"""Training from the same webdataset tars: pictures and captions per second, ours and open_clip's.

python tests/bench/tars.py [--data FOLDER --pictures 4000 --batch 128 --workers 0 2]

Contenders: our torch loader on the tars; the same loader on .rec files of the same pairs; open_clip's webdataset loader
with its training transform and tokenizer. All tokenize to 77 tokens (.rec files hold them ready), decode,
crop, resize to 224 px and give a normalised float32 batch. --data: a folder with captions.jsonl and images/; without it
pictures are drawn (see loader.py). Each is started, runs until its queues are drained and is then timed. Check: both of
ours give the same batches, bit for bit, and each picture of the tars comes once in an epoch.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Report, argument_parser
from loader import ENDLESS, SIZE, Batches, Setting, encode_pictures, has_package, open_clip_loader, take_time

from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import Records, open_records
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.training.data import make_loader
from rwkv_clip.training.data.batch import Plan
from rwkv_clip.training.settings import DataSettings
from rwkv_clip.transform import normalize

GOALS = {0: None, 2: 2.0}  # ours on tars over open_clip's, by workers
EMPTIED = 8  # batches before the clock starts


def read_pairs(data: Path | None, count: int) -> list[tuple[bytes, str]]:
    """(encoded picture, caption), drawn without a folder."""
    if data is None:
        return [(jpeg, f"a drawn picture with the number {i}") for i, jpeg in enumerate(encode_pictures(count, None))]
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()[:count]]
    return [((data / "images" / row["image"]).read_bytes(), row["captions"][0]) for row in rows]


def write_tars(pairs: list[tuple[bytes, str]], folder: Path, shards: int) -> None:
    """train-0.tar, train-1.tar, .. with a jpg and a txt for each pair."""
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for i in range(shard, len(pairs), shards):
                for ending, content in ((".jpg", pairs[i][0]), (".txt", pairs[i][1].encode())):
                    member = tarfile.TarInfo(f"{i:06}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def ours(setting: Setting, records: Records) -> Batches:
    """Our loader, and the normalisation of the training step."""
    plan = Plan(global_batch=setting.batch, steps=ENDLESS)
    settings = DataSettings(workers=setting.workers, loader="torch")
    loader = make_loader(records, plan, SIZE, settings, device=setting.device)
    try:
        for batch in loader:
            yield normalize(batch.image.to(setting.device, non_blocking=True)), []
    finally:
        loader.close()


def check(report: Report, tars: Records, records: Records, batch: int) -> None:
    """One epoch of both."""
    seen, wrong = [], 0
    plan = Plan(global_batch=batch, steps=len(records) // batch)
    settings = DataSettings(workers=0, loader="torch")
    for one, other in zip(*(make_loader(each, plan, SIZE, settings) for each in (tars, records))):
        wrong += not (one.image.equal(other.image) and one.text.equal(other.text) and one.ids.equal(other.ids))
        seen += one.ids.tolist()
        if len(seen) >= 1024:
            break
    report.gate("tars and .rec: batches that differ", wrong, 0)
    report.gate("samples that come twice", len(seen) - len(set(seen)), 0)


def main() -> None:
    """Command line."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--data", type=Path, help="folder with captions.jsonl and images/ instead of drawn pictures")
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--timed", type=int, default=2560, help="pictures per measurement, at least 5 batches (2560)")
    args = parser.parse_args()
    if args.device.type == "cpu":
        torch.set_num_threads(1)  # the cores are the workers'
    report = Report("tars", args.device, commit=args.commit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = read_pairs(args.data, args.pictures)
        write_tars(pairs, folder, shards=max(2, *args.workers))
        build_records(str(folder / "train-*.tar"), str(folder / "built"), workers=1)
        tokenizer, spec = make_tokenizer(), str(folder / "train-*.tar")
        start = time.perf_counter()
        tars = open_records(spec, tokenizer)
        report.add("opening", "first time, index made", seconds=time.perf_counter() - start)
        start = time.perf_counter()
        tars, records = open_records(spec, tokenizer), open_records(folder / "built", tokenizer)
        report.add("opening", "again", seconds=time.perf_counter() - start)
        check(report, tars, records, args.batch)
        contenders: dict[str, Callable[[Setting], Batches]] = {
            "ours, tars": lambda setting: ours(setting, tars),
            "ours, .rec": lambda setting: ours(setting, records),
        }
        if all(map(has_package, ("open_clip", "webdataset", "pandas"))):
            contenders["open_clip, tars"] = open_clip_loader
        for workers in args.workers:
            setting = Setting(folder, args.device, args.batch, workers)
            measure(report, setting, contenders, args.repeats, max(5, args.timed // args.batch))
    report.finish(args.output)


def measure(report: Report, setting: Setting, contenders: dict, repeats: int, timed: int) -> None:
    """A row per contender, timed in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds[name].append(take_time(run(setting), setting.device, EMPTIED, timed))
    case, peer = f"batch {setting.batch}, {setting.workers} workers", "open_clip, tars"
    for name, values in seconds.items():
        against = peer if name != peer and peer in contenders else None
        goal = GOALS.get(setting.workers) if against and name == "ours, tars" else None
        speed = setting.batch / float(np.median(values))
        report.add(case, name, seconds=values, baseline=against, goal=goal, pairs_per_second=speed)
    if peer not in contenders:
        report.missing(case, peer, "open_clip_torch, webdataset or pandas is not installed (pip install -e '.[bench]')")


if __name__ == "__main__":
    main()
