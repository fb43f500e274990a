"""FLIP: image towers that read only a part of the patches in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ConfigError


class PatchDropout(nn.Module):
    """FLIP (arXiv 2212.00794): in training, each sample keeps the class token and some patches, chosen at random."""

    def __init__(self, ratio: float):
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + N, W) -> (B, 1 + K, W), K = N * (1 - ratio) rounded down, at least 1, in random order.

        NOTE(parity): by the order of uniform noise, as the released Chinese-CLIP code; open_clip takes the largest of
        normal noise, which is the same distribution.
        """
        if not self.training or not self.ratio:
            return x
        count = x.shape[1] - 1
        noise = torch.rand(x.shape[0], count, device=x.device)
        kept = noise.argsort(dim=1)[:, : max(1, int(count * (1 - self.ratio)))]
        patches = x[:, 1:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], patches], dim=1)


def drop_patches(model: nn.Module, ratio: float) -> None:
    """Make the ViT of a model leave out patches in training, in place. ConfigError for another image tower."""
    from open_clip.transformer import VisionTransformer

    tower = getattr(model, "visual", None) or getattr(model, "image_model", None)
    if not isinstance(tower, VisionTransformer):
        raise ConfigError(
            [f"force_patch_dropout: {ratio} needs a ViT of open_clip's; the image tower is a {type(tower).__name__}"]
        )
    tower.patch_dropout = PatchDropout(ratio)
