"""page.html: one file with everything that a run or a comparison shows. No script, nothing from the network.

Its tables are those of the other files; pictures are embedded (photographs as JPEG, which keeps the page small).
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from .files import keep, new_file, safe_name
from .plots import chances, draw_bars, draw_confusion
from .tables import Table

GALLERY = "captions and their five best pictures, best first. Green: right; orange: right, but further down."
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2em auto;
  padding: 0 1.2em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
p.about, figcaption, ul.notes { color: #555; font-size: .88em; } ul.notes { padding-left: 1.2em; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; border-top: 2px solid #1a1a1a; border-bottom: 2px solid #1a1a1a; font-size: .88em;
  font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #1a1a1a; text-align: left; vertical-align: bottom; }
th, td { padding: .25em .7em .25em 0; } td.number, th.number { text-align: right; }
td { white-space: nowrap; } td.words { min-width: 16em; white-space: normal; }
tr.published td { color: #666; } tr.rule td { border-top: 1px solid #bbb; }
td.best { font-weight: 700; }
figure { margin: 1.5em 0; } figure img { max-width: 100%; height: auto; }
details { margin: 1em 0; } pre { background: #f5f5f5; padding: .8em; overflow-x: auto; font-size: .82em; }
"""


def draw_pictures(folder: Path, tables: Sequence[Table], runs: Sequence[dict]) -> list[tuple[Path, str]]:
    """Draw bars of each table and the confusion of each set into the folder; (file, caption) of each picture."""
    pictures = []
    for table in tables:
        task = re.sub("[^a-z]+", "-", table.title.split(",")[0].lower())
        file = folder / ("bars.png" if len(tables) == 1 else f"bars-{task}.png")
        guess = None if table.by_set else chances(runs)
        keep(file, lambda table=table, guess=guess: draw_bars(table, guess))
        pictures.append((file, f"{table.title}. Line: chance." if guess else f"{table.title}."))
    for run in runs:
        for result in run["results"]:
            worst, name = result.get("confusion"), result["dataset"]
            if worst and any(entry["right"] < entry["samples"] for entry in worst):
                stem = f"{run['model']}-{name}" if len(runs) > 1 else name
                file = new_file(folder, f"confusion-{safe_name(stem)}", ".png")
                keep(file, lambda worst=worst, name=name: draw_confusion(worst, name))
                pictures.append((file, f"{run['model']}, {name}: what the worst classes are taken for."))
    return pictures


def page_text(
    title: str,
    about: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[tuple[Path, str]],
    runs: Sequence[dict],
) -> str:
    """The page.

    about: lines below the title; pictures: (file, caption), a missing one is left out; runs: contents of result.json,
    whose settings and environment come at the end.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="about">{escape(line)}</p>' for line in about)]
    parts += [_table(table) for table in tables]
    parts += [_picture(file, caption) for file, caption in pictures if file.is_file()]
    parts += [_details(run) for run in runs]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _table(table: Table) -> str:
    number = [all(_is_figure(row[c]) for row in table.rows) for c in range(len(table.header))]
    kinds = ["number" if is_number else "" for is_number in number]
    kinds = ["words" if name == "note" else kind for name, kind in zip(table.header, kinds)]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(table.header, kinds))
    lines = []
    for index, row in enumerate(table.rows):
        # A rule where a new set begins, and between published rows and ours.
        new_set = table.by_set and table.published and row[0] != table.rows[index - 1][0]
        turn = (index in table.published) != (index - 1 in table.published)
        row_kind = "published" if index in table.published else ""
        row_kind += " rule" if index and (new_set or turn) else ""
        cells = (
            f'<td class="{kind}{" best" if (index, column) in table.best else ""}">{escape(cell)}</td>'
            for column, (cell, kind) in enumerate(zip(row, kinds))
        )
        lines.append(f'<tr class="{row_kind}">{"".join(cells)}</tr>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + f'</tbody></table></div>\n<ul class="notes">{notes}</ul>'
    )


def _picture(path: Path, caption: str) -> str:
    with Image.open(path) as picture:
        width, height = picture.size
        colors = picture.convert("RGB").getcolors(maxcolors=20_000)
        content, kind = path.read_bytes(), "png"
        if colors is None:  # photographs: a drawing has few colors and is smaller, and sharper, as it is
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
            content, kind = buffer.getvalue(), "jpeg"
    data = base64.b64encode(content).decode("ascii")
    image = f'<img width="{width}" height="{height}" alt="{escape(caption)}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _details(run: dict) -> str:
    shown = {key: value for key, value in run.items() if key != "results"}
    content = escape(json.dumps(shown, indent=2, ensure_ascii=False))
    summary = f"{escape(run['model'])}, {escape(run['task'])}: settings"
    return f"<details><summary>{summary}</summary><pre>{content}</pre></details>"


def _is_figure(cell: str) -> bool:
    return cell == "-" or cell.rstrip("*").replace(".", "", 1).isdigit()
