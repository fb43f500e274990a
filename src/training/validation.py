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
    found: RetrievalResult, pairs: np.ndarray, logit_scale: Tensor, size: int, seed: int
) -> dict[str, float]:
    """`loss`, `image_to_text_acc` and `text_to_image_acc`: means over all pairs of a caption and its image; nothing
    where there is no pair.

    The loss is that of `--positives pairs`, within batches of `size` pairs, the last smaller; logit_scale as the model
    stores it, a logarithm. pairs: int64 (pairs, 2), a caption and its image. An image with several captions, and a
    caption that occurs twice, are false negatives where they meet in a batch. Sets list the captions of an image
    together, so the pairs are shuffled first, in the same way at every validation and for every model: by `seed`.
    (Chinese-CLIP shuffles for this reason, too.)
    """
    if not len(pairs):
        return {}
    order = torch.from_numpy(pairs[np.argsort(hash64(seed, np.arange(len(pairs))), kind="stable")])
    scale, totals = logit_scale.detach().float().cpu().exp(), torch.zeros(3, dtype=torch.float64)
    for captions, images in (part.unbind(1) for part in order.split(size)):
        image, text = found.image_features[images], found.text_features[captions]
        of_images, of_texts = contrastive_losses(image, text, scale)
        hits = rank_own_first(image, text)
        totals += torch.stack([x.sum(dtype=torch.float64) for x in ((of_images + of_texts) / 2, *hits)])
    return dict(zip(("loss", *ACCURACIES), (totals / len(order)).tolist()))
