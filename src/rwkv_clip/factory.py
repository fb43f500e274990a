"""How models are made: by name, JSON, dict or from a checkpoint.

The interface is open_clip's: create_model_and_transforms, get_tokenizer, encode_image, encode_text, list_models. A name
that is not ours is passed to open_clip, so any of its models can be trained and evaluated here.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checkpoint import find_checkpoint, hash_file, read_description, read_weights
from .config import CONFIGS, ConfigError, list_presets, load_json
from .models import chinese_clip
from .models.released import OPENAI_ENTRIES, convert_config, is_released_config, strip_prefixes
from .models.specification import CLIP_PIXELS, ContrastiveModel, ModelSpec, load_family
from .models.two_tower import ModelConfig
from .tokenizer import Tokenizer
from .transform import prepare, train_transform, val_transform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Model = str | Path | dict[str, Any] | ModelSpec
M = TypeVar("M", bound=nn.Module)
log = logging.getLogger(__name__)


def list_models() -> list[str]:
    """Our presets. `open_clip.list_models()` names work too."""
    return list_presets("models")


def resolve_spec(model: Model) -> tuple[str, ModelSpec]:
    """Name, JSON path, dict or specification -> (name, specification). ConfigError for anything else."""
    if isinstance(model, dict):
        spec = parse_spec(model)
        return spec.name, spec
    if not isinstance(model, (str, Path)):
        return model.name, model
    name = str(model).replace("/", "-")
    if name in list_models():
        return name, parse_spec(load_json(CONFIGS / "models" / f"{name}.json"))
    if chinese_clip.is_structure(str(model)):
        return str(model), chinese_clip.parse_structure(str(model))
    if str(model).endswith(".json"):
        data = load_json(model)
        if not isinstance(data, dict):
            raise ConfigError([f"{model}: expected a JSON object that describes a model"])
        return Path(model).stem, parse_spec(data)
    import open_clip

    if name in open_clip.list_models():
        return name, parse_spec({"open_clip": name})
    near = difflib.get_close_matches(name, [*list_models(), *open_clip.list_models()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"ours: {', '.join(list_models())}"
    raise ConfigError([f"model: {str(model)!r} is not a preset, .json file or open_clip model; {hint}"])


def parse_spec(data: dict[str, Any]) -> ModelSpec:
    """A model from JSON data: two towers of ours, open_clip's, or that of released RWKV-CLIP or Chinese-CLIP files."""
    if chinese_clip.is_configuration(data):
        return chinese_clip.convert_configuration(data)
    if "open_clip" in data or ("embed_dim" in data and not {"image", "text"} & data.keys()):
        return load_family("open_clip").OpenClipConfig.parse(data)
    return convert_config(data) if is_released_config(data) else ModelConfig.parse(data)


def create_model(
    model: Model,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    drop_path: float | None = None,
) -> ContrastiveModel:
    """Build a model; `model` is a preset name, the path of a JSON, a dict (ours, released or open_clip's keys).

    pretrained: weights as for `load_checkpoint`, or an open_clip tag when the model is open_clip's. precision: fp32, or
    bf16 / fp16 to hold the weights in that type (decays stay float32). drop_path overrides the image tower's rate.
    `model(image, text)` returns what open_clip's models do, `model(image, text, needs=names)` features by name.
    """
    if precision not in DTYPES:
        raise ConfigError([f"precision: {precision!r} is not one of {', '.join(DTYPES)}"])
    _, spec = resolve_spec(model)
    if drop_path is not None:
        spec = spec.with_drop_path(drop_path)
    spec, tag = spec.find_tag(str(pretrained)) if pretrained else (spec, None)
    net = spec.build(tag)
    if pretrained and not tag:
        load_checkpoint(net, pretrained)
    net.spec = spec
    return cast_weights(net, DTYPES[precision]).to(device).eval()


