"""Checks of composed texts: rows per second and process, and the time until the first word is known.

python tests/bench/describe_verify.py [--rows 10000]

What is found of 500 inventions that were planted in good texts, each under the right reason, and how many of 200
faithful paraphrases are rejected by mistake (tests/helpers/planted_texts.py): of the even rows, which were looked at
while the checks were made, and of the odd ones, which hardly were. For the time each text has its row's number at the
end, so that none comes twice. Check: no more are rejected than the tests allow.
"""

from __future__ import annotations

import sys
from itertools import cycle, islice

import torch
from harness import ROOT, Report, alternate, argument_parser, clock

sys.path.append(str(ROOT / "tests"))
from helpers.planted_texts import PARAPHRASES, false_alarms, is_found, plants
from rwkv_clip.describe.lexicon.tables import Tables
from rwkv_clip.describe.sources import Sources
from rwkv_clip.describe.verify import judge

GOAL = 150e-6  # seconds per row, of one process
FALSE_ALARMS = 20  # of 200 paraphrases


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--rows", type=int, default=10000, help="texts that are checked (10000)")
    args = parser.parse_args()
    args.device = torch.device("cpu")
    report = Report("describe_verify", args.device, commit=args.commit)
    for kind, planted in plants().items():
        found = sum(is_found(kind, *row) for row in planted)
        report.add("500 planted inventions", kind, planted=len(planted), found=found)
    halves = {"even rows": PARAPHRASES[::2], "odd rows": PARAPHRASES[1::2]}
    alarms = {name: len(false_alarms(rows)) for name, rows in halves.items()}
    report.gate("false alarms", sum(alarms.values()), FALSE_ALARMS)
    for name, rows in halves.items():
        report.add("faithful paraphrases", name, texts=sum(len(texts) for _, texts in rows), rejected=alarms[name])
    paraphrases = [(sources, text) for sources, texts in PARAPHRASES for text in texts]
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
