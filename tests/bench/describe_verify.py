"""Checks of composed texts: rows per second and process, and the time until the first word is known.

python tests/bench/describe_verify.py [--rows 10000]

The rows are those of the tests (tests/unit/describe), each text with its row's number at the end, so that no text comes
twice. Check: of the tests' faithful paraphrases no more are rejected than the tests allow.
"""

from __future__ import annotations

import json
from itertools import cycle, islice

import torch
from harness import ROOT, Report, alternate, argument_parser, clock

from rwkv_clip.describe.lexicon.tables import Tables
from rwkv_clip.describe.sources import Sources, Tag
from rwkv_clip.describe.verify import judge

GOAL = 150e-6  # seconds per row, of one process
FALSE_ALARMS = 20  # of 200 paraphrases


def read_rows() -> list[tuple[Sources, str]]:
    rows = []
    for line in (ROOT / "tests/unit/describe/paraphrases.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tags = tuple(Tag(tag) for tag in row["tags"])
        sources = Sources(row["id"], row["raw"], row["caption"], tags, row["ocr"])
        rows += [(sources, text) for text in row["texts"]]
    return rows


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--rows", type=int, default=10000, help="texts that are checked (10000)")
    args = parser.parse_args()
    args.device = torch.device("cpu")
    report = Report("describe_verify", args.device, commit=args.commit)
    paraphrases = read_rows()
    report.gate("false alarms", sum(bool(judge(*row).rejects) for row in paraphrases), FALSE_ALARMS)
    rows = [
        (Sources(str(i), f"{s.raw} {i}", s.caption, s.tags, s.ocr), f"{text.rstrip('.')}, {i}.")
        for i, (s, text) in enumerate(islice(cycle(paraphrases), args.rows))
    ]
    times, cpu = [], []
    for _ in range(args.repeats):
        seconds, spent = clock(lambda: [judge(*row) for row in rows])
        times.append(seconds)
        cpu.append(spent)
    case = f"{args.rows} rows"
    report.add(case, "judge", seconds=times, rows_per_cpu_second=args.rows / min(cpu))
    report.ratio(case, "times faster than 150 us of CPU a row", GOAL * args.rows / min(cpu), goal=1.0)
    for name, seconds in alternate({"read": Tables}, repeats=args.repeats, device=args.device).items():
        report.add("lexicon", name, seconds=seconds)
    report.finish(args.output)


if __name__ == "__main__":
    main()
