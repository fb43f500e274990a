"""LoRA (arXiv 2106.09685): low-rank adapters beside frozen linear layers, and the weights that both make together.

peft makes and trains the adapters; to read what it trained nothing of it is needed. A checkpoint of such a run holds
the adapters and what else trained; its base weights stay where they are, named by path and sha256.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError

NAME = ".default."  # peft's name of an adapter, within those of its parameters
SCALARS = ("logit_scale", "logit_bias")  # train beside adapters
_PART = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class AdapterSettings:
    """Adapters in place of training the weights."""

    lora_rank: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Train low-rank adapters of this rank (LoRA: arXiv 2106.09685) and the temperature; all weights stay frozen."""
    lora_alpha: float | None = field(default=None, metadata={"limits": {"above": 0}})
    """Adapters are scaled by alpha / rank; default: the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of linear layers that get adapters, or patterns, such as 'text_model.*.att.key'; default: every linear
    layer of both towers that --lock-image, --lock-text and --freeze leave."""

    def problems(self) -> list[str]:
        """Flags that would have no effect."""
        values = (("lora_alpha", self.lora_alpha), ("lora_targets", " ".join(self.lora_targets)))
        return [
            f"{name}: {value} has no effect without lora_rank; set it, too"
            for name, value in values
            if value and self.lora_rank is None
        ]

    @property
    def scale(self) -> float:
        """Of the product of an adapter's two matrices."""
        assert self.lora_rank is not None, "asked where there are adapters"
        return (self.lora_alpha or self.lora_rank) / self.lora_rank


class SplitAttention(nn.Module):
    """The attention of open_clip's transformer blocks by two linear layers, which adapters know, in place of
    nn.MultiheadAttention, which reads its weights itself (and which peft would change in place at every call).
    The same numbers to rounding, of query = key = value."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        width, device = attention.embed_dim, attention.in_proj_weight.device
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        self.in_proj = nn.Linear(width, 3 * width, device="meta").to_empty(device=device)
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(width, width, device="meta").to_empty(device=device)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(B, T, W), or (T, B, W) without `batch_first` -> the same, and no weights."""
        assert query is key is value and not need_weights, "open_clip's blocks attend to themselves"
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.in_proj(x).chunk(3, -1))
        x = self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


# ---- in training -----------------------------------------------------------------------------------------------------


def add_adapters(model: nn.Module, settings: AdapterSettings) -> list[str]:
    """Give linear layers of the towers adapters, in place, and freeze everything else but the temperature. Returns the
    names of these layers.

    Layers with frozen weights get none, so freeze before. ConfigError for a pattern that matches none, and for a tower
    with trained weights but no linear layers, such as a ResNet.
    """
    scalars = [parameter for name, parameter in model.named_parameters() if name in SCALARS and parameter.requires_grad]
    _split_attention(model)
    chosen = choose_layers(model, settings.lora_targets)
    config, inject, layer_kind = _load_peft()
    config = config(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or settings.lora_rank,
        target_modules="|".join(map(re.escape, chosen)),
    )
    inject(config, model)
    for module in model.modules():
        if isinstance(module, layer_kind):
            module.cast_input_dtype_enabled = False  # autocast does it
    for parameter in scalars:
        parameter.requires_grad_(True)
    return chosen


def _load_peft() -> tuple[Any, Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError(f"lora_rank: {error.name} is not installed; pip install -e '.[lora]'") from None
    return LoraConfig, inject_adapter_in_model, LoraLayer


def check_peft() -> None:
    """ImportError that names the extra, unless adapters can be made."""
    _load_peft()


def _split_attention(model: nn.Module) -> None:
    for module in list(model.modules()):
        attention = getattr(module, "attn", None)
        own = type(module).__name__ == "ResidualAttentionBlock" and not hasattr(module, "ln_1_kv")  # of cross attention
        if own and type(attention) is nn.MultiheadAttention:
            module.attn = SplitAttention(attention)


def choose_layers(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that get adapters. ConfigError as `add_adapters`."""
    layers = dict(_find_layers(model))
    free = [name for name, layer in layers.items() if layer.weight.requires_grad]
    problems = []
    for pattern in patterns:
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.5) or list(layers)[:3]
            problems.append(f"lora_targets: {pattern!r} matches no linear layer; names are like {', '.join(near)}")
        elif not any(name in free for name in matched):
            problems.append(f"lora_targets: {pattern!r} matches frozen layers only; unlock them, or leave it out")
    chosen = [name for name in free if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not patterns and not free:
        problems.append("lora_rank: no linear layer is left to adapt; freeze less, or leave lora_rank out")
    if not patterns and not problems:
        tower: Any = model.visual
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        if trained and not any(name.startswith(("visual.", "image_model.")) for name in chosen):
            problems.append(
                f"lora_rank: the image tower ({type(tower).__name__}) has no linear layers to adapt; freeze it by "
                "--lock-image, or leave lora_rank out"
            )
    if problems:
        raise ConfigError(problems)
    return chosen


def _find_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of the model that are called; the others' weights are read by what holds them."""
    read = ("MultiheadAttention", "AttentionPool2d")
    held = [name for name, module in model.named_modules() if type(module).__name__ in read]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[0] not in held:
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called."""
    return any(f".lora_A{NAME}" in name for name, _ in model.named_parameters())


def kept_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of the weights, by the model's names: all of them, or with adapters what trains, and the
    buffers, which running statistics are."""
    state = model.state_dict()
    if not has_adapters(model):
        return state
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {key: value for key, value in state.items() if key not in frozen}


def name_kept(key: str) -> str:
    """The name of a tensor of `kept_state` in a file: without peft's name of the adapter."""
    return key.replace(NAME, ".", 1) if ".lora_" in key else key.replace(".base_layer.", ".")


# ---- from files ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(base: Mapping[str, Tensor], kept: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Base weights and what a checkpoint with adapters holds -> whole weights, with the bits of peft's own merging:
    W + scale * B A. ValueError for adapters that do not fit, which names the first."""
    whole = dict(base)
    for key, value in kept.items():
        part = _PART.fullmatch(key)
        if part is None:
            whole[key] = value
        elif part[2] == "A":
            layer = part[1]
            name = f"{layer}.weight" if f"{layer}.weight" in base else f"{layer}_weight"  # see SplitAttention
            up = kept.get(f"{layer}.lora_B.weight")
            fits = up is not None and name in base and up.dim() == value.dim() == 2 and up.shape[1] == value.shape[0]
            if not fits or base[name].shape != (up.shape[0], value.shape[1]):  # type: ignore[union-attr]
                raise ValueError(f"the adapter of {layer} does not fit the base weights")
            weight = base[name]
            whole[name] = weight + ((up @ value) * scale).to(weight.dtype)  # type: ignore[operator]
    return whole
