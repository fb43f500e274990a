"""A comparison of several runs: all models and all published rows in one table for each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rwkv_clip.files import new_folder, parse_json

from .files import keep, write
from .formats import csv_text, latex, markdown_section
from .page import GALLERY, draw_pictures, page_text
from .run import SCHEMA
from .tables import Table, compare, list_sets

TASKS = ("classification", "retrieval", "linear_probe")


def collect(places: Sequence[str], output: str | Path) -> tuple[Path, list[Table]]:
    """One report of several runs; returns the folder that it made (`output`, or output-2, ...) and its tables.

    places: run folders, folders of run folders, or result.json files. ValueError where one holds no result.
    """
    runs = _read_runs(places)
    contents = list(runs.values())
    tables = [table for task in TASKS if (table := compare(task, contents))]
    if not tables:
        raise ValueError(f"{', '.join(map(str, places))}: none of these runs has evaluated a set; nothing to compare")
    folder = new_folder(Path(output))
    write(folder / "runs.json", json.dumps(runs, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    for name, form in (("table.md", markdown_section), ("table.tex", latex), ("table.csv", csv_text)):
        write(folder / name, "\n".join(map(form, tables)))
    pictures = draw_pictures(folder, tables, contents)
    for place, run in runs.items():
        pictures.append((Path(place).parent / "retrieval.png", f"{run['model']}: {GALLERY}"))
    about = [f"{len(runs)} runs, {len({run['model'] for run in contents})} models; our figures beside published ones"]
    keep(folder / "page.html", lambda: page_text("Comparison", about, tables, pictures, contents))
    return folder, tables


def _read_runs(places: Sequence[str]) -> dict[str, dict]:
    """Contents of result.json files by path, in the order given, each file once."""
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
    for key, kind in {"schema": int, "task": str, "model": str, "results": list}.items():
        if not isinstance(run, dict) or not isinstance(run.get(key), kind):
            raise ValueError(f"{path}: no {key!r}; this is not a result of our evaluation")
    if run["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema {run['schema']}, expected {SCHEMA}; use the version that wrote it")
    if run["task"] not in TASKS:
        raise ValueError(f"{path}: task {run['task']!r}; valid names: {', '.join(TASKS)}")
    try:  # whether all that tables need is present
        compare(run["task"], [run])
        if run["task"] != "retrieval":
            list_sets(run)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: results lack {error}; run that evaluation again") from error
    return run
