"""RWKV-6 towers for images and texts, and the settings that describe them.

Parameter names and shapes are those of the released RWKV-CLIP checkpoints, which therefore load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import parse, ranged, to_dict
from ..tokenizer import CLIP_BPE, Tokenizer, make_tokenizer
from .rwkv_block import IMAGE_STYLE, TEXT_STYLE, Block, depth_power, init_mixing, run_blocks
from .specification import CLIP_PIXELS, Encoded
from .tower import Tower


class _TowerConfig:
    """What the descriptions of both towers have in common. (Attributes without annotation are not settings.)"""

    side: ClassVar[str]
    width: int

    @classmethod
    def parse(cls, table: dict[str, Any]) -> Any:
        return parse(cls, table, where=f"{cls.side}.")

    def to_json(self) -> dict[str, Any]:
        return to_dict(self)

    def encode(self, tower: Tower, inputs: Tensor) -> Encoded:
        return tower.encode(inputs)

    @property
    def own_width(self) -> int:
        return self.width


@dataclass(frozen=True)
class ImageTowerConfig(_TowerConfig):
    """RWKV image tower. Head size is width / heads and a multiple of 4 (four shift directions)."""

    side = "image"
    pixels = CLIP_PIXELS

    image_size: tuple[int, int] = (224, 224)  # height, width in pixels
    patch: int = ranged(32, minimum=1)
    width: int = ranged(640, minimum=4)
    depth: int = ranged(12, minimum=1)
    heads: int = ranged(8, minimum=1)
    ffn_width: int = ranged(3200, minimum=1)
    norm_eps: float = ranged(1e-5, above=0)  # of the group norm after WKV
    drop_path: float = ranged(0.0, minimum=0, below=1)
    class_token: bool = False

    def problems(self) -> list[str]:
        if self.width % (4 * self.heads):
            return [f"image.heads: {self.heads} heads of width {self.width} give no head size that is a multiple of 4"]
        return [f"image.image_size: {side} is not positive" for side in self.image_size if side < 1]

    def build(self, embed_dim: int | None = None) -> ImageTower:
        return ImageTower(self, embed_dim)

    def with_drop_path(self, rate: float) -> ImageTowerConfig:
        return replace(self, drop_path=rate)

    @property
    def drop_branches(self) -> int:
        return 2 * self.depth if self.drop_path else 0


@dataclass(frozen=True)
class TextTowerConfig(_TowerConfig):
    """RWKV text tower. Head size is even (two shift directions)."""

    side = "text"
    default_tokenizer = CLIP_BPE

    context: int = ranged(77, minimum=2)
    vocab: int = ranged(49408, minimum=1)
    width: int = ranged(640, minimum=2)
    depth: int = ranged(6, minimum=1)
    heads: int = ranged(10, minimum=1)
    ffn_width: int = ranged(2240, minimum=1)
    norm_eps: float = ranged(64e-5, above=0)  # of the group norm after WKV: 1e-5 * 8^2 as released
    # Released `text_initialization`: RWKV's own initial values; false leaves the library's defaults.
    rwkv_init: bool = True

    def problems(self) -> list[str]:
        if self.width % (2 * self.heads):
            return [f"text.heads: {self.heads} heads of width {self.width} give no even head size"]
        return []

    def build(self, embed_dim: int | None = None) -> TextTower:
        return TextTower(self, embed_dim)

    def tokenizer(self, name: str) -> Tokenizer:
        return make_tokenizer(name, self.context)

    @property
    def vocabulary(self) -> int:
        return self.vocab


class PatchEmbed(nn.Module):
    """Non-overlapping patches; an image that the patch does not divide is zero-padded at the right and bottom."""

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


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, rows * columns, W) of one grid -> those of another: bicubic, corners not aligned."""
    grid = table.float().unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


