"""Nearest neighbours in exported features: text to image and image to text, exact or through faiss.

Exact means: similarities are exact sums (see `metrics`), the best come first, and equal ones come in the order of the
folder, whatever chunks, device or number of threads. Only a piece of the matrix of similarities exists at a time.
faiss (any of its index types) computes in float32 and orders equal ones as it likes.

Results are lines {"text_id", "image_ids", "scores"} in text_to_image.jsonl and {"image_id", "text_ids", "scores"} in
image_to_text.jsonl, best first: what Chinese-CLIP's evaluation reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rwkv_clip.data.image import open_picture
from rwkv_clip.dist import choose_device
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.files import write_whole
from rwkv_clip.metrics import nearest_items
from rwkv_clip.tokenizer import count_cut

from .export import KINDS, Features, read_about, read_features
from .report import markdown, new_folder
from .settings import SearchSettings

WAYS = {"text_to_image": ("texts", "images"), "image_to_text": ("images", "texts")}
EXACT = "exact"


def run(settings: SearchSettings) -> list[Path]:
    """Search as `settings` say. Own queries are answered on the screen; else the written files are returned."""
    folder = Path(settings.features)
    about, device = read_about(folder), choose_device(settings.device)
    stored = {kind: read_features(folder, kind) for kind in KINDS}
    if settings.query or settings.picture:
        for way, queries in _own_queries(settings, about, stored, device):
            print(markdown(_table(queries, *_search(settings, way, queries, stored, device))), end="")
        return []
    wanted = [
        way
        for way, kinds in WAYS.items()
        if settings.direction == way or (settings.direction == "both" and all(stored[kind] for kind in kinds))
    ]
    if not wanted:
        raise ValueError(f"{folder}: holds no pair of images and texts; give --query or --picture")
    found = [(way, *_search(settings, way, _need(settings, stored, way, 0), stored, device)) for way in wanted]
    output = Path(settings.output) if settings.output else folder / "search"
    output.parent.mkdir(parents=True, exist_ok=True)
    output = new_folder(output.parent, output.name)
    paths = []
    for way, items, places, scores in found:
        paths.append(output / f"{way}.jsonl")
        write_whole(paths[-1], _lines(stored[WAYS[way][0]], items, places, scores))
    return paths


def nearest_by_faiss(queries: Tensor, items: Tensor, count: int, factory: str) -> tuple[Tensor, Tensor]:
    """`nearest_items` through a faiss index that `factory` describes; float32. A place of -1: it found fewer."""
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
        reason = str(error).split("Error: ")[-1].splitlines()[0].strip()
        raise ValueError(f"index: faiss cannot make {factory!r} of {len(items)} items ({reason}); try Flat") from None
    scores, places = index.search(queries.numpy(), count)
    return torch.from_numpy(places), torch.from_numpy(scores)


def _search(
    settings: SearchSettings, way: str, queries: Features, stored: dict, device: torch.device
) -> tuple[Features, Tensor, Tensor]:
    items = _need(settings, stored, way, 1)
    if settings.index == EXACT:
        return items, *nearest_items(queries.vectors, items.vectors, settings.k, device)
    return items, *nearest_by_faiss(queries.vectors, items.vectors, settings.k, settings.index)


def _need(settings: SearchSettings, stored: dict, way: str, role: int) -> Features:
    """The queries (role 0) or items (1) of the folder. ValueError where it has none."""
    kind = WAYS[way][role]
    if stored[kind] is None:
        raise ValueError(f"{settings.features}: holds no {kind}, which {way} needs; write them with `features`")
    return stored[kind]


def _find_again(place: str | None, features: Path) -> str | None:
    """A file or folder that a folder of features names. Older ones name it from where `features` was started, which
    was most often a folder above; what is found is checked by its digest."""
    if place is None or Path(place).exists():
        return place
    above = (folder / place for folder in features.resolve().parents)
    return next((str(path) for path in above if path.exists()), place)


def _own_queries(settings: SearchSettings, about: dict, stored: dict, device) -> Iterator[tuple[str, Features]]:
    """Texts and pictures of the user, encoded by the model that the features came from."""
    for way, given in (("text_to_image", settings.query), ("image_to_text", settings.picture)):
        if given:
            _need(settings, stored, way, 1)
    paths = [Path(path) for path in settings.picture]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"picture: {path}: no such file")
    folder, precision = Path(settings.features), about.get("precision", "fp32")
    checkpoint = settings.checkpoint or _find_again(about.get("checkpoint"), folder)
    if not checkpoint:
        raise ValueError(f"checkpoint: {settings.features} does not say what made it; name the model's checkpoint")
    model = settings.model or about.get("model_setting")
    if model and not settings.model and model.endswith(".json"):
        model = _find_again(model, folder)
    from rwkv_clip.factory import load_for_inference

    loaded = load_for_inference(checkpoint, model=model, device=str(device), precision=precision)
    if about and loaded.digest != about["checkpoint_sha256"]:
        raise ValueError(f"checkpoint: {checkpoint} is not what made {settings.features}; write the features again")
    extractor = FeatureExtractor.of(loaded, device, workers=0)
    if settings.query:
        prefix = about.get("prefix", "") if settings.prefix is None else settings.prefix
        texts = [prefix + text for text in settings.query]
        tokens = loaded.tokenizer(texts)
        if cut := count_cut(texts, tokens, loaded.tokenizer):
            print(f"{cut} queries are longer than the context of {tokens.shape[1]} tokens: cut", file=sys.stderr)
        rows = [{"text_id": text} for text in settings.query]
        yield "text_to_image", Features("texts", extractor.encode_tokens(tokens), rows)
    if settings.picture:
        vectors = extractor.encode_images(lambda i: open_picture(paths[i]), len(paths))
        yield "image_to_text", Features("images", vectors, [{"image_id": str(path)} for path in paths])


def _table(queries: Features, items: Features, places: Tensor, scores: Tensor) -> list[list[str]]:
    """Query, rank, similarity, id and, where known, text or class of each result."""
    rows = [["query", "rank", "similarity", "id", ""]]
    for query, found, values in zip(queries.ids, places.tolist(), scores.tolist()):
        for rank, (place, value) in enumerate((p, v) for p, v in zip(found, values) if p >= 0):
            facts = items.rows[place]
            about = facts.get("text", facts.get("class", ""))
            rows.append([str(query), str(rank + 1), f"{value:.4f}", str(items.ids[place]), str(about)])
    return rows


def _lines(queries: Features, items: Features, places: Tensor, scores: Tensor) -> Iterator[bytes]:
    ids, asked, answer = items.ids, KINDS[queries.kind], KINDS[items.kind] + "s"
    for query, found, values in zip(queries.ids, places.tolist(), scores.tolist()):
        kept = [(ids[place], value) for place, value in zip(found, values) if place >= 0]
        row = {asked: query, answer: [name for name, _ in kept], "scores": [value for _, value in kept]}
        yield json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
