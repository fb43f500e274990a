"""Descriptions: rows per second of a whole job by rules, and the memory that it takes.

python tests/bench/describe.py [--rows 100000] [--memory-rows 1000000]

A job is `python -m rwkv_clip.describe run` in a process of its own, from JSON lines to texts.parquet and report.html,
start of Python and workers included: rows of web text, a caption of 8 to 15 words and six scored tags, no two alike, no
pictures. Each stage is timed by the job itself. Memory is the largest sum of resident memory (shared pages divided
among those that share them) of the command and its workers, looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness import ROOT, Report, argument_parser

WORDS = {
    "who": "man woman boy girl dog cat horse cyclist surfer climber child player couple crowd skier",
    "what": "riding holding watching chasing carrying throwing pulling crossing painting reading",
    "thing": "bicycle ball kite surfboard umbrella basket rope guitar camera book ladder sled boat bench tent",
    "look": "red blue green old wooden large small striped yellow white black shiny wet",
    "where": "beach street park forest lake mountain field river bridge market garden station harbour roof",
    "place": "Paris Oslo Kyoto Lima Nairobi Austin Bergen Cork Dover Essen",
}
WHO, WHAT, THING, LOOK, WHERE, PLACES = (words.split() for words in WORDS.values())
WEB = (
    "IMG_{n}.JPG {t}",
    "{t} - photo by me",
    "{t} | flickr",
    "{t} http://example.com/{n}",
    "{t} #{w} #nice",
    "{t}, {p} {y}",
)


def write_rows(file: Path, count: int) -> None:
    """JSON lines of made-up rows."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in make_rows(count))


def make_rows(count: int) -> Iterator[dict]:
    """{id, image, raw, synthetic, tags, tag_scores}."""
    draw = random.Random(0)
    pick = draw.choice
    for number in range(count):
        who, what, thing, look, where = map(pick, (WHO, WHAT, THING, LOOK, WHERE))
        other, second = pick(WHO), pick(LOOK)
        raw = f"{who} {what} {look} {thing} {number % 9973}"
        raw = pick(WEB).format(t=raw, n=draw.randrange(10_000), w=where, p=pick(PLACES), y=draw.randrange(1950, 2020))
        caption = f"a {second} {who} {what} a {look} {thing} near a {where} with a {other}"
        tags = [who, thing, where, look, pick(THING), pick(WHERE)]
        scores = [round(draw.uniform(0.6, 1), 3) for _ in tags]
        row = {"id": f"row-{number}", "image": f"{number}.jpg", "raw": raw, "synthetic": caption}
        yield row | {"tags": tags, "tag_scores": scores}


def run_job(source: Path, job: Path, *options: object) -> tuple[float, float]:
    """(seconds, largest MiB) of a job. SystemExit with what it printed where it fails."""
    command = [sys.executable, "-m", "rwkv_clip.describe", "run", "--input", source, "--output", job, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began, most = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
        while process.poll() is None:
            most = max(most, sum(map(resident, family(process.pid))))
            time.sleep(0.1)
        seconds = time.monotonic() - began
        if process.returncode:
            out.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{out.read()[-3000:]}")
    return seconds, most


def family(parent: int) -> Iterator[int]:
    """A process and all below it."""
    yield parent
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def resident(pid: int) -> float:
    """MiB of a process, shared pages in proportion; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def read_times(job: Path) -> dict[str, float]:
    """Rows per second of the stages, as the job noted them."""
    found = {}
    for file in sorted(job.glob("*/times.jsonl")):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        seconds = sum(entry["seconds"] for entry in entries)
        found[file.parent.name] = sum(entry["rows"] for entry in entries) / seconds if seconds else 0.0
    return found


def read_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=100_000, help="of the job that is timed (100000)")
    parser.add_argument("--memory-rows", type=int, default=0, help="of one more job, for its memory (0: none)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = read_command_line(arguments)
    report = Report("describe", args.device, commit=args.commit)
    with tempfile.TemporaryDirectory(dir=ROOT / "logs" if (ROOT / "logs").is_dir() else None) as folder:
        source = Path(folder, "rows.jsonl")
        write_rows(source, args.rows)
        times, peaks = [], []
        for turn in range(args.repeats):
            seconds, most = run_job(source, Path(folder, f"job-{turn}"), "--workers", args.workers)
            times.append(seconds)
            peaks.append(most)
        case = f"{args.rows:,} rows, {args.workers} processes"
        rate = args.rows / sorted(times)[len(times) // 2]
        report.add(case, "rules, the whole job", seconds=times, rows_per_second=rate, mib=max(peaks))
        for stage, speed in read_times(Path(folder, "job-0")).items():
            report.add(case, f"stage {stage}", rows_per_second=speed)
        if args.memory_rows:
            write_rows(source, args.memory_rows)
            seconds, most = run_job(source, Path(folder, "large"), "--workers", args.workers)
            figures = {"rows_per_second": args.memory_rows / seconds, "mib": most}
            report.add(f"{args.memory_rows:,} rows, {args.workers} processes", "rules, the whole job", **figures)
    report.finish(args.output)


if __name__ == "__main__":
    main()
