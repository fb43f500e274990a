"""Which classes a model gets wrong, and what it takes them for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_clip.metrics import exact_features

WORST = 10  # classes that are reported
_CHUNK = 1024


def worst_classes(features: Tensor, weights: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[dict]:
    """The classes with the smallest fraction of right answers, worst first (ties in class order).

    features (n, d) and weights (classes, d): normalised; labels (n,). Each entry: class, name, samples, right, and
    `predicted`: [class, name, count] of every answer that was given, most frequent first. Classes without samples
    are left out. Answers are those of the metrics: the right class has to be better than every other.
    """
    labels, weights = labels.cpu(), exact_features(weights, "weights")
    parts = zip(features.split(_CHUNK), labels.split(_CHUNK))
    predicted = torch.cat([_answer(exact_features(part) @ weights.T, label) for part, label in parts])
    samples = torch.bincount(labels, minlength=len(class_names))
    right = torch.bincount(labels[predicted == labels], minlength=len(class_names))
    present = torch.nonzero(samples).flatten().tolist()
    worst = sorted(present, key=lambda label: (int(right[label]) / int(samples[label]), label))[:WORST]
    return [
        {
            "class": label,
            "name": class_names[label],
            "samples": int(samples[label]),
            "right": int(right[label]),
            "predicted": _answers(predicted[labels == label], class_names),
        }
        for label in worst
    ]


def _answer(similarity: Tensor, labels: Tensor) -> Tensor:
    """The class that each row of similarities (n, classes) gives: its label if that is best alone, else the first of
    the best others."""
    own = similarity.gather(1, labels[:, None])
    others = similarity.scatter(1, labels[:, None], -torch.inf)
    return torch.where(own[:, 0] > others.amax(1), labels, others.argmax(1))


def _answers(predicted: Tensor, class_names: Sequence[str]) -> list[list]:
    counts = torch.bincount(predicted, minlength=len(class_names))
    order = torch.argsort(counts, descending=True, stable=True)
    return [[label, class_names[label], int(counts[label])] for label in order.tolist() if counts[label]]
