"""Tables of results: percent with one decimal, published rows beside ours, as Markdown, CSV and LaTeX.

A run is what its result.json holds. A figure that rests on other pictures than the published ones carries a star
and is never compared (not the best of its column, not in an average).
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .published import RECALLS, not_at_hand, published_rows, published_samples

PUBLISHED_MODEL = published_rows()[-1].model
NOTHING = "-"
LEGACY = " (legacy)"  # ends the name of a row that counts as the released code does
_DIRECTIONS = [f"{way} R@{k}" for way in ("image->text", "text->image") for k in (1, 5, 10)]
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


@dataclass(frozen=True)
class Table:
    """Header and rows as text; `best` lists the cells (row, column) that hold the best figure of a comparison."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    best: frozenset[tuple[int, int]] = frozenset()
    published: frozenset[int] = frozenset()  # rows that are not ours


def retrieval_rows(results: Sequence[dict], model: str) -> list[list[str]]:
    """Header, one row for our model per set, and below it the published ones where the set is theirs in full."""
    rows = [["model", "data set", "split", "images", "captions", *_DIRECTIONS, "mean recall"]]
    for result in results:
        rows += _retrieval_of(result, model)
        rows += _published_retrieval([result])
    return rows


def classification_rows(results: Sequence[dict], model: str) -> list[list[str]]:
    """One row for each data set; the published figure stands beside the headline it belongs to."""
    header = ["data set", "split", "samples", "classes", "headline", model, "top-1", "top-5", "mean per class"]
    rows = [[*header, PUBLISHED_MODEL, "note"]]
    published = published_rows()[-1].classification
    for result in results:
        name = result["dataset"]
        if result["status"] != "done":
            rows.append([name, *[NOTHING] * 9, textwrap.shorten(f"{result['status']}: {result['reason']}", 100)])
            continue
        metrics, headline = result["metrics"], result["headline"]
        notes = [result["note"]] if result.get("note") else []
        if _is_part(result):
            whole = published_samples("classification")[name]
            notes.append(f"{metrics['samples']} of {whole} pictures: not the published set")
        if metrics["classes_without_samples"]:
            notes.append(f"no samples, left out: {', '.join(metrics['classes_without_samples'])}")
        if result.get("legacy"):
            notes.append(f"legacy: {_or_nothing(result['legacy']['metrics'][headline])}")
        ours = [_percent(metrics[key]) for key in (headline, "top1", "top5", "mean_per_class")]
        numbers = [str(metrics["samples"]), str(metrics["classes"])]
        beside = f"{published[name]:.1f}" if name in published else NOTHING
        rows.append([name, result["split"], *numbers, headline, *ours, beside, "; ".join(notes)])
    return rows


def comparison(task: str, runs: Sequence[dict]) -> Table | None:
    """All runs of a task (retrieval, classification, linear_probe) and all published rows of it, or None."""
    runs = [run for run in runs if run["task"] == task and any(map(_is_done, run["results"]))]
    if not runs:
        return None
    return _compare_retrieval(runs) if task == "retrieval" else _compare_classification(task, runs)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its header."""
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells)
    return "".join(f"| {line} |\n" for line in lines)


def notes_text(table: Table) -> str:
    """The notes as a Markdown list."""
    return "".join(f"- {_plain(note)}\n" for note in table.notes)


def markdown_section(table: Table) -> str:
    """Title, table and notes as Markdown."""
    return f"## {table.title}\n\n{markdown([table.header, *table.rows])}\n{notes_text(table)}"


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Comma-separated values, quoted where needed, one line per row."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def latex(table: Table) -> str:
    """A table for a paper (needs the package booktabs): best figures bold, published rows above ours."""
    text_columns = len([name for name in table.header if name in ("model", "data set", "split")])
    columns = "l" * text_columns + "r" * (len(table.header) - text_columns)
    lines = [" & ".join(map(_latex, table.header)), r"\midrule"]
    previous = None
    for number, row in enumerate(table.rows):
        group = row[0] if table.header[0] == "data set" else number in table.published
        if previous is not None and group != previous:
            lines.append(r"\midrule")
        previous = group
        cells = (rf"\textbf{{{_latex(c)}}}" if (number, i) in table.best else _latex(c) for i, c in enumerate(row))
        lines.append(" & ".join(cells))
    body = "".join(f"{line}\n" if line == r"\midrule" else f"{line} \\\\\n" for line in lines)
    notes = " ".join(note.rstrip(".") + "." for note in table.notes)
    return (
        "\\begin{table}\n\\centering\\small\n"
        f"\\caption{{{_latex(table.title)}. {_latex(notes)}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def _retrieval_of(result: dict, model: str) -> list[list[str]]:
    """Our row of one set and, where it was asked for, the one in the released code's way."""
    if not _is_done(result):
        return []
    place = [result["dataset"], result["split"] or NOTHING, str(result["images"]), str(result["captions"])]
    rows = [[model, *place, *_recalls(result["metrics"])]]
    if result.get("legacy"):
        rows.append([model + LEGACY, *place, *_recalls(result["legacy"]["metrics"])])
    return rows


