"""A run of zero-shot classification: accuracies, their report, and files of predictions.

The class embeddings of a checkpoint are kept in the cache folder: ImageNet's 80,000 prompts are encoded once.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rwkv_clip import classification
from rwkv_clip.classification import ClassificationResult, describe_prompts, tokenize_prompts
from rwkv_clip.datasets import ELEVATER, ClassificationSet, load_classification
from rwkv_clip.datasets.names import read_templates
from rwkv_clip.dist import rank_and_size

from .. import upstream
from ..cache import cached, model_key
from ..encoder import Encoder
from ..report.confusion import worst_classes
from ..report.files import safe_name
from ..report.run import start_report
from ..sets import Asked, load_each, on_each
from ..settings import ClassesSettings
from ..submission import write_submission


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(ClassesSettings):
    """Zero-shot classification: top-1, top-5 and mean per class."""

    data: str = "data"
    """Folder of class folders; for a benchmark also the root folder in which torchvision looks for it."""
    language: Literal["en", "zh"] = "en"
    """Language of ImageNet's names and templates (zh needs the extra clip-benchmark) and of elevater's. Other sets: a
    file for `names`."""
    names: str | None = None
    """JSON {"names": {folder: name}, "templates": ["a photo of a {}."]}; "names" may be a list in the order of the
    sorted folders, by number where all are numbers. Default: names.json in the data folder, else the folders and its
    own templates."""
    templates: str | None = None
    """Text file of prompt templates, one a line, with {} for the class name, in place of a set's own."""
    save_dir: str | None = None
    """Folder for SET.json: probabilities of every picture and class, as ELEVATER's server takes them."""
    legacy: bool = False
    """Also count as the released code does, with its defects named; the exact figures stay the result."""


def class_weights(encoder: Encoder, data: ClassificationSet) -> Tensor:
    """`classification.class_weights` of a set, kept in the encoder's cache for the same weights, tokens, precision and
    device. All ranks call it."""
    tokens, classes = tokenize_prompts(data, encoder.loaded.tokenizer), len(data.class_names)

    def encode() -> Tensor:
        return classification.class_weights(encoder.extractor, tokens, classes)

    if encoder.cache is None:
        return encode()
    model = sorted(model_key(encoder.loaded).items())
    about = f"{classes} {tuple(tokens.shape)} {encoder.device.type} {model}".encode()
    key = hashlib.sha256(about + tokens.numpy().tobytes()).hexdigest()
    return cached(encoder.cache / "classes" / f"{key[:32]}.safetensors", encode, encoder.device)


def evaluate_classification(encoder: Encoder, data: ClassificationSet) -> ClassificationResult:
    """Classify every picture of a set, on every rank, with class embeddings from the cache."""
    return classification.evaluate_classification(encoder.extractor, data, class_weights(encoder, data))


def load(settings: ClassificationSettings, device: torch.device) -> list[Asked]:
    """Every requested set, or why it is missing. ValueError where there is none at all."""

    def make(dataset: str) -> ClassificationSet:
        found = load_classification(dataset, settings.data, settings.names, language=settings.language)
        return replace(found, templates=read_templates(settings.templates)) if settings.templates else found

    return load_each(settings.dataset, make, device)


def run(settings: ClassificationSettings, sets: list[Asked], encoder: Encoder) -> int:
    """Evaluate every set of `load`. One that is missing is reported as skipped, one that fails as failed."""
    report = start_report("classification", settings, encoder)
    for name, result in on_each(sets, lambda data: _evaluate(data, encoder, settings)):
        report.add(result)
        if name == ELEVATER and result["status"] == "done" and rank_and_size()[0] == 0:
            print(f"Result:\nzeroshot-top1: {result['metrics']['top1']}")
    return report.finish()


def _evaluate(data: ClassificationSet, encoder: Encoder, settings: ClassificationSettings) -> dict:
    started = time.monotonic()
    result = evaluate_classification(encoder, data)
    pictures = result.features, result.weights, data.labels
    details: dict = {"confusion": worst_classes(*pictures, data.class_names)}
    if settings.save_dir and rank_and_size()[0] == 0:
        cosines = result.features @ result.weights.cpu().T
        about = safe_name(data.name.rpartition("/")[2]), encoder.loaded.model, encoder.loaded.name
        path = write_submission(Path(settings.save_dir), *about, cosines, data.submission)
        print(f"predictions: {path}")
    if settings.legacy:
        details["legacy"] = upstream.count_classification(*pictures, data.name, len(data.class_names))
    return {
        "dataset": data.name,
        "status": "done",
        "path": data.path,
        "split": data.split,
        "headline": data.headline,
        "metrics": result.metrics,
        **details,
        "class_names": list(data.class_names),
        "templates": list(data.templates),
        "note": describe_prompts(data, encoder.loaded.tokenizer),
        "seconds": round(time.monotonic() - started, 3),
    }
