"""The report of one run, in its own folder.

result.json, table.md, table.csv and table.tex are rewritten after every data set, so that a later error loses nothing;
pictures and page.html at the end. A file that cannot be written is named and the run continues: its figures are printed
in any case. Only the main rank writes.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rwkv_clip.dist import rank_and_size
from rwkv_clip.errors import STORAGE
from rwkv_clip.files import new_folder

from ..encoder import Encoder
from ..settings import EvalSettings
from .files import keep, place_of, say_missing
from .formats import csv_text, latex, markdown, markdown_notes, markdown_section
from .page import GALLERY, draw_pictures, page_text
from .tables import Table, compare, list_sets

SCHEMA = 1


@dataclass
class Report:
    """The results of one run, one dict per data set, and the folder that they are written to."""

    place: Path
    about: dict  # what all results share, e.g. the task
    results: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    folder: Path | None = None  # made by the first save: a run that fails before any result leaves nothing
    saved: bool = True  # whether result.json is up to date

    def add(self, result: dict) -> None:
        """Append the result of a data set and rewrite everything."""
        self.results.append(result)
        self.save()

    def content(self) -> dict:
        """What result.json holds."""
        seconds = round(time.monotonic() - self.started, 3)
        return {"schema": SCHEMA, **self.about, "seconds": seconds, "results": self.results}

    def save(self) -> None:
        """Write result.json and the tables, each whole or not at all."""
        if rank_and_size()[0]:
            return
        try:
            self.folder = self.folder or new_folder(self.place)
        except OSError as error:
            self.saved = False
            say_missing(self.place, error)
            return
        content, (sets, compared) = self.content(), self.tables()
        result = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.saved = keep(self.folder / "result.json", lambda: result)
        keep(self.folder / "table.md", self.text)
        keep(self.folder / "table.csv", lambda: csv_text(sets))
        keep(self.folder / "table.tex", lambda: latex(compared) if compared else "% no set is done\n")

    def finish(self) -> int:
        """Draw pictures and page.html once all sets are done, and print the tables. Returns the exit code."""
        if self.folder:
            self._draw()
        undone = [result for result in self.results if result["status"] != "done"]
        if rank_and_size()[0] == 0:
            print(self.text(), end="")
            if self.folder:
                print(f"results: {self.folder}")
            for result in undone:
                print(f"{result['status']}: {result['dataset']}: {result['reason']}", file=sys.stderr)
            if not self.saved:
                return STORAGE
        failed = any(result["status"] == "failed" for result in undone)
        # A rank without results leaves them to the main rank.
        return 2 if failed or (self.results and len(undone) == len(self.results)) else 0

    def tables(self) -> tuple[Table, Table | None]:
        """Every set, and the comparison with published rows, where a set is done."""
        content = self.content()
        return list_sets(content), compare(content["task"], [content])

    def text(self) -> str:
        """The table of every set, then the comparison; of retrieval's, which has the same rows, only the notes."""
        sets, compared = self.tables()
        text = markdown([sets.header, *sets.rows])
        if compared is None:
            return text
        same = self.about["task"] == "retrieval"
        return text + "\n" + (markdown_notes(compared) if same else markdown_section(compared))

    def _draw(self) -> None:
        run, (sets, compared) = self.content(), self.tables()
        tables = [compared] if compared else []
        pictures = draw_pictures(self.folder, tables, [run])
        pictures.append((self.folder / "retrieval.png", GALLERY))
        tables += [] if run["task"] == "retrieval" else [sets]
        about = [f"{run['date']}, checkpoint {run['checkpoint']}, sha256 {run['checkpoint_sha256']}"]
        title = f"{run['model']}: {run['task'].replace('_', ' ')}"
        keep(self.folder / "page.html", lambda: page_text(title, about, tables, pictures, [run]))


def start_report(task: str, settings: EvalSettings, encoder: Encoder) -> Report:
    """An empty report; its folder is made with the first result."""
    loaded, device = encoder.loaded, encoder.device
    about = {
        "task": task,
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
    return Report(place_of(settings, task, loaded.name), about)
