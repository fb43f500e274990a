"""RWKV-CLIP for transformers: its towers in plain PyTorch, in one file that needs nothing else.

It is copied into a folder that `rwkv_clip.save_pretrained(.., transformers=True)` writes, and read by

    AutoModel.from_pretrained(FOLDER, trust_remote_code=True)

Image towers are RWKV-6 and CLIP's ViT, text towers RWKV-6, CLIP's transformer and BERT. Parameters have the names and
shapes of the library's. WKV6 is the plain recurrence, a few operations per token; the library has fast kernels, trains
and drops paths and patches. Written for float32; the sums of WKV6 are kept in float32 in other dtypes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

MIX_RANK, DECAY_RANK = 32, 64
MAX_RAW_DECAY = 80.0  # exp(-exp(x)) is 0 from far below; exp(x) stays finite
TEXT_SHIFTS = ((0, 0, 1, -1), (0, 0, -1, 1))  # padding of F.pad, one for each part of a head
IMAGE_SHIFTS = ((0, 0, 1, -1), (0, 0, -1, 1), (0, 0, 0, 0, 1, -1), (0, 0, 0, 0, -1, 1))
# Settings of CLIP's towers that a table may leave out.
VIT = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "mlp_ratio": 4.0}
TRANSFORMER = {
    **{"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0},
    **{"pool_type": "argmax", "eos_id": 2},
}


class RWKVCLIPConfig(PretrainedConfig):
    """image, text: the tables of both towers, as in the library's model JSON; embed_dim: width that both are projected
    to, or None; tokenizer: its name in the library."""

    model_type = "rwkv_clip"

    def __init__(
        self, image: Any = None, text: Any = None, embed_dim: Any = None, tokenizer: str = "clip-bpe", **others: Any
    ):
        self.image, self.text = image, text
        self.embed_dim, self.tokenizer = embed_dim, tokenizer
        super().__init__(**others)


@dataclass
class RWKVCLIPOutput(ModelOutput):
    """Features (B, D), normalised, and scaled cosines; None for what was not asked for."""

    image_embeds: Any = None
    text_embeds: Any = None
    logits_per_image: Any = None  # (images, texts)
    logits_per_text: Any = None  # its transpose


def shift(x: Tensor, heads: int, grid: tuple) -> Tensor:
    """(B, T, C): every part of a head from its neighbour on the grid; tokens after the grid's are kept."""
    b, _, c = x.shape
    paddings, count = (TEXT_SHIFTS if len(grid) == 1 else IMAGE_SHIFTS), math.prod(grid)
    cells = x[:, :count].reshape(b, *grid, heads, len(paddings), c // heads // len(paddings))
    moved = [F.pad(part.flatten(-2), padding).view(part.shape) for part, padding in zip(cells.unbind(-2), paddings)]
    return torch.cat([torch.stack(moved, -2).reshape(b, count, c), x[:, count:]], 1)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Bidirectional WKV6: r, k, v, raw decay w (B, T, H, N), bonus u (H, N) -> (B, T, H, N)."""
    factor = torch.exp(-torch.exp(w.float().clamp(max=MAX_RAW_DECAY)))
    rs, ks, vs, ws = (x.float().unbind(1) for x in (r, k, v, factor))
    steps = range(len(rs))
    ys = [(rs[t] * u.float() * ks[t]).sum(-1, keepdim=True) * vs[t] for t in steps]
    for order in (steps, reversed(steps)):
        state = torch.zeros_like(ks[0]).unsqueeze(-1) * vs[0].unsqueeze(-2)
        for t in order:
            ys[t] = ys[t] + (rs[t].unsqueeze(-1) * state).sum(-2)
            state = ws[t].unsqueeze(-1) * state + ks[t].unsqueeze(-1) * vs[t].unsqueeze(-2)
    return torch.stack(ys, 1).to(v.dtype)


class TimeMix(nn.Module):
    """In place of attention."""

    time_maa_x: nn.Parameter

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        for name in "xwkvrg":
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.zeros(1, 1, width)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(width, 5 * MIX_RANK))
        self.time_maa_w2 = nn.Parameter(torch.zeros(5, MIX_RANK, width))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, width))
        self.time_decay_w1 = nn.Parameter(torch.zeros(width, DECAY_RANK))
        self.time_decay_w2 = nn.Parameter(torch.zeros(DECAY_RANK, width))
        self.time_faaaa = nn.Parameter(torch.zeros(heads, width // heads))
        self.receptance, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gate, self.output = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.ln_x = nn.GroupNorm(heads, width, eps=eps)

    def forward(self, x: Tensor, grid: tuple) -> Tensor:
        b, t, c = x.shape
        step = shift(x, self.heads, grid) - x
        hidden = torch.tanh((x + step * self.time_maa_x) @ self.time_maa_w1).view(b, t, 5, 1, MIX_RANK)
        fractions = (hidden @ self.time_maa_w2).squeeze(3).unbind(2)
        static = (getattr(self, f"time_maa_{name}") for name in "wkvrg")
        for_w, for_k, for_v, for_r, for_g = (x + step * (own + more) for own, more in zip(static, fractions))
        decay = self.time_decay + torch.tanh(for_w @ self.time_decay_w1) @ self.time_decay_w2
        parts = (self.receptance(for_r), self.key(for_k), self.value(for_v), decay)
        r, k, v, w = (part.view(b, t, self.heads, -1) for part in parts)
        y = self.ln_x(wkv6(r, k, v, w, self.time_faaaa).reshape(b * t, c)).view(b, t, c)
        return self.output(y * F.silu(self.gate(for_g)))


class ChannelMix(nn.Module):
    """In place of the MLP. The coefficients of an image tower weigh the token itself, those of a text its neighbour."""

    def __init__(self, width: int, ffn_width: int, heads: int, image: bool):
        super().__init__()
        self.heads, self.image, self.prefix = heads, image, "spatial_mix" if image else "time_maa"
        for name in "kr":
            self.register_parameter(f"{self.prefix}_{name}", nn.Parameter(torch.zeros(1, 1, width)))
        self.key = nn.Linear(width, ffn_width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor, grid: tuple) -> Tensor:
        weights = [getattr(self, f"{self.prefix}_{name}") for name in "kr"]
        step = shift(x, self.heads, grid) - x
        for_k, for_r = (x + step * (1 - weight if self.image else weight) for weight in weights)
        return torch.sigmoid(self.receptance(for_r)) * self.value(torch.relu(self.key(for_k)).square())


class Block(nn.Module):
    """x += time mix; x += channel mix."""

    def __init__(self, table: dict, image: bool, first: bool):
        super().__init__()
        width, heads = table["width"], table["heads"]
        self.ln0 = nn.LayerNorm(width) if first else None
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(width, heads, table["norm_eps"])
        self.ffn = ChannelMix(width, table["ffn_width"], heads, image)

    def forward(self, x: Tensor, grid: tuple) -> Tensor:
        x = x if self.ln0 is None else self.ln0(x)
        x = x + self.att(self.ln1(x), grid)
        return x + self.ffn(self.ln2(x), grid)


class PatchEmbed(nn.Module):
    """Patches of a picture that is padded with zeros at the right and bottom where they do not divide it."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.patch, self.projection = patch, nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: Tensor) -> Tensor:
        bottom, right = (-side % self.patch for side in pixels.shape[-2:])
        return self.projection(F.pad(pixels, (0, right, 0, bottom)))


class ImageTower(nn.Module):
    """Pixels (B, 3, h, w) -> (B, D)."""

    def __init__(self, table: dict, embed_dim: Any):
        super().__init__()
        self.grid = tuple(-(-side // table["patch"]) for side in table["image_size"])
        width = table["width"]
        self.patch_embed = PatchEmbed(table["patch"], width)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if table["class_token"] else None
        self.layers = nn.ModuleList(Block(table, True, i == 0) for i in range(table["depth"]))
        self.ln1 = nn.LayerNorm(width)
        self.proj = None if embed_dim is None else nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels.to(self.pos_embed.dtype))
        grid = tuple(x.shape[-2:])
        table: Tensor = self.pos_embed
        if grid != self.grid:
            table = table.float().unflatten(1, self.grid).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
            table = table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        x = x.flatten(2).transpose(1, 2) + table
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1)
        for block in self.layers:
            x = block(x, grid)
        x = self.ln1(x)
        x = x[:, -1] if self.cls_token is not None else x.mean(1)
        return x if self.proj is None else x @ self.proj


class TextTower(nn.Module):
    """Token ids (B, T), padded with 0, which is read as the library does -> (B, D)."""

    def __init__(self, table: dict, embed_dim: Any):
        super().__init__()
        width = table["width"]
        self.emb = nn.Embedding(table["vocab"], width)
        self.blocks = nn.ModuleList(Block(table, False, i == 0) for i in range(table["depth"]))
        self.ln_out = nn.LayerNorm(width)
        self.proj = None if embed_dim is None else nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x, (ids.shape[1],))
        x = F.normalize(self.ln_out(x), dim=-1).mean(1)
        return x if self.proj is None else x @ self.proj


