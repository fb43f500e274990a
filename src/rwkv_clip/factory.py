"""How models are made: by name, JSON, dict or from a checkpoint.

The interface is open_clip's: create_model_and_transforms, get_tokenizer, encode_image, encode_text, list_models. A name
that is not ours is passed to open_clip, so any of its models can be trained and evaluated here.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checkpoint import find_checkpoint, read_description, read_weights
from .config import CONFIGS, ConfigError, list_presets, load_json
from .files import hash_file, parse_json
from .models import chinese_clip, hugging_face
from .models.patch_dropout import drop_patches
from .models.released import OPENAI_ENTRIES, convert_config, is_released_config, strip_prefixes
from .models.specification import CLIP_PIXELS, ContrastiveModel, ModelSpec, load_family
from .models.two_tower import ModelConfig
from .serialization import CheckpointError, read_about
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
    pretrained_image: str | Path | None = None,
    pretrained_text: str | Path | None = None,
    force_patch_dropout: float = 0.0,
) -> ContrastiveModel:
    """Build a model; `model` is a preset name, the path of a JSON, a dict (ours, released or open_clip's keys).

    pretrained: weights as for `load_checkpoint`, or an open_clip tag when the model is open_clip's. precision: fp32, or
    bf16 / fp16 to hold the weights in that type (decays stay float32). drop_path overrides the image tower's rate.
    pretrained_image, pretrained_text: weights of one tower, see `load_towers`. force_patch_dropout: fraction of patches
    that a ViT leaves out in training. `model(image, text)` returns what open_clip's models do, `model(image, text,
    needs=names)` features by name.
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
    load_towers(net, pretrained_image, pretrained_text)
    if force_patch_dropout:
        drop_patches(net, force_patch_dropout)
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


def load_towers(model: ContrastiveModel, image: str | Path | None, text: str | Path | None) -> None:
    """Load the image tower of a CLIP (OpenAI's keys, `visual.*`; its temperature, too) and the encoder of a BERT, each
    from a file of its own; what else these hold is left out. Strictly, but for the projection of the text tower, which
    a BERT does not have. ConfigError for a model without such a tower, ValueError as `load_checkpoint`.

    NOTE(parity): the released code rounds all weights to float16 on the way, these and new ones; here nothing is.
    """
    own = model.state_dict()
    if image is not None:
        state = chinese_clip.image_tower_of(strip_prefixes(_read_state(image)), "image_model.")
        wanted = {key for key in own if key.startswith("image_model.")}
        if not wanted:
            raise ConfigError(["pretrained_image: the model has no image_model; give whole weights (pretrained)"])
        model.load_state_dict(_fit(own, state, image, wanted), strict=False)
    if text is not None:
        if "text_model.embeddings.word_embeddings.weight" not in own:
            raise ConfigError(["pretrained_text: the model's text tower is no BERT; give whole weights (pretrained)"])
        state = chinese_clip.text_tower_of(strip_prefixes(_read_state(text)), "text_model.")
        wanted = {key for key in own if key.startswith("text_model.") and key != "text_model.proj"}
        model.load_state_dict(_fit(own, state, text, wanted), strict=False)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file, a folder of ours, or one of transformers."""
    return read_weights(find_weights(path))


def find_weights(path: str | Path) -> Path:
    """The weights in a folder of transformers, which has a config.json beside them; any other path as it is."""
    path = Path(path)
    if not (path / "config.json").is_file():
        return path
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None and any(path.glob("*.index.json")):
        raise CheckpointError(
            f"{path}: its weights are in several files, which are not read; save it whole with transformers: "
            "ChineseCLIPModel.from_pretrained(FOLDER).save_pretrained(NEW, max_shard_size='100GB')"
        )
    if found is None:
        raise CheckpointError(f"{path}: has a config.json, but neither {files[0].name} nor {files[1].name}")
    return found


def read_fitting_weights(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """What `load_checkpoint` loads: whole tensors, one for each key of the model's state dict. ValueError as there."""
    state, own = strip_prefixes(_read_state(path)), model.state_dict()
    if hugging_face.is_state(state):
        state = hugging_face.from_state(state)
    elif chinese_clip.is_released_state(state) and not chinese_clip.is_released_state(own):
        state = chinese_clip.from_released(state)
    marks = [state.pop(key) for key in OPENAI_ENTRIES if key in state and key not in own]
    if marks and not any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        log.warning("%s: looks like OpenAI's, trained with QuickGELU; this model has exact GELU (NAME-quickgelu)", path)
    return _fit(own, state, path, own.keys())


def _fit(
    own: dict[str, Tensor], state: dict[str, Tensor], path: str | Path, wanted: Collection[str]
) -> dict[str, Tensor]:
    """The state with its position embeddings resized. ValueError unless it has all of `wanted`, keys of the model,
    with their shapes, and no key that the model does not have."""
    positions = chinese_clip.POSITIONS
    if {positions} <= state.keys() & own.keys() and state[positions].shape[1:] == own[positions].shape[1:]:
        state[positions] = chinese_clip.fit_positions(state[positions], len(own[positions]))
    problems = [f"missing: {key}" for key in own if key in wanted and key not in state]
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

    Most describe their model, see `describe`; a bare weights file needs `model` (a name or the path of a JSON).
    """
    text = str(checkpoint)
    if text.startswith("open_clip:"):
        _, name, *tag = text.split(":")
        net = create_model(name, tag[0] if tag else None, precision, device)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Loaded(net, preprocess_of(net), get_tokenizer(name), text[10:], digest, precision)
    name, spec, path = describe(checkpoint, model)
    net = create_model(spec, path, precision, device)
    weights = path / "model.safetensors" if path.is_dir() else path
    return Loaded(net, preprocess_of(net), net.spec.tokenizer(), name, hash_file(weights), precision)


DESCRIPTION = "rwkv_clip"  # the text beside the tensors of a file that describes its model: JSON of name and spec


def describe(checkpoint: str | Path, model: str | None = None) -> tuple[str, ModelSpec, Path]:
    """(name, specification, weights) of what holds weights; `model` where that is not told by itself.

    Run and checkpoint folders, folders of transformers, files that `rwkv_clip.convert` wrote and the released files of
    Chinese-CLIP tell. ConfigError for others without `model`.
    """
    path = find_weights(checkpoint)
    if model is not None:
        return *resolve_spec(model), find_checkpoint(path)
    if path != Path(checkpoint):
        where = Path(checkpoint) / "config.json"
        data = load_json(where)
        if not isinstance(data, dict):
            raise ConfigError([f"{where}: expected a JSON object that describes a model"])
        return Path(checkpoint).name, hugging_face.convert_configuration(data, str(where)), path
    path = find_checkpoint(path)
    if described := read_description(path):
        return described["model"], resolve_spec(described["spec"])[1], path
    if path.suffix == ".safetensors" and (text := read_about(path).get(DESCRIPTION)):
        data = parse_json(text, str(path))
        if not isinstance(data, dict) or not isinstance(data.get("spec"), dict):
            raise CheckpointError(f"{path}: its description of the model is damaged; name the model")
        return str(data.get("model")), parse_spec(data["spec"]), path
    state = strip_prefixes(read_weights(path))
    if chinese_clip.is_released_state(state):
        name, found = chinese_clip.infer_configuration(state)
        return name, found, path
    raise ConfigError([f"model: {checkpoint} holds weights only; name its model (preset or JSON path)"])
