"""BERT as a text tower: post-norm layers, padding masked, features of position 0 ([CLS]).

From the paper (Devlin et al. 2018, arXiv 1810.04805); names and shapes of parameters are those of its released weights,
without the pooler. Written here, not taken from transformers, to leave padding out: on a CPU the products of a layer
read only tokens that are there (`tests/bench/bert.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ConfigError, parse, ranged, to_dict
from ..ops.watched import refuse_fused_attention
from ..tokenizer import BERT_CHINESE, MOST_POSITIONS, PAD, Tokenizer, make_tokenizer
from .intermediates import collect
from .specification import Encoded
from .tower import Tower


@dataclass(frozen=True)
class BertConfig:
    """BERT's settings; the defaults are those of the base size with the Chinese vocabulary."""

    default_tokenizer = BERT_CHINESE
    own_width = None  # always projected

    context: int = ranged(52, minimum=2)
    vocab: int = ranged(21128, minimum=1)
    width: int = ranged(768, minimum=1)
    depth: int = ranged(12, minimum=1)
    heads: int = ranged(12, minimum=1)
    ffn_width: int = ranged(3072, minimum=1)
    positions: int = ranged(MOST_POSITIONS, minimum=2)  # rows of the table of positions
    token_types: int = ranged(2, minimum=1)  # rows of a table of which only the first is used
    dropout: float = ranged(0.1, minimum=0, below=1)  # of embeddings and branches, in training
    attention_dropout: float = ranged(0.1, minimum=0, below=1)
    norm_eps: float = ranged(1e-12, above=0)
    init_std: float = ranged(0.02, above=0)

    def problems(self) -> list[str]:
        found = []
        if self.width % self.heads:
            found.append(f"text.heads: {self.heads} does not divide text.width {self.width}")
        if self.context > self.positions:
            found.append(f"text.context: {self.context} is more than text.positions {self.positions}")
        return found

    @classmethod
    def parse(cls, table: dict[str, Any]) -> BertConfig:
        return parse(cls, table, where="text.")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bert", **to_dict(self)}

    def build(self, embed_dim: int | None) -> BertTower:
        return BertTower(self, embed_dim)

    def encode(self, tower: BertTower, inputs: Tensor) -> Encoded:
        return tower.encode(inputs)

    def tokenizer(self, name: str) -> Tokenizer:
        if name != BERT_CHINESE:  # others use 0 for a word
            raise ConfigError([f"tokenizer: {name!r} has no padding that BERT's tower knows; use {BERT_CHINESE!r}"])
        return make_tokenizer(name, self.context)

    @property
    def vocabulary(self) -> int:
        return self.vocab


class Layout(NamedTuple):
    """Where the tokens of a batch (B, T) are: all of them, or those that are not padding, packed."""

    shape: tuple[int, int]  # B, T, without columns that only hold padding
    places: Tensor | None  # (N,) int64, of the packed tokens in the flattened batch; None: all B * T
    read: Tensor | None  # (B, 1, 1, T) bool: what attention reads; None: all

    def spread(self, x: Tensor) -> Tensor:
        """(N, W) -> (B, T, W), zero where nothing is."""
        if self.places is not None:
            rows, columns = self.shape
            x = x.new_zeros(rows * columns, x.shape[-1]).index_copy(0, self.places, x)
        return x.unflatten(0, self.shape)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ..) -> (N, ..)."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)


def find_layout(text: Tensor) -> Layout:
    """Token ids (B, T) -> their layout.

    Padding is hidden from attention; a row of nothing else is read whole, as the released code's finite mask does.
    Position 0 is always there, for its features. Packing waits for the device, so it is for CPUs, and no graph can hold
    it.
    """
    here = text != PAD
    read = here | ~here.any(1, keepdim=True)
    if text.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return Layout((text.shape[0], text.shape[1]), None, read[:, None, None])
    if read.all():
        return Layout((text.shape[0], text.shape[1]), None, None)
    packed = read.index_fill(1, torch.tensor([0]), True)
    length = int(packed.any(0).nonzero()[-1]) + 1
    places = packed[:, :length].flatten().nonzero().flatten()
    return Layout((text.shape[0], length), places, read[:, None, None, :length])