class QuickGELU(nn.Module):
    """Of CLIP's first models."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """A block of CLIP: x += attention; x += MLP."""

    def __init__(self, width: int, heads: int, ratio: float, quick: bool):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, int(width * ratio)))
        self.mlp.add_module("gelu", QuickGELU() if quick else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(int(width * ratio), width))

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks of CLIP."""

    def __init__(self, table: dict, heads: int):
        super().__init__()
        settings = table["width"], heads, table["mlp_ratio"], bool(table.get("quick_gelu"))
        self.resblocks = nn.ModuleList(Attention(*settings) for _ in range(table["layers"]))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ViT(nn.Module):
    """Pixels (B, 3, h, w) of the size that it was made for -> (B, D)."""

    def __init__(self, table: dict, embed_dim: int):
        super().__init__()
        table = {**VIT, **table}
        width, patch = table["width"], table["patch_size"]
        size = table["image_size"]
        rows, columns = (side // patch for side in ((size, size) if isinstance(size, int) else size))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + rows * columns, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(table, width // table["head_width"])
        self.proj = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))[:, 0] @ self.proj


class TextTransformer(nn.Module):
    """Token ids (B, T), causal, read at their largest id or at the first `eos_id` -> (B, D)."""

    def __init__(self, table: dict, embed_dim: int):
        super().__init__()
        table = {**TRANSFORMER, **table}
        width = table["width"]
        self.end = table["eos_id"] if table["pool_type"] == "eos" else None
        self.token_embedding = nn.Embedding(table["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(table["context_length"], width))
        self.transformer = Transformer(table, table["heads"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:count]
        mask = torch.full((count, count), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        place = ids if self.end is None else (ids == self.end).int()
        return x[torch.arange(len(x), device=x.device), place.argmax(1)] @ self.text_projection


class Branch(nn.Module):
    """The end of a residual branch of BERT."""

    def __init__(self, table: dict, width: int):
        super().__init__()
        self.dropout = table["dropout"]
        self.dense = nn.Linear(width, table["width"])
        self.LayerNorm = nn.LayerNorm(table["width"], table["norm_eps"])

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        return self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + start)


class BertLayer(nn.Module):
    """Attention, then two dense maps."""

    def __init__(self, table: dict):
        super().__init__()
        width, self.heads, self.dropout = table["width"], table["heads"], table["attention_dropout"]
        maps = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": maps, "output": Branch(table, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, table["ffn_width"])})
        self.output = Branch(table, table["ffn_width"])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        maps: Any = self.attention["self"]
        query, key, value = (
            maps[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        x = self.attention["output"](mixed.transpose(1, 2).flatten(2), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """Token ids (B, T), padded with 0, which is not read -> (B, D), from the first token."""

    def __init__(self, table: dict, embed_dim: int):
        super().__init__()
        width = table["width"]
        self.dropout = table["dropout"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(table["vocab"], width),
                "position_embeddings": nn.Embedding(table["positions"], width),
                "token_type_embeddings": nn.Embedding(table["token_types"], width),
                "LayerNorm": nn.LayerNorm(width, table["norm_eps"]),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(table) for _ in range(table["depth"]))})
        self.proj = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        here, parts = ids != 0, self.embeddings
        layers: Any = self.encoder["layer"]
        mask = (here | ~here.any(1, keepdim=True))[:, None, None]
        types: Any = parts["token_type_embeddings"]
        places = torch.arange(ids.shape[1], device=ids.device)
        x = parts["word_embeddings"](ids) + parts["position_embeddings"](places) + types.weight[0]
        x = F.dropout(parts["LayerNorm"](x), self.dropout, self.training)
        for layer in layers:
            x = layer(x, mask)
        return x[:, 0] @ self.proj


# Kind of a tower -> its class.
IMAGES = {"rwkv": ImageTower, "open_clip": ViT}
TEXTS = {"rwkv": TextTower, "open_clip": TextTransformer, "bert": Bert}


class RWKVCLIPModel(PreTrainedModel):
    """Two towers and a temperature."""

    config_class = RWKVCLIPConfig
    main_input_name = "pixel_values"
    logit_bias: nn.Parameter | None

    def __init__(self, config: RWKVCLIPConfig):
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        bias = getattr(config, "init_logit_bias", None)
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor(float(bias))))
        self.text_model = TEXTS[config.text.get("kind", "rwkv")](config.text, config.embed_dim)
        self.image_model = IMAGES[config.image.get("kind", "rwkv")](config.image, config.embed_dim)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file; to train from the beginning use the library."""

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, h, w), normalised as preprocess_cfg of the configuration says -> (B, D), not normalised."""
        return self.image_model(pixel_values)

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, D), not normalised."""
        return self.text_model(input_ids)

    def forward(self, pixel_values: Any = None, input_ids: Any = None, **_: Any) -> RWKVCLIPOutput:
        """Features of what is given, normalised, and their scaled cosines if both are."""
        found = {}
        if pixel_values is not None:
            found["image_embeds"] = F.normalize(self.get_image_features(pixel_values), dim=-1)
        if input_ids is not None:
            found["text_embeds"] = F.normalize(self.get_text_features(input_ids), dim=-1)
        if len(found) == 2:
            logits = self.logit_scale.exp() * found["image_embeds"] @ found["text_embeds"].T
            logits = logits if self.logit_bias is None else logits + self.logit_bias
            found |= {"logits_per_image": logits, "logits_per_text": logits.T}
        return RWKVCLIPOutput(**found)
