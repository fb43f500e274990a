"""The stages of a job one after the other, and what a command says about each when it is done."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_clip.files import InUse, hold

from .dedup import find_duplicates
from .executors import Build, make_stage
from .ingest import ingest
from .job import ROWS, Job, Stage, parse_shard
from .picture_stages import make_caption_task, make_score_task, make_tag_task
from .stages import make_compose_task, make_verify_task
from .status import find_reasons

log = logging.getLogger(__name__)
PART_ROWS = 5000
DEDUP = {"duplicate_of": "str", "near_duplicate_of": "str"}
WAIT = 1.0  # seconds between two looks at whether another command has read the input


@contextlib.contextmanager
def own_job(settings: Any) -> Iterator[None]:
    """One command at a time works on a job, or several with --shard. InUse, before anything is touched."""
    job = _begin(settings)
    shared = parse_shard(settings.shard)[1] > 1
    with hold(job.folder / "job.lock", str(job.folder), "wait for it, or give each its own --shard", shared=shared):
        yield


def _begin(settings: Any) -> Job:
    begun = (Path(settings.output) / "job.json").exists()
    part_rows = settings.part_rows or (None if begun or not settings.input else PART_ROWS)
    return Job(settings.output, part_rows)


def open_job(settings: Any) -> Job:
    """The job of a command, its input read to the end. One command reads; others that share the job wait for it."""
    job = _begin(settings)
    if settings.input is None:
        job.count_parts()
        return job
    while True:
        try:
            about = ingest(job, settings, settings.new_run)
        except InUse:
            if settings.shard is None:
                raise
            time.sleep(WAIT)
            continue
        _say_input(about)
        return job


def _say_input(about: dict[str, Any]) -> None:
    """What was found in the input: a field under another name would go unseen otherwise."""
    told = [f"{about['rows']:,} rows", *(f"{n:,} skipped ({reason})" for reason, n in about["skipped"].items())]
    if have := about.get("have"):
        told.append(f"with raw text {have['raw']:,}, caption {have['caption']:,}, tags {have['tags']:,}")
    print(f"{ROWS}: {', '.join(told)}", *about.get("notes", ()), sep="\n  note: ", flush=True)


def caption(settings: Any) -> None:
    """The stage `caption` of a job that has been read."""
    _make(settings, "caption", make_caption_task)


def tag(settings: Any) -> None:
    """The stage `tags`."""
    _make(settings, "tags", make_tag_task)


def score(settings: Any) -> None:
    """The stage `scores` of a job whose texts are checked."""
    _make(settings, "scores", make_score_task)


def compose(settings: Any) -> None:
    """The stage `compose` of a job that has been read."""
    _make(settings, "compose", make_compose_task)


def verify(settings: Any) -> None:
    """The stage `verify` of a job whose texts are composed. ValueError where they are not."""
    _make(settings, "verify", make_verify_task)


def _make(settings: Any, stage: str, build: Build) -> None:
    counts = make_stage(settings, build)
    told = {"made": counts["made"] - counts["failed"], "as before": counts["rows"] - counts["made"]}
    _say(stage, counts["rows"], told)
    if counts["failed"]:
        reasons = find_reasons(Job(settings.output), stage)
        print(f"  failed: {counts['failed']:,}{reasons}; the same command tries them again", flush=True)


def dedup(settings: Any) -> None:
    """Which rows repeat an earlier one: the whole job at once, by its generated texts."""
    job = Job(settings.output)
    job.check(["verify"])
    stage = Stage("dedup", DEDUP, ("verify",), (), {"threshold": settings.near, "dedup_version": 1}, whole=True)
    job.agree(stage, settings.new_run)
    numbers = range(job.count_parts())
    made_of = job.made_of(stage, 0)  # the same for all parts
    if all(job.is_made(stage, number, made_of=made_of) for number in numbers):
        return
    began = time.monotonic()
    found = find_duplicates((row["generated"] or "" for row in job.read("verify")), settings.near)
    wanted = {int(place) for place in (*found.exact, *found.near) if place >= 0}
    names = {place: row["id"] for place, row in enumerate(job.read("verify")) if place in wanted}
    place = 0
    for number in numbers:
        rows = job.read_part(number, ["verify"])
        results = [
            {"duplicate_of": names.get(int(found.exact[i])), "near_duplicate_of": names.get(int(found.near[i]))}
            for i in range(place, place + len(rows))
        ]
        job.write_part(stage, number, rows, results, made_of)
        place += len(rows)
    job.note_time("dedup", rows=place, seconds=round(time.monotonic() - began, 3))
    exact, near = int((found.exact >= 0).sum()), int((found.near >= 0).sum())
    _say("dedup", place, {"equal to an earlier one": exact, "nearly equal": near})


def need_scores(job: Job, settings: Any) -> None:
    """ValueError where rows are to be chosen by CLIP scores, and none are there nor will be."""
    if settings.min_clip is not None and not getattr(settings, "checkpoint", None) and not job.has("scores"):
        raise ValueError("min_clip: the job has no CLIP scores; give --checkpoint to `run` or `report`")


def _say(stage: str, rows: int, counts: dict[str, int]) -> None:
    told = [f"{rows:,} rows", *(f"{n:,} {name}" for name, n in counts.items() if n)]
    print(f"{stage}: {', '.join(told)}", flush=True)