def _recalls(metrics: dict) -> list[str]:
    return [_or_nothing(metrics[key]) for key in (*RECALLS, "mean_recall")]


def _published_retrieval(results: Sequence[dict]) -> list[list[str]]:
    """Published rows of the set of these results, if one of them has the published number of pictures."""
    for result in results:
        name = result["dataset"].lower()
        if published_samples("retrieval").get(name) == result.get("images"):
            place = [result["dataset"], result["split"] or NOTHING, str(result["images"]), str(result["captions"])]
            found = [(row.model, row.retrieval[name]) for row in reversed(published_rows()) if name in row.retrieval]
            return [[model, *place, *(f"{v:.1f}" for v in (*r, sum(r) / len(r)))] for model, r in found]
    return []


def _compare_retrieval(runs: Sequence[dict]) -> Table:
    labels = _labels(runs)
    results = [(label, result) for label, run in zip(labels, runs) for result in run["results"] if _is_done(result)]
    rows, published, best = [], set(), set()
    for name in dict.fromkeys((result["dataset"], result["split"], result["images"]) for _, result in results):
        ours = [(label, r) for label, r in results if (r["dataset"], r["split"], r["images"]) == name]
        theirs = list(reversed(_published_retrieval([r for _, r in ours])))
        start = len(rows)
        published |= set(range(start, start + len(theirs)))
        group = [[row[1], row[0], *row[2:]] for row in theirs]
        group += [[row[1], row[0], *row[2:]] for label, r in ours for row in _retrieval_of(r, label)]
        best |= {(start + row, column) for row, column in _best(group, range(5, 12))}
        rows += group
    header = ["data set", "model", "split", "images", "captions", *_DIRECTIONS, "mean recall"]
    sets = published_samples("retrieval")
    notes = _notes("retrieval") if any(r["dataset"].lower() in sets for _, r in results) else []
    prefixes = {r.get("prefix", "") for _, r in results}
    notes.append("Caption prefix: " + ", ".join(repr(prefix) for prefix in sorted(prefixes)))
    notes += dict.fromkeys(f"{r['dataset']}: {r['note']}" for _, r in results if r.get("note"))
    notes += _legacy_notes(runs)
    title = "Zero-shot retrieval, percent"
    return Table(title, header, rows, notes, frozenset(best), frozenset(published))


def _compare_classification(task: str, runs: Sequence[dict]) -> Table:
    """One row for a model, one column for a set with its headline metric."""
    found: list[tuple[str, dict[str, dict]]] = []  # label, results by set
    for label, run in zip(_labels(runs), runs):
        done = {result["dataset"]: result for result in run["results"] if _is_done(result)}
        row = next((sets for name, sets in found if name == label and not sets.keys() & done.keys()), None)
        if row is None:
            found.append((label, done))
        else:
            row.update(done)
    order = published_samples("classification")
    present = dict.fromkeys(name for _, results in found for name in results)
    sets = [name for name in order if name in present] + [name for name in present if name not in order]
    theirs = [row for row in published_rows() if task == "classification" and row.classification.keys() & set(sets)]
    whole = all(name in sets for name in order)
    rows = [_published_classes(row, sets, whole) for row in theirs]
    for label, results in found:
        rows.append([label, *(_headline(results.get(name)) for name in sets)])
        rows[-1] += [_average(rows[-1], sets)] if whole else []
        if any("legacy" in result for result in results.values()):
            row = [label + LEGACY, *(_headline(results.get(name), "legacy") for name in sets)]
            rows.append(row + ([_average(row, sets)] if whole else []))
    headlines = {result["dataset"]: result["headline"] for _, results in found for result in results.values()}
    means = [name for name in sets if headlines[name] == "mean_per_class"]
    notes = [f"Mean per class: {', '.join(means)}; top-1 elsewhere"] if means else ["Top-1"]
    notes += [note for _, results in found for result in results.values() for note in _part_note(result)]
    notes += _notes("classification") if theirs else []
    notes += _legacy_notes(runs)
    header = ["model", *sets, *(["average of the eleven"] if whole else [])]
    title = "Linear probe, percent" if task == "linear_probe" else "Zero-shot classification, percent"
    best = _best(rows, range(1, len(header)))
    return Table(title, header, rows, list(dict.fromkeys(notes)), frozenset(best), frozenset(range(len(theirs))))


