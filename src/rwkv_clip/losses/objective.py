"""The interface of an objective: a module that computes losses from a model's named features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

FACTS = ("image_keys", "text_keys")
"""What an objective may ask for that the batch knows: int64 (B,), a number for each image's encoded bytes; and (B,), or
(B, V) for V texts, a number for each text's token ids. Equal numbers mean equal images or texts (63-bit hashes: in a
batch of 65,536 pairs one wrong equality in four billion batches). They are passed whole, as the features are, and never
differentiated."""


class Objective(nn.Module):
    """Called with this rank's features by name, it gathers those of other ranks as it needs them.

    What it declares determines what the towers are given and return. Its parameters are optimized, sharded,
    checkpointed and resumed like the towers'; its buffers are checkpointed, and a skipped step leaves them unchanged.
    It is called once per step, however many micro-batches the towers need.
    """

    needs: tuple[str, ...] = ("image", "text", "logit_scale")
    """Names of what `forward` takes: the model's outputs (`rwkv_clip.models.two_tower`) and facts of the batch."""
    texts: ClassVar[int | None] = None
    """Texts per image; None for any number."""
    image_views: ClassVar[int] = 1
    """Augmented views of each image in a batch."""
    begins: ClassVar[Mapping[str, float]] = {}
    """What the model's scalars begin with, by name and as the model stores them, where neither weights nor its
    description say it. With `logit_bias`, a model that has none gets one."""
    scale_limits: tuple[float, float] = (0.0, math.log(100))
    """Where the model's stored logit_scale is kept after every step, by default as in the paper of CLIP."""
    made: ClassVar[tuple[str, ...]] = ()
    """Those of its needs that it makes itself, by `observe` or `recall`."""
    recalls: tuple[str, ...] = ()
    """Facts of the batch that `recall` gets."""
    sources: Mapping[str, str] = {}
    """Of what it reads besides the batch, a digest by the setting that names it: the same on all ranks and in a resumed
    run."""

    def observe(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """More facts, by name, one row per sample, from a micro-batch on its device: image uint8 (B, 3, h, w), text
        int64 (B, T) or (B, V, T), as the towers get them. Called once for each, without gradient, under autocast; the
        facts are treated as those of the batch."""
        return {}

    def recall(self, facts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same from facts of this rank's batch in host memory, before the batch is sent to the device. Blank images
        of a void step have negative keys."""
        return {}

    forward: Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]
    """Features and facts by name -> (losses, report): scalars by name. The losses are summed and differentiated, the
    report is logged as it is. Features have one row per sample, (B, ..); (B, V, ..) where a sample has several views or
    texts."""
