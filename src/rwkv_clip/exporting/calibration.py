"""Pictures and texts that static quantisation measures the ranges of a model's activations with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError
from ..data.image import open_image
from ..data.retrieval_set import load_retrieval
from ..data.rows import IMAGE_ENDINGS
from ..factory import Loaded

MOST = {"image": 128, "text": 512}  # taken evenly from a larger set
BATCH = 16


def read_calibration(source: str | Path, loaded: Loaded, split: str | None = None) -> dict[str, list[Tensor]]:
    """Batches of inputs by side: of a folder of pictures ("image" only), or a set for retrieval.

    source, split: as `load_retrieval` takes them, or a folder. Preprocessed and tokenised as the model wants it.
    ConfigError where there is none, ValueError for a picture that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        endings = tuple(f".{ending}" for ending in IMAGE_ENDINGS)
        files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(endings))
        if files:
            return {"image": _batch([loaded.preprocess(open_image(files[i])) for i in _spread(len(files), "image")])}
    data = load_retrieval(source, split=split)
    if not len(data.image_names) or not len(data.image_of_caption):
        raise ConfigError([f"calibration: {source} has no picture with a text; give pictures like those to be encoded"])
    pictures = [loaded.preprocess(data.open(i)) for i in _spread(len(data.image_names), "image")]
    tokens, _ = data.tokenize(loaded.tokenizer)
    return {
        "image": _batch(pictures),
        "text": list(tokens[torch.from_numpy(_spread(len(tokens), "text"))].split(BATCH)),
    }


def _spread(count: int, side: str) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, MOST[side])).round().astype(np.int64))


def _batch(pictures: list[Tensor]) -> list[Tensor]:
    return list(torch.stack(pictures).split(BATCH))
