"""Which classes a model gets wrong, and what it takes them for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_clip.metrics import nearest_items

WORST = 10  # classes that are reported
_CHUNK = 1024


def worst_classes(features: Tensor, weights: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[dict]:
    """The classes with the smallest share of right answers, worst first (equal ones in class order).

    features (n, d) and weights (classes, d): normalised; labels (n,). Each entry: class, name, samples, right, and
    `predicted`: [class, name, count] of every answer that was given, most frequent first. Classes without samples
    are left out. Answers are those of the metrics: equal similarities go to the class that comes first.
    """
    labels = labels.cpu()
    predicted = torch.cat([nearest_items(part, weights, 1)[:, 0] for part in features.split(_CHUNK)])
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


def _answers(predicted: Tensor, class_names: Sequence[str]) -> list[list]:
    counts = torch.bincount(predicted, minlength=len(class_names))
    order = torch.argsort(counts, descending=True, stable=True)
    return [[label, class_names[label], int(counts[label])] for label in order.tolist() if counts[label]]
