"""The interface of an objective: a module that computes losses from a model's named features."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn


class Objective(nn.Module):
    """Called with this rank's features by name, it gathers those of other ranks as it needs them.

    What it declares determines what the towers are given and return. Its parameters are optimized, sharded,
    checkpointed and resumed like the towers'; its buffers are checkpointed, and a skipped step leaves them unchanged.
    It is called once per step, however many micro-batches the towers need.
    """

    needs: ClassVar[tuple[str, ...]] = ("image", "text", "logit_scale")
    """Names of the model's outputs that `forward` takes (`rwkv_clip.models.two_tower`)."""
    texts: ClassVar[int | None] = None
    """Texts per image; None for any number."""
    image_views: ClassVar[int] = 1
    """Augmented views of each image in a batch."""

    forward: Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]
    """Features by name -> (losses, report): scalars by name. The losses are summed and differentiated, the report is
    logged as it is. Features have one row per sample, (B, ..); (B, V, ..) where a sample has several views or texts."""
