"""A retrieval run: recall, its report, and retrieval.png with what the model found."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import torch

from rwkv_clip.data.retrieval_set import RetrievalSet, load_retrieval
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.metrics import nearest_items, target_ranks
from rwkv_clip.retrieval import RetrievalResult, evaluate_retrieval

from .cache import on_all_ranks
from .legacy import legacy_retrieval
from .plots import drawable
from .report import Report, keep, start_report
from .settings import FeaturesSettings, RetrievalSettings

SHOWN = 5  # pictures for each query of the gallery


def load(settings: RetrievalSettings | FeaturesSettings, device: torch.device) -> RetrievalSet:
    """The set that `settings` name; all ranks call it."""
    names = ("split", "image_root", "allow_outside")
    options = {"texts": settings.views, **{name: getattr(settings, name) for name in names}}
    return on_all_ranks(lambda: load_retrieval(settings.data, **options), device)


def run(settings: RetrievalSettings, data: RetrievalSet, loaded, device: torch.device) -> Report:
    """Evaluate retrieval on `data` as `settings` say with a model of `load_for_inference`."""
    report = start_report("retrieval", settings, loaded, device)
    work = {"batch_size": settings.batch_size, "workers": settings.workers}
    extractor = FeatureExtractor.of(loaded, device, progress=True, **work)
    result = evaluate_retrieval(extractor, data, settings.prefix)
    name, legacy = settings.dataset or data.name, {}
    if settings.legacy:
        pairs = (result.image_features, result.text_features, data.image_of_caption)
        legacy["legacy"] = legacy_retrieval(*pairs, name.lower())
    report.add(
        {
            "dataset": name,
            "status": "done",
            "path": data.path,
            "split": data.split,
            "images": len(data.image_names),
            "captions": len(data.image_of_caption),
            "captions_cut": result.captions_cut,
            "note": "; ".join(filter(None, [data.note, cut_note(data, result.captions_cut, loaded.tokenizer)])),
            "prefix": settings.prefix,
            "metrics": result.metrics,
            **legacy,
            "seconds": round(time.monotonic() - report.started, 3),
        }
    )
    if settings.gallery and report.folder:  # the main rank has one
        keep(report.folder / "retrieval.png", lambda path: draw_gallery(data, result, path, settings.gallery))
    return report


def cut_note(data: RetrievalSet, count: int, tokenizer) -> str:
    """How many captions are cut, in words; nothing where none is."""
    if not count:
        return ""
    which = f"{count} of {len(data.image_of_caption)} captions"
    if data.captions is None:
        return f"{which} fill the context of {data.tokens.shape[1]} tokens: records do not say which of them were cut"
    return f"{which} are longer than the context of {tokenizer.context} tokens: their ends were cut off"


def draw_gallery(data: RetrievalSet, result: RetrievalResult, path: Path, queries: int) -> None:
    """Save a picture: `queries` captions spread over the set, each with its five best pictures, best first.

    The right picture has a green frame. Where it is not among the five, it follows with its rank, framed in
    orange.
    """
    from matplotlib.figure import Figure

    total = len(data.image_of_caption)
    chosen = torch.linspace(0, total - 1, min(queries, total)).round().long().unique()
    texts, owners = result.text_features[chosen], torch.from_numpy(data.image_of_caption)[chosen]
    best, _ = nearest_items(texts, result.image_features, SHOWN)
    ranks = target_ranks(texts, result.image_features, owners)
    figure = Figure(figsize=(12.5, 1.9 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), SHOWN + 2, squeeze=False, width_ratios=[1.7, *[1] * (SHOWN + 1)])
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for row, caption, owner, found, rank in zip(grid, chosen.tolist(), owners.tolist(), best.tolist(), ranks.tolist()):
        text = textwrap.fill(textwrap.shorten(data.caption_text(caption), 180), 28)
        row[0].text(0, 0.5, drawable(text), va="center", fontsize=9, transform=row[0].transAxes)
        for axes, image in zip(row[1:], found):
            _show(axes, data.open(image), "tab:green" if image == owner else None)
        if owner not in found:
            _show(row[-1], data.open(owner), "tab:orange", f"rank {rank + 1} of {len(data.image_names)}")
    figure.savefig(path, dpi=90)


def _show(axes, picture, frame: str | None, title: str = "") -> None:
    picture.thumbnail((224, 224))
    axes.imshow(picture)
    axes.set_title(title, fontsize=8)
    if frame:
        axes.spines[:].set(visible=True, color=frame, linewidth=4)
