"""The newest results per bench and device as one Markdown page and one plot.

python tests/bench/summary.py     # tests/bench/results/*.json -> tests/bench/results/SUMMARY.md, figure/bench.png
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from harness import RESULTS, ROOT, SCHEMA, table_of

FIGURE = ROOT / "figure" / "bench.png"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
REACHED, SHORT = "#2a7f62", "#c8553d"


def read_results(folder: Path) -> list[dict]:
    """The newest result of each bench and device, by bench, then device. ValueError names a file that is none."""
    newest: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            key, good = (result["bench"], result["device"]), result["schema"] == SCHEMA
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f"{path.name} is no result of a bench (schema {SCHEMA}); delete it or run the bench again")
        if key not in newest or newest[key]["date"] < result["date"]:
            newest[key] = result
    return [newest[key] for key in sorted(newest)]


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def describe(result: dict) -> str:
    """'AMD EPYC, 2 cores, 2 threads, torch 2.15.0, commit abc with changes, 2026-11-21: `python ..`'."""
    machine = f"{result['device']}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    commit = f"commit {result['commit']}{' with changes' if result['changed'] else ''}"
    return f"{machine}, torch {result['torch']}, {commit}, {result['date'][:10]}: `{result['command']}`"


def result_lines(result: dict) -> list[str]:
    """One result: where it comes from, its checks, its rows, its ratios."""
    lines = [describe(result), "", *markdown_table(*table_of(result)), ""]
    ratios = [ratio for ratio in result["ratios"] if "contender" not in ratio]
    if ratios:
        goals = ["" if ratio["goal"] is None else f"{ratio['goal']:g}" for ratio in ratios]
        rows = [[ratio["case"], ratio["what"], f"{ratio['value']:.2f}", aim] for ratio, aim in zip(ratios, goals)]
        lines += [*markdown_table(["case", "ratio", "value", "goal"], rows), ""]
    worst = max(result["gates"], key=lambda gate: gate["error"] / gate["limit"] if gate["limit"] else 0, default=None)
    if worst:
        near = f"the one nearest to its limit: {worst['what']}, {worst['error']:.2g} of {worst['limit']:.2g}"
        lines += [f"Checks passed before any time was taken: {len(result['gates'])}; {near}.", ""]
    return lines


def summary_text(results: list[dict]) -> str:
    """The page: a section per bench, a part per device; a kind of device without a result is said to be missing."""
    lines = ["# Benches", "", "Made by `python tests/bench/summary.py` from the JSON files beside this page. Times are"]
    lines += [
        "medians of alternating calls; a ratio is the baseline's time over the contender's: larger is better.",
        "",
    ]
    for bench in dict.fromkeys(result["bench"] for result in results):
        lines += [f"## {bench}", ""]
        own = [result for result in results if result["bench"] == bench]
        for result in own:
            lines += result_lines(result)
        for kind in KINDS.keys() - {result["kind"] for result in own}:
            lines += [f"{KINDS[kind]}: not measured.", ""]
    return "\n".join(lines).rstrip() + "\n"


def plot_bars(axis, ratios: list[tuple[str, dict]], title: str, ends: tuple[float, float]) -> None:
    """One bar per ratio with its goal as a tick, on a logarithmic axis that starts at 1 (equal to the peer)."""
    for place, (_, ratio) in enumerate(ratios):
        value, goal = ratio["value"], ratio["goal"]
        color = REACHED if value >= goal else SHORT
        axis.barh(place, value - 1, left=1, color=color, height=0.7)
        text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
        axis.text(max(value, 1) * 1.04, place, text, va="center", fontsize=7)
        axis.plot([goal, goal], [place - 0.45, place + 0.45], color="black", linewidth=1.6)
    axis.set_xscale("log")
    axis.set_xlim(ends)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if ends[0] <= t <= ends[1]]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=7)
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(ratios)), [label for label, _ in ratios], fontsize=7)
    axis.set_ylim(len(ratios) - 0.4, -0.6)
    axis.set_title(title, fontsize=9, loc="left")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def plot_ratios(results: list[dict], path: Path) -> Path | None:
    """All ratios that have a goal, one panel per bench and device, goals as ticks; None where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = []
    for result in results:
        ratios = [(f"{ratio['case']}: {ratio['what']}", ratio) for ratio in result["ratios"] if _can_draw(ratio)]
        if ratios:
            panels.append((f"{result['bench']} on {result['device']}", ratios))
    if not panels:
        return None
    heights = [len(ratios) + 2.2 for _, ratios in panels]
    size = (9.5, 0.19 * sum(heights) + 0.9)
    figure, axes = plt.subplots(len(panels), figsize=size, layout="constrained", height_ratios=heights, squeeze=False)
    values = [1, *(n for _, ratios in panels for _, ratio in ratios for n in (ratio["value"], ratio["goal"]))]
    for axis, (title, ratios) in zip(axes[:, 0], panels):
        plot_bars(axis, ratios, title, (min(values) / 1.15, max(values) * 1.35))
    kinds = {result["kind"] for result in results}
    absent = "".join(f" {KINDS[kind]}: not measured." for kind in KINDS if kind not in kinds)
    what = "Times faster (or smaller) than the peer. Ticks: goals. Green: reached, red: not reached."
    figure.suptitle(what + absent, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _can_draw(ratio: dict) -> bool:
    return ratio["goal"] is not None and math.isfinite(ratio["value"]) and ratio["value"] > 0


def write_summary(folder: Path = RESULTS, figure: Path = FIGURE) -> list[Path]:
    """Write SUMMARY.md into `folder` and the plot; returns the files. The plot needs matplotlib, the page does not."""
    results = read_results(folder)
    if not results:
        raise ValueError(f"{folder.name}: no results; run bash shell/bench.sh")
    page = folder / "SUMMARY.md"
    page.write_text(summary_text(results))
    try:
        drawn = plot_ratios(results, figure)
    except ImportError:
        print("matplotlib is not installed: no plot (pip install matplotlib)")
        drawn = None
    return [page, drawn] if drawn else [page]


if __name__ == "__main__":
    for written in write_summary():
        print(written.relative_to(ROOT))
