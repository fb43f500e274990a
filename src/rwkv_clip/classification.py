"""Zero-shot classification: a picture belongs to the class whose prompts it is most similar to. For training and
evaluation.

Ranks share the pictures and the prompts; all of them get all features, so counts are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .datasets import ClassificationSet
from .features import FeatureExtractor
from .metrics import accuracy, target_ranks
from .tokenizer import BERT_CHINESE, count_cut, prepare_texts


@dataclass(frozen=True)
class ClassificationResult:
    """Metrics as `metrics.accuracy` names them, and the features (float32, CPU, length 1) that they come from."""

    metrics: dict[str, object]
    features: Tensor  # (pictures, C)
    weights: Tensor  # (classes, C)


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name, grouped by class."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def tokenize_prompts(data: ClassificationSet, tokenizer: Callable) -> Tensor:
    """The token rows of all prompts of a set, int64 (classes * templates, context)."""
    return tokenizer(prepare_texts(tokenizer, prompts_of(data.class_names, data.templates)))


def class_weights(extractor: FeatureExtractor, tokens: Tensor, classes: int) -> Tensor:
    """(classes, C) float32 of length 1: the mean over templates of the normalised text features, normalised.

    tokens: those of `tokenize_prompts`. All ranks call it.
    """
    means = extractor.encode_tokens(tokens).view(classes, len(tokens) // classes, -1).mean(1)
    return torch.nn.functional.normalize(means, dim=-1)


def evaluate_classification(
    extractor: FeatureExtractor, data: ClassificationSet, weights: Tensor | None = None
) -> ClassificationResult:
    """Classify every picture of a set, on every rank. Similarities are floats; ties count against the model.

    weights: what `class_weights` gave for this model and set, where that is kept.
    """
    if weights is None:
        weights = class_weights(extractor, tokenize_prompts(data, extractor.tokenizer), len(data.class_names))
    features = extractor.encode_images(data.open, data.count)
    metrics = accuracy(target_ranks(features, weights, data.labels), data.labels, data.class_names)
    return ClassificationResult(metrics, features, weights)


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
