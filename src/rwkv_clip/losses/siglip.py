"""SigLIP: every image-text pair of the global batch is a decision of its own (Zhai et al. 2023, arXiv 2303.15343).

A pair's loss needs no other pair, so its gradient is known as soon as its score is: `sigmoid_loss` computes both in one
pass over chunks of rows, three matrix products in all, and stores nothing of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dist import gather, rank_and_size
from .objective import FACTS, Objective
from .pairs import check_features, comparison_dtype, gather_keys, score_chunks

TILE = 2**16  # scores whose logarithms a CPU computes at once, within its second-level cache
LINEAR = 40.0  # log(1 + e^x) is x from here on, in float64 too


class SigLIP(Objective):
    """Sigmoid cross-entropy of all pairs, summed over the texts of each image.

    A pair is a positive where image and text belong together, else a negative; its logit is logit_scale * cosine +
    logit_bias. Both are the model's: checkpoints and exports hold them, as open_clip's do. Where neither weights nor
    the model's description say how they begin, they begin as published: at 10 and -10.

    NOTE(parity): open_clip's trainer keeps exp(logit_scale) at 100 or below for this loss, too; the published algorithm
    does not, and weights that were released with it have larger ones (112.3: open_clip's ViT-SO400M-14-SigLIP-384), so
    nothing is cut here.

    positives: "pairs" or "mask", as of `InfoNCE`; pairs that are left out have no loss.
    """

    needs: tuple[str, ...] = ("image", "text", "logit_scale", "logit_bias")
    begins: ClassVar[Mapping[str, float]] = {"logit_scale": math.log(10), "logit_bias": -10.0}
    scale_limits = (-math.inf, math.inf)

    def __init__(self, positives: Literal["pairs", "mask"] = "pairs"):
        super().__init__()
        if positives == "mask":
            self.needs = (*self.needs, *FACTS)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        image_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image (B, D), text (B, D), or (B, V, D) for the mean over V texts of each image, both normalised;
        logit_scale: scalar, already exponentiated; keys as in `contrastive_losses`. ValueError for other shapes."""
        loss = compare_pairs(image, text, logit_scale, logit_bias, image_keys, text_keys)
        return {"contrastive": loss}, {"logit_bias": logit_bias.detach().reshape(())}


def compare_pairs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
) -> Tensor:
    """Mean over this rank's images of the losses with all ranks' texts: scalar, in float32, or float64 where the images
    are float64, whatever autocast says.

    -(1 / B) sum_ij log sigmoid(z_ij (scale image_i . text_j + bias)), z_ij = 1 where i = j, else -1. The mean of that
    over ranks is the loss of one process with the whole batch. Arguments otherwise as of `contrastive_losses`, also in
    what keys leave out. Differentiable once.
    """
    texts = check_features(image, text, scale=scale, bias=bias)
    with torch.autocast(image.device.type, enabled=False):
        dtype, first = comparison_dtype(image), rank_and_size()[0] * len(image)
        everybody, keys = gather(texts.to(dtype)), gather_keys(texts, image_keys, text_keys)
        image, scale, bias = image.to(dtype), scale.to(dtype).reshape(()), bias.to(dtype).reshape(())
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (image, everybody, scale, bias))
        sums = [
            sigmoid_loss(image, one.contiguous(), scale, bias, first, key, gradients)[0]
            for one, key in zip(everybody.unbind(1), keys)
        ]
        return torch.stack(sums).mean() / len(image)


@torch.library.custom_op("rwkv_clip::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    image: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    first: int,
    keys: Tensor | None = None,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses of images (B, D) with texts (N, D), of which first + i is that of image i; one dtype, float32
    or float64. keys: (K, N), as of `pair_losses`.

    -> the sum, and for the backward pass its gradients by image, texts, scale and bias, empty without `gradients`.
    d/d score = sigmoid(score) of a negative, -sigmoid(-score) of a positive. Exact at any score.
    """
    fits = image.dim() == texts.dim() == 2 and image.shape[1] == texts.shape[1] and image.dtype == texts.dtype
    if not fits or scale.numel() != 1 or bias.numel() != 1 or not image.is_floating_point() or not len(image):
        raise ValueError(
            f"sigmoid_loss: images {image.dtype} {tuple(image.shape)}, texts {texts.dtype} {tuple(texts.shape)}, scale "
            f"{tuple(scale.shape)}, bias {tuple(bias.shape)}; should be (B, D) and (N, D) of one dtype, B at least 1, "
            f"and two numbers"
        )
    if keys is not None and (keys.dim() != 2 or keys.shape[1] != len(texts) or keys.is_floating_point()):
        raise ValueError(f"sigmoid_loss: keys {keys.dtype} {tuple(keys.shape)}, should be integers (K, {len(texts)})")
    if not 0 <= first <= len(texts) - len(image):
        raise ValueError(f"sigmoid_loss: first {first} with {len(image)} images exceeds the {len(texts)} texts")
    total, d_bias = image.new_zeros(()), image.new_zeros(())
    d_image, d_texts = _like(image, gradients), _like(texts, gradients).zero_()
    for chunk, scaled, scores, _ in score_chunks(image, texts, scale, first, keys):
        positives = scores.add_(bias).diagonal(first + chunk.start)
        positives.neg_()  # the loss of all is log(1 + e^score) now
        total += _sum_softplus(scores)
        if not gradients:
            continue
        d_scores = scores.sigmoid_()
        positives.neg_()
        d_bias += d_scores.sum()
        torch.mm(d_scores, texts, out=d_image[chunk])
        d_texts.addmm_(d_scores.T, scaled)
    d_scale = (d_image * image).sum() if gradients else image.new_zeros(())  # before it is multiplied by the scale
    return total, d_image.mul_(scale), d_texts, d_scale, d_bias


def _like(x: Tensor, gradients: bool) -> Tensor:
    return torch.empty_like(x) if gradients else x.new_empty(0)


def _sum_softplus(scores: Tensor) -> Tensor:
    """Sum of log(1 + e^x) over (rows, columns).

    On a CPU PyTorch's log1p takes as long as the scores themselves, so there log(1 + e) is log u + (e - (u - 1)) / u
    with u = 1 + e as it is rounded: exact to the last digits for any e in (0, 1], and several times as fast.
    """
    if scores.device.type != "cpu":
        return F.softplus(scores, threshold=LINEAR).sum()
    total = scores.new_zeros(())
    for x in scores.split(max(1, TILE // scores.shape[1])):
        e = x.abs().neg_().exp_()
        u = e + 1
        total += e.sub_(u - 1).div_(u).add_(u.log_()).add_(x.clamp(min=0)).sum()
    return total


@sigmoid_loss.register_fake
def _(
    image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int, keys: Any = None, gradients: bool = True
) -> tuple[Tensor, ...]:
    numbers = [image.new_empty(()) for _ in range(3)]
    return numbers[0], _like(image, gradients), _like(texts, gradients), *numbers[1:]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.shapes = inputs[2].shape, inputs[3].shape
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: Any, g_total: Tensor, *_: Tensor) -> tuple[Any, ...]:
    d_image, d_texts, d_scale, d_bias = ctx.saved_tensors
    assert d_image.numel(), "made without gradients"
    scalars = ((g_total * x).reshape(shape) for x, shape in zip((d_scale, d_bias), ctx.shapes))
    return g_total * d_image, g_total * d_texts, *scalars, None, None, None


sigmoid_loss.register_autograd(_differentiate, setup_context=_save)
