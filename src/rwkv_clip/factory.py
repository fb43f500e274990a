"""How models are made: by name, JSON, dict or from a checkpoint.

The interface is open_clip's: create_model_and_transforms, get_tokenizer, encode_image, encode_text, list_models. A name
that is not ours is passed to open_clip, so any of its models can be trained and evaluated here.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .base_weights import digest_of
from .checkpoint import SUFFIX, find_checkpoint, is_run, read_description, read_weights
from .config import CONFIGS, ConfigError, list_presets, load_json
from .data.image import to_rgb
from .files import parse_json
from .models import chinese_clip, hugging_face
from .models.patch_dropout import drop_patches
from .models.released import convert_config, is_released_config, strip_prefixes
from .models.specification import CLIP_PIXELS, ContrastiveModel, ModelSpec, load_family
from .models.two_tower import ModelConfig
from .overrides import Overrides, accept_model_name, changes, check_overrides, choose_towers, override
from .pretrained import (
    CONFIG,
    HUB,
    LOCAL,
    OPEN_CLIP_CONFIG,
    RELEASED,
    fetch_released,
    find_released,
    find_weights,
    layout_of,
    locate,
    read_layout,
)
from .serialization import CheckpointError, read_about
from .tokenizer import Tokenizer
from .transform import prepare, train_transform, val_transform
from .weights import NoRandomValues, check_room, load_towers, move_weights
from .weights import load_checkpoint as load_checkpoint  # also found here
from .weights import read_fitting_weights as read_fitting_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST = {"amp": torch.float32, "amp_bf16": torch.float32, "amp_bfloat16": torch.float32}  # of the weights
Model = str | Path | dict[str, Any] | ModelSpec
_added: dict[str, dict[str, Any]] = {}  # name -> model JSON
M = TypeVar("M", bound=nn.Module)


def list_models() -> list[str]:
    """Our presets, and those of `add_model_config`. `open_clip.list_models()` names work too."""
    return sorted({*list_presets("models"), *_added})


def add_model_config(path: str | Path) -> list[str]:
    """Give the model JSON at `path`, or each in that folder, its file's name as a preset name, in this process.

    Returns the names. ConfigError for what does not describe a model, or has the name of a shipped preset."""
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {file.stem: parse_spec(load_json(file)).to_json() for file in files}
    if taken := sorted(found.keys() & set(list_presets("models"))):
        raise ConfigError([f"{path}: {name} is the name of a shipped preset; rename the file" for name in taken])
    _added.update(found)
    return list(found)


@accept_model_name
def get_model_config(model: Model) -> dict[str, Any] | None:
    """The JSON of a model, by name (`hf-hub:` and `local-dir:` too): of open_clip's in its form, of others in ours.
    None for an unknown name."""
    try:
        spec = resolve_spec(model)[1]
    except ConfigError:
        if isinstance(model, str) and not model.startswith((HUB, LOCAL)) and not model.endswith(".json"):
            return None
        raise
    return getattr(spec, "description", None) or spec.to_json()


def resolve_spec(model: Model) -> tuple[str, ModelSpec]:
    """Name, JSON path, dict, specification, or what holds weights and describes them (`hf-hub:org/name`,
    `local-dir:path`, a folder) -> (name, specification). ConfigError for anything else."""
    if isinstance(model, dict):
        spec = parse_spec(model)
        return spec.name, spec
    if not isinstance(model, (str, Path)):
        return model.name, model
    name = str(model).replace("/", "-")
    if name in _added:
        return name, parse_spec(_added[name])
    if name in list_models():
        return name, parse_spec(load_json(CONFIGS / "models" / f"{name}.json"))
    if chinese_clip.is_structure(str(model)):
        return str(model), chinese_clip.parse_structure(str(model))
    if str(model).endswith(".json"):
        data = load_json(model)
        if not isinstance(data, dict):
            raise ConfigError([f"{model}: expected a JSON object that describes a model"])
        return Path(model).stem, parse_spec(data)
    if holds_weights(model):
        return describe(model)[:2]
    import open_clip

    if name in open_clip.list_models():
        return name, parse_spec({"open_clip": name})
    near = difflib.get_close_matches(name, [*list_models(), *open_clip.list_models()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"ours: {', '.join(list_models())}"
    raise ConfigError([f"model: {str(model)!r} is not a preset, .json file or open_clip model; {hint}"])


def holds_weights(model: Model) -> bool:
    """Whether what names a model also holds its weights: a place on the hub, a folder with a configuration, or the path
    (with a slash, as names have none) of a run or checkpoint folder, or of its averaged weights (@ema)."""
    if not isinstance(model, (str, Path)):
        return False
    if str(model).startswith((HUB, LOCAL)) or layout_of(Path(model)) is not None:
        return True
    path = Path(model)
    if path.name.endswith(SUFFIX) and not path.exists():
        path = path.with_name(path.name.removesuffix(SUFFIX))
    return (isinstance(model, Path) or os.sep in model) and is_run(path)


def parse_spec(data: dict[str, Any]) -> ModelSpec:
    """A model from JSON data: two towers of ours, open_clip's, or that of released RWKV-CLIP or Chinese-CLIP files."""
    if chinese_clip.is_configuration(data):
        return chinese_clip.convert_configuration(data)
    if "open_clip" in data or ("embed_dim" in data and not {"image", "text"} & data.keys()):
        return load_family("open_clip").OpenClipConfig.parse(data)
    return convert_config(data) if is_released_config(data) else ModelConfig.parse(data)


