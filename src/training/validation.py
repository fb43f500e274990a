"""Loss and accuracies of a validation set, batch by batch, from the features that its retrieval is computed with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rwkv_clip.losses.pairs import contrastive_losses, rank_own_first
from rwkv_clip.retrieval import RetrievalResult

from .data.augment import hash64
from .trainer import ACCURACIES


@torch.no_grad()
def measure_batches(
    found: RetrievalResult, image_of_caption: np.ndarray, logit_scale: Tensor, size: int, seed: int
) -> dict[str, float]:
    """`loss`, `image_to_text_acc` and `text_to_image_acc`: means over all pairs of a caption and its image.

    The loss is that of `--positives pairs`, within batches of `size` pairs, the last smaller; logit_scale as the model
    stores it, a logarithm. image_of_caption: int64 (captions,). An image with several captions, and a caption that
    occurs twice, are false negatives where they meet in a batch. Sets list the captions of an image together, so the
    pairs are shuffled first, in the same way at every validation and for every model: by `seed`. (Chinese-CLIP shuffles
    for this reason, too.)"""
    order = torch.from_numpy(np.argsort(hash64(seed, np.arange(len(image_of_caption))), kind="stable"))
    scale, images = logit_scale.detach().float().cpu().exp(), torch.from_numpy(image_of_caption)
    totals = torch.zeros(3, dtype=torch.float64)
    for captions in order.split(size):
        image, text = found.image_features[images[captions]], found.text_features[captions]
        of_images, of_texts = contrastive_losses(image, text, scale)
        hits = rank_own_first(image, text)
        totals += torch.stack([x.sum(dtype=torch.float64) for x in ((of_images + of_texts) / 2, *hits)])
    return dict(zip(("loss", *ACCURACIES), (totals / len(order)).tolist()))
