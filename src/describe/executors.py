"""Who makes the parts of a stage: processes of this machine, one of several commands that share the work, or Ray.

Whoever does, the same function makes the same parts in the same folder; only the order in time differs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

from tqdm import tqdm

from rwkv_clip.processes import map_ordered

from .job import Job, parse_shard
from .settings import JobSettings
from .work import Task, make_parts

FEW = 5000  # rows that are done sooner than other processes are started
Build = Callable[[Any], Task]  # settings -> the task; can be pickled, as the settings can


def make_stage(settings: JobSettings, build: Build) -> Counter[str]:
    """Make all parts of a stage that are this command's. Returns counts and raises errors as `make_parts` does."""
    job, task = Job(settings.output), build(settings)
    job.agree(task.stage, settings.new_run)
    which, of = parse_shard(settings.shard)
    numbers = list(range(job.count_parts()))[which::of]
    job.check(
        [stage for stage in task.stage.reads if stage in task.stage.needs or job.has_begun(stage, numbers)], numbers
    )
    all_rows = job.count_rows()
    rows = sum(min(job.part_rows, all_rows - number * job.part_rows) for number in numbers)
    began = time.monotonic()
    with tqdm(total=rows, unit="row", disable=None, desc=task.stage.name) as bar:
        if settings.executor == "ray":
            counts = _with_ray(settings, build, numbers, bar.update)
        elif task.ask is not None or settings.workers == 1 or rows <= FEW:
            counts = make_parts(job, task, numbers, settings.retry_failed, bar.update)
        else:
            counts = _with_processes(settings, build, numbers, bar.update)
    if task.tell is not None and (told := task.tell()):
        print(told, flush=True)
    if counts["made"]:
        seconds = round(time.monotonic() - began, 3)
        job.note_time(task.stage.name, rows=counts["made"], failed=counts["failed"], seconds=seconds)
    return counts


def _with_processes(
    settings: JobSettings, build: Build, numbers: Sequence[int], progress: Callable[[int], Any]
) -> Counter[str]:
    counts: Counter[str] = Counter(rows=0, made=0, failed=0)
    for found in map_ordered(partial(_make_one, settings, build), numbers, settings.workers, chunk=1):
        counts.update(found)
        progress(found["rows"])
    return counts


@lru_cache(maxsize=2)
def _task(settings: JobSettings, build: Build) -> Task:
    """In a worker process: the task is built once."""
    return build(settings)


def _make_one(settings: JobSettings, build: Build, number: int) -> Counter[str]:
    return make_parts(Job(settings.output), _task(settings, build), [number], settings.retry_failed)


# ---- Ray -------------------------------------------------------------------------------------------------------------


def import_ray() -> ModuleType:
    """Ray with its data library, an optional package. ImportError that names the extra."""
    try:
        import ray.data
    except ImportError:
        raise ImportError("--executor ray needs Ray: pip install -e '.[ray]'") from None
    return ray


def _with_ray(
    settings: JobSettings, build: Build, numbers: Sequence[int], progress: Callable[[int], Any]
) -> Counter[str]:
    """Parts are rows of a Ray dataset, given out one by one; results come back as counts, texts stay in the folder."""
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        local = {} if settings.ray_address else {"num_cpus": settings.workers, "include_dashboard": False}
        ray.init(address=settings.ray_address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # a plan of the one step that there is
        parts = ray.data.from_items([{"part": number} for number in numbers], override_num_blocks=len(numbers))
        made = parts.map(partial(_make_with_ray, settings, build), concurrency=settings.workers)
        counts: Counter[str] = Counter(rows=0, made=0, failed=0)
        for found in made.iter_rows():
            counts.update({name: int(found[name]) for name in ("rows", "made", "failed")})
            progress(int(found["rows"]))
        return counts
    finally:
        if started:
            ray.shutdown()


def _make_with_ray(settings: JobSettings, build: Build, row: dict[str, Any]) -> dict[str, int]:
    return {"rows": 0, "made": 0, "failed": 0, **_make_one(settings, build, int(row["part"]))}
