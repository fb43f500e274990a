"""Weights into models: strict loading, keys of others renamed, tables of positions resized where a model has another
number of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base_weights import read_whole
from .config import ConfigError
from .models import chinese_clip, hugging_face
from .models.positions import fit_tables
from .models.released import OPENAI_ENTRIES, strip_prefixes
from .models.specification import ContrastiveModel, ModelSpec, load_family
from .models.tower_states import (
    PROJECTIONS,
    cut_tower,
    describe_model,
    describe_tower,
    find_prefix,
    find_tower,
    lacks_projection,
)
from .pretrained import find_weights

M = TypeVar("M", bound=nn.Module)
OPEN_CLIP = "open_clip:"  # before the names of its models and tags
BITS = 8  # parameters for each byte of a file, at most
BIAS = "logit_bias"
SMALL = 1 << 28  # parameters of models that are built in any case: the file's own mistake is told
log = logging.getLogger(__name__)


class NoRandomValues(TorchFunctionMode):
    """Inside, tensors keep what they are when they should be filled with random numbers: for models whose every weight
    is loaded afterwards."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        if name == "linalg_qr":  # of nn.init.orthogonal_
            return args[0], args[0]
        return func(*args, **(kwargs or {}))


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights strictly: a checkpoint or run folder of ours, .safetensors, a released .pt state dict, or what
    `pretrained.locate` finds by name.

    `module.` and `_orig_mod.` prefixes and what OpenAI's files hold besides weights are removed; values are cast to the
    model's dtypes. ValueError names every missing, unexpected and misshapen key.
    """
    model.load_state_dict(read_fitting_weights(model, path))


def check_room(spec: ModelSpec, path: Path) -> None:
    """ConfigError for a model far larger than its file of weights: it is not built to find out."""
    if path.is_dir():
        return  # a checkpoint of a run, which describes itself
    size = path.stat().st_size
    if _estimate(spec.to_json()) <= 64 * size:
        return
    with torch.device("meta"):  # takes a second
        count = sum(parameter.numel() for parameter in spec.build().parameters())
    if count > max(SMALL, BITS * size):
        raise ConfigError([f"{path}: has {size:,} bytes, and the model {count:,} parameters; correct its description"])


def _estimate(data: dict[str, Any]) -> int:
    """About how many parameters a description asks for, never far less: from its largest numbers alone."""
    found: dict[str, int] = {}

    def read(value: Any, name: str) -> None:
        if isinstance(value, (dict, list)):
            for key, one in value.items() if isinstance(value, dict) else ((name, one) for one in value):
                read(one, key)
        elif isinstance(value, int):
            found[name] = max(found.get(name, 1), value)

    read(data, "")
    rows = sum(found.pop(name, 0) for name in ("vocab", "vocab_size", "positions", "context", "context_length"))
    patch = found.pop("patch", 0) or found.pop("patch_size", 0) or 1
    rows += (found.pop("image_size", 0) // patch) ** 2
    depth = found.pop("depth", 0) + found.pop("layers", 0) + 1
    width = max(found.values(), default=1)
    return rows * width + 12 * depth * width**2


def load_towers(model: ContrastiveModel, image: str | Path | None, text: str | Path | None) -> None:
    """Load one tower alone, or each from weights of its own; the other tower stays as it is.

    From a checkpoint of ours, any that `load_checkpoint` reads, `open_clip:NAME:TAG`, a tower's own state dict, a BERT
    (text) or an ImageNet classifier of timm's (image). Strictly, but for a projection, which starts anew where the
    weights have none. With the image tower of a model comes its temperature. ConfigError for a model without such a
    tower, ValueError, which says what the weights hold, where they do not fit.

    NOTE(parity): Chinese-CLIP's code rounds all weights to float16 on the way, these and new ones; here nothing is.
    """
    own = model.state_dict()
    for side, place in (("image", image), ("text", text)):
        if place is None:
            continue
        prefix = find_prefix(own, side)
        if prefix is None:
            raise ConfigError([f"pretrained_{side}: the model has no {side} tower; give whole weights (pretrained)"])
        target = cut_tower(own, side, prefix)
        state = _read_model(place)
        tower = find_tower(state, side, target)
        anew = {key for key in target if lacks_projection(tower, side) and PROJECTIONS[side].fullmatch(key)}
        found = {f"{prefix}{key}": value for key, value in tower.items()}
        if side == "image" and find_prefix(state, "image") and "logit_scale" in state:
            _warn_of_gelu(model, state, place)
            found["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)
        held = f"it holds {describe_tower(tower)}; the model's {side} tower is {describe_tower(target)}"
        fitting = _fit(model, found, place, [f"{prefix}{key}" for key in target if key not in anew], held)
        model.load_state_dict(fitting, strict=False)
        if anew:
            log.info("%s: has no projection of the %s tower; it starts anew", place, side)


def _read_model(place: str | Path) -> dict[str, Tensor]:
    """The weights of a place, by open_clip's or our keys where they are a model's."""
    name, _, tag = str(place).removeprefix(OPEN_CLIP).partition(":")
    if not str(place).startswith(OPEN_CLIP):
        state = strip_prefixes(_read_state(place))
        alone = chinese_clip.is_released_state(state) and find_prefix(state, "image") is None  # a BERT's own file
        return state if alone else to_own_keys(state, ())
    if not tag:
        raise ConfigError([f"pretrained: {place} names no weights; open_clip:NAME:TAG does"])
    spec, found = load_family("open_clip").OpenClipConfig.parse({"open_clip": name}).find_tag(tag)
    return spec.build(found).state_dict()


def _read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file, a folder of ours, or one of transformers."""
    return read_whole(find_weights(path), lambda state, keys: to_own_keys(strip_prefixes(state), keys))