def change_spec(spec: ModelSpec, overrides: Mapping[str, Any]) -> ModelSpec:
    """The specification with the changes that these arguments of `create_model` ask for. ConfigError for what the model
    does not have."""
    return parse_spec(override(spec.to_json(), overrides)) if changes(overrides) else spec


@accept_model_name
def create_model(
    model: Model,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    drop_path: float | None = None,
    pretrained_image: str | Path | bool | None = None,
    pretrained_text: str | Path | bool | None = None,
    force_patch_dropout: float | None = 0.0,
    **overrides: Unpack[Overrides],
) -> ContrastiveModel:
    """Build a model; `model` is a preset name, the path of a JSON, a dict (ours, released or open_clip's keys), or what
    holds weights, too: `hf-hub:org/name[@revision]`, `local-dir:path`, a folder with a configuration, a run folder.

    pretrained: weights as for `load_checkpoint`, an open_clip tag when the model is open_clip's, or a tag of released
    weights (`list_pretrained`). precision: fp32, or bf16 / fp16 to hold the weights in that type (decays stay float32);
    amp and amp_bf16 hold them in fp32, for autocast. drop_path overrides the image tower's rate. pretrained_image,
    pretrained_text: weights of one tower, see `load_towers`. force_patch_dropout: fraction of patches that a ViT leaves
    out in training. overrides: open_clip's further arguments, see `Overrides`. `model(image, text)` returns what
    open_clip's models do, `model(image, text, needs=names)` features by name.
    """
    _check_precision(precision)
    check_overrides(overrides)
    image, text = choose_towers(pretrained_image, pretrained_text, overrides)
    spec, weights = _find_source(model, pretrained, overrides)
    if drop_path is not None:
        spec = spec.with_drop_path(drop_path)
    spec, tag = spec.find_tag(str(weights)) if weights else (spec, None)
    changed = change_spec(spec, overrides)
    if weights and not tag and holds_weights(model):
        check_room(spec, find_checkpoint(find_weights(weights)))
    net = spec.build(tag) if tag else changed.build()
    if tag and changed != spec:
        net = move_weights(net, changed.build())
    if net.logit_scale.is_meta and (weights or image or text):
        raise ConfigError(["pretrained: the meta device holds no numbers; build the model there without weights"])
    if weights and not tag:
        load_checkpoint(net, weights)
    load_towers(net, image, text)
    if force_patch_dropout:
        drop_patches(net, force_patch_dropout)
    if overrides.get("output_dict") is not None:
        net.output_dict = bool(overrides["output_dict"])
    return _complete(net, changed, precision, device)


