"""Zero-shot classification: a picture belongs to the class whose prompts it is most similar to.

Ranks share the pictures and the prompts; all of them get all features, so counts are those of one process. The class
embeddings of a checkpoint are kept in the cache folder: ImageNet's 80,000 prompts are encoded once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_clip.dist import max_over_ranks
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.metrics import accuracy, target_ranks
from rwkv_clip.serialization import CheckpointError, encode_tensors, read_tensors
from rwkv_clip.tokenizer import count_cut

from .cache import keep, model_key, on_all_ranks
from .confusion import worst_classes
from .datasets import Asked, ClassificationSet, load_classification, load_each
from .legacy import legacy_classification
from .report import Report, start_report
from .settings import ClassificationSettings


def class_weights(extractor: FeatureExtractor, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(classes, C) float32 of length 1: the mean over templates of the normalised text features, normalised."""
    features = extractor.encode_texts(prompts_of(class_names, templates))
    means = features.view(len(class_names), len(templates), -1).mean(1)
    return torch.nn.functional.normalize(means, dim=-1)


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name, those of a class one after the other."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def evaluate_classification(
    extractor: FeatureExtractor,
    data: ClassificationSet,
    weights: Tensor | None = None,
    inspect: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, object]:
    """Metrics of `metrics.accuracy`, on every rank. Similarities are floats; equal ones count against the model.

    weights: what `class_weights` gave before; default: encoded now.
    inspect(features, class weights, labels) sees what the metrics are made from.
    """
    if weights is None:
        weights = class_weights(extractor, data.class_names, data.templates)
    labels = on_all_ranks(data.labels, extractor.device)
    features = extractor.encode_images(data.open_one(labels), data.count)
    if inspect is not None:
        inspect(features, weights, labels)
    return accuracy(target_ranks(features, weights, labels), labels, data.class_names)


def cached_class_weights(folder: Path, loaded, extractor: FeatureExtractor, data: ClassificationSet) -> Tensor:
    """`class_weights` of a set, kept in `folder` for the same weights, tokens, precision and device.

    All ranks call it. One that finds nothing (a disk of its own) needs the others to compute.
    """
    tokens = loaded.tokenizer(prompts_of(data.class_names, data.templates))
    device = extractor.device
    known = f"{len(data.class_names)} {tuple(tokens.shape)} {device.type} {sorted(model_key(loaded).items())}".encode()
    key = hashlib.sha256(known + tokens.numpy().tobytes()).hexdigest()
    path = folder / "classes" / f"{key[:32]}.safetensors"
    found = _read_weights(path, len(data.class_names))
    if not max_over_ranks(torch.tensor(float(found is None), device=device)):
        return found
    weights = class_weights(extractor, data.class_names, data.templates)
    keep(path, encode_tensors({"weights": weights, "sha256": _digest(weights)}))
    return weights


def _read_weights(path: Path, classes: int) -> Tensor | None:
    """None where the file is not there, or is not as it was written."""
    try:
        tensors = read_tensors(path) if path.is_file() else {}
        weights = tensors["weights"]
        return weights if len(weights) == classes and torch.equal(tensors["sha256"], _digest(weights)) else None
    except (CheckpointError, KeyError, OSError):
        return None


def _digest(weights: Tensor) -> Tensor:
    digest = hashlib.sha256(weights.contiguous().numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def load(settings: ClassificationSettings, device: torch.device) -> list[Asked]:
    """Every set asked for, or why it is not here. ValueError where there is none at all."""

    def make(dataset: str) -> ClassificationSet:
        return load_classification(dataset, settings.data, settings.names, language=settings.language).checked()

    return load_each(settings.dataset, make, device)


def run(settings: ClassificationSettings, sets: list[Asked], loaded, device: torch.device) -> Report:
    """Evaluate every set of `load`. One that is missing is reported as skipped, one that fails as failed."""
    report = start_report("classification", settings, loaded, device)
    for dataset, data in sets:
        if isinstance(data, dict):
            report.add(data)
            continue
        try:
            report.add(_evaluate(data, settings, loaded, device))
        except (ValueError, OSError) as error:
            report.add({"dataset": dataset, "status": "failed", "reason": str(error)})
    return report


def _notes(data: ClassificationSet, tokenizer: Callable) -> str:
    """What a reader of the figures should know about the set and its prompts."""
    texts = prompts_of(data.class_names, data.templates)
    tokens = tokenizer(texts)
    notes = [data.note] if data.note else []
    if cut := count_cut(texts, tokens, tokenizer):
        notes.append(f"{cut} of {len(texts)} prompts are longer than the context of {tokens.shape[1]}: cut")
    rows = tokens.view(len(data.class_names), -1)
    groups: dict[bytes, list[str]] = {}
    for name, row in zip(data.class_names, rows):
        groups.setdefault(row.numpy().tobytes(), []).append(name)
    if same := [names for names in groups.values() if len(names) > 1]:
        count = sum(map(len, same))
        notes.append(
            f"{count} classes have the prompts of another, e.g. {same[0][0]}: never told apart, so never right"
        )
    return "; ".join(notes)


def _evaluate(data: ClassificationSet, settings: ClassificationSettings, loaded, device: torch.device) -> dict:
    started = time.monotonic()
    details: dict = {}

    def inspect(features: Tensor, weights: Tensor, labels: Tensor) -> None:
        details["confusion"] = worst_classes(features, weights, labels, data.class_names)
        if settings.legacy:
            details["legacy"] = legacy_classification(features, weights, labels, data.name, len(data.class_names))

    work = {"batch_size": settings.batch_size, "workers": settings.workers}
    extractor = FeatureExtractor.of(loaded, device, progress=True, **work)
    weights = cached_class_weights(settings.cache_folder, loaded, extractor, data)
    metrics = evaluate_classification(extractor, data, weights, inspect)
    return {
        "dataset": data.name,
        "status": "done",
        "path": data.path,
        "split": data.split,
        "headline": data.headline,
        "metrics": metrics,
        **details,
        "class_names": list(data.class_names),
        "templates": list(data.templates),
        "note": _notes(data, loaded.tokenizer),
        "seconds": round(time.monotonic() - started, 3),
    }