def to_own_keys(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Keys of the layouts of transformers and of Chinese-CLIP's released files -> those of a model, some of which are
    `own`; any others as they are."""
    if hugging_face.is_state(state):
        return hugging_face.from_state(state)
    if chinese_clip.is_released_state(state) and not chinese_clip.is_released_state(own):
        return chinese_clip.from_released(state)
    return state


def read_fitting_weights(model: nn.Module, path: str | Path, spare: Iterable[str] = ()) -> dict[str, Tensor]:
    """What `load_checkpoint` loads: whole tensors, one for each key of the model's state dict. ValueError as there.
    spare: keys that are left out where the model has none."""
    own = model.state_dict()
    state = to_own_keys(strip_prefixes(_read_state(path)), own)
    _warn_of_gelu(model, state, path)
    for key in (*OPENAI_ENTRIES, *spare):
        if key not in own:
            state.pop(key, None)
    held = describe_model(state)
    return _fit(model, state, path, own.keys(), held and f"it holds {held}; the model is {describe_model(own)}")


def _warn_of_gelu(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict()
    marked = any(key in state and key not in own for key in OPENAI_ENTRIES)
    if marked and not any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        log.warning("%s: looks like OpenAI's, trained with QuickGELU; this model has exact GELU (NAME-quickgelu)", path)


def _fit(
    model: nn.Module, state: dict[str, Tensor], path: str | Path, wanted: Collection[str], held: str = ""
) -> dict[str, Tensor]:
    """The state with its tables of positions resized. ValueError unless it has all of `wanted`, keys of the model,
    with their shapes, and no key that the model does not have. held: what the error adds. A bias of the scores that the
    weights were trained without begins as the model says.

    NOTE(parity): open_clip begins it with 0, by which every other text of a batch is judged a match at first."""
    own = model.state_dict()
    fit_tables(model, own, state)
    if BIAS in wanted and BIAS in own and BIAS not in state and not own[BIAS].is_meta:
        state[BIAS] = own[BIAS].clone()
        log.warning("%s: has no %s; it begins with %g", path, BIAS, own[BIAS].item())
    problems = [f"missing: {key}" for key in own if key in wanted and key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in own]
    problems += [
        f"shape of {key}: checkpoint {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        from .recognition import say_model

        rather = say_model(state, path) if len(wanted) == len(own) else ""
        most = 3 if rather else 20
        shown = "\n  ".join(problems[:most]) + (f"\n  .. and {len(problems) - most} more" if problems[most:] else "")
        more = "".join(f"; {what}" for what in (held, rather) if what)
        raise ValueError(f"{path}: does not fit the model ({len(problems)} keys){more}\n  {shown}")
    return state


def move_weights(source: nn.Module, target: M) -> M:
    """The target with the weights of a model that differs from it in the number of positions only."""
    target.load_state_dict(_fit(target, dict(source.state_dict()), "pretrained", target.state_dict().keys()))
    return target
