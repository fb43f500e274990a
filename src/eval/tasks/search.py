"""Nearest neighbours in exported features: text to image and image to text, exact or through faiss.

Exact means: similarities are exact sums (see `metrics`), the best come first, and ties come in the order of the folder,
whatever chunks, device or number of threads. faiss (any of its index types) computes in float32 and orders ties
arbitrarily.

Results are lines {"text_id", "image_ids", "scores"} in text_to_image.jsonl and {"image_id", "text_ids", "scores"} in
image_to_text.jsonl, best first: what Chinese-CLIP's evaluation reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rwkv_clip.config import ranged
from rwkv_clip.data.image import open_picture
from rwkv_clip.dist import choose_device
from rwkv_clip.feature_files import KINDS, Features, json_line, read_about, read_features
from rwkv_clip.files import new_folder, write_whole
from rwkv_clip.metrics import nearest_items
from rwkv_clip.nearest import Gallery, search
from rwkv_clip.tokenizer import count_cut, prepare_texts

from ..encoder import Encoder
from ..report.formats import markdown

DIRECTIONS = {
    "text_to_image": {"queries": "texts", "items": "images"},
    "image_to_text": {"queries": "images", "items": "texts"},
}
Answer = tuple[object, list[tuple[int, float]]]  # a query's id, and index and similarity of what was found, best first
EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Nearest neighbours, text to image and image to text, in a folder that `features` wrote."""

    features: str
    """Folder with features of images, texts or both; Chinese-CLIP's *_feat.jsonl are read as well."""
    direction: Literal["both", "text_to_image", "image_to_text"] = "both"
    """Which items of the folder search for which, where no query is given."""
    query: tuple[str, ...] = ()
    """Texts to search images for, instead of those of the folder; `checkpoint` encodes them."""
    picture: tuple[str, ...] = ()
    """Picture files to search texts for; `checkpoint` encodes them."""
    k: int = ranged(10, minimum=1)
    """Results for each query."""
    index: str = EXACT
    """exact, or a faiss index_factory text: Flat, HNSW32, IVF1024,Flat .. (needs the extra `faiss`)."""
    checkpoint: str | None = None
    """Model for `query` and `picture`. Default: the one that made the features."""
    model: str | None = None
    """Model name or JSON, where the checkpoint does not describe its model."""
    prefix: str | None = None
    """Prepended to every query; default: the prefix that `features` used."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best present."""
    output: str | None = None
    """Folder for text_to_image.jsonl and image_to_text.jsonl; default: `search` in that of the features. A number is
    added where it exists already."""

    def problems(self) -> list[str]:
        return []


def run(settings: SearchSettings) -> int:
    """Search as `settings` say: results of given queries are printed, otherwise files are written."""
    folder = Path(settings.features)
    about, device = read_about(folder), choose_device(settings.device)
    stored = {kind: found for kind in KINDS if (found := read_features(folder, kind))}
    if settings.query or settings.picture:
        for direction, queries in _own_queries(settings, about, stored, device):
            items = _take(settings, stored, direction, "items")
            print(markdown(_table(items, _search(settings, queries, items, device))), end="")
        return 0
    wanted = DIRECTIONS if settings.direction == "both" else [settings.direction]
    if settings.direction == "both" and len(stored) < len(KINDS):
        raise ValueError(f"{folder}: holds no pair of images and texts; give --query or --picture")
    found = {}
    for direction in wanted:
        queries, items = (_take(settings, stored, direction, role) for role in ("queries", "items"))
        found[direction] = queries, items, _search(settings, queries, items, device)
    output = new_folder(Path(settings.output or folder / "search"))
    for direction, answers in found.items():
        write_whole(output / f"{direction}.jsonl", _lines(*answers))
        print(f"results: {output / f'{direction}.jsonl'}")
    return 0


def nearest_by_faiss(queries: Tensor, items: Tensor, count: int, factory: str) -> tuple[Tensor, Tensor]:
    """`nearest_items` through a faiss index that `factory` describes; float32. An index of -1: it found fewer."""
    try:
        import faiss
    except ImportError:
        raise ValueError(f"index: {factory!r} needs faiss; pip install -e .[faiss], or use exact") from None
    vectors, count = items.numpy(), min(count, len(items))
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        reason = str(error).strip().rsplit(": ", 1)[-1]
        raise ValueError(f"index: faiss cannot make {factory!r} of {len(items)} items ({reason}); try Flat") from None
    scores, places = index.search(queries.numpy(), count)
    return torch.from_numpy(places), torch.from_numpy(scores)


