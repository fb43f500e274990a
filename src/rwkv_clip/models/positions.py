"""Tables of position embeddings for another picture size or context than a file of weights was made for.

Each family keeps its own rule, so that numbers are those of its code: open_clip's models open_clip's (bicubic,
antialiased, corners not aligned; texts linear), Chinese-CLIP's ViT its released code's (`chinese_clip.fit_positions`),
RWKV's image tower that of its forward pass, which resizes the same table for pictures of another size.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import chinese_clip
from .rwkv import ImageTower, resize_table

log = logging.getLogger(__name__)
TEXT_TABLES = ("positional_embedding", "text.positional_embedding", "text_model.positional_embedding")


def fit_tables(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Resize tables of `state`, in place, to those of the model, whose state dict is `own`.

    The old grid is taken for a square one, as open_clip does. What cannot be resized is left as it is: its shape is
    then named as one that does not fit. ValueError for a Chinese-CLIP table that is no square.
    """
    for key in [key for key in state if key in own and key.endswith(("positional_embedding", "pos_embed"))]:
        old, new = state[key], own[key]
        if old.shape == new.shape or old.dim() != new.dim() or old.shape[-1] != new.shape[-1]:
            continue
        if key == chinese_clip.POSITIONS:
            state[key] = chinese_clip.fit_positions(old, len(new))
        elif key in TEXT_TABLES:
            state[key] = resize_line(old, len(new))
        else:
            state[key] = _resize_grid(getattr(model, key.split(".")[0], None), old)
        if state[key].shape != old.shape:
            log.info("%s: resized from %d to %d positions", key, old.shape[-2], new.shape[-2])


def _resize_grid(tower: Any, table: Tensor) -> Tensor:
    """The table of an image tower for its grid, from that of a square one."""
    released = isinstance(tower, ImageTower)
    count = table.shape[-2] - (0 if released else 1)
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        return table
    if released:
        return resize_table(table, (side, side), tower.grid)
    grid = getattr(tower, "grid_size", None)
    return table if grid is None else resize_grid(table, (side, side), tuple(grid))


def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1 + rows * columns, W) -> the same for the grid `new`; row 0, the class token's, is kept.

    open_clip's resize_pos_embed: bicubic, antialiased, corners not aligned."""
    grid = table[1:].float().unflatten(0, old).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], grid[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)])


def resize_line(table: Tensor, count: int) -> Tensor:
    """(positions, W) -> (count, W), as open_clip's resize_text_pos_embed: linear, corners not aligned."""
    line = F.interpolate(table.float().T[None], size=count, mode="linear", align_corners=False)
    return line[0].T.to(table.dtype)
