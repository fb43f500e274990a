"""RWKV towers as they are exported: the same numbers in fewer, larger steps of standard operators.

An interpreter of graphs runs every operator as one pass over memory and cannot fuse what it does not know. So tokens of
all samples are rows of one matrix, constants of the weights are folded into products (the static part of a mixture is
the bias of the dynamic one), and a token shift is one gather of rows: part p of a head of token t lies in a row of its
own, and is read from the row of its neighbour, or multiplied by 0 at the border.

The weights are the tower's own tensors; `rwkv_clip.exporting.parts` compares the outputs with the tower's.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.rwkv import ImageTower, TextTower
from ..models.rwkv_block import MIX_RANK, Block, ChannelMix, TimeMix
from ..ops.wkv.plain import wkv6_plain


class Shift(NamedTuple):
    """A token shift: for every part of a head of every token the row to read, (T * H * parts,), and 1 where there is
    one, else 0, (T * H * parts, 1)."""

    rows: Tensor
    kept: Tensor
    parts: int


def plan_shift(grid: tuple[int, ...], more: int, heads: int) -> Shift:
    """grid: (T,) of a text, (h, w) of an image; `more` tokens after it keep their place. Sizes may be symbolic."""
    t = torch.arange(math.prod(grid) + more)
    cells, own = (t[:-more], t[-more:]) if more else (t, t[:0])
    near, there = [], []
    cells = cells.reshape(grid)
    for axis in reversed(range(len(grid))):  # left, right, upper, lower; no arithmetic with sizes, which ONNX lacks
        ends = cells.narrow(axis, 0, 1), cells.narrow(axis, -1, 1)
        count = grid[axis] - 1
        near += [
            torch.cat([ends[0], cells.narrow(axis, 0, count)], axis),
            torch.cat([cells.narrow(axis, 1, count), ends[1]], axis),
        ]
        inner = (torch.arange(grid[axis]) > 0).reshape([-1 if i == axis else 1 for i in range(len(grid))])
        there += [inner.expand(grid), inner.flip(axis).expand(grid)]
    parts = len(near)
    source = torch.stack([z.reshape(-1) for z in near], 1)  # (T', parts)
    kept = torch.stack([z.reshape(-1) for z in there], 1).float()
    if more:
        source = torch.cat([source, own.unsqueeze(1).expand(more, parts)])
        kept = torch.cat([kept, kept.new_ones(more, parts)])
    place = torch.arange(heads).unsqueeze(1) * parts + torch.arange(parts)
    rows = (source.unsqueeze(1) * (heads * parts) + place).reshape(-1)
    return Shift(rows, kept.unsqueeze(1).expand(-1, heads, -1).reshape(-1, 1), parts)


class FlatBlock(nn.Module):
    """A block on rows (B * T, C)."""

    def __init__(self, block: Block):
        super().__init__()
        self.block, self.heads = block, block.att.heads

    def forward(self, x: Tensor, tokens: int, shift: Shift) -> Tensor:
        block = self.block
        if block.ln0 is not None:
            x = block.ln0(x)
        x = x + self._mix_time(block.att, block.ln1(x), tokens, shift)
        return x + self._mix_channels(block.ffn, block.ln2(x), tokens, shift)

    def _step(self, x: Tensor, tokens: int, shift: Shift) -> Tensor:
        """From every token to its shifted self."""
        width = x.shape[-1]
        near = x.reshape(-1, tokens * self.heads * shift.parts, width // (self.heads * shift.parts))
        return (near.index_select(1, shift.rows) * shift.kept).reshape(-1, width) - x

    def _mix_time(self, att: TimeMix, x: Tensor, tokens: int, shift: Shift) -> Tensor:
        step, width = self._step(x, tokens, shift), x.shape[-1]
        mixed = x + step * att.time_maa_x.view(width)
        hidden = torch.tanh(mixed @ att.time_maa_w1).split(MIX_RANK, 1)
        for_w, for_k, for_v, for_r, for_g = (
            x + step * torch.addmm(getattr(att, f"time_maa_{name}").view(width), hidden[i], att.time_maa_w2[i])
            for i, name in enumerate("wkvrg")
        )
        decay = torch.addmm(att.time_decay.view(width), torch.tanh(for_w @ att.time_decay_w1), att.time_decay_w2)
        heads = (-1, tokens, self.heads, width // self.heads)
        r, k, v, w = (z.reshape(heads) for z in (att.receptance(for_r), att.key(for_k), att.value(for_v), decay))
        y = wkv6_plain(r, k, v, w, att.time_faaaa)
        y = F.layer_norm(y, (width // self.heads,), eps=att.ln_x.eps).reshape(-1, width)
        return att.output((y * att.ln_x.weight + att.ln_x.bias) * F.silu(att.gate(for_g)))

    def _mix_channels(self, ffn: ChannelMix, x: Tensor, tokens: int, shift: Shift) -> Tensor:
        step, width = self._step(x, tokens, shift), x.shape[-1]
        weights = [z.view(width) for z in ffn.mix_parameters()]
        if ffn.style.mixes_own:
            weights = [1 - z for z in weights]
        hidden = torch.relu(ffn.key(x + step * weights[0]))
        return torch.sigmoid(ffn.receptance(x + step * weights[1])) * ffn.value(hidden * hidden)


class FlatImageTower(nn.Module):
    """pixel_values (B, 3, h, w) -> features (B, D). size: the pictures' height and width; None for any."""

    def __init__(self, tower: ImageTower, size: tuple[int, int] | None):
        super().__init__()
        self.tower, self.size = tower, size
        self.blocks = nn.ModuleList(FlatBlock(cast(Block, block)) for block in tower.layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tower, patch = self.tower, self.tower.config.patch
        height, width = self.size or pixel_values.shape[-2:]
        rows, columns = (height + patch - 1) // patch, (width + patch - 1) // patch
        if self.size is None or height % patch or width % patch:
            pixel_values = F.pad(pixel_values, (0, columns * patch - width, 0, rows * patch - height))
        cells = pixel_values.reshape(-1, 3, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        projection = tower.patch_embed.projection
        x = F.linear(cells.reshape(-1, rows * columns, 3 * patch * patch), projection.weight.flatten(1))
        assert projection.bias is not None, "patches are projected with a bias"
        x = x + (self._positions(rows, columns) + projection.bias)
        tokens, more = rows * columns, 0
        if tower.cls_token is not None:
            x = torch.cat([x, tower.cls_token.expand(x.shape[0], -1, -1)], 1)
            tokens, more = tokens + 1, 1
        shift = plan_shift((rows, columns), more, tower.config.heads)
        x = x.reshape(-1, tower.width)
        for block in self.blocks:
            x = block(x, tokens, shift)
        pooled = tower.pool(tower.ln1(x).reshape(-1, tokens, tower.width))
        return pooled if tower.proj is None else pooled @ tower.proj

    def _positions(self, rows: int, columns: int) -> Tensor:
        """(1, T, width), resized as the tower does, here for symbolic sizes, too."""
        tower = self.tower
        if self.size is not None:
            return tower._positions((rows, columns))
        table = tower.pos_embed.unflatten(1, tower.grid).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)


class FlatTextTower(nn.Module):
    """input_ids (B, context) int64 -> features (B, D)."""

    def __init__(self, tower: TextTower):
        super().__init__()
        self.tower = tower
        self.blocks = nn.ModuleList(FlatBlock(cast(Block, block)) for block in tower.blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        tower, tokens = self.tower, self.tower.config.context
        x = tower.emb(input_ids).reshape(-1, tower.width)
        shift = plan_shift((tokens,), 0, tower.config.heads)
        for block in self.blocks:
            x = block(x, tokens, shift)
        pooled = tower.pool(tower.ln_out(x).reshape(-1, tokens, tower.width))
        return pooled if tower.proj is None else pooled @ tower.proj
