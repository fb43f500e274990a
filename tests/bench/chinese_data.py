"""Samples per second from Chinese-CLIP's LMDB beside those from .rec files of the same pairs.

python tests/bench/chinese_data.py --data captions.jsonl --texts captions_zh.0     # without --data: pictures of its own

sample: one record read (base64 and tokenizing, or checksum), in random order, files cached. loader: batches of 224 px
decoded and cropped, in this process and by two workers.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
from harness import ROOT, Report, alternate, argument_parser

import sys  # isort: skip

sys.path.insert(0, str(ROOT / "tests"))
from helpers.chinese_clip import write_files
from helpers.pictures import encode, photo
from rwkv_clip.data.build import build_records
from rwkv_clip.data.lmdb_build import LmdbSettings, build_lmdb
from rwkv_clip.data.pairs import PairsSettings, convert
from rwkv_clip.data.records import Records, open_records
from rwkv_clip.tokenizer import BERT_CHINESE, make_tokenizer
from rwkv_clip.training.data import Plan, make_loader
from rwkv_clip.training.settings import DataSettings

OWN, CONTEXT, READ, BATCH = 500, 52, 1000, 64


def make_sets(folder: Path, args) -> dict[str, Records]:
    """The same pairs as .rec and as LMDB."""
    if args.data:
        convert(PairsSettings(str(args.data), str(folder), texts=(args.texts,), images=args.images))
    else:
        images = {i: encode(photo(i, 500, 375), quality=90) for i in range(OWN)}
        write_files(folder, "train", images, [(i, f"第{i}张照片，一只狗在雪地上跑", [i]) for i in range(OWN)])
    list(build_lmdb(LmdbSettings(str(folder), "train")))
    name = {"tokenizer": BERT_CHINESE, "context": CONTEXT}
    build_records(str(folder / "train_texts.jsonl"), str(folder / "rec"), **name)
    tokenizer = make_tokenizer(BERT_CHINESE, CONTEXT)
    return {".rec": open_records(folder / "rec", tokenizer), "LMDB": open_records(folder / "lmdb/train", tokenizer)}


def difference(sets: dict[str, Records]) -> float:
    """Share of samples that are not the same."""
    ours, theirs = sets["LMDB"], sets[".rec"]
    if len(ours) != len(theirs):
        return 1.0
    pairs = ((ours.sample(i), theirs.sample(i)) for i in range(len(ours)))
    return float(np.mean([one[0] != other[0] or (one[1] != other[1]).any() for one, other in pairs]))


def load(records: Records, steps: int, workers: int) -> None:
    """All batches of a plan."""
    settings = DataSettings(workers=workers, loader="torch")
    with contextlib.closing(make_loader(records, Plan(global_batch=BATCH, steps=steps), 224, settings)) as loader:
        for _ in loader:
            pass


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, help="what data2rec.py reads; pictures are taken as they are")
    parser.add_argument("--texts", default="captions.0", help="field of the text of each picture")
    parser.add_argument("--images", help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=60, help=f"batches of {BATCH} in a timed call")
    args = parser.parse_args()
    report = Report("chinese_data", args.device, commit=args.commit)
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder), args)
        report.gate("samples of LMDB that differ from .rec", difference(sets), 0.0)
        count = len(sets["LMDB"])
        order = np.random.default_rng(0).permutation(count)[:READ].tolist()
        cases = {f"sample, {count} pairs": (len(order), None, lambda r: [r.sample(i) for i in order])}
        for workers in (0, 2):
            case = f"loader, {workers} workers"
            cases[case] = args.steps * BATCH, 1.0, lambda r, workers=workers: load(r, args.steps, workers)
        for case, (samples, goal, call) in cases.items():
            calls = {name: lambda records=records, call=call: call(records) for name, records in sets.items()}
            for name, seconds in alternate(calls, repeats=args.repeats, device=args.device).items():
                rate, own = samples / sorted(seconds)[len(seconds) // 2], name == "LMDB"
                about = {"baseline": ".rec", "goal": goal} if own else {}
                report.add(case, name, seconds=seconds, per_second=rate, **about)
    report.finish(args.output)


if __name__ == "__main__":
    main()
