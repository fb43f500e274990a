"""Weights into models: strict loading, keys of others renamed, tables of positions resized where a model has another
number of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checkpoint import read_weights
from .config import ConfigError
from .models import chinese_clip, hugging_face
from .models.positions import fit_tables
from .models.released import OPENAI_ENTRIES, strip_prefixes
from .models.specification import ContrastiveModel, ModelSpec
from .pretrained import find_weights

M = TypeVar("M", bound=nn.Module)
BITS = 8  # parameters for each byte of a file, at most
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
        model.load_state_dict(_fit(model, state, image, wanted), strict=False)
    if text is not None:
        if "text_model.embeddings.word_embeddings.weight" not in own:
            raise ConfigError(["pretrained_text: the model's text tower is no BERT; give whole weights (pretrained)"])
        state = chinese_clip.text_tower_of(strip_prefixes(_read_state(text)), "text_model.")
        wanted = {key for key in own if key.startswith("text_model.") and key != "text_model.proj"}
        model.load_state_dict(_fit(model, state, text, wanted), strict=False)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file, a folder of ours, or one of transformers."""
    return read_weights(find_weights(path))


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
    return _fit(model, state, path, own.keys())


def _fit(model: nn.Module, state: dict[str, Tensor], path: str | Path, wanted: Collection[str]) -> dict[str, Tensor]:
    """The state with its tables of positions resized. ValueError unless it has all of `wanted`, keys of the model,
    with their shapes, and no key that the model does not have."""
    own = model.state_dict()
    fit_tables(model, own, state)
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
        raise ValueError(
            f"{path}: does not fit the model ({len(problems)} keys){'; ' * bool(rather)}{rather}\n  {shown}"
        )
    return state


def move_weights(source: nn.Module, target: M) -> M:
    """The target with the weights of a model that differs from it in the number of positions only."""
    target.load_state_dict(_fit(target, dict(source.state_dict()), "pretrained", target.state_dict().keys()))
    return target
