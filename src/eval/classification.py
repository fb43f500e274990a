"""Zero-shot classification: a picture belongs to the class whose prompts it is most similar to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_clip.dist import AUTOCAST
from rwkv_clip.features import encode_images, encode_texts
from rwkv_clip.metrics import accuracy, target_ranks

from .confusion import worst_classes
from .datasets import ClassificationSet, MissingData, load_classification
from .legacy import legacy_classification
from .report import Report, start_report
from .settings import ClassificationSettings


def class_weights(
    model: torch.nn.Module,
    tokenizer: Callable,
    class_names: Sequence[str],
    templates: Sequence[str],
    **encoding,
) -> Tensor:
    """(classes, C) float32 of length 1: the mean over templates of the normalised text features, normalised.

    `encoding` goes to `features.encode_texts`: device, batch_size, autocast, progress.
    """
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    features = encode_texts(model, tokenizer(texts), **encoding)
    means = features.view(len(class_names), len(templates), -1).mean(1)
    return torch.nn.functional.normalize(means, dim=-1)


def evaluate_classification(
    model: torch.nn.Module,
    data: ClassificationSet,
    preprocess: Callable,
    tokenizer: Callable,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    workers: int = 4,
    progress: bool = False,
    inspect: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, object]:
    """Metrics of `metrics.accuracy`. Similarities are floats; equal ones rank in class order.

    inspect(features, class weights, labels) sees what the metrics are made from.
    """
    encoding = {"device": device, "batch_size": batch_size, "autocast": autocast, "progress": progress}
    weights = class_weights(model, tokenizer, data.class_names, data.templates, **encoding)
    labels = torch.full((data.count,), -1, dtype=torch.int64)

    def open_one(index: int):
        picture, labels[index] = data.read(index)
        return picture

    features = encode_images(model, open_one, data.count, preprocess, workers=workers, **encoding)
    if inspect is not None:
        inspect(features, weights, labels)
    return accuracy(target_ranks(features, weights, labels), labels, data.class_names)


def run(settings: ClassificationSettings, loaded, device: torch.device) -> Report:
    """Evaluate every set asked for. One that is missing is reported as skipped, one that fails as failed."""
    report = start_report("classification", settings, loaded, device)
    for dataset in settings.dataset:
        try:
            report.add(_evaluate(dataset, settings, loaded, device))
        except MissingData as error:
            report.add({"dataset": dataset, "status": "skipped", "reason": str(error)})
        except (ValueError, OSError) as error:
            report.add({"dataset": dataset, "status": "failed", "reason": str(error)})
    return report


def _evaluate(dataset: str, settings: ClassificationSettings, loaded, device: torch.device) -> dict:
    started = time.monotonic()
    data = load_classification(dataset, settings.data, settings.names)
    details: dict = {}

    def inspect(features: Tensor, weights: Tensor, labels: Tensor) -> None:
        details["confusion"] = worst_classes(features, weights, labels, data.class_names)
        if settings.legacy:
            details["legacy"] = legacy_classification(features, weights, labels, data.name, len(data.class_names))

    metrics = evaluate_classification(
        loaded.model,
        data,
        loaded.preprocess,
        loaded.tokenizer,
        device=device,
        batch_size=settings.batch_size,
        autocast=AUTOCAST[loaded.precision],
        workers=settings.workers,
        progress=True,
        inspect=inspect,
    )
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
        "note": data.note,
        "seconds": round(time.monotonic() - started, 3),
    }
