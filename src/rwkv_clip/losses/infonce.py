"""InfoNCE, the objective of CLIP and RWKV-CLIP."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .objective import FACTS, Objective
from .pairs import contrastive_losses


class InfoNCE(Objective):
    """Symmetric cross-entropy over the global batch.

    Each rank scores its own images against all ranks' texts, once: B x N scores instead of N x N, four matrix products
    instead of the six of two cross-entropies, and image features are never exchanged. Averaged over ranks, as DDP does
    with gradients, this is the loss of one process with the whole batch. Every rank must hold the same B.

    positives: "pairs", every text but an image's own is a negative; "mask", except those that are the same as its own,
    and the texts of the same image elsewhere in the batch: they are left out (Chinese-CLIP's users met them as false
    negatives; soft targets would not remove those).
    """

    def __init__(self, positives: Literal["pairs", "mask"] = "pairs"):
        super().__init__()
        if positives == "mask":
            self.needs = (*self.needs, *FACTS)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        image_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image (B, D), text (B, D), or (B, V, D) for the mean over V texts of each image, both normalised;
        logit_scale: scalar, already exponentiated; keys as in `contrastive_losses`. ValueError for other shapes."""
        of_images, of_texts = contrastive_losses(image, text, logit_scale, image_keys, text_keys)
        return {"contrastive": (of_images.mean() + of_texts.mean()) / 2}, {}
