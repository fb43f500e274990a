"""RWKV-6 towers for images and texts: one block, two ways to shift tokens, two embeddings.

Parameter names and shapes are those of the released RWKV-CLIP checkpoints, which therefore load as they are. What
differs between the towers besides shift and embedding is written down as data in `BlockStyle`.

Mixed precision: the residual stream has the dtype of the embeddings, float32 with float32 weights (autocast or not),
bfloat16 with bfloat16 weights. LayerNorm reads it; from there every product, mixture and gate of a block has autocast's
dtype (or the stream's), with float32 inside each pointwise step and sum. The raw decay is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..config import ImageTowerConfig, TextTowerConfig
from ..ops import mix_tokens, norm_gate, relu_square, sigmoid_gate, wkv6

MIX_RANK, DECAY_RANK = 32, 64  # inner widths of the low-rank maps behind token mixing and decay


@dataclass(frozen=True)
class BlockStyle:
    """What an image block and a text block do differently."""

    mix_name: str  # prefix of the channel mix's coefficients
    mixes_own: bool  # they weigh the token itself (image) or its neighbour (text)


IMAGE_STYLE = BlockStyle(mix_name="spatial_mix", mixes_own=True)
TEXT_STYLE = BlockStyle(mix_name="time_maa", mixes_own=False)


def _coefficients(width: int, value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((1, 1, width), value))


class TimeMix(nn.Module):
    """Attention's place: data-dependent token mixing, bidirectional WKV6 per head, group norm and gate."""

    def __init__(self, width: int, heads: int, norm_eps: float):
        super().__init__()
        self.heads = heads
        for name in "xwkvrg":
            self.register_parameter(f"time_maa_{name}", _coefficients(width))
        self.time_maa_w1 = nn.Parameter(torch.zeros(width, 5 * MIX_RANK))
        self.time_maa_w2 = nn.Parameter(torch.zeros(5, MIX_RANK, width))
        self.time_decay = _coefficients(width)
        self.time_decay_w1 = nn.Parameter(torch.zeros(width, DECAY_RANK))
        self.time_decay_w2 = nn.Parameter(torch.zeros(DECAY_RANK, width))
        self.time_faaaa = nn.Parameter(torch.zeros(heads, width // heads))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(heads, width, eps=norm_eps)

    def _mix(self, x: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
        """Inputs of w, k, v, r, g: x moved towards its neighbour by a static and a data-dependent share."""
        b, t, c = x.shape
        (mixed,) = mix_tokens(x, self.time_maa_x.view(1, c), None, self.heads, grid)
        hidden = torch.tanh(mixed @ self.time_maa_w1).view(b * t, 5, MIX_RANK).transpose(0, 1)
        shares = torch.bmm(hidden, self.time_maa_w2).view(5, b, t, c)
        static = torch.cat([getattr(self, f"time_maa_{name}") for name in "wkvrg"]).view(5, c)
        return mix_tokens(x, static, shares, self.heads, grid)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        b, t, c = x.shape
        for_w, for_k, for_v, for_r, for_g = self._mix(x, grid)
        decay = self.time_decay + torch.tanh(for_w @ self.time_decay_w1) @ self.time_decay_w2
        r, k, v = self.receptance(for_r), self.key(for_k), self.value(for_v)
        y = wkv6(*(z.view(b, t, self.heads, c // self.heads) for z in (r, k, v, decay)), self.time_faaaa)
        norm = self.ln_x
        y = norm_gate(y.view(b, t, c), self.gate(for_g), norm.weight, norm.bias, self.heads, norm.eps)
        return self.output(y)


class ChannelMix(nn.Module):
    """The MLP's place: squared ReLU, gated by a sigmoid."""

    def __init__(self, width: int, ffn_width: int, heads: int, style: BlockStyle):
        super().__init__()
        self.heads, self.style = heads, style
        for name in "kr":
            self.register_parameter(f"{style.mix_name}_{name}", _coefficients(width))
        self.key = nn.Linear(width, ffn_width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        weights = torch.cat([getattr(self, f"{self.style.mix_name}_{name}") for name in "kr"]).view(2, -1)
        if self.style.mixes_own:
            weights = 1 - weights.to(torch.promote_types(weights.dtype, torch.float32))
        for_k, for_r = mix_tokens(x, weights, None, self.heads, grid)
        return sigmoid_gate(self.receptance(for_r), self.value(relu_square(self.key(for_k))))


class DropPath(nn.Module):
    """Drops a residual branch per sample while training, and scales the kept ones up by 1 / (1 - rate)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], numbers: Tensor | None = None) -> Tensor:
        """x + branch(x), the branch dropped where `numbers` is below the rate. x: (B, T, C); numbers: (B,), uniform in
        [0, 1), drawn here where there are none; on the CPU, or while compiling on any device."""
        if not self.training or self.rate == 0:
            return x + branch(x)
        compiling = torch.compiler.is_compiling()
        if numbers is None:  # by the CPU's generator: the host would wait for a GPU's
            numbers = torch.rand(x.shape[0], device=x.device if compiling else None)
        if compiling:  # a graph has one shape: everything is computed, and some of it times 0
            kept = (numbers.to(x.device) >= self.rate).to(x.dtype) / (1 - self.rate)
            return x + branch(x) * kept.view(-1, 1, 1)
        # Where no sample keeps the branch it runs on an empty batch, and its parameters get gradients of 0: one without
        # a gradient would stop DDP.
        kept = (numbers >= self.rate).nonzero().flatten()
        if x.is_cuda:
            kept = kept.pin_memory().to(x.device, non_blocking=True)
        part = branch(x.index_select(0, kept))
        return x.index_add(0, kept, part.to(x.dtype), alpha=1 / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"{self.rate:.3f}"


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What goes into a block's matrix products: autocast's dtype, else the residual stream's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Block(nn.Module):
    """x += time mix; x += channel mix, each behind a LayerNorm. The first block of a tower normalises its input."""

    def __init__(
        self,
        config: ImageTowerConfig | TextTowerConfig,
        style: BlockStyle,
        first: bool,
        drop_path: float = 0.0,
    ):
        super().__init__()
        width = config.width
        self.ln0 = nn.LayerNorm(width) if first else None
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(width, config.heads, config.norm_eps)
        self.ffn = ChannelMix(width, config.ffn_width, config.heads, style)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, ...], drop_numbers: Tensor | None = None) -> Tensor:
        """x: (B, T, C) -> the same. drop_numbers: (2, B), what `DropPath` decides by in the two branches."""
        dtype = _compute_dtype(x)
        first, second = (None, None) if drop_numbers is None else drop_numbers.unbind()
        if self.ln0 is not None:
            x = self.ln0(x)
        x = self.drop_path(x, lambda z: self.att(self.ln1(z).to(dtype), grid), first)
        return self.drop_path(x, lambda z: self.ffn(self.ln2(z).to(dtype), grid), second)


def _keep_narrow(width: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What activation checkpointing keeps of a block: WKV6 and the matrix products whose result is as wide as a token
    (its inputs r, k, v, decay; the gates; the branches' ends). They hold two thirds of a block's arithmetic in a
    quarter of its activations; the rest - mixing, norms, the wide half of the channel mix - is computed again."""
    narrow = op is torch.ops.aten.mm.default and args[1].shape[1] == width
    keep = narrow or op is torch.ops.rwkv_clip.wkv6.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _run(
    blocks: nn.ModuleList, x: Tensor, grid: tuple[int, ...], recompute: bool, drop_numbers: Tensor | None = None
) -> Tensor:
    # Numbers are arguments, not state: recomputation, perhaps behind the next batch's forward, gets the same again.
    numbers = [None] * len(blocks) if drop_numbers is None else drop_numbers.unflatten(0, (len(blocks), 2)).unbind()
    if not recompute:
        for block, own in zip(blocks, numbers):
            x = block(x, grid, own)
        return x
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep_narrow, x.shape[-1]))
    for block, own in zip(blocks, numbers):
        x = checkpoint(block, x, grid, own, use_reentrant=False, context_fn=contexts)
    return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches; a picture that the patch does not divide is zero-padded at the right and bottom."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) -> tokens (B, ceil(h / patch) * ceil(w / patch), width), row by row."""
        b, p = image.shape[0], self.patch
        bottom, right = (-side % p for side in image.shape[-2:])
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        # As one matrix product: half the time of torch's convolution on a CPU, and no transposition of its output.
        rows, columns = image.shape[-2] // p, image.shape[-1] // p
        pixels = image.view(b, 3, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, 3 * p * p)
        return F.linear(pixels, self.projection.weight.flatten(1), self.projection.bias)


class ImageTower(nn.Module):
    """Pictures (B, 3, h, w), any h and w -> features (B, width), not normalised."""

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        self.config = config
        self.grid = tuple(-(-side // config.patch) for side in config.image_size)
        self.recompute = False
        self.patch_embed = PatchEmbed(config.patch, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], config.width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.layers = nn.ModuleList(Block(config, IMAGE_STYLE, i == 0, rate) for i, rate in enumerate(rates))
        self.drop_numbers: Tensor | None = None  # see RWKVCLIP.set_drop_numbers
        self.ln1 = nn.LayerNorm(config.width)
        self._init_values()

    @torch.no_grad()
    def _init_values(self) -> None:
        for layer, block in enumerate(self.layers):
            init_mixing(block.att, layer, self.config.depth)
            for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
                getattr(block.att, name).uniform_(-1e-4, 1e-4)
            share = _depth_power(layer, self.config.depth, self.config.width)
            block.ffn.spatial_mix_k.copy_(share)
            block.ffn.spatial_mix_r.copy_(share)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        table = self.pos_embed.float().unflatten(1, self.grid).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def forward_tokens(self, image: Tensor) -> Tensor:
        """Normalised tokens (B, T, width), row by row; the class token, if there is one, comes last."""
        if image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image: expected shape (B, 3, height, width), got {tuple(image.shape)}")
        grid = tuple(-(-side // self.config.patch) for side in image.shape[-2:])
        x = self.patch_embed(image) + self._positions(grid)
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1)
        numbers = self.drop_numbers if self.training else None
        if numbers is not None and torch.compiler.is_compiling():
            numbers = numbers.to(x.device)
        return self.ln1(_run(self.layers, x, grid, self.recompute and self.training, numbers))

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.forward_tokens(image)
        return tokens[:, -1] if self.cls_token is not None else tokens.mean(1)


class TextTower(nn.Module):
    """Token ids (B, T), T up to the context -> features (B, width): mean of normalised token vectors, padding too."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.emb = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, TEXT_STYLE, i == 0) for i in range(config.depth))
        self.ln_out = nn.LayerNorm(config.width)
        self._init_values()

    @torch.no_grad()
    def _init_values(self) -> None:
        for layer, block in enumerate(self.blocks):
            init_mixing(block.att, layer, self.config.depth)
            share = _depth_power(layer, self.config.depth, self.config.width)
            block.ffn.time_maa_k.copy_(1 - share)
            block.ffn.time_maa_r.copy_(1 - share)
            # NOTE(parity): the released code keeps these two in bfloat16. We start from the same rounded values but
            # store float32, where an update smaller than a bfloat16 step is not lost.
            for parameter in (block.att.time_decay, block.att.time_faaaa):
                parameter.copy_(parameter.bfloat16())
            if self.config.rwkv_init:
                self._init_matrices(block, (1 + layer) / self.config.depth)
        if self.config.rwkv_init:
            self.emb.weight.uniform_(-1e-4, 1e-4)

    @staticmethod
    def _init_matrices(block: Block, depth_share: float) -> None:
        att, ffn = block.att, block.ffn
        for name in ("time_maa_w2", "time_decay_w2"):
            getattr(att, name).uniform_(-0.01, 0.01)
        for linear in (att.output, ffn.value, ffn.receptance):
            linear.weight.zero_()
        for linear, gain in (
            (att.receptance, 1),
            (att.value, 1),
            (att.key, 0.1),
            (att.gate, 0.1),
            (ffn.key, 0.5),
        ):
            rows, columns = linear.weight.shape
            nn.init.orthogonal_(linear.weight, gain * math.sqrt(max(1, rows / columns)))
        att.ln_x.weight.fill_(depth_share**0.7)

    def forward_tokens(self, text: Tensor) -> Tensor:
        """Normalised (LayerNorm) token vectors (B, T, width)."""
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.config.context:
            raise ValueError(f"text: expected shape (B, 1..{self.config.context}), got {tuple(text.shape)}")
        return self.ln_out(_run(self.blocks, self.emb(text), text.shape[1:], self.recompute and self.training))

    def forward(self, text: Tensor) -> Tensor:
        return F.normalize(self.forward_tokens(text), dim=-1).mean(1)


# ---- initial values ---------------------------------------------------------------------------------------------


def _depth_power(layer: int, depth: int, width: int, factor: float = 1.0) -> Tensor:
    """(channel / width) ** (factor * (1 - layer / depth)), shape (1, 1, width)."""
    channel = torch.arange(width, dtype=torch.float64) / width
    return channel.pow(factor * (1 - layer / depth)).float().view(1, 1, width)


@torch.no_grad()
def init_mixing(att: TimeMix, layer: int, depth: int) -> None:
    """Initial shares, decays and bonus of RWKV-6: they depend on channel and layer only."""
    width = att.time_decay.shape[-1]
    late = layer / max(depth - 1, 1)
    share = _depth_power(layer, depth, width)
    for name in "xwk":
        getattr(att, f"time_maa_{name}").copy_(1 - share)
    att.time_maa_v.copy_(1 - (share + 0.3 * late))
    for name in "rg":
        getattr(att, f"time_maa_{name}").copy_(1 - _depth_power(layer, depth, width, 0.5))
    channel = torch.arange(width, dtype=torch.float64)
    ramp = channel / max(width - 1, 1)
    att.time_decay.copy_((-6 + 5 * ramp.pow(0.7 + 1.3 * late)).view(1, 1, width))
    zigzag = ((channel + 1) % 3 - 1) * 0.1
    att.time_faaaa.copy_((late * (1 - ramp) + zigzag).view_as(att.time_faaaa))
