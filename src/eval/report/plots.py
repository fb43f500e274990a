"""Pictures of results: bars for each set, drawn from the same table, and the confusion of the worst classes.

Ours in color, published rows in grey, the released code's way of counting hatched. No display is needed.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence

from rwkv_clip.fonts import find_fonts

from .tables import LEGACY, RECALL_COLUMNS, Table

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for color blindness
LABELLED = 48  # in a panel with more bars than that, published ones lose their figures
COLUMNS = 16  # of the confusion
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a line behind a figure does not strike it out
DPI = 110


def draw_bars(table: Table, chance: dict[str, float] | None = None) -> bytes:
    """The figures of a comparison as bars (PNG): a panel for each retrieval set, one panel for all class sets.

    chance: percent by column name, marked by a line.
    """
    from matplotlib.figure import Figure

    panels = _panels(table)
    longest = max(len(groups) * (len(bars) * 0.24 + 0.45) for _, groups, bars in panels)
    labels = {label: None for _, _, bars in panels for label, *_ in bars}
    figure = Figure(figsize=(min(16, max(6.4, longest + 0.8)), 3.1 * len(panels) + 0.22 * len(labels)))
    figure.set_layout_engine("constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    colors = _colors(panels)
    for axes, (title, groups, bars) in zip(all_axes, panels):
        width = 0.84 / len(bars)
        for place, (label, published, figures) in enumerate(bars):
            color, hatch = colors[label]
            for group, value in enumerate(figures):
                if value is None:
                    continue
                x = group + (place - (len(bars) - 1) / 2) * width
                name = _plain(label) if label in labels else None
                labels.pop(label, None)
                axes.bar(x, value, 0.92 * width, color=color, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
                if len(bars) * len(groups) <= LABELLED or not published:
                    text = axes.annotate(f"{value:.1f}", (x, value), (0, 3), textcoords="offset points")
                    text.set(ha="center", va="bottom", fontsize=7, rotation=90, bbox=_WHITE)
        for group, name in enumerate(groups):
            if chance and name in chance:
                line = "chance" if group == 0 else None
                axes.hlines(chance[name], group - 0.45, group + 0.45, "black", "dashed", linewidth=1, label=line)
        axes.set_xticks(range(len(groups)), [_plain(textwrap.fill(name, 14)) for name in groups], fontsize=8)
        highest = max((value for *_, figures in bars for value in figures if value is not None), default=100)
        axes.set(
            title=_plain(title), ylabel="percent", ylim=(0, max(5, 1.18 * highest)), xlim=(-0.6, len(groups) - 0.4)
        )
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= min(100, 1.18 * highest)])
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=2 if len(colors) > 3 else 1)
    return png_of(figure)


def draw_confusion(worst: Sequence[dict], dataset: str) -> bytes:
    """What the worst classes (rows, of `confusion.worst_classes`) were taken for (columns), in percent of a row
    (PNG)."""
    from matplotlib.figure import Figure

    rows = [entry["class"] for entry in worst]
    names = {answer[0]: answer[1] for entry in worst for answer in entry["predicted"]}
    names |= {entry["class"]: entry["name"] for entry in worst}
    columns = _answered(worst, rows)
    percents = [
        [100 * dict((a[0], a[2]) for a in entry["predicted"]).get(column, 0) / entry["samples"] for column in columns]
        for entry in worst
    ]
    others = [max(0.0, 100 - sum(row)) for row in percents]
    if any(rest > 0.05 for rest in others):
        percents = [[*row, rest] for row, rest in zip(percents, others)]
    heads = [names[column] for column in columns] + ["all others"] * (len(percents[0]) - len(columns))
    figure = Figure(figsize=(3.0 + 0.52 * len(heads), 2.1 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(percents, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, values in enumerate(percents):
        for column, value in enumerate(values):
            if value > 0.5:
                color = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        if rows[row] in columns:
            right = columns.index(rows[row])
            axes.add_patch(_frame(right, row))
    axes.set_xticks(range(len(heads)), [_short(head) for head in heads], rotation=40, ha="right", fontsize=8)
    labels = [f"{_short(entry['name'])} ({entry['samples']})" for entry in worst]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_title(f"{_short(dataset)}: the {len(rows)} classes most often wrong", fontsize=10, loc="left")
    axes.set(xlabel="taken for, percent of the class (framed: right)", ylabel="class (pictures)")
    axes.spines[:].set_visible(False)
    return png_of(figure)


def png_of(figure, dpi: int = DPI) -> bytes:
    """A figure of matplotlib as the content of a file, its texts in a font that has their characters; where none is
    installed, the picture says so."""
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if text.get_text()]
    fonts, lacking = find_fonts("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_fontfamily(fonts)
    if lacking:
        figure.suptitle(textwrap.fill(lacking, 48), fontsize=8)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # which the picture says itself
        figure.savefig(content, dpi=dpi)
    return content.getvalue()


def chances(runs: Sequence[dict]) -> dict[str, float]:
    """Percent that guessing gets, by set of classes."""
    results = [r for run in runs for r in run["results"] if r["status"] == "done" and "classes" in r["metrics"]]
    return {result["dataset"]: 100 / result["metrics"]["classes"] for result in results}


def _panels(table: Table) -> list[tuple[str, list[str], list[tuple[str, bool, list[float | None]]]]]:
    """(title, groups, [(label, published, figure of each group)]) of every panel."""
    if not table.by_set:
        columns = [column for column, name in enumerate(table.header) if column and not name.startswith("average")]
        bars = [(r[0], i in table.published, [_figure(r[c]) for c in columns]) for i, r in enumerate(table.rows)]
        return [(table.title, [table.header[column] for column in columns], bars)]
    groups: dict[tuple, list] = {}
    for number, row in enumerate(table.rows):
        groups.setdefault((row[0], row[3]), []).append(
            (row[1], number in table.published, row[RECALL_COLUMNS.start : RECALL_COLUMNS.stop])
        )
    return [
        (
            f"{name}: recall, {images} pictures",
            [table.header[column] for column in RECALL_COLUMNS],
            [(label, published, [_figure(cell) for cell in cells]) for label, published, cells in rows],
        )
        for (name, images), rows in groups.items()
    ]


def _colors(panels) -> dict[str, tuple[str, str]]:
    """Color and hatch of each label: published rows in greys, a model and its legacy row in one color."""
    bars = {label: published for _, _, bars in panels for label, published, _ in bars}
    theirs = [label for label, published in bars.items() if published]
    ours = list(dict.fromkeys(label.removesuffix(LEGACY) for label, published in bars.items() if not published))
    greys = {label: str(round(0.82 - 0.45 * i / max(1, len(theirs) - 1), 2)) for i, label in enumerate(theirs)}
    found = {label: (grey, "") for label, grey in greys.items()}
    for label, published in bars.items():
        if not published:
            color = COLORS[ours.index(label.removesuffix(LEGACY)) % len(COLORS)]
            found[label] = (color, "///" if label.endswith(LEGACY) else "")
    return found


def _answered(worst: Sequence[dict], rows: Sequence[int]) -> list[int]:
    """Columns: the rows' own classes, then other answers, most frequent first, up to COLUMNS."""
    totals: dict[int, int] = {}
    for entry in worst:
        for label, _, count in entry["predicted"]:
            totals[label] = totals.get(label, 0) + count
    others = sorted((label for label in totals if label not in rows), key=lambda label: (-totals[label], label))
    return [*rows, *others[: max(0, COLUMNS - len(rows))]]


def _frame(column: int, row: int):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor="tab:orange", linewidth=1.8)


def _figure(cell: str) -> float | None:
    try:
        return float(cell.rstrip("*"))
    except ValueError:
        return None


def _short(name: str) -> str:
    return _plain(textwrap.shorten(name, 26, placeholder=".."))


def _plain(text: str) -> str:
    return drawable(text).removeprefix("_")  # matplotlib leaves names with it out of legends


def drawable(text: str) -> str:
    """Text as it can be drawn: a dollar sign would start a formula, half a character (of broken JSON) would be an
    error."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()
