"""The RWKV-6 block: data-dependent time mix (bidirectional WKV) and channel mix, and their initial values.

The differences between the blocks of the towers are data, in `BlockStyle`.

Mixed precision: the residual stream has the dtype of the embeddings, float32 with float32 weights (autocast or not),
bfloat16 with bfloat16 weights. LayerNorm reads it; from there every product, mixture and gate of a block has autocast's
dtype (or the stream's), with float32 inside each pointwise step and sum. The raw decay is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..ops import mix_tokens, norm_gate, relu_square, sigmoid_gate, wkv6

MIX_RANK, DECAY_RANK = 32, 64  # ranks of the low-rank maps for token mixing and decay


@dataclass(frozen=True)
class BlockStyle:
    """What an image block and a text block do differently."""

    mix_name: str  # prefix of the channel mix's coefficients
    mixes_own: bool  # they weigh the token itself (image) or its neighbour (text)


class BlockSizes(Protocol):
    """What a block reads from its tower's settings."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def ffn_width(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...


IMAGE_STYLE = BlockStyle(mix_name="spatial_mix", mixes_own=True)
TEXT_STYLE = BlockStyle(mix_name="time_maa", mixes_own=False)


def _coefficients(width: int, value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((1, 1, width), value))


class Mixing(nn.Module):
    """What mixes tokens by static coefficients (J, C), of several parameters."""

    kept: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None, persistent=False)

    def find_static(self) -> Tensor:
        """The coefficients, as the parameters are."""
        raise NotImplementedError

    @torch.no_grad()
    def keep_static(self) -> None:
        """Find them once, in float32, for encoding; the first call with gradients, `train()` and new weights end that,
        as the parameters may have changed after them."""
        self.kept = self.find_static().float()

    def train(self, mode: bool = True) -> Mixing:
        if mode:
            self.kept = None
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.kept = None
        super()._load_from_state_dict(*arguments)

    @property
    def static(self) -> Tensor:
        """The coefficients that were kept, or found now."""
        if self.kept is not None and not torch.is_grad_enabled():
            return self.kept
        if self.kept is not None and not torch.compiler.is_compiling():
            self.kept = None
        return self.find_static()


class TimeMix(Mixing):
    """In place of attention: data-dependent token mixing, bidirectional WKV6 per head, group norm and gate."""

    time_maa_x: nn.Parameter
    time_maa_v: nn.Parameter

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
        """Inputs of w, k, v, r, g: x moved towards its neighbour by a static and a data-dependent fraction."""
        b, t, c = x.shape
        (mixed,) = mix_tokens(x, self.time_maa_x.view(1, c), None, self.heads, grid)
        hidden = torch.tanh(mixed @ self.time_maa_w1).view(b * t, 5, MIX_RANK).transpose(0, 1)
        fractions = torch.bmm(hidden, self.time_maa_w2).view(5, b, t, c)
        return mix_tokens(x, self.static, fractions, self.heads, grid)

    def find_static(self) -> Tensor:
        return torch.cat([getattr(self, f"time_maa_{name}") for name in "wkvrg"]).view(5, -1)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        b, t, c = x.shape
        for_w, for_k, for_v, for_r, for_g = self._mix(x, grid)
        change = torch.tanh(for_w @ self.time_decay_w1) @ self.time_decay_w2
        decay = self.time_decay + change.to(self.time_decay.dtype)  # torch adds two dtypes one number at a time
        inputs = self.receptance(for_r), self.key(for_k), self.value(for_v), decay
        r, k, v, w = (z.view(b, t, self.heads, c // self.heads) for z in inputs)
        y = wkv6(r, k, v, w, self.time_faaaa)
        norm = self.ln_x
        y = norm_gate(y.view(b, t, c), self.gate(for_g), norm.weight, norm.bias, self.heads, norm.eps)
        return self.output(y)


class ChannelMix(Mixing):
    """In place of the MLP: squared ReLU, gated by a sigmoid."""

    def __init__(self, width: int, ffn_width: int, heads: int, style: BlockStyle):
        super().__init__()
        self.heads, self.style = heads, style
        for name in "kr":
            self.register_parameter(f"{style.mix_name}_{name}", _coefficients(width))
        self.key = nn.Linear(width, ffn_width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(ffn_width, width, bias=False)

    def mix_parameters(self) -> list[Tensor]:
        """Coefficients of the token mixing, for the key and for the receptance."""
        return [getattr(self, f"{self.style.mix_name}_{name}") for name in "kr"]

    def find_static(self) -> Tensor:
        weights = torch.cat(self.mix_parameters()).view(2, -1)
        return 1 - weights.to(torch.promote_types(weights.dtype, torch.float32)) if self.style.mixes_own else weights

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        for_k, for_r = mix_tokens(x, self.static, None, self.heads, grid)
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
    """The dtype of a block's matrix products: autocast's, else that of the residual stream."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Block(nn.Module):
    """x += time mix; x += channel mix, each after a LayerNorm. The first block of a tower normalises its input."""

    def __init__(
        self,
        config: BlockSizes,
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
    quarter of its activations; the rest - mixing, norms, the wide half of the channel mix - is recomputed."""
    narrow = op is torch.ops.aten.mm.default and args[1].shape[1] == width
    keep = narrow or op is torch.ops.rwkv_clip.wkv6.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, grid: tuple[int, ...], recompute: bool, drop_numbers: Tensor | None = None
) -> Tensor:
    # Numbers are arguments, not state: recomputation, perhaps after the next batch's forward, gets the same ones.
    numbers = [None] * len(blocks) if drop_numbers is None else drop_numbers.unflatten(0, (len(blocks), 2)).unbind()
    if not recompute:
        for block, own in zip(blocks, numbers):
            x = block(x, grid, own)
        return x
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep_narrow, x.shape[-1]))
    for block, own in zip(blocks, numbers):
        x = checkpoint(block, x, grid, own, use_reentrant=False, context_fn=contexts)
    return x


# ---- initial values ---------------------------------------------------------------------------------------------


def depth_power(layer: int, depth: int, width: int, factor: float = 1.0) -> Tensor:
    """(channel / width) ** (factor * (1 - layer / depth)), shape (1, 1, width)."""
    channel = torch.arange(width, dtype=torch.float64) / width
    return channel.pow(factor * (1 - layer / depth)).float().view(1, 1, width)


@torch.no_grad()
def init_mixing(att: TimeMix, layer: int, depth: int) -> None:
    """Initial fractions, decays and bonus of RWKV-6: they depend on channel and layer only."""
    width = att.time_decay.shape[-1]
    late = layer / max(depth - 1, 1)
    fraction = depth_power(layer, depth, width)
    for name in "xwk":
        getattr(att, f"time_maa_{name}").copy_(1 - fraction)
    att.time_maa_v.copy_(1 - (fraction + 0.3 * late))
    for name in "rg":
        getattr(att, f"time_maa_{name}").copy_(1 - depth_power(layer, depth, width, 0.5))
    channel = torch.arange(width, dtype=torch.float64)
    ramp = channel / max(width - 1, 1)
    att.time_decay.copy_((-6 + 5 * ramp.pow(0.7 + 1.3 * late)).view(1, 1, width))
    zigzag = ((channel + 1) % 3 - 1) * 0.1
    att.time_faaaa.copy_((late * (1 - ramp) + zigzag).view_as(att.time_faaaa))
