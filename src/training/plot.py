"""training.png: loss, learning rate, temperature, retrieval and what --eval measures of a run, from its log.jsonl."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rwkv_clip.files import write_whole

HEADLINES = ("/top1", "/mean_recall")  # the metric of each task of --eval that is drawn


def plot_training(folder: Path) -> Path:
    """Draw `folder/training.png` from `folder/log.jsonl`; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evaluated = sorted({key for record in records for key in record if key.endswith(HEADLINES)})
    rows: list[Any] = [["loss", "lr"], ["logit_scale", "retrieval"], *([["evaluated"] * 2] if evaluated else [])]
    figure, axes = plt.subplot_mosaic(rows, figsize=(10, 3 * len(rows)), layout="constrained")
    panels = [("loss", "loss"), ("lr", "learning rate"), ("logit_scale", "logit scale (exp)")]
    for key, title in panels:
        axis = axes[key]
        points = [(record["step"], record[key]) for record in records if key in record]
        axis.plot(*zip(*points)) if points else None
        axis.set_title(title)
    if evaluated:
        _draw_evaluated(axes["evaluated"], records, evaluated)
    retrieval = axes["retrieval"]
    for key, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for k, style in ((1, "-"), (5, "--")):
            name = f"val_{key}_R@{k}"
            points = [(record["step"], 100 * record[name]) for record in records if name in record]
            if points:
                color = "tab:blue" if key == "text_to_image" else "tab:orange"
                retrieval.plot(*zip(*points), style, color=color, marker=".", label=f"{label} R@{k}")
    retrieval.set_title("retrieval on --val-data, %")
    if retrieval.lines:
        retrieval.set_ylim(0, 100)
        retrieval.legend()
    else:
        retrieval.text(0.5, 0.5, "no --val-data", ha="center", transform=retrieval.transAxes)
    for axis in axes.values():
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    path, image = folder / "training.png", io.BytesIO()
    figure.savefig(image, dpi=110)
    plt.close(figure)
    write_whole(path, [image.getvalue()])
    return path


def _draw_evaluated(axis: Any, records: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        points = [(record["step"], 100 * record[name]) for record in records if name in record]
        axis.plot(*zip(*points), marker=".", label=name)
    axis.set_title("--eval, %")
    axis.set_ylim(0, 100)
    axis.legend()
