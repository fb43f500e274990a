"""Predictions of a classification set as ELEVATER's evaluation server takes them: probabilities in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_clip.files import write_whole
from rwkv_clip.models.freezing import IMAGE_TOWERS
from rwkv_clip.models.packed import sizes_of

SCALE = 100.0  # of the released zero-shot evaluation, whatever the model's temperature


def write_submission(
    folder: Path, name: str, model: nn.Module, model_name: str, logits: Tensor, order: Sequence[int] | None
) -> Path:
    """Write FOLDER/NAME.json; returns its path.

    logits (pictures, classes): cosines of pictures and classes; order: which pictures the file lists (None: all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    sizes = sizes_of(model)
    count = sum(sizes.values())
    about = {
        "model_name": model_name,
        "dataset_name": name,
        "num_trainable_params": 0,
        "num_params": count,
        "num_visual_params": sum(size for name, size in sizes.items() if name.startswith(IMAGE_TOWERS)),
        "num_backbone_params": count,
        "n_shot": 0,
        "rnd_seeds": [123],
    }
    write_whole(path, _pieces(about, logits if order is None else logits[torch.tensor(order, dtype=torch.int64)]))
    return path


def _pieces(about: dict, logits: Tensor) -> Iterator[bytes]:
    """The JSON as json.dumps would write it at once; a row of probabilities, to six decimals, at a time."""
    yield json.dumps(about).encode()[:-1] + b', "predictions": [['
    for number, cosines in enumerate(logits):
        row = (SCALE * cosines).softmax(dim=0).tolist()
        yield (b", " if number else b"") + json.dumps([round(p, 6) for p in row]).encode()
    yield b"]]}"
