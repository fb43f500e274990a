"""open_clip's further arguments of `create_model`: what each changes in the description of a model, or why it cannot.

They work on the JSON of a model, so they serve every family of towers: the picture size is `image_size` in each, the
context `context` or `context_length`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from .config import ConfigError
from .models.specification import suggest
from .transform import CLIP_MEAN, CLIP_STD

F = TypeVar("F", bound=Callable[..., Any])


class Overrides(TypedDict, total=False):
    """Arguments by open_clip's names, with its meaning. None, and false where it is open_clip's default, change
    nothing."""

    force_image_size: int | tuple[int, int] | None  # tables of positions are resized
    force_context_length: int | None
    force_quick_gelu: bool  # of open_clip's towers
    init_logit_bias: float | None  # the scores have a bias, which begins with this where weights have none
    image_mean: tuple[float, ...] | None  # of open_clip's models, per channel
    image_std: tuple[float, ...] | None
    image_interpolation: str | None  # of open_clip's models: bicubic, bilinear
    image_resize_mode: str | None  # shortest, squash
    force_preprocess_cfg: dict[str, Any] | None  # the same four as mean, std, interpolation, resize_mode
    pretrained_image_path: str | Path | None  # as pretrained_image, pretrained_text
    pretrained_text_path: str | Path | None
    load_weights: bool  # False: only the structure
    require_pretrained: bool  # an error without weights
    output_dict: bool | None  # model(image, text) returns a dict
    cache_dir: str | Path | None  # of downloads
    weights_only: bool
    jit: bool
    force_custom_text: bool
    aug_cfg: dict[str, Any] | None


# What is accepted with open_clip's default only, and what to do instead.
_REFUSED = {
    "jit": (False, "a script is not made; torch.compile(model) and torch.export work"),
    "weights_only": (True, "files that can run code are not read; save the weights as .safetensors"),
    "force_custom_text": (False, 'describe the model in a JSON with "custom_text": true'),
    "aug_cfg": (None, "training transforms are settings of rwkv_clip.training (--crop-area, --auto-augment, ..)"),
}
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_STRUCTURE = ("force_image_size", "force_context_length", "force_quick_gelu", "init_logit_bias")
_CHANGING = (*_STRUCTURE, "force_preprocess_cfg", *(f"image_{name}" for name in _PREPROCESSING))


def accept_model_name(function: F) -> F:
    """The function, whose argument `model` may be called `model_name` as in open_clip."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if "model_name" in named:
            named["model"] = named.pop("model_name")
        return function(*arguments, **named)

    return cast(F, call)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """ConfigError for a name that is not an argument, or a value that is not supported; every problem is listed."""
    names = list(Overrides.__annotations__)
    problems = [
        f"{name}: not an argument of create_model; {suggest(name, names)}" for name in overrides if name not in names
    ]
    problems += [
        f"{name}: {overrides[name]!r} is not supported; {remedy}"
        for name, (default, remedy) in _REFUSED.items()
        if overrides.get(name, default) not in (default, None)
    ]
    if problems:
        raise ConfigError(problems)


def choose_towers(image: Any, text: Any, overrides: Mapping[str, Any]) -> tuple[str | Path | None, str | Path | None]:
    """The files of pretrained_image and pretrained_text, or of open_clip's ..._path. ConfigError for `True`, which asks
    for weights that a library would choose."""
    found = []
    for name, value, default in (("pretrained_image", image, False), ("pretrained_text", text, True)):
        if value is True and not default:
            raise ConfigError([f"{name}: True names no weights; give the path of a file with those of one tower"])
        path = overrides.get(f"{name}_path")
        found.append(path if value in (True, False, None) else value)
    return found[0], found[1]


def changes(overrides: Mapping[str, Any]) -> bool:
    """Whether they change the description of a model."""
    return any(overrides.get(name) not in (None, False) for name in _CHANGING)


def override(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a model with these changes. ConfigError for what the model does not have."""
    whole, named = "open_clip" in data, None
    if whole:
        named = source = data["open_clip"]
        source = _describe(source) if isinstance(source, str) and _changes_structure(overrides) else source
        data = {**data, "open_clip": source}
        towers = source if isinstance(source, dict) else {}
        sides = {"image": "vision_cfg", "text": "text_cfg"}
    else:
        data = towers = dict(data)
        sides = {"image": "image", "text": "text"}
    if isinstance(size := overrides.get("force_image_size"), int) and not whole:
        overrides = {**overrides, "force_image_size": (size, size)}
    for name, side, keys in (
        ("force_image_size", sides["image"], ("image_size",)),
        ("force_context_length", sides["text"], ("context_length",) if whole else ("context", "context_length")),
    ):
        if (value := overrides.get(name)) is not None:
            table = towers[side]
            theirs = whole or table.get("kind") == "open_clip"
            towers[side] = {**table, keys[-1 if theirs else 0]: _as_setting(value, theirs)}
    if (bias := overrides.get("init_logit_bias")) is not None:
        towers["init_logit_bias"] = float(bias)
    if overrides.get("force_quick_gelu"):
        _force_quick_gelu(towers, whole)
    if whole and isinstance(named, str) and towers == _describe(named):
        data["open_clip"] = named  # nothing has changed
    _set_preprocessing(data, overrides, whole)
    return data


def _as_setting(value: Any, theirs: bool) -> Any:
    """A number as it is; a size as a list, in a table of open_clip's only where it is no square."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if theirs and len(set(value)) == 1 else list(value)


def _changes_structure(overrides: Mapping[str, Any]) -> bool:
    return any(overrides.get(name) not in (None, False) for name in _STRUCTURE)


def _describe(name: str) -> dict[str, Any]:
    import open_clip

    found = open_clip.get_model_config(name)
    assert found, "it was found by this name"
    return found


def _force_quick_gelu(towers: dict[str, Any], whole: bool) -> None:
    if whole:
        towers["quick_gelu"] = True
        return
    sides = [side for side in ("image", "text") if towers[side].get("kind") == "open_clip"]
    if not sides:
        raise ConfigError(["force_quick_gelu: the model has no tower of open_clip's; leave it out"])
    for side in sides:
        towers[side] = {**towers[side], "quick_gelu": True}


def _set_preprocessing(data: dict[str, Any], overrides: Mapping[str, Any], whole: bool) -> None:
    given = dict(overrides.get("force_preprocess_cfg") or {})
    given |= {name: overrides[f"image_{name}"] for name in _PREPROCESSING if overrides.get(f"image_{name}") is not None}
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(given.keys() - set(_PREPROCESSING)):
        raise ConfigError([f"force_preprocess_cfg: {name} is none of {', '.join(_PREPROCESSING)}" for name in unknown])
    if "resize_mode" in given:
        data["resize_mode"] = given["resize_mode"]
    if whole:
        pixels = data.get("pixels", (CLIP_MEAN, CLIP_STD))
        data["pixels"] = [list(given.get(name, own)) for name, own in zip(("mean", "std"), pixels)]
        data |= {name: given[name] for name in ("interpolation",) if name in given}
        return
    fixed = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"}
    problems = [
        f"image_{name}: {given[name]!r} is not this model's, which reads pictures with {own!r}; leave it out"
        for name, own in fixed.items()
        if name in given and (tuple(given[name]) if name != "interpolation" else given[name]) != own
    ]
    if problems:
        raise ConfigError(problems)
