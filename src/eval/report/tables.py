"""Tables of results: percent with one decimal, published rows beside ours.

A run is the content of its result.json, and its figures are a comparison of one run. A figure from pictures other than
the published ones carries a star and is never compared (not the best of its column, not in an average).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .published import RECALLS, chinese_rows, chinese_sets, not_at_hand, published_rows, published_samples

PUBLISHED_MODEL = published_rows()[-1].model
NOTHING = "-"
LEGACY = " (legacy)"  # ends the name of a row that counts as the released code does
_DIRECTIONS = [f"{way} R@{k}" for way in ("image->text", "text->image") for k in (1, 5, 10)]
RECALL_COLUMNS = range(5, 11)  # of a comparison of retrieval, with the mean recall after them


@dataclass(frozen=True)
class Table:
    """Header and rows as text; `best` lists the cells (row, column) that hold the best figure of a comparison."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    best: frozenset[tuple[int, int]] = frozenset()
    published: frozenset[int] = frozenset()  # rows that are not ours

    @property
    def by_set(self) -> bool:
        """Whether rows are grouped by data set, and not a column for each."""
        return self.header[0] == "data set"


def compare(task: str, runs: Sequence[dict]) -> Table | None:
    """All runs of a task (retrieval, classification, linear_probe) and all published rows of it, or None."""
    runs = [run for run in runs if run["task"] == task and any(map(_is_done, run["results"]))]
    if not runs:
        return None
    return _compare_retrieval(runs) if task == "retrieval" else _compare_classes(task, runs)


def list_sets(run: dict) -> Table:
    """Every set of one run: for retrieval its comparison with our row first, else a row for each set."""
    if run["task"] != "retrieval":
        return _list_classes(run)
    table = compare("retrieval", [run])
    ours = [row for number, row in enumerate(table.rows) if number not in table.published]
    theirs = [table.rows[number] for number in sorted(table.published, reverse=True)]
    header, *rows = ([model, name, *rest] for name, model, *rest in (table.header, *ours, *theirs))
    return Table("Every set", header, rows, table.notes)


def _list_classes(run: dict) -> Table:
    """A row for each data set. Zero-shot: the published figure beside the headline that it belongs to. A linear probe
    has none: published probes are of other sets of this name."""
    probe = run["task"] == "linear_probe"
    header = ["data set", "split", *(["trained on"] if probe else []), "samples", "classes", "headline", run["model"]]
    header += ["top-1", "top-5", "mean per class", "penalty" if probe else PUBLISHED_MODEL, "note"]
    rows = []
    for result in run["results"]:
        name = result["dataset"]
        if not _is_done(result):
            reason = textwrap.shorten(f"{result['status']}: {result['reason']}", 100)
            rows.append([name, *[NOTHING] * (len(header) - 2), reason])
            continue
        metrics, headline = result["metrics"], result["headline"]
        figures = [_percent(metrics[key]) for key in (headline, "top1", "top5", "mean_per_class")]
        numbers = [str(metrics["samples"]), str(metrics["classes"])]
        if probe:
            numbers.insert(0, str(result["probe"]["train_samples"]))
            figures.append(f"{result['probe']['strength']:.3g}")
        else:
            figures.append(_figure(published_rows()[-1].classification.get(name)))
        rows.append([name, result["split"], *numbers, headline, *figures, "; ".join(_notes_of(result, probe))])
    return Table("Every set", header, rows)


def _notes_of(result: dict, probe: bool) -> list[str]:
    """What a reader should know about the figures of one set of classes."""
    metrics = result["metrics"]
    notes = [result["note"]] if result.get("note") else []
    if probe and not result["probe"]["converged"]:
        notes.append(f"not converged after {result['probe']['iterations']} iterations")
    if not probe and _is_partial(result):
        whole = published_samples("classification")[result["dataset"]]
        notes.append(f"{metrics['samples']} of {whole} pictures: not the published set")
    if metrics["classes_without_samples"]:
        notes.append(f"no samples, left out: {', '.join(metrics['classes_without_samples'])}")
    if result.get("legacy"):
        notes.append(f"legacy: {_percent(result['legacy']['metrics'][result['headline']])}")
    return notes


