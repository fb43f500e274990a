"""A retrieval run: recall, its report, and retrieval.png with what the model found."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from rwkv_clip.config import ranged
from rwkv_clip.data.retrieval_set import RetrievalSet, load_retrieval
from rwkv_clip.features import on_all_ranks
from rwkv_clip.fonts import wrap_text
from rwkv_clip.metrics import nearest_items, target_ranks
from rwkv_clip.retrieval import RetrievalResult, evaluate_retrieval
from rwkv_clip.tokenizer import BERT_CHINESE

from .. import upstream
from ..encoder import Encoder
from ..report.files import keep
from ..report.plots import drawable, png_of
from ..report.run import start_report
from ..settings import CaptionedSettings

SHOWN = 5  # pictures for each query of the gallery


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(CaptionedSettings):
    """Zero-shot retrieval, image to text and text to image: recall at 1, 5 and 10."""

    data: str
    """JSON list, JSON lines, Karpathy's or COCO's JSON, Chinese-CLIP's NAME_texts.jsonl or LMDB folder, or records
    (prefix, .rec, glob, comma list)."""
    split: str | None = None
    """Use only entries of this split ("all": every one); needed where the file holds several."""
    dataset: str | None = None
    """Name in the report; flickr30k, coco, muge, flickr30k-cn and coco-cn add the published rows. Default: from the
    file."""
    gallery: int = ranged(8, minimum=0)
    """Queries shown in retrieval.png with their five best pictures; 0: none."""
    legacy: bool = False
    """Also count as the released code does, with its defects named; the exact figures stay the result."""


def load(settings: CaptionedSettings, device: torch.device) -> RetrievalSet:
    """The set that `settings` name; all ranks call it."""
    names = ("split", "image_root", "texts", "allow_outside")
    return on_all_ranks(lambda: load_retrieval(settings.data, **{n: getattr(settings, n) for n in names}), device)


def run(settings: RetrievalSettings, data: RetrievalSet, encoder: Encoder) -> int:
    """Evaluate retrieval and write the report."""
    if settings.legacy and data.pairs is not None:
        raise ValueError(f"legacy: the released RWKV-CLIP code does not read {data.path}; leave --legacy out")
    report, tokenizer = start_report("retrieval", settings, encoder), encoder.loaded.tokenizer
    result = evaluate_retrieval(encoder.extractor, data, settings.prefix)
    name, legacy = settings.dataset or data.name, {}
    notes = data.note, note_cut(data, result.captions_cut, tokenizer), note_prefix(settings.prefix, tokenizer)
    if settings.legacy:
        features = result.image_features, result.text_features
        legacy["legacy"] = upstream.count_retrieval(*features, data.image_of_caption, name.lower())
    report.add(
        {
            "dataset": name,
            "status": "done",
            "path": data.path,
            "split": data.split,
            "images": len(data.image_names),
            "captions": len(data.image_of_caption),
            "captions_cut": result.captions_cut,
            "note": "; ".join(filter(None, notes)),
            "prefix": settings.prefix,
            "metrics": result.metrics,
            **legacy,
            "seconds": round(time.monotonic() - report.started, 3),
        }
    )
    if settings.gallery and report.folder:  # the main rank has one
        keep(report.folder / "retrieval.png", lambda: draw_gallery(data, result, settings.gallery))
    return report.finish()


def note_cut(data: RetrievalSet, count: int, tokenizer) -> str:
    """How many captions are cut, in words; "" where none is."""
    if not count:
        return ""
    which = f"{count} of {len(data.image_of_caption)} captions"
    if data.captions is None:
        return f"{which} fill the context of {data.tokens.shape[1]} tokens: records do not say which of them were cut"
    return f"{which} are longer than the context of {tokenizer.context} tokens: their ends were cut off"


def note_prefix(prefix: str, tokenizer) -> str:
    """What is odd about English words before Chinese captions; "" where they are not."""
    if prefix.strip() and prefix.isascii() and getattr(tokenizer, "name", None) == BERT_CHINESE:
        return f"the model reads Chinese and the prefix is {prefix!r}: leave it out (--prefix '')"
    return ""


def draw_gallery(data: RetrievalSet, result: RetrievalResult, queries: int) -> bytes:
    """A picture (PNG): `queries` captions spread over the set, each with its five best pictures, best first.

    The right picture has a green frame. Where it is not among the five, it follows with its rank, framed in
    orange.
    """
    from matplotlib.figure import Figure

    owned = torch.from_numpy(data.image_of_caption >= 0).nonzero().flatten()
    total = len(owned)
    chosen = owned[torch.linspace(0, total - 1, min(queries, total)).round().long().unique()]
    texts = result.text_features[chosen]
    rights = [torch.tensor(data.images_of(caption)) for caption in chosen.tolist()]
    # Of several right pictures the best: none is counted among the wrong ones before it.
    owners = torch.stack([own[(result.image_features[own] @ text).argmax()] for own, text in zip(rights, texts)])
    best, _ = nearest_items(texts, result.image_features, SHOWN)
    ranks = target_ranks(texts, result.image_features, owners)
    figure = Figure(figsize=(12.5, 1.9 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), SHOWN + 2, squeeze=False, width_ratios=[1.7, *[1] * (SHOWN + 1)])
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    places = zip(chosen.tolist(), owners.tolist(), best.tolist(), ranks.tolist())
    for row, own, (caption, owner, found, rank) in zip(grid, rights, places):
        text = drawable(wrap_text(data.caption_text(caption), 28, 180))
        row[0].text(0, 0.5, text, va="center", fontsize=9, transform=row[0].transAxes)
        right = own.tolist()
        for axes, image in zip(row[1:], found):
            _show(axes, data.open(image), "tab:green" if image in right else None)
        if not set(right) & set(found):
            _show(row[-1], data.open(owner), "tab:orange", f"rank {rank + 1} of {len(data.image_names)}")
    return png_of(figure, dpi=90)


def _show(axes, picture, frame: str | None, title: str = "") -> None:
    picture.thumbnail((224, 224))
    axes.imshow(picture)
    axes.set_title(title, fontsize=8)
    if frame:
        axes.spines[:].set(visible=True, color=frame, linewidth=4)
