"""Transforms from an image to the normalised tensor that a model reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from .data.image import to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ResizeMode = Literal["shortest", "squash"]  # open_clip's words: the short side, then cropped; or all of it, distorted
THIN = 32  # long side / short side beyond which the ends of an image are cut off before it is resized


def val_transform(
    size: int | tuple[int, int], resize_mode: ResizeMode = "shortest"
) -> Callable[[Image.Image], torch.Tensor]:
    """Evaluation: PIL image of any mode -> float32 (3, h, w), bicubic, normalised with CLIP's statistics.

    shortest: the same numbers as open_clip's and torchvision's for upright RGB and square sizes; for (h, w) the resized
    image just covers the frame before its centre is cropped. squash: resized to the frame, whatever its aspect.

    Made of PIL and torch alone: to import torchvision takes longer than to load a model and to encode a picture.
    """
    height, width = _pair(size)
    if resize_mode == "squash":
        # NOTE(parity): the released Chinese-CLIP code makes an image RGB after it was resized, which matters for
        # palettes and transparency only, and does not turn it upright.
        return _Steps([to_rgb, _Squash((height, width)), _Pixels()])
    return _Steps([*prepare(size), _Cover((height, width)), _Centre((height, width)), _Pixels()])


def train_transform(size: int | tuple[int, int]) -> Callable[[Image.Image], torch.Tensor]:
    """Training: PIL image of any mode -> float32 (3, h, w), normalised with CLIP's statistics.

    Random crop (area 0.7 to 1, aspect 0.8 to 1.25) resized linearly, mirrored with probability 0.5. Random numbers come
    from torch's global generator.
    """
    from torchvision import transforms as T

    crop = T.RandomResizedCrop(_pair(size), (0.7, 1.0), (0.8, 1.25), T.InterpolationMode.BILINEAR)
    flip = T.RandomHorizontalFlip(0.5)
    return T.Compose([to_rgb, crop, flip, T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])


def prepare(size: int | tuple[int, int]) -> list[Callable[[Image.Image], Image.Image]]:
    """What comes before any transform that resizes a PIL image to cover `size` and crops its centre.

    It is made upright and RGB (a palette or 1-bit image cannot be interpolated), and cut if it is too thin to be
    resized in memory.
    """
    return [to_rgb, _Thin(_pair(size))]


def normalize(
    image: torch.Tensor,
    mean: tuple[float, ...] | torch.Tensor = CLIP_MEAN,
    std: tuple[float, ...] | torch.Tensor = CLIP_STD,
) -> torch.Tensor:
    """(B, 3, h, w) uint8 0..255, or float 0..1, on any device -> float32, normalised per channel.

    mean, std: three numbers each; float32 tensors on the images' device are used without a copy.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image: shape {tuple(image.shape)} is not (batch, 3, height, width)")
    full = 255.0 if image.dtype == torch.uint8 else 1.0
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image: dtype {image.dtype} is neither uint8 nor floating point")
    centre, scale = (torch.as_tensor(values, device=image.device).view(3, 1, 1) for values in (mean, std))
    # In place: on a CPU three more fresh copies of the batch take longer than the arithmetic.
    return image.to(torch.float32, copy=True).div_(full).sub_(centre).div_(scale)


class _Steps:
    """One after the other."""

    def __init__(self, transforms: list[Callable]):
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class _Thin:
    """Cut the ends off an image that is far longer than wide, beyond what a centre crop of (height, width) can see.

    Resized whole, 32,768 x 1 pixels would become 7,340,032 x 224. Either end loses a multiple of the short side, so
    that the centre of the resized image stays in place to a fraction of a pixel.
    """

    def __init__(self, size: tuple[int, int]):
        self.most = THIN * -(-max(size) // min(size))  # times the short side

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = min(image.size), max(image.size)
        if long <= self.most * short:
            return image
        cut = (long - self.most * short) // (2 * short) * short
        across, down = (cut, 0) if image.width == long else (0, cut)
        return image.crop((across, down, image.width - across, image.height - down))


class _Squash:
    """Resize to (height, width)."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize(self.size[::-1], Image.Resampling.BICUBIC)


class _Cover(_Squash):
    """Resize, keeping the aspect ratio, to the smallest image that covers (height, width)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.size[0] == self.size[1]:  # torchvision's rule, which rounds the long side down
            side, short = self.size[0], min(image.size)
            across, down = (side if s == short else int(side * s / short) for s in image.size)
            return image.resize((across, down), Image.Resampling.BICUBIC)
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        width = max(self.size[1], round(image.width * scale))
        height = max(self.size[0], round(image.height * scale))
        return image.resize((width, height), Image.Resampling.BICUBIC)


class _Centre(_Squash):
    """The middle (height, width) of an image that covers it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        (height, width), top, left = self.size, *(round((a - b) / 2) for a, b in zip(image.size[::-1], self.size))
        return image.crop((left, top, left + width, top + height))


class _Pixels:
    """An RGB image as float32 (3, h, w), 0 to 1, normalised with CLIP's statistics."""

    mean, std = CLIP_MEAN, CLIP_STD  # to be read, as of torchvision's Normalize

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return normalize(pixels[None], self.mean, self.std)[0]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Image size as (height, width); ValueError unless both are positive."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_size: {size} is not a size; use a positive number or (height, width)")
    return height, width