def _compare_retrieval(runs: Sequence[dict]) -> Table:
    labelled = zip(_labels(runs), runs)
    results = [(label, result) for label, run in labelled for result in run["results"] if _is_done(result)]
    rows, published, best = [], set(), set()
    for key in dict.fromkeys((result["dataset"], result["split"], result["images"]) for _, result in results):
        ours = [(label, r) for label, r in results if (r["dataset"], r["split"], r["images"]) == key]
        theirs = _published_recalls(ours[0][1])
        start = len(rows)
        published |= set(range(start, start + len(theirs)))
        group = theirs + [row for label, result in ours for row in _recalls(label, result)]
        if ours[0][1]["dataset"].lower() not in chinese_sets():  # those may be of other pictures
            best |= {(start + row, column) for row, column in _best(group, range(5, 12))}
        rows += group
    sets = published_samples("retrieval")
    notes = _sources("retrieval") if any(r["dataset"].lower() in sets for _, r in results) else []
    notes += _chinese_sources({r["dataset"].lower() for _, r in results})
    prefixes = {r.get("prefix", "") for _, r in results}
    notes.append("Caption prefix: " + ", ".join(repr(prefix) for prefix in sorted(prefixes)))
    notes += dict.fromkeys(f"{r['dataset']}: {r['note']}" for _, r in results if r.get("note"))
    notes += _defects(runs)
    header = ["data set", "model", "split", "images", "captions", *_DIRECTIONS, "mean recall"]
    return Table("Zero-shot retrieval, percent", header, rows, notes, frozenset(best), frozenset(published))


def _recalls(label: str, result: dict) -> list[list[str]]:
    """Our row of one set and, where requested, one counted in the released code's way."""
    counts = [(label, result["metrics"])]
    if result.get("legacy"):
        counts.append((label + LEGACY, result["legacy"]["metrics"]))
    return [
        [*_place(result, name), *(_percent(metrics[key]) for key in (*RECALLS, "mean_recall"))]
        for name, metrics in counts
    ]


def _published_recalls(result: dict) -> list[list[str]]:
    """Published rows of the set of a result, if it has the published number of pictures."""
    name = result["dataset"].lower()
    rows = chinese_rows() if name in chinese_sets() else published_rows()
    if rows is published_rows() and published_samples("retrieval").get(name) != result["images"]:
        return []
    found = [(row.model, row.retrieval[name]) for row in rows if name in row.retrieval]
    return [[*_place(result, model), *map(_figure, (*r, None if None in r else sum(r) / len(r)))] for model, r in found]


def _place(result: dict, model: str) -> list[str]:
    return [result["dataset"], model, result["split"] or NOTHING, str(result["images"]), str(result["captions"])]


def _compare_classes(task: str, runs: Sequence[dict]) -> Table:
    """One row for a model, one column for a set with its headline metric."""
    found = _join(runs)
    present = dict.fromkeys(name for _, results in found for name in results)
    order = published_samples("classification")
    sets = [name for name in order if name in present] + [name for name in present if name not in order]
    whole = all(name in sets for name in order)  # with an average of all
    theirs = [row for row in published_rows() if task == "classification" and row.classification.keys() & set(sets)]
    rows = [
        [row.model, *(_figure(row.classification.get(name)) for name in sets), *([_figure(row.average)] * whole)]
        for row in theirs
    ]
    for label, results in found:
        ways = ["", LEGACY] if any("legacy" in result for result in results.values()) else [""]
        for way in ways:
            figures = [_headline(results.get(name), bool(way)) for name in sets]
            rows.append([label + way, *figures, *([_average(figures, sets)] * whole)])
    headlines = {result["dataset"]: result["headline"] for _, results in found for result in results.values()}
    means = [name for name in sets if headlines[name] == "mean_per_class"]
    notes = [f"Mean per class: {', '.join(means)}; top-1 elsewhere"] if means else ["Top-1"]
    notes += [
        f"Starred, {name}: {result['metrics']['samples']} of {order[name]} pictures, not the published set"
        for _, results in found
        for name, result in results.items()
        if _is_partial(result)
    ]
    notes += _sources("classification") if theirs else []
    notes += _defects(runs)
    header = ["model", *sets, *(["average of the eleven"] * whole)]
    title = "Linear probe, percent" if task == "linear_probe" else "Zero-shot classification, percent"
    best, published = _best(rows, range(1, len(header))), range(len(theirs))
    return Table(title, header, rows, list(dict.fromkeys(notes)), frozenset(best), frozenset(published))