def _check_precision(precision: str) -> None:
    if precision not in DTYPES | AUTOCAST:
        raise ConfigError([f"precision: {precision!r} is not one of {', '.join(DTYPES | AUTOCAST)}"])


def _complete(net: ContrastiveModel, spec: ModelSpec, precision: str, device: str | torch.device) -> ContrastiveModel:
    """A built model with what belongs to it, in its precision, on its device."""
    net.spec = spec
    set_preprocessing(net)
    net = cast_weights(net, (DTYPES | AUTOCAST)[precision])
    return (net if net.logit_scale.is_meta else net.to(device)).eval()


def _load_model(spec: ModelSpec, path: Path, precision: str, device: str | torch.device) -> ContrastiveModel:
    """What `create_model(spec, path, ..)` returns, without the initial values, which take longer than the weights."""
    with NoRandomValues():
        net = spec.build()
    load_checkpoint(net, path)
    return _complete(net, spec, precision, device)


def _find_source(
    model: Model, pretrained: str | Path | None, overrides: Overrides
) -> tuple[ModelSpec, str | Path | None]:
    """The model and its weights, a path or a tag; None: none. ConfigError where weights are asked for twice, or must
    be there and are not named."""
    cache = overrides.get("cache_dir")
    if holds_weights(model):
        if pretrained:
            raise ConfigError([f"pretrained: {str(model)!r} has weights of its own; leave out {str(pretrained)!r}"])
        _, spec, found = describe(model, cache=cache)  # type: ignore[arg-type] # it is a name
        weights: str | Path | None = found
    else:
        name, spec = resolve_spec(model)
        released = next((one for one in RELEASED if tuple(one) == (name, str(pretrained))), None)
        weights = pretrained
        if released:
            weights = fetch_released(released, cache)
        elif pretrained and (str(pretrained).startswith((HUB, LOCAL)) or find_released(str(pretrained))):
            weights = find_weights(pretrained, cache)
        elif pretrained and str(pretrained).endswith(SUFFIX):
            weights = find_checkpoint(pretrained)
    if overrides.get("load_weights") is False:
        weights = None
    if overrides.get("require_pretrained") and not weights:
        raise ConfigError(["pretrained: not set; name a file or a tag, see list_pretrained()"])
    return spec, weights


def cast_weights(model: M, dtype: torch.dtype) -> M:
    """Hold the weights in `dtype`; decays, bonus, temperature and its bias stay float32, where rounding would compound,
    and so do batch norms, whose weights have to have the dtype of their running statistics."""
    exact = {"time_decay", "time_faaaa", "logit_scale", "logit_bias"}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and name not in exact:
                parameter.data = parameter.data.to(dtype)
    return model


