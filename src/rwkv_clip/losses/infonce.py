"""InfoNCE, the objective of CLIP and RWKV-CLIP."""

from __future__ import annotations

from torch import Tensor

from .objective import Objective
from .pairs import contrastive_losses


class InfoNCE(Objective):
    """Symmetric cross-entropy over the global batch.

    Each rank scores its own images against all ranks' texts, once: B x N scores instead of N x N, four matrix products
    instead of the six of two cross-entropies, and image features are never exchanged. Averaged over ranks, as DDP does
    with gradients, this is the loss of one process with the whole batch. Every rank must hold the same B.
    """

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image (B, D), text (B, D), or (B, V, D) for the mean over V texts of each image, both normalised;
        logit_scale: scalar, already exponentiated. ValueError for other shapes."""
        of_images, of_texts = contrastive_losses(image, text, logit_scale)
        return {"contrastive": (of_images.mean() + of_texts.mean()) / 2}, {}