def _search(settings: SearchSettings, queries: Features, items: Features, device: torch.device) -> list[Answer]:
    """The best items of each query."""
    if settings.index == EXACT and device.type == "cpu":
        found = search(Gallery.of(items.vectors.numpy()), queries.vectors.numpy(), settings.k)
        places, scores = map(torch.from_numpy, found)
    elif settings.index == EXACT:
        places, scores = nearest_items(queries.vectors, items.vectors, settings.k, device)
    else:
        places, scores = nearest_by_faiss(queries.vectors, items.vectors, settings.k, settings.index)
    rows = zip(queries.ids, places.tolist(), scores.tolist())
    return [(query, [pair for pair in zip(row, values) if pair[0] >= 0]) for query, row, values in rows]


def _take(settings: SearchSettings, stored: dict[str, Features], direction: str, role: str) -> Features:
    """The queries or the items of the folder. ValueError where it has none."""
    kind = DIRECTIONS[direction][role]
    if kind not in stored:
        raise ValueError(f"{settings.features}: holds no {kind}, which {direction} needs; write them with `features`")
    return stored[kind]


def _own_queries(
    settings: SearchSettings, about: dict, stored: dict[str, Features], device: torch.device
) -> Iterator[tuple[str, Features]]:
    """The user's texts and pictures, encoded by the model that made the features."""
    for direction, given in (("text_to_image", settings.query), ("image_to_text", settings.picture)):
        if given:
            _take(settings, stored, direction, "items")
    paths = [Path(path) for path in settings.picture]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"picture: {path}: no such file")
    encoder = _load_encoder(settings, about, device)
    if settings.query:
        tokenizer, prefix = encoder.loaded.tokenizer, settings.prefix
        before = about.get("prefix", "") if prefix is None else prefix
        texts = prepare_texts(tokenizer, [before + text for text in settings.query])
        tokens = tokenizer(texts)
        if cut := count_cut(texts, tokens, tokenizer):
            print(f"{cut} queries are longer than the context of {tokens.shape[1]} tokens: cut", file=sys.stderr)
        yield (
            "text_to_image",
            Features("texts", encoder.extractor.encode_tokens(tokens), [{"text_id": text} for text in settings.query]),
        )
    if settings.picture:
        vectors = encoder.extractor.encode_images(lambda i: open_picture(paths[i]), len(paths))
        yield "image_to_text", Features("images", vectors, [{"image_id": str(path)} for path in paths])


def _load_encoder(settings: SearchSettings, about: dict, device: torch.device) -> Encoder:
    """The model that made the features, or the one that the user says is the same."""
    folder = Path(settings.features)
    checkpoint = settings.checkpoint or _find_again(about.get("checkpoint"), folder)
    if not checkpoint:
        raise ValueError(f"checkpoint: {settings.features} does not say what made it; name the model's checkpoint")
    model = settings.model or about.get("model_setting")
    if model and not settings.model and model.endswith(".json"):
        model = _find_again(model, folder)
    from rwkv_clip.factory import load_for_inference

    loaded = load_for_inference(checkpoint, model=model, device=str(device), precision=about.get("precision", "fp32"))
    if about and loaded.digest != about["checkpoint_sha256"]:
        raise ValueError(f"checkpoint: {checkpoint} is not what made {settings.features}; write the features again")
    return Encoder.of(loaded, device, workers=0)


def _find_again(place: str | None, features: Path) -> str | None:
    """A file or folder that a folder of features names. Older ones name it relative to where `features` was started,
    usually a folder above; what is found is checked by its digest."""
    if place is None or Path(place).exists():
        return place
    above = (folder / place for folder in features.resolve().parents)
    return next((str(path) for path in above if path.exists()), place)


def _table(items: Features, answers: list[Answer]) -> list[list[str]]:
    """Query, rank, similarity, id and, where known, text or class of each result."""
    rows, ids = [["query", "rank", "similarity", "id", ""]], items.ids
    for query, found in answers:
        for rank, (place, score) in enumerate(found, 1):
            about = items.rows[place].get("text", items.rows[place].get("class", ""))
            rows.append([str(query), str(rank), f"{score:.4f}", str(ids[place]), str(about)])
    return rows


def _lines(queries: Features, items: Features, answers: list[Answer]) -> Iterator[bytes]:
    ids, asked, answer = items.ids, KINDS[queries.kind], KINDS[items.kind] + "s"
    for query, found in answers:
        yield json_line({asked: query, answer: [ids[place] for place, _ in found], "scores": [s for _, s in found]})
