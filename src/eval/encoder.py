"""A loaded model and how an evaluation runs it: what every task gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from rwkv_clip.dist import AUTOCAST
from rwkv_clip.features import DECODE_WORKERS, encode_images, encode_texts, raise_together

if TYPE_CHECKING:
    from rwkv_clip.factory import Loaded

T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """A model of `load_for_inference`, its device, and how many pictures are read ahead by how many threads."""

    loaded: Loaded
    device: torch.device
    batch_size: int = 64
    workers: int = DECODE_WORKERS
    cache: Path | None = None  # folder of features that outlive the process; None: none do

    def images(self, open_one: Callable[[int], Image], count: int) -> Tensor:
        """Features (count, C) of pictures, as `features.encode_images` has them; all ranks call it."""
        return encode_images(
            self.loaded.model, open_one, count, self.loaded.preprocess, workers=self.workers, **self.options
        )

    def texts(self, tokens: Tensor) -> Tensor:
        """Features (n, C) of token rows (n, T), as `features.encode_texts` has them; all ranks call it."""
        return encode_texts(self.loaded.model, tokens, **self.options)

    @property
    def options(self) -> dict:
        """What pictures and texts are encoded with."""
        autocast = AUTOCAST[self.loaded.precision]
        return {"device": self.device, "batch_size": self.batch_size, "autocast": autocast, "progress": True}


def on_all_ranks(make: Callable[[], T], device: torch.device) -> T:
    """make() on every rank, or its error on all of them: a rank may have a disk of its own."""
    made, problem = None, None
    try:
        made = make()
    except Exception as error:  # whatever it is: nobody goes on alone
        problem = error
    raise_together(problem, 0, device)
    return made
