"""What towers that are written here have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .intermediates import collect
from .layers import find_undecayed, number_layers
from .specification import Encoded


class Tower(nn.Module):
    """Tokens -> pooled -> features, a projection where the model has one, groups."""

    def __init__(self, width: int, embed_dim: int | None):
        super().__init__()
        self.recompute = False
        self.width, self.embed_dim = width, embed_dim
        self.proj: nn.Parameter | None = None

    def _add_projection(self) -> None:
        """CLIP's projection, initialised last: a matrix (width, embed_dim) without a bias; none without an
        `embed_dim`."""
        if self.embed_dim is not None:
            self.proj = nn.Parameter(self.width**-0.5 * torch.randn(self.width, self.embed_dim))

    def forward_tokens(self, inputs: Tensor) -> Tensor:
        """Token vectors (B, T, width) after the last LayerNorm."""
        raise NotImplementedError

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, T, width) -> (B, width)."""
        raise NotImplementedError

    def groups(self) -> list[list[Any]]:
        """Modules and parameters in open_clip's order: embedding, blocks, the last one with the last norm."""
        raise NotImplementedError

    def encode(self, inputs: Tensor) -> Encoded:
        """Features (B, embed_dim or width), not normalised, and what they are made from."""
        tokens = self.forward_tokens(inputs)
        pooled = self.pool(tokens)
        return Encoded(pooled if self.proj is None else pooled @ self.proj, pooled, tokens)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(inputs).features

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        """Its blocks, first to last."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm after the last block; None where blocks end with one."""
        return None

    def collect_blocks(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features, not normalised, and what each block puts out, (B, T, width)."""
        features, seen = collect(self.blocks_in_order, lambda: self(inputs))
        return features, [out for _, out in seen]

    def no_weight_decay(self) -> set[str]:
        """See `RWKVCLIP.no_weight_decay`."""
        return find_undecayed(self)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """See `RWKVCLIP.group_matcher`."""
        return number_layers(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass while training."""
        self.recompute = enable

    def lock(self, unlocked: int = 0) -> None:
        """Freeze all but the last `unlocked` groups; the projection, if there is one, is the last."""
        self.requires_grad_(False)
        groups = [*self.groups(), *([[self.proj]] if self.proj is not None else [])]
        for group in groups[max(len(groups) - unlocked, 0) :]:
            for member in group:
                member.requires_grad_(True)