def _published_classes(row, sets: Sequence[str], whole: bool) -> list[str]:
    figures = [f"{row.classification[name]:.1f}" if name in row.classification else NOTHING for name in sets]
    average = [] if not whole else [NOTHING if row.average is None else f"{row.average:.1f}"]
    return [row.model, *figures, *average]


def _headline(result: dict | None, way: str | None = None) -> str:
    if result is None or (way and way not in result):
        return NOTHING
    metrics = result[way]["metrics"] if way else result["metrics"]
    return _or_nothing(metrics[result["headline"]]) + ("*" if _is_part(result) else "")


def _average(row: Sequence[str], sets: Sequence[str]) -> str:
    """Mean of the eleven published sets, where each is there in full."""
    figures = [cell for name, cell in zip(sets, row[1:]) if name in published_samples("classification")]
    return f"{sum(map(float, figures)) / len(figures):.1f}" if all(map(_is_number, figures)) else NOTHING


def _is_part(result: dict) -> bool:
    """Whether a published set was evaluated on another number of pictures than the published figure."""
    whole = published_samples("classification").get(result["dataset"])
    return whole is not None and whole != result["metrics"]["samples"]


def _part_note(result: dict) -> list[str]:
    if not _is_part(result):
        return []
    whole = published_samples("classification")[result["dataset"]]
    return [f"Starred, {result['dataset']}: {result['metrics']['samples']} of {whole} pictures, not the published set"]


def _labels(runs: Sequence[dict]) -> list[str]:
    """Names of models, made different where models are: by precision, else by digest of the weights."""
    keys = [(run["model"], run.get("checkpoint_sha256"), run.get("environment", {}).get("precision")) for run in runs]
    by_model: dict[str, set] = {}
    for key in keys:
        by_model.setdefault(key[0], set()).add(key)
    labels = []
    for model, digest, precision in keys:
        rivals = by_model[model]
        extra = [str(precision)] if len({key[2] for key in rivals}) > 1 else []
        extra += [str(digest)[:8]] if len({key[1] for key in rivals}) > 1 else []
        labels.append(f"{model} ({', '.join(extra)})" if extra else model)
    return labels


def _notes(task: str) -> list[str]:
    """Where the published rows come from, and which are not at hand."""
    by_source: dict[str, list[str]] = {}
    for row in published_rows():
        if getattr(row, task):
            by_source.setdefault(row.source, []).append(row.method)
    notes = [f"Published row of {', '.join(methods)}: {source}" for source, methods in by_source.items()]
    absent = not_at_hand(task)
    return notes + ([f"Published rows that are not at hand, left out: {', '.join(absent)}"] if absent else [])


def _legacy_notes(runs: Sequence[dict]) -> list[str]:
    """Every defect of the released code that a legacy row reproduces or does not, each once."""
    defects = [
        (f"{label}{LEGACY}, {result['dataset']}", defect)
        for label, run in zip(_labels(runs), runs)
        for result in run["results"]
        for defect in result.get("legacy", {}).get("defects", ())
    ]
    return [
        f"{where}: {defect['name']} ({defect['says']}), {'' if defect['reproduced'] else 'not '}reproduced: "
        f"{defect['effect']}"
        for where, defect in defects
    ]


def _best(rows: Sequence[Sequence[str]], columns: Iterable[int]) -> set[tuple[int, int]]:
    """Cells with the highest figure of their column, of those that are right, where there are two or more."""
    best = set()
    for column in columns:
        exact = [(n, row[column]) for n, row in enumerate(rows) if not any(c.endswith(LEGACY) for c in row[:2])]
        figures = {number: float(cell) for number, cell in exact if _is_number(cell)}
        if len(figures) > 1:
            best |= {(number, column) for number, figure in figures.items() if figure == max(figures.values())}
    return best


def _is_done(result: dict) -> bool:
    return result["status"] == "done"


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).isdigit()


def _plain(text: str) -> str:
    """A text (a name from somebody's data) as part of a Markdown table on a terminal: no markup, no control signs."""
    text = text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _or_nothing(fraction: float | None) -> str:
    return NOTHING if fraction is None else _percent(fraction)


def _latex(text: str) -> str:
    return text.translate(_LATEX).replace(r"-\textgreater{}", r"$\to$")
