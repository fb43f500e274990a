"""Zero-shot classification: a picture belongs to the class whose prompts it is most similar to.

Ranks share the pictures and the prompts; all of them get all features, so counts are those of one process. The class
embeddings of a checkpoint are kept in the cache folder: ImageNet's 80,000 prompts are encoded once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rwkv_clip.dist import rank_and_size
from rwkv_clip.metrics import accuracy, target_ranks
from rwkv_clip.tokenizer import BERT_CHINESE, count_cut, prepare_texts

from .. import upstream
from ..cache import cached, model_key
from ..datasets import ELEVATER, Asked, ClassificationSet, load_classification, load_each, on_each
from ..datasets.names import read_templates
from ..encoder import Encoder
from ..report.confusion import worst_classes
from ..report.files import safe_name
from ..report.run import start_report
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


@dataclass(frozen=True)
class ClassificationResult:
    """Metrics as `metrics.accuracy` names them, and the features (float32, CPU, length 1) that they come from."""

    metrics: dict[str, object]
    features: Tensor  # (pictures, C)
    weights: Tensor  # (classes, C)


def class_weights(encoder: Encoder, data: ClassificationSet) -> Tensor:
    """(classes, C) float32 of length 1: the mean over templates of the normalised text features, normalised.

    Kept in the encoder's cache for the same weights, tokens, precision and device. All ranks call it.
    """
    tokenizer = encoder.loaded.tokenizer
    tokens = tokenizer(prepare_texts(tokenizer, prompts_of(data.class_names, data.templates)))

    def encode() -> Tensor:
        features = encoder.extractor.encode_tokens(tokens)
        means = features.view(len(data.class_names), len(data.templates), -1).mean(1)
        return torch.nn.functional.normalize(means, dim=-1)

    if encoder.cache is None:
        return encode()
    model = sorted(model_key(encoder.loaded).items())
    about = f"{len(data.class_names)} {tuple(tokens.shape)} {encoder.device.type} {model}".encode()
    key = hashlib.sha256(about + tokens.numpy().tobytes()).hexdigest()
    return cached(encoder.cache / "classes" / f"{key[:32]}.safetensors", encode, encoder.device)


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name, grouped by class."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def evaluate_classification(encoder: Encoder, data: ClassificationSet) -> ClassificationResult:
    """Classify every picture of a set, on every rank. Similarities are floats; ties count against the model."""
    weights = class_weights(encoder, data)
    features = encoder.extractor.encode_images(data.open, data.count)
    metrics = accuracy(target_ranks(features, weights, data.labels), data.labels, data.class_names)
    return ClassificationResult(metrics, features, weights)


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


def describe_prompts(data: ClassificationSet, tokenizer: Callable) -> str:
    """What a reader of the figures should know about the set and its prompts."""
    texts = prepare_texts(tokenizer, prompts_of(data.class_names, data.templates))
    tokens = tokenizer(texts)
    notes = [data.note] if data.note else []
    if cut := count_cut(texts, tokens, tokenizer):
        notes.append(f"{cut} of {len(texts)} prompts are longer than the context of {tokens.shape[1]}: cut")
    if getattr(tokenizer, "name", None) == BERT_CHINESE and all(map(str.isascii, texts)):
        notes.append("the model reads Chinese and no prompt is: give --language zh, or names and templates in Chinese")
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
