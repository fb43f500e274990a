"""How far a job is: parts and rows of every stage, and why rows failed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .job import ORDER, Job
from .parquet import read_metadata, read_parquet

STATUS = {"caption": ("caption_status", "caption_reason"), "compose": ("compose_status", "compose_reason")}
SHOWN = 5  # reasons


def describe_status(folder: str | Path) -> str:
    """A line for each stage that has begun. ValueError where there is no job."""
    job = Job(folder)
    if not job.is_read():
        return f"{folder}: the input has not been read to the end; `run --input ..` goes on"
    parts, rows = job.count_parts(), job.count_rows()
    lines = [f"{folder}: {rows:,} rows in {parts} part{'s' * (parts > 1)} of {job.part_rows:,}"]
    lines += [_line(job, stage, parts) for stage in ORDER if (job.folder / stage).is_dir()]
    return "\n".join(lines)


def _line(job: Job, stage: str, parts: int) -> str:
    there = [k for k in range(parts) if job.part(stage, k).exists()]
    failed = sum(int(read_metadata(job.part(stage, k)).get("failed", 0)) for k in there)
    journals = [job.part(stage, k).with_suffix(".journal") for k in range(parts)]
    begun = sum(_count_lines(file) for file in journals if file.exists())
    times = job.read_times(stage)
    seconds, made = sum(entry.get("seconds", 0) for entry in times), sum(entry.get("rows", 0) for entry in times)
    told = [f"{len(there)} of {parts} parts"]
    told += [f"{begun:,} rows of others finished"] if begun else []
    told += [f"{failed:,} rows failed{find_reasons(job, stage)}"] if failed else []
    told += [f"{made / seconds:,.0f} rows/s"] if seconds else []
    return f"  {stage}: " + ", ".join(told)


def find_reasons(job: Job, stage: str) -> str:
    """Why rows of a stage failed, the commonest reasons, in brackets; "" where that is not noted."""
    if stage not in STATUS:
        return ""
    status, reason = STATUS[stage]
    parts = [part for k in range(job.count_parts()) if (part := job.part(stage, k)).exists()]
    rows = (row for part in parts for row in read_parquet(part, STATUS[stage]))
    found = Counter(row[reason] for row in rows if row[status] == "failed")
    return " (" + "; ".join(f"{text}: {n:,}" for text, n in found.most_common(SHOWN)) + ")"


def _count_lines(file: Path) -> int:
    with open(file, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
