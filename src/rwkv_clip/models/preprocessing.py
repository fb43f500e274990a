"""What open_clip's tables say about pictures: mean, deviation, interpolation, resizing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .specification import CLIP_PIXELS, Pixels

PREPROCESSING = {"resize_mode": ("shortest", "squash"), "interpolation": ("bicubic", "bilinear")}


def read_preprocessing(images: Mapping[str, Any]) -> dict[str, Any]:
    """A `preprocess_cfg`, or the table of a tag, in ours; a number stands for all three channels."""
    values = [images.get(key) if images.get(key) is not None else own for key, own in zip(("mean", "std"), CLIP_PIXELS)]
    pixels = [[value] * 3 if isinstance(value, (int, float)) else value for value in values]
    return {"pixels": pixels, **{key: images[key] for key in PREPROCESSING if images.get(key)}}


def parse_pixels(value: Any) -> Pixels:
    """Two lists of three numbers -> mean, deviation. ValueError for anything else."""
    try:
        mean, std = (tuple(map(float, values)) for values in value)
    except TypeError as error:
        raise ValueError("not two lists of numbers") from error
    if not len(mean) == len(std) == 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError("not three numbers, or a deviation that is not above 0")
    return mean, std


def check_size(vision: Any) -> list[str]:
    """Problems with the size of pictures in open_clip's `vision_cfg`."""
    size = vision.get("image_size", 1) if isinstance(vision, dict) else 1
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    if all(type(side) is int and side > 0 for side in sides):
        return []
    return [f"vision_cfg.image_size: {size!r} is neither a positive whole number nor two; correct it"]
