"""Chinese-CLIP in the layout of transformers (`ChineseCLIPModel`): its config.json and its keys of weights.

Each attention has three matrices there and one here, projections are transposed, and BERT's names are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from .chinese_clip import CONTEXT
from .two_tower import ModelConfig

MODEL_TYPE = "chinese_clip"
_TEXT = {  # theirs -> ours, and their default, which a config.json may leave out
    "vocab_size": ("vocab", 30522),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("ffn_width", 3072),
    "max_position_embeddings": ("positions", 512),
    "type_vocab_size": ("token_types", 2),
    "hidden_dropout_prob": ("dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "layer_norm_eps": ("norm_eps", 1e-12),
    "initializer_range": ("init_std", 0.02),
}
_VISION = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}


def convert_configuration(data: dict[str, Any], where: str) -> ModelConfig:
    """The content of config.json -> model. ConfigError, with `where`, for another model or what is not supported."""
    if data.get("model_type") != MODEL_TYPE:
        raise ConfigError([f"{where}: model_type is {data.get('model_type')!r}; only {MODEL_TYPE!r} is known"])
    text, vision = (data.get(f"{side}_config") for side in ("text", "vision"))
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ConfigError(
            [f"{where}: text_config and vision_config are tables in a {MODEL_TYPE} model; one is missing"]
        )
    vision = {key: vision.get(key, default) for key, default in _VISION.items()}
    width, heads = vision["hidden_size"], vision["num_attention_heads"]
    problems = []
    if vision["hidden_act"] not in list(_ACTIVATIONS) or text.get("hidden_act", "gelu") != "gelu":
        problems.append(f"{where}: hidden_act is not one of {', '.join(_ACTIVATIONS)} (text: gelu)")
    if vision["num_channels"] != 3 or vision["layer_norm_eps"] != 1e-5:
        problems.append(f"{where}: vision_config with num_channels other than 3 or layer_norm_eps other than 1e-5")
    whole = all(type(value) is int and value > 0 for value in (width, heads, vision["intermediate_size"]))
    if not whole or width % heads:
        problems.append(f"{where}: hidden_size {width!r} and num_attention_heads {heads!r} give no whole head size")
    if problems:
        raise ConfigError(problems)
    image = {
        **{"kind": "open_clip", "image_size": vision["image_size"], "layers": vision["num_hidden_layers"]},
        **{"width": width, "patch_size": vision["patch_size"]},
        **({"head_width": width // heads} if width // heads != 64 else {}),
        **({"mlp_ratio": vision["intermediate_size"] / width} if vision["intermediate_size"] != 4 * width else {}),
        "quick_gelu": _ACTIVATIONS[vision["hidden_act"]],
    }
    own = {ours: text.get(theirs, default) for theirs, (ours, default) in _TEXT.items()}
    own["context"] = min(CONTEXT, own["positions"]) if isinstance(own["positions"], int) else CONTEXT
    dim = data.get("projection_dim", 512)
    return ModelConfig.parse(
        {"image": image, "text": {"kind": "bert", **own}, "embed_dim": dim, "resize_mode": "squash"}
    )


def write_configuration(spec: ModelConfig) -> dict[str, Any]:
    """Model -> the content of config.json. ConfigError for what transformers does not have."""
    image, text = spec.image.to_json(), spec.text.to_json()
    known = {"kind", "image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "quick_gelu"}
    plain = isinstance(image.get("layers"), int) and not image.keys() - known
    if (image.get("kind"), text.get("kind")) != ("open_clip", "bert") or not plain:
        raise ConfigError(["to: transformers has Chinese-CLIP with a plain ViT and BERT only; write safetensors"])
    width = image["width"]
    size = image.get("image_size", 224)
    vision = _VISION | {
        **{"hidden_size": width, "num_hidden_layers": image["layers"], "patch_size": image["patch_size"]},
        **{"num_attention_heads": width // image.get("head_width", 64), "projection_dim": spec.embed_dim},
        **{"intermediate_size": int(width * image.get("mlp_ratio", 4)), "image_size": size},
        **{
            "hidden_act": "quick_gelu" if image.get("quick_gelu") else "gelu",
            "model_type": "chinese_clip_vision_model",
        },
    }
    own = {theirs: text[ours] for theirs, (ours, _) in _TEXT.items()}
    own |= {"hidden_act": "gelu", "pad_token_id": 0, "model_type": "chinese_clip_text_model"}
    return {
        **{"architectures": ["ChineseCLIPModel"], "model_type": MODEL_TYPE, "projection_dim": spec.embed_dim},
        **{"text_config": own, "vision_config": vision},
    }


# ---- weights ---------------------------------------------------------------------------------------------------------

_DROPPED = ("text_model.pooler.", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
_NAMES = {  # of the image tower, theirs -> ours
    "vision_model.embeddings.class_embedding": "image_model.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "image_model.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "image_model.positional_embedding",
    **{f"vision_model.pre_layrnorm.{part}": f"image_model.ln_pre.{part}" for part in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{part}": f"image_model.ln_post.{part}" for part in ("weight", "bias")},
}
_PROJECTIONS = {"visual_projection.weight": "image_model.proj", "text_projection.weight": "text_model.proj"}
_PARTS = {  # of a block
    "self_attn.out_proj": "attn.out_proj",
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}
_BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OWN_BLOCK = re.compile(r"image_model\.transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def is_state(keys: Iterable[str]) -> bool:
    """Whether a state dict has the keys of ChineseCLIPModel."""
    return "vision_model.embeddings.class_embedding" in keys


def from_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their keys -> ours. A key that is not known keeps its name, so that a strict load names it."""
    found: dict[str, Tensor] = {}
    state = {key: value for key, value in state.items() if not key.startswith(_DROPPED)}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if key in _PROJECTIONS:
            found[_PROJECTIONS[key]] = value.T.contiguous()
        elif block and block[2] in _PARTS:
            found[f"image_model.transformer.resblocks.{block[1]}.{_PARTS[block[2]]}.{block[3]}"] = value
        elif block and block[2] == "self_attn.q_proj":
            parts = [key.replace("q_proj", f"{name}_proj") for name in "qkv"]
            if all(part in state and state[part].shape == value.shape for part in parts) and value.ndim:
                whole = torch.cat([state[part] for part in parts])
                found[f"image_model.transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}"] = whole
        elif not (block and block[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            found[_NAMES.get(key, key)] = value
    return found


def to_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our keys -> theirs."""
    names, projections, parts = (
        {ours: theirs for theirs, ours in table.items()} for table in (_NAMES, _PROJECTIONS, _PARTS)
    )
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        block = _OWN_BLOCK.fullmatch(key)
        if key in projections:
            found[projections[key]] = value.T.contiguous()
        elif block and block[2] == "attn.in_proj":
            for name, part in zip("qkv", value.chunk(3)):
                found[f"vision_model.encoder.layers.{block[1]}.self_attn.{name}_proj.{block[3]}"] = part.clone()
        elif block:
            found[f"vision_model.encoder.layers.{block[1]}.{parts[block[2]]}.{block[3]}"] = value
        else:
            found[names.get(key, key)] = value
    return found
