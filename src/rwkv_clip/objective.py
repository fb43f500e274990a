"""Objectives: features in, losses and a report out. Their running statistics, where they have any, are buffers.

An objective is a module called with this rank's normalised features; it gathers what it needs. It returns (losses,
report): the losses are summed and differentiated, the report goes to the log as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dist import gather, rank_and_size


class InfoNCE(nn.Module):
    """Symmetric cross-entropy over the global batch.

    Each rank scores its own rows against everybody's columns, so no rank ever holds the global matrix: B x N instead
    of N x N numbers. Averaged over ranks, as DDP does with gradients, this is the loss of one process with the whole
    batch.
    """

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image_features, text_features: (B, D), normalised; logit_scale: scalar, already exponentiated."""
        with torch.autocast(image_features.device.type, enabled=False):
            dtype = torch.float64 if image_features.dtype == torch.float64 else torch.float32
            image, text = image_features.to(dtype), text_features.to(dtype)
            rank, _ = rank_and_size()
            target = torch.arange(len(image), device=image.device) + rank * len(image)
            of_images = F.cross_entropy(logit_scale * image @ gather(text).T, target)
            of_texts = F.cross_entropy(logit_scale * text @ gather(image).T, target)
            return {"contrastive": (of_images + of_texts) / 2}, {}


_OBJECTIVES = {"infonce": InfoNCE}


def make_objective(name: str) -> nn.Module:
    """Objective by its settings name."""
    return _OBJECTIVES[name]()
