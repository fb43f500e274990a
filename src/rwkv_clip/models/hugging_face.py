"""Models in the layout of transformers: what its config.json says, and the keys of weights.

Chinese-CLIP is `ChineseCLIPModel` there: each attention has three matrices there and one here, projections are
transposed, and BERT's names are the same. Others run the code of `modeling_rwkv_clip.py`, whose keys are ours.
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
OWN_TYPE = "rwkv_clip"  # of modeling_rwkv_clip.py
_BLOCKS = {"width", "layers", "mlp_ratio", "quick_gelu"}
_CODE = {  # settings of open_clip's towers that this code knows; what acts in training only has no effect there
    "image": {*_BLOCKS, "image_size", "patch_size", "head_width", "patch_dropout"},
    "text": {*_BLOCKS, "context_length", "vocab_size", "heads", "pool_type", "eos_id"},
}
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


def check_code(spec: Any) -> None:
    """ConfigError, saying what to use instead, for a model that transformers cannot have: neither its own code nor
    `modeling_rwkv_clip.py` computes it."""
    if not isinstance(spec, ModelConfig):
        remedy = "save it without transformers, and open_clip opens the folder (local-dir:)"
        raise ConfigError([f"transformers: {spec.name} is open_clip's; {remedy}"])
    problems = []
    for side, tower in (("image", spec.image.to_json()), ("text", spec.text.to_json())):
        if tower.get("kind") != "open_clip":
            continue
        odd = [f"{side}.{key}" for key in tower if key not in (*_CODE[side], "kind")]
        odd += ["image.layers of a ResNet"] if side == "image" and not isinstance(tower.get("layers", 12), int) else []
        odd += ["text.pool_type"] if tower.get("pool_type", "argmax") not in ("argmax", "eos") else []
        problems += [f"transformers: there is no code for {one}; save it without transformers" for one in odd]
    if problems:
        raise ConfigError(problems)


def convert_configuration(data: dict[str, Any], where: str) -> ModelConfig:
    """The content of config.json -> model. ConfigError, with `where`, for another model or what is not supported."""
    if data.get("model_type") == OWN_TYPE:
        return _convert_own(data, where)
    if data.get("model_type") != MODEL_TYPE:
        known = f"{MODEL_TYPE!r} and {OWN_TYPE!r}"
        raise ConfigError([f"{where}: model_type is {data.get('model_type')!r}; only {known} are known"])
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
    usual = min(CONTEXT, own["positions"]) if isinstance(own["positions"], int) else CONTEXT
    own["context"] = data.get("context_length", usual)  # this and resize_mode: where they are not the released models'
    table = {"embed_dim": data.get("projection_dim", 512), "resize_mode": data.get("resize_mode", "squash")}
    return ModelConfig.parse({"image": image, "text": {"kind": "bert", **own}, **table})


def _convert_own(data: dict[str, Any], where: str) -> ModelConfig:
    """As `RWKVCLIPConfig` has it, also after transformers has saved it."""
    table = {key: data[key] for key in ("image", "text", "embed_dim", "tokenizer") if data.get(key) is not None}
    pictures = data.get("preprocess_cfg")
    if isinstance(pictures, dict) and "resize_mode" in pictures:
        table["resize_mode"] = pictures["resize_mode"]
    try:
        if missing := [side for side in ("image", "text") if side not in table]:
            raise ConfigError([f"{side}: missing in a {OWN_TYPE} model; save it again" for side in missing])
        return ModelConfig.parse(table)
    except ConfigError as error:
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None


def write_configuration(spec: ModelConfig) -> dict[str, Any]:
    """Model -> the content of config.json. ConfigError for what transformers does not have."""
    image, text = spec.image.to_json(), spec.text.to_json()
    known = {*_CODE["image"], "kind"}
    plain = isinstance(image.get("layers"), int) and not image.keys() - known
    if (image.get("kind"), text.get("kind")) != ("open_clip", "bert") or not plain:
        raise ConfigError(["to: transformers has Chinese-CLIP with a plain ViT and BERT only; write safetensors"])
    if spec.init_logit_bias is not None:
        raise ConfigError(["init_logit_bias: ChineseCLIPModel has no bias of scores; save it without transformers"])
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
    unusual = {} if text["context"] == min(CONTEXT, text["positions"]) else {"context_length": text["context"]}
    return {
        **{"architectures": ["ChineseCLIPModel"], "model_type": MODEL_TYPE, "projection_dim": spec.embed_dim},
        **{"text_config": own, "vision_config": vision, **unusual},
        **({} if spec.resize_mode == "squash" else {"resize_mode": spec.resize_mode}),
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