@accept_model_name
def create_model_and_transforms(
    model: Model,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> tuple[ContrastiveModel, Callable, Callable]:
    """(model, preprocess for training, preprocess for evaluation); transforms map a PIL image to (3, h, w) float.

    overrides: further arguments of `create_model`."""
    net = create_model(model, pretrained, precision, device, **overrides)
    return net, train_transform(net.spec.image_size), preprocess_of(net)


@accept_model_name
def create_model_from_pretrained(
    model: Model,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    return_transform: bool = True,
    **overrides: Any,
) -> ContrastiveModel | tuple[ContrastiveModel, Callable]:
    """A model with weights and its preprocess for evaluation (open_clip's function of this name). ConfigError without
    weights."""
    net = create_model(model, pretrained, precision, device, **{**overrides, "require_pretrained": True})
    return (net, preprocess_of(net)) if return_transform else net


@accept_model_name
def get_tokenizer(model: Model, context_length: int | None = None, cache_dir: str | Path | None = None) -> Tokenizer:
    """Tokenizer of a model: texts -> int64 (n, context). context_length: another one than the model's."""
    spec = describe(model, cache=cache_dir)[1] if holds_weights(model) else resolve_spec(model)[1]  # type: ignore[arg-type]
    tokenizer = spec.tokenizer()
    return tokenizer if context_length is None else tokenizer.with_context(context_length)


def preprocess_of(model: ContrastiveModel) -> Callable:
    """Evaluation transform of a model from `create_model`: PIL image of any mode -> float (3, h, w)."""
    size, (mean, std) = model.spec.image_size, model.spec.pixels
    mode: Any = getattr(model.spec, "resize_mode", "shortest")
    interpolation = getattr(model.spec, "interpolation", "bicubic")
    if (mean, std) == CLIP_PIXELS and interpolation == "bicubic":
        return val_transform(size, mode)
    import open_clip

    theirs = open_clip.image_transform(
        size, is_train=False, mean=mean, std=std, resize_mode=mode, interpolation=interpolation
    )
    theirs.transforms[:0] = prepare(size) if mode == "shortest" else [to_rgb]
    return theirs


def set_preprocessing(model: ContrastiveModel) -> None:
    """What open_clip keeps on `model.visual`: image_mean, image_std, and preprocess_cfg, a table of both and more."""
    mean, std = model.spec.pixels
    visual: Any = model.visual
    visual.image_mean, visual.image_std = mean, std
    visual.preprocess_cfg = {
        **{"size": model.spec.image_size, "mode": "RGB", "mean": mean, "std": std},
        **{"interpolation": getattr(model.spec, "interpolation", "bicubic"), "resize_mode": model.spec.resize_mode},
        "fill_color": 0,
    }


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
    """Open a run folder, checkpoint folder, weights file, `open_clip:NAME[:TAG]`, `hf-hub:org/name[@revision]`,
    `local-dir:path`, or released weights by name (`list_pretrained`).

    Most describe their model, see `describe`; a bare weights file needs `model` (a name or the path of a JSON).
    """
    text = str(checkpoint)
    if text.startswith("open_clip:"):
        _, name, *tag = text.split(":")
        net = create_model(name, tag[0] if tag else None, precision, device)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Loaded(net, preprocess_of(net), get_tokenizer(name), text[10:], digest, precision)
    _check_precision(precision)
    name, spec, path = describe(checkpoint, model)
    if holds_weights(checkpoint):
        check_room(spec, path)
    net = _load_model(spec, path, precision, device)
    return Loaded(net, preprocess_of(net), net.spec.tokenizer(), name, digest_of(path), precision)


DESCRIPTION = "rwkv_clip"  # the text beside the tensors of a file that describes its model: JSON of name and spec


def describe(
    checkpoint: str | Path, model: str | None = None, cache: str | Path | None = None
) -> tuple[str, ModelSpec, Path]:
    """(name, specification, weights) of what holds weights; `model` where that is not told by itself.

    Run and checkpoint folders, places on the hub and folders with a configuration (ours, open_clip's, transformers'),
    files that `rwkv_clip.convert` wrote, the released files of Chinese-CLIP and released weights by name tell.
    ConfigError for others without `model`. cache: for downloads.
    """
    place = locate(checkpoint, cache)
    path = find_weights(place)
    if model is not None:
        return *resolve_spec(model), find_checkpoint(path)
    if path != place:
        return *_read_layout(place, str(checkpoint)), path
    if released := find_released(str(checkpoint)):
        return *resolve_spec(released.model), path
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


def _read_layout(folder: Path, named: str) -> tuple[str, ModelSpec]:
    """Name and specification that the configuration in a folder tells; `named` is how the folder was asked for."""
    layout, data = read_layout(folder)
    where = str(folder / layout)
    if layout == CONFIG:
        if not isinstance(data.get("spec"), dict):
            raise ConfigError([f"{where}: has no table spec, which describes the model; export the weights again"])
        return str(data.get("model")), parse_spec(data["spec"])
    name = named.removeprefix(HUB) if named.startswith(HUB) else folder.resolve().name
    if layout == OPEN_CLIP_CONFIG:
        return name, load_family("open_clip").OpenClipConfig.from_layout(data, where)
    return name, hugging_face.convert_configuration(data, where)
