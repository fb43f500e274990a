"""What an evaluation leaves behind: one folder of its own, and what several of them say together.

A run writes result.json, table.md, table.csv and table.tex, again after every data set, so that an error in a later
one loses nothing; at its end pictures and page.html. What finds no room is named, and the run goes on: its figures are
printed in any case. Ranks other than 0 write nothing. `collect` reads the result.json files of several runs and writes
the same files with all models, and all published ones, in one table for each task.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rwkv_clip.dist import rank_and_size
from rwkv_clip.files import parse_json, write_whole

from .page import write_page
from .plots import chances, draw_bars, draw_confusion
from .tables import (
    Table,
    classification_rows,
    comparison,
    csv_text,
    latex,
    markdown,
    markdown_section,
    notes_text,
    retrieval_rows,
)

SCHEMA = 1
GALLERY = "captions and their five best pictures, best first. Green: right; orange: right, but further down."
TASKS = ("classification", "retrieval", "linear_probe")


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
    rows: Callable[[Sequence[dict], str], list[list[str]]] | None = None  # a table of the task's own
    saved: bool = True  # whether result.json has all that is known

    def add(self, result: dict) -> None:
        """Append the result of a data set and write everything known so far."""
        self.results.append(result)
        self.save()

    def content(self) -> dict:
        """What result.json holds."""
        seconds = round(time.monotonic() - self.started, 3)
        return {"schema": SCHEMA, "task": self.task, **self.about, "seconds": seconds, "results": self.results}

    def save(self) -> None:
        """Write result.json and the tables into the folder, each whole or not at all."""
        if rank_and_size()[0]:
            return
        try:
            self.folder = self.folder or new_folder(self.parent, self.name)
        except OSError as error:
            self.saved = False
            _say_missing(self.parent / self.name, error)
            return
        content = self.content()
        compared = comparison(self.task, [content])
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.saved = keep(self.folder / "result.json", lambda part: _write(part, text))
        keep(self.folder / "table.md", lambda part: _write(part, self.text()))
        keep(self.folder / "table.csv", lambda part: _write(part, csv_text(self.table())))
        latex_text = latex(compared) if compared else "% no set is done\n"
        keep(self.folder / "table.tex", lambda part: _write(part, latex_text))

    def finish(self) -> None:
        """Draw the pictures and write page.html, once all sets are done."""
        if self.folder is None:
            return
        run, rows = self.content(), self.table()
        compared = comparison(self.task, [run])
        tables = [compared] if compared else []
        if self.task != "retrieval":
            tables.append(Table("Every set", rows[0], rows[1:]))
        about = [f"{run['date']}, checkpoint {run['checkpoint']}, sha256 {run['checkpoint_sha256']}"]
        title = f"{run['model']}: {self.task.replace('_', ' ')}"
        pictures = _draw(self.folder, tables[:1] if compared else [], [run])
        pictures.append((self.folder / "retrieval.png", GALLERY))
        keep(self.folder / "page.html", lambda part: write_page(part, title, about, tables, pictures, [run]))

    def text(self) -> str:
        """The table, and below it its notes or, for sets of classes, the published rows of all methods."""
        text, compared = markdown(self.table()), comparison(self.task, [self.content()])
        if compared is None:
            return text
        return text + "\n" + (notes_text(compared) if self.task == "retrieval" else markdown_section(compared))

    def table(self) -> list[list[str]]:
        """Header and rows as text, percent with one decimal; the published figures beside or below ours."""
        rows = self.rows or (retrieval_rows if self.task == "retrieval" else classification_rows)
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


def check_place(logs: str) -> None:
    """Make the folder of all runs and write into it, before any work. OSError where that cannot be."""
    Path(logs).mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=logs) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(error.errno, error.strerror, logs) from None


def keep(path: Path, make: Callable[[Path], None]) -> bool:
    """Write `path` whole or not at all: make(part), a file that then takes its name. False, and a line on standard
    error, where it cannot be written."""
    part = path.with_name(f"part-{path.name}")  # the ending says what is drawn
    try:
        make(part)
        os.replace(part, path)
        return True
    except OSError as error:
        _say_missing(path, error)
        return False
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _say_missing(path: Path, error: OSError) -> None:
    print(f"missing: {path}: {error.strerror or error}", file=sys.stderr)


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


def collect(places: Sequence[str], output: str | Path) -> tuple[Path, list[Table]]:
    """One report of several runs; returns the folder that it made (`output`, or output-2, ...) and its tables.

    places: run folders, folders of run folders, or result.json files. ValueError where one holds no result.
    """
    runs = _read_runs(places)
    tables = [table for task in TASKS if (table := comparison(task, list(runs.values())))]
    if not tables:
        raise ValueError(f"{', '.join(map(str, places))}: no set is done in any of these runs; nothing to compare")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = new_folder(output.parent, output.name)
    _write(folder / "runs.json", json.dumps(runs, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "table.md", "\n".join(map(markdown_section, tables)))
    _write(folder / "table.tex", "\n".join(map(latex, tables)))
    _write(folder / "table.csv", "\n".join(csv_text([t.header, *t.rows]) for t in tables))
    contents = list(runs.values())
    pictures = _draw(folder, tables, contents)
    for place, run in runs.items():
        gallery = Path(place).parent / "retrieval.png"
        pictures.append((gallery, f"{run['model']}: {GALLERY}"))
    about = [f"{len(runs)} runs, {len({run['model'] for run in contents})} models; our figures beside published ones"]
    keep(folder / "page.html", lambda part: write_page(part, "Comparison", about, tables, pictures, contents))
    return folder, tables


def _read_runs(places: Sequence[str]) -> dict[str, dict]:
    """Contents of result.json files by path, in the order given, each file once."""
    if not places:
        raise ValueError("runs: none given; name run folders, or the folder that holds them")
    runs: dict[str, dict] = {}
    for place in map(Path, places):
        files = [place] if place.is_file() else [place / "result.json"]
        if not files[0].is_file():
            files = sorted(place.glob("*/result.json"))
        if not files:
            raise ValueError(f"{place}: no result.json in it or in its folders; name the folder of a run")
        runs |= {str(file): _read_run(file) for file in files}
    return runs


def _read_run(path: Path) -> dict:
    try:
        run = parse_json(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; run that evaluation again") from None
    wanted = {"schema": int, "task": str, "model": str, "results": list}
    for key, kind in wanted.items():
        if not isinstance(run, dict) or not isinstance(run.get(key), kind):
            raise ValueError(f"{path}: no {key!r}; this is no result of an evaluation of ours")
    if run["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema {run['schema']}, known is {SCHEMA}; use the version that wrote it")
    if run["task"] not in TASKS:
        raise ValueError(f"{path}: task {run['task']!r}; known: {', '.join(TASKS)}")
    try:
        _rows_of(run)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: results lack {error}; run that evaluation again") from error
    return run


def _rows_of(run: dict) -> None:
    """Form all tables of a run: what they need is there."""
    (retrieval_rows if run["task"] == "retrieval" else classification_rows)(run["results"], run["model"])
    comparison(run["task"], [run])


def _draw(folder: Path, tables: Sequence[Table], runs: Sequence[dict]) -> list[tuple[Path, str]]:
    """Draw bars of each table and the confusion of each set into the folder; (file, caption) of each picture."""
    pictures = []
    for table in tables:
        name = (
            "bars.png" if len(tables) == 1 else f"bars-{re.sub('[^a-z]+', '-', table.title.split(',')[0].lower())}.png"
        )
        guess = chances(runs) if table.header[0] != "data set" else None
        keep(folder / name, lambda part, table=table, guess=guess: draw_bars(table, part, guess))
        pictures.append((folder / name, f"{table.title}. Line: chance." if guess else f"{table.title}."))
    for run in runs:
        for result in run["results"]:
            worst = result.get("confusion")
            if worst and any(entry["right"] < entry["samples"] for entry in worst):
                safe = re.sub(
                    r"[^A-Za-z0-9._-]+", "-", f"{run['model'] + '-' if len(runs) > 1 else ''}{result['dataset']}"
                )
                file = new_file(folder, f"confusion-{safe}")
                name = result["dataset"]
                keep(file, lambda part, worst=worst, name=name: draw_confusion(worst, name, part))
                pictures.append((file, f"{run['model']}, {result['dataset']}: what the worst classes are taken for."))
    return pictures


def new_file(folder: Path, stem: str) -> Path:
    """folder/stem.png, or stem-2, stem-3 .. where that exists already."""
    number = 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path


def _write(path: Path, text: str) -> None:
    # What is not UTF-8 (a part of a path) is written as an escape, which JSON reads back.
    write_whole(path, [text.encode("utf-8", "backslashreplace")])