def _join(runs: Sequence[dict]) -> list[tuple[str, dict[str, dict]]]:
    """(label, results by set) of each row: runs of one model share a row where they have no set in common."""
    found: list[tuple[str, dict[str, dict]]] = []
    for label, run in zip(_labels(runs), runs):
        done = {result["dataset"]: result for result in run["results"] if _is_done(result)}
        row = next((sets for name, sets in found if name == label and not sets.keys() & done.keys()), None)
        if row is None:
            found.append((label, done))
        else:
            row.update(done)
    return found


def _headline(result: dict | None, legacy: bool) -> str:
    if result is None or (legacy and "legacy" not in result):
        return NOTHING
    metrics = result["legacy"]["metrics"] if legacy else result["metrics"]
    return _percent(metrics[result["headline"]]) + ("*" if _is_partial(result) else "")


def _average(figures: Sequence[str], sets: Sequence[str]) -> str:
    """Mean of the eleven published sets, where each is complete."""
    known = [figure for name, figure in zip(sets, figures) if name in published_samples("classification")]
    return f"{sum(map(float, known)) / len(known):.1f}" if known and all(map(_is_number, known)) else NOTHING


def _is_partial(result: dict) -> bool:
    """Whether a published set was evaluated on another number of pictures than the published figure."""
    whole = published_samples("classification").get(result["dataset"])
    return whole is not None and whole != result["metrics"]["samples"]


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


def _sources(task: str) -> list[str]:
    """Where the published rows come from, and which are missing."""
    by_source: dict[str, list[str]] = {}
    for row in published_rows():
        if getattr(row, task):
            by_source.setdefault(row.source, []).append(row.method)
    notes = [f"Published row of {', '.join(methods)}: {source}" for source, methods in by_source.items()]
    absent = not_at_hand(task)
    return notes + ([f"Published rows that are not available, left out: {', '.join(absent)}"] if absent else [])


def _chinese_sources(sets: set[str]) -> list[str]:
    """Where the published rows of Chinese sets come from, and what is not known of them."""
    sources = dict.fromkeys(row.source for row in chinese_rows() if row.retrieval.keys() & sets)
    warning = "Published rows of Chinese sets: official split (MUGE: validation, else test), zero-shot unless it says "
    warning += "fine-tuned; their sources do not print the number of pictures, so compare only if yours is that split"
    return [f"Published row of Chinese-CLIP: {source}" for source in sources] + ([warning] if sources else [])


def _defects(runs: Sequence[dict]) -> list[str]:
    """Every defect of the released code that a legacy row reproduces or does not."""
    return [
        f"{label}{LEGACY}, {result['dataset']}: {defect['name']} ({defect['says']}), "
        f"{'' if defect['reproduced'] else 'not '}reproduced: {defect['effect']}"
        for label, run in zip(_labels(runs), runs)
        for result in run["results"]
        for defect in result.get("legacy", {}).get("defects", ())
    ]


def _best(rows: Sequence[Sequence[str]], columns: Iterable[int]) -> set[tuple[int, int]]:
    """Cells with the highest figure of their column, among the exact ones, where there are two or more."""
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


def _figure(percent: float | None) -> str:
    return NOTHING if percent is None else f"{percent:.1f}"


def _percent(fraction: float | None) -> str:
    return _figure(None if fraction is None else 100 * fraction)
