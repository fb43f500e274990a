"""Released files -> ours: the keys of RWKV-CLIP's configuration JSON, and what is not a weight in a state dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import ConfigError
from .two_tower import ModelConfig

# Keys of the released JSON that belong to the run or never change the function.
_WITHOUT_EFFECT = frozenset({"workers", "precision", "data_type", "text_num_head", "with_cp", "tiny_att_layer"})
# Options of the released text tower that no released model uses: the value that disables each.
_UNUSED = {"dropout": 0, "pos_emb": 0, "head_qk": 0, "tiny_att_dim": 0}
_REQUIRED = ("image_embed_dims", "n_embd", "image_depth", "n_layer")
_OPTIONAL = {
    *("input_size", "image_patch_size", "image_hidden_rate", "image_num_heads", "image_output_cls_token"),
    *("image_with_cls_token", "drop_path_rate", "ctx_len", "vocab_size", "text_initialization", "head_size"),
    *("head_size_divisor", "dim_att", "dim_ffn"),
}
_KEYS = {*_WITHOUT_EFFECT, *_UNUSED, *_REQUIRED, *_OPTIONAL}
_PREFIXES = ("module.", "_orig_mod.")
# What the state dicts of OpenAI's CLIP hold besides weights.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")


def is_released_config(data: dict[str, Any]) -> bool:
    """Whether a model JSON uses the released key set (`image_embed_dims`, `n_embd`, ...)."""
    return "image_embed_dims" in data or "n_embd" in data


def convert_config(data: dict[str, Any]) -> ModelConfig:
    """Released key set -> ModelConfig. Missing keys take the released defaults; ConfigError lists what does not fit."""
    problems = [f"{key}: missing in a released RWKV-CLIP configuration" for key in _REQUIRED if key not in data]
    problems += [
        f"{key}: {data[key]!r} is not supported; released models have {off!r}"
        for key, off in _UNUSED.items()
        if data.get(key, off) not in (off, False)
    ]
    problems += [f"{key}: unknown key in a released RWKV-CLIP configuration" for key in data if key not in _KEYS]
    if problems:
        raise ConfigError(problems)
    width, text_width = data["image_embed_dims"], data["n_embd"]
    if data.get("dim_att", 0) not in (0, text_width):
        raise ConfigError([f"dim_att: {data['dim_att']} differs from n_embd {text_width}; use {text_width}"])
    size = data.get("input_size", 224)
    head_size = data.get("head_size", 64)
    image = {
        "image_size": [size, size] if isinstance(size, int) else size,
        "patch": data.get("image_patch_size", 32),
        "width": width,
        "depth": data["image_depth"],
        "heads": data.get("image_num_heads", 8),
        "ffn_width": int(width * data.get("image_hidden_rate", 5)),
        "drop_path": data.get("drop_path_rate", 0.0),
        "class_token": _boolean(data, "image_with_cls_token") or _boolean(data, "image_output_cls_token"),
    }
    text = {
        "context": data.get("ctx_len", 77),
        "vocab": data.get("vocab_size", 49408),
        "width": text_width,
        "depth": data["n_layer"],
        "heads": text_width // head_size,
        "ffn_width": data.get("dim_ffn") or text_width * 7 // 2 // 32 * 32,
        "norm_eps": 1e-5 * data.get("head_size_divisor", 8) ** 2,
        "rwkv_init": _boolean(data, "text_initialization", True),
    }
    if text_width % head_size:
        raise ConfigError([f"head_size: {head_size} does not divide n_embd {text_width}"])
    return ModelConfig.parse({"image": image, "text": text})


def _boolean(data: dict[str, Any], key: str, default: bool = False) -> bool:
    """The released scripts write booleans as JSON booleans or as the strings "True" and "False"."""
    value = data.get(key, default)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, (bool, int)):
        raise ConfigError([f"{key}: {value!r} is not true or false"])
    return bool(value)


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that DDP and torch.compile put before (or inside) parameter names."""
    stripped = {}
    for key, value in state.items():
        name = key
        for prefix in _PREFIXES:
            name = name.replace(prefix, "")
        if name in stripped:
            raise ValueError(f"checkpoint: keys {key!r} and another both name {name!r}; save one copy only")
        stripped[name] = value
    return stripped
