"""Token shift: parts of every head look at a neighbouring token instead of their own.

On a text line the first half of a head's channels comes from the token before, the second half from the token after. On
an image grid the four quarters come from the left, right, upper and lower neighbour. Outside the grid there is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# One entry per part of a head: padding in F.pad's order (last dimension first; the channels themselves stay).
_TEXT = ((0, 0, 1, -1), (0, 0, -1, 1))
_IMAGE = ((0, 0, 1, -1), (0, 0, -1, 1), (0, 0, 0, 0, 1, -1), (0, 0, 0, 0, -1, 1))


def shift_tokens(x: Tensor, heads: int, grid: tuple[int, ...]) -> Tensor:
    """x: (B, T, C) with C = heads * N -> the same shape, every part of a head taken from its neighbour.

    grid (T',): text, N even. grid (h, w): image in row-major order, N a multiple of 4. Tokens after the grid's
    (a class token) are kept as they are. ValueError where x, heads and grid do not fit together.
    """
    check_grid(x, heads, grid)
    b, t, c = x.shape
    paddings = _TEXT if len(grid) == 1 else _IMAGE
    count = math.prod(grid)
    # (B, *grid, heads, parts, N / parts): unbind and stack cost one pass each, forward and backward, and a negative
    # padding crops, so that one F.pad is the whole shift of a part.
    cells = x[:, :count].view(b, *grid, heads, len(paddings), c // heads // len(paddings))
    shifted = [F.pad(part.flatten(-2), padding).view(part.shape) for part, padding in zip(cells.unbind(-2), paddings)]
    out = torch.stack(shifted, -2).view(b, count, c)
    return out if count == t else torch.cat([out, x[:, count:]], 1)


def check_grid(x: Tensor, heads: int, grid: Sequence[int]) -> None:
    """ValueError unless x is (B, T, C), its tokens hold the grid and its channels the heads."""
    if not isinstance(x, Tensor) or x.dim() != 3:
        raise ValueError(f"x: {describe(x)}, expected (B, T, C)")
    if len(grid) not in (1, 2) or min(grid) < 1 or math.prod(grid) > x.shape[1]:
        raise ValueError(f"grid: {tuple(grid)} is not (T,) or (height, width) of {x.shape[1]} tokens or fewer")
    parts = 2 * len(grid)
    if heads < 1 or x.shape[2] % (heads * parts):
        raise ValueError(
            f"heads: {heads} heads of {x.shape[2]} channels give no head size that is a multiple of {parts}"
        )


def describe(x: object) -> str:
    """What a message calls an argument."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
