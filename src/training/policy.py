"""Augmentation policies (AutoAugment, RandAugment), which timm has, as functions of a seed.

timm draws from the generators of the modules `random` and `numpy.random`. They are seeded for each picture, and put
back as they were: the same seed gives the same picture with any loader, in any process, in any order, and nobody else's
random numbers change. (The same versions of Python, timm and Pillow are needed for the same bits.)
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rwkv_clip.transform import CLIP_MEAN

FORMS = "original, v0, or rand with timm's options, such as rand-m9-mstd0.5"
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRANSLATION = 0.45  # largest shift, as a fraction of the shorter side: timm's create_transform
_generators = threading.Lock()  # a second loader of this process waits


def build_policy(name: str, size: tuple[int, int], interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """timm's policy `name` for RGB pictures of (height, width), with the parameters of timm's create_transform: what a
    rotation or shift leaves empty has the mean color. ValueError for a name that timm does not know."""
    from timm.data.auto_augment import auto_augment_transform, posterize, rand_augment_transform

    options = {
        "translate_const": int(min(size) * TRANSLATION),
        "img_mean": tuple(min(255, round(255 * x)) for x in CLIP_MEAN),
        "interpolation": RESAMPLING[interpolation],
    }
    build = rand_augment_transform if name.split("-")[0] == "rand" else auto_augment_transform
    try:
        policy = build(name, options)
    except (AssertionError, KeyError, ValueError) as error:
        reason = f" ({error})" if str(error) else ""
        raise ValueError(f"auto_augment: {name!r} is no policy{reason}; use {FORMS}") from None
    groups = [policy.ops] if hasattr(policy, "ops") else policy.policy
    for operation in chain(*groups):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, and black for 0 bits, which its policies may ask for: newer versions of Pillow call that an error, of
    which older ones made black."""
    from timm.data.auto_augment import posterize

    return posterize(picture, bits, **options) if bits > 0 else Image.new(picture.mode, picture.size)


class Policy:
    """A policy as `build_policy` makes it, for pictures of one size; `seed` decides all that is random in it."""

    def __init__(self, name: str, size: tuple[int, int], interpolation: str):
        self._transform = build_policy(name, size, interpolation)

    def apply(self, pixels: Tensor, seed: int) -> Tensor:
        """uint8 (3, h, w) -> the same. seed: 64 bits."""
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        with _seeded(seed):
            picture = self._transform(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _generators:
        before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