class ImageTower(Tower):
    """Images (B, 3, h, w), any h and w -> features: the class token, or the mean of all tokens."""

    def __init__(self, config: ImageTowerConfig, embed_dim: int | None = None):
        super().__init__(config.width, embed_dim)
        self.config = config
        self.image_size = config.image_size
        self.grid = self.grid_of(config.image_size)
        self.patch_embed = PatchEmbed(config.patch, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], config.width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()  # also on the meta device
        blocks = [Block(config, IMAGE_STYLE, i == 0, rate) for i, rate in enumerate(rates)]
        self.layers = nn.ModuleList(blocks)
        self.drop_numbers: Tensor | None = None  # see RWKVCLIP.set_drop_numbers
        self.ln1 = nn.LayerNorm(config.width)
        self._init_values(blocks)
        self._add_projection()

    @torch.no_grad()
    def _init_values(self, blocks: Iterable[Block]) -> None:
        for layer, block in enumerate(blocks):
            init_mixing(block.att, layer, self.config.depth)
            for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
                getattr(block.att, name).uniform_(-1e-4, 1e-4)
            fraction = depth_power(layer, self.config.depth, self.config.width)
            for parameter in block.ffn.mix_parameters():
                parameter.copy_(fraction)

    def grid_of(self, size: Iterable[int]) -> tuple[int, int]:
        """Patches of a picture of (height, width): rows, columns."""
        rows, columns = (-(-side // self.config.patch) for side in size)
        return rows, columns

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        return resize_table(self.pos_embed, self.grid, grid)

    def forward_tokens(self, image: Tensor) -> Tensor:
        """Tokens (B, T, width) after the last LayerNorm, row by row; the class token, if there is one, comes last."""
        if image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image: expected shape (B, 3, height, width), got {tuple(image.shape)}")
        grid = self.grid_of(image.shape[-2:])
        x = self.patch_embed(image.to(self.patch_embed.projection.weight.dtype)) + self._positions(grid)
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1)
        numbers = self.drop_numbers if self.training else None
        if numbers is not None and torch.compiler.is_compiling():
            numbers = numbers.to(x.device)
        return self.ln1(run_blocks(self.layers, x, grid, self.recompute and self.training, numbers))

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, -1] if self.cls_token is not None else tokens.mean(1)

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def last_norm(self) -> nn.Module:
        return self.ln1

    def groups(self) -> list[list[Any]]:
        embedding = [self.patch_embed, self.pos_embed, *([] if self.cls_token is None else [self.cls_token])]
        return [embedding, *([block] for block in self.layers[:-1]), [self.layers[-1], self.ln1]]


class TextTower(Tower):
    """Token ids (B, T), T up to the context -> features: the mean of normalised token vectors, padding included."""

    def __init__(self, config: TextTowerConfig, embed_dim: int | None = None):
        super().__init__(config.width, embed_dim)
        self.config = config
        self.context_length, self.vocab_size = config.context, config.vocab
        self.emb = nn.Embedding(config.vocab, config.width)
        blocks = [Block(config, TEXT_STYLE, i == 0) for i in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(config.width)
        self._init_values(blocks)
        self._add_projection()

    @torch.no_grad()
    def _init_values(self, blocks: Iterable[Block]) -> None:
        for layer, block in enumerate(blocks):
            init_mixing(block.att, layer, self.config.depth)
            fraction = depth_power(layer, self.config.depth, self.config.width)
            for coefficients in block.ffn.mix_parameters():
                coefficients.copy_(1 - fraction)
            # NOTE(parity): the released code keeps these two in bfloat16. We start from the same rounded values but
            # store float32, where an update smaller than a bfloat16 step is not lost.
            for parameter in (block.att.time_decay, block.att.time_faaaa):
                parameter.copy_(parameter.bfloat16())
            if self.config.rwkv_init:
                self._init_matrices(block, (1 + layer) / self.config.depth)
        if self.config.rwkv_init:
            self.emb.weight.uniform_(-1e-4, 1e-4)

    @staticmethod
    def _init_matrices(block: Block, depth_fraction: float) -> None:
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
        att.ln_x.weight.fill_(depth_fraction**0.7)

    def forward_tokens(self, text: Tensor) -> Tensor:
        """Token vectors (B, T, width) after the last LayerNorm."""
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.config.context:
            raise ValueError(f"text: expected shape (B, 1..{self.config.context}), got {tuple(text.shape)}")
        return self.ln_out(run_blocks(self.blocks, self.emb(text), text.shape[1:], self.recompute and self.training))

    def pool(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens, dim=-1).mean(1)

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def last_norm(self) -> nn.Module:
        return self.ln_out

    def groups(self) -> list[list[Any]]:
        return [[self.emb], *([block] for block in self.blocks[:-1]), [self.blocks[-1], self.ln_out]]


TOWERS = {"image": ImageTowerConfig, "text": TextTowerConfig}
