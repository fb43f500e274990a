"""What an evaluation leaves behind: one folder of its own with result.json, table.md and table.csv.

result.json is written again after every data set, so an error in a later one loses nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rwkv_clip.dist import rank_and_size

SCHEMA = 1
PUBLISHED_MODEL = "RWKV-CLIP B/32, YFCC15M (published)"

# Percent, EMNLP 2024. Retrieval: Karpathy test split; R@1, R@5, R@10 image to text, then text to image.
PUBLISHED_RETRIEVAL = {
    "coco": (5000, (50.3, 76.2, 85.2, 34.0, 60.9, 71.7)),
    "flickr30k": (1000, (76.0, 94.7, 97.6, 57.6, 82.3, 88.7)),
}
PUBLISHED_CLASSIFICATION = {
    "cifar10": (10_000, 79.8),
    "cifar100": (10_000, 55.1),
    "food101": (25_250, 50.6),
    "pets": (3_669, 37.6),
    "flowers": (6_149, 57.1),
    "sun397": (19_850, 54.0),
    "stanford_cars": (8_041, 4.1),
    "dtd": (1_880, 24.6),
    "caltech101": (5_677, 77.1),
    "aircraft": (3_333, 4.0),
    "imagenet": (50_000, 44.3),
}
_RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@dataclass
class Report:
    """The results of one run, one dict per data set, and the folder parent/name that they go to."""

    parent: Path
    name: str
    task: str
    about: dict
    results: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    folder: Path | None = None  # made by the first save: a run that fails before any result leaves nothing

    def add(self, result: dict) -> None:
        """Append the result of a data set and write everything known so far."""
        self.results.append(result)
        self.save()

    def save(self) -> None:
        """Write result.json, table.md and table.csv into the folder, each whole or not at all; the lead rank does."""
        if rank_and_size()[0] > 0:
            return
        if self.folder is None:
            self.folder = new_folder(self.parent, self.name)
        seconds = round(time.monotonic() - self.started, 3)
        content = {
            "schema": SCHEMA,
            "task": self.task,
            **self.about,
            "seconds": seconds,
            "results": self.results,
        }
        _write(
            self.folder / "result.json",
            json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        )
        rows = self.table()
        _write(self.folder / "table.md", markdown(rows))
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        _write(self.folder / "table.csv", lines.getvalue())

    def table(self) -> list[list[str]]:
        """Header and rows as text, percent with one decimal; the published figures beside or below ours."""
        rows = {"retrieval": retrieval_rows, "classification": classification_rows}[self.task]
        return rows(self.results, self.about["model"])


def start_report(task: str, settings, loaded, device: torch.device) -> Report:
    """A report that knows its place and what all its results share. OSError where logs cannot be made."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = settings.name or f"{stamp}-{task}-{re.sub(r'[^A-Za-z0-9._-]+', '-', loaded.name)}"
    about = {
        "model": loaded.name,
        "checkpoint": settings.checkpoint,
        "checkpoint_sha256": loaded.digest,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": asdict(settings),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": loaded.precision,
        },
    }
    parent = Path(settings.logs)
    parent.mkdir(parents=True, exist_ok=True)
    return Report(parent, name, task, about)


def new_folder(parent: Path, name: str) -> Path:
    """Create parent/name, or parent/name-2, -3, ... where that exists already."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def retrieval_rows(results: Sequence[dict], model: str) -> list[list[str]]:
    """One row for our model and, where the set is a published one in full, one for the published model."""
    header = ["model", "data set", "split", "images", "captions"]
    header += [f"{way} R@{k}" for way in ("image->text", "text->image") for k in (1, 5, 10)] + ["mean recall"]
    rows = [header]
    for result in results:
        images, place = result["images"], [result["dataset"], result["split"] or "-"]
        values = [result["metrics"][key] for key in (*_RECALLS, "mean_recall")]
        rows.append([model, *place, str(images), str(result["captions"]), *map(_percent, values)])
        published = PUBLISHED_RETRIEVAL.get(result["dataset"].lower())
        if published and published[0] == images:
            recalls = published[1]
            mean = sum(recalls) / len(recalls)
            numbers = [f"{value:.1f}" for value in (*recalls, mean)]
            rows.append([PUBLISHED_MODEL, *place, str(images), str(result["captions"]), *numbers])
    return rows


def classification_rows(results: Sequence[dict], model: str) -> list[list[str]]:
    """One row for each data set; the published figure stands beside the headline it belongs to."""
    header = [
        "data set",
        "split",
        "samples",
        "classes",
        "headline",
        model,
        "top-1",
        "top-5",
        "mean per class",
    ]
    rows = [[*header, PUBLISHED_MODEL, "note"]]
    for result in results:
        name = result["dataset"]
        if result["status"] != "done":
            rows.append([name, *["-"] * 9, textwrap.shorten(f"{result['status']}: {result['reason']}", 100)])
            continue
        metrics, headline = result["metrics"], result["headline"]
        count, published = PUBLISHED_CLASSIFICATION.get(name, (None, None))
        notes = [result["note"]] if result["note"] else []
        if count and count != metrics["samples"]:
            notes.append(f"{metrics['samples']} of {count} pictures: not the published set")
        if metrics["classes_without_samples"]:
            notes.append(f"no samples, left out: {', '.join(metrics['classes_without_samples'])}")
        ours = [_percent(metrics[key]) for key in (headline, "top1", "top5", "mean_per_class")]
        numbers = [str(metrics["samples"]), str(metrics["classes"])]
        beside = "-" if published is None else f"{published:.1f}"
        rows.append([name, result["split"], *numbers, headline, *ours, beside, "; ".join(notes)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its header."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells)
    return "".join(f"| {line} |\n" for line in lines)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