def cast_weights(model: M, dtype: torch.dtype) -> M:
    """Hold the weights in `dtype`; decays, bonus and temperature stay float32, where rounding would compound."""
    exact = {"time_decay", "time_faaaa", "logit_scale"}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name.rsplit(".", 1)[-1] not in exact:
            parameter.data = parameter.data.to(dtype)
    return model


def create_model_and_transforms(
    model: Model,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> tuple[ContrastiveModel, Callable, Callable]:
    """(model, preprocess for training, preprocess for evaluation); transforms map a PIL image to (3, h, w) float."""
    net = create_model(model, pretrained, precision, device)
    return net, train_transform(net.spec.image_size), preprocess_of(net)


def get_tokenizer(model: Model) -> Tokenizer:
    """Tokenizer of a model: texts -> int64 (n, context)."""
    return resolve_spec(model)[1].tokenizer()


def preprocess_of(model: ContrastiveModel) -> Callable:
    """Evaluation transform of a model from `create_model`: PIL image of any mode -> float (3, h, w)."""
    size, (mean, std) = model.spec.image_size, model.spec.pixels
    if (mean, std) == CLIP_PIXELS:
        return val_transform(size, getattr(model.spec, "resize_mode", "shortest"))
    import open_clip

    theirs = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
    theirs.transforms[:0] = prepare(size)
    return theirs


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights strictly: a checkpoint or run folder of ours, .safetensors, or a released .pt state dict.

    `module.` and `_orig_mod.` prefixes and what OpenAI's files hold besides weights are removed; values are cast to the
    model's dtypes. ValueError names every missing, unexpected and misshapen key.
    """
    model.load_state_dict(read_fitting_weights(model, path))


def read_fitting_weights(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """What `load_checkpoint` loads: whole tensors, one for each key of the model's state dict. ValueError as there."""
    state, own = strip_prefixes(read_weights(path)), model.state_dict()
    if chinese_clip.is_released_state(state) and not chinese_clip.is_released_state(own):
        state = chinese_clip.from_released(state)
    positions = chinese_clip.POSITIONS
    if {positions} <= state.keys() & own.keys() and state[positions].shape[1:] == own[positions].shape[1:]:
        state[positions] = chinese_clip.fit_positions(state[positions], len(own[positions]))
    marks = [state.pop(key) for key in OPENAI_ENTRIES if key in state and key not in own]
    if marks and not any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        log.warning("%s: looks like OpenAI's, trained with QuickGELU; this model has exact GELU (NAME-quickgelu)", path)
    problems = [f"missing: {key}" for key in own if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in own]
    problems += [
        f"shape of {key}: checkpoint {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  .. and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{path}: does not fit the model ({len(problems)} keys)\n  {shown}")
    return state


@dataclass
class Loaded:
    """A model ready for inference, with what belongs to it."""

    model: ContrastiveModel
    preprocess: Callable  # PIL image -> float (3, h, w)
    tokenizer: Tokenizer
    name: str
    digest: str  # sha256 of the weights file, or of the name where a library fetched the weights
    precision: str


def load_for_inference(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Loaded:
    """Open a run folder, checkpoint folder, weights file, or `open_clip:NAME[:TAG]`.

    Our checkpoints describe their model; a bare weights file needs `model` (a name or the path of a JSON).
    """
    text = str(checkpoint)
    if text.startswith("open_clip:"):
        _, name, *tag = text.split(":")
        net = create_model(name, tag[0] if tag else None, precision, device)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Loaded(net, preprocess_of(net), get_tokenizer(name), text[10:], digest, precision)
    path = find_checkpoint(checkpoint)
    described = read_description(path)
    if model is None:
        if described is None:
            raise ConfigError([f"model: {checkpoint} holds weights only; name its model (preset or JSON path)"])
        name, spec = described["model"], described["spec"]
    else:
        name, spec = resolve_spec(model)
    net = create_model(spec, path, precision, device)
    weights = path / "model.safetensors" if path.is_dir() else path
    return Loaded(net, preprocess_of(net), net.spec.tokenizer(), name, hash_file(weights), precision)
