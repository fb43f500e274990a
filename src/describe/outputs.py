"""What a job ends with: its report, its texts, a training set."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwkv_clip.config import to_dict

from .export import export
from .instruct import find_sample, write_training_set
from .instruction_files import read_samples
from .job import ORDER, Job
from .picture_stages import Pictures
from .prompt import Prompt
from .report import write_report
from .run import need_scores
from .select import Selection

UNSHOWN = ("key_variable",)  # where a key is says nothing about the texts
VERSIONS = ("rwkv-clip", "pyarrow", "aiohttp", "torch")


def make_report(settings: Any) -> Path:
    """report.html and report.json of a job."""
    job, pictures = Job(settings.output), Pictures(settings)
    job.check_begun()
    prices = {"prompt": settings.price_in, "completion": settings.price_out, "currency": settings.currency}
    about = {
        "title": f"Descriptions of {job.folder.name}",
        "settings": {
            name: value for name, value in to_dict(settings).items() if value is not None and name not in UNSHOWN
        },
        "versions": {name: found for name in VERSIONS if (found := _find_version(name))},
        "stages": {stage: _sum_times(job, stage) for stage in ORDER if job.read_times(stage)},
        "prices": prices if settings.price_in is not None or settings.price_out is not None else None,
    }

    def read() -> Iterator[dict[str, Any]]:
        for row in job.read():
            reason = settings.judge(row)
            yield {**row, "keep": not reason, "drop_reason": reason or None}

    page = write_report(read, about, pictures.find, job.folder)
    print(f"report: {page}", flush=True)
    return page


def _sum_times(job: Job, stage: str) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for entry in job.read_times(stage):
        for name, value in entry.items():
            total[name] = total.get(name, 0) + value
    return total


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def make_export(settings: Any) -> None:
    """The job's texts as files."""
    job, pictures = Job(settings.output), Pictures(settings)
    job.check(["verify"])
    need_scores(job, settings)
    _check_stages(job, settings)
    source = pictures.source if "webdataset" in settings.to else None
    about = {"made_by": "rwkv_clip.describe"}
    print(export(lambda: job.read(), job.folder, settings, settings, source, pictures.settings, about), flush=True)


def _check_stages(job: Job, selection: Selection) -> None:
    """ValueError where rows would be chosen or written by a stage that is not there as a whole."""
    job.check_begun()
    if selection.duplicates != "keep":
        job.check(["dedup"])


def make_training_set(settings: Any) -> None:
    """A training set for a composer, of a job's rows or of an instruction file."""
    prompt = Prompt.load(settings.prompt)
    if settings.instructions is None:
        job = Job(settings.output)
        job.check(["compose", "verify"])
        _check_stages(job, settings)

    def read() -> Any:
        if settings.instructions is not None:
            return read_samples(settings.instructions)
        return (find_sample(row, settings, settings) for row in job.read())

    print(write_training_set(read, Path(settings.folder), prompt, settings, settings.prompt), flush=True)