class Embeddings(nn.Module):
    """Words, positions and a constant, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dropout = config.dropout
        self.word_embeddings = nn.Embedding(config.vocab, config.width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(N,), (N,) int64 -> (N, W)."""
        x = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings.weight[0]
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class Branch(nn.Module):
    """The end of a residual branch: norm(dropout(dense(x)) + input)."""

    def __init__(self, config: BertConfig, width: int):
        super().__init__()
        self.dropout = config.dropout
        self.dense = nn.Linear(width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        return self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + start)


class Layer(nn.Module):
    """Attention, then two dense maps with GELU (exact, by erf) between them."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        maps = nn.ModuleDict({name: nn.Linear(config.width, config.width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": maps, "output": Branch(config, config.width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.ffn_width)})
        self.output = Branch(config, config.ffn_width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(N, W) -> (N, W)."""
        maps: Any = self.attention["self"]
        query, key, value = (
            layout.spread(maps[name](x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.read, dropout_p=dropout)
        x = self.attention["output"](layout.pack(mixed.transpose(1, 2).flatten(2)), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertTower(Tower):
    """Token ids (B, T), padded with 0, T up to the number of positions -> features of the first token."""

    def __init__(self, config: BertConfig, embed_dim: int | None):
        super().__init__(config.width, embed_dim)
        self.config = config
        self.context_length, self.vocab_size = config.context, config.vocab
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.depth))})
        self._init_values()
        self._add_projection()

    @property
    def _layers(self) -> Any:
        return self.encoder["layer"]

    @torch.no_grad()
    def _init_values(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=self.config.init_std)
            if isinstance(module, nn.Linear):
                module.bias.zero_()

    def encode(self, text: Tensor) -> Encoded:
        """Features, what they are projected from, and token vectors (B, T, width), zero at padding."""
        hidden, layout = self._run(text)
        tokens = layout.spread(hidden)
        if layout.read is not None:
            tokens = tokens * layout.read[:, 0, 0, :, None]
        pooled = self._pool(hidden, layout)
        tokens = F.pad(tokens, (0, 0, 0, text.shape[1] - layout.shape[1]))
        return Encoded(pooled if self.proj is None else pooled @ self.proj, pooled, tokens)

    def forward(self, text: Tensor) -> Tensor:
        pooled = self._pool(*self._run(text))
        return pooled if self.proj is None else pooled @ self.proj

    def _run(self, text: Tensor) -> tuple[Tensor, Layout]:
        """Hidden states (N, width) after the last layer, and where they belong."""
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.config.positions:
            raise ValueError(f"text: expected shape (B, 1..{self.config.positions}), got {tuple(text.shape)}")
        refuse_fused_attention()
        layout = find_layout(text)
        text = text[:, : layout.shape[1]]
        positions = torch.arange(text.shape[1], device=text.device).expand(text.shape)
        x = self.embeddings(layout.pack(text), layout.pack(positions))
        for layer in self._layers:
            if self.recompute and self.training:
                x = checkpoint(layer, x, layout, use_reentrant=False)
            else:
                x = layer(x, layout)
        return x, layout

    @staticmethod
    def _pool(hidden: Tensor, layout: Layout) -> Tensor:
        if layout.places is None:
            return hidden.unflatten(0, layout.shape)[:, 0]
        return hidden[(layout.places % layout.shape[1] == 0).nonzero().flatten()]

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        return list(self._layers)

    def collect_blocks(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same of packed tokens; zero at padding."""
        features, seen = collect(self.blocks_in_order, lambda: self(inputs))
        found = []
        for (_, layout), out in seen:
            tokens = layout.spread(out)
            tokens = tokens if layout.read is None else tokens * layout.read[:, 0, 0, :, None]
            found.append(F.pad(tokens, (0, 0, 0, inputs.shape[1] - layout.shape[1])))
        return features, found

    def groups(self) -> list[list[Any]]:
        return [[self.embeddings], *([layer] for layer in self._layers)]


TOWERS = {"text": BertConfig}
