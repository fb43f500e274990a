"""Which model a file of weights belongs to, found when it does not fit the one that was named."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, find_checkpoint, read_description
from .factory import list_models, resolve_spec

MOST = 3  # names that are told
TABLES = ("pos_emb", "positional_embedding", "attn_mask", "position")  # parts of keys: resized, or made anew


def say_model(state: Mapping[str, Tensor], path: str | Path) -> str:
    """What an error says of weights that do not fit: the model that they fit, or ""."""
    told = _read_name(path)
    known = {*list_models(), *_list_theirs()}
    if told is not None and told not in known:
        return f"it belongs to a model of its own, {told!r}; name that model's JSON, or {path} as the model"
    names = recognize(state) if told is None else [told]
    return f"it fits {' or '.join(names)}: name that model" if names else ""


def recognize(state: Mapping[str, Tensor]) -> list[str]:
    """Names of models, ours first, that have exactly these tensors but for the number of positions; at most three, none
    where no known one has."""
    wanted, found = _shapes(state), []
    for name in _candidates(state):
        if _describe(name) == wanted:
            found.append(name)
        if len(found) == MOST:
            break
    return found


def _read_name(path: str | Path) -> str | None:
    """The name that a checkpoint of a run tells."""
    try:
        described = read_description(find_checkpoint(Path(path)))
    except (OSError, ValueError, CheckpointError):
        return None
    return described["model"] if described else None


def _list_theirs() -> list[str]:
    import open_clip

    return open_clip.list_models()


def _candidates(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Our presets, and those of open_clip's, without text towers of the hub, whose features are as wide."""
    import open_clip

    yield from list_models()
    widths = {
        state[key].shape[-1:] for key in ("text_projection", "visual.proj", "text.text_projection") if key in state
    }
    for name in open_clip.list_models():
        about: dict[str, Any] = open_clip.get_model_config(name) or {}
        if (about.get("embed_dim"),) in widths and "hf_model_name" not in about.get("text_cfg", {}):
            yield name


@functools.cache
def _describe(name: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a model's tensors by key, without its memory; None for one that cannot be built here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip says of each that it has no weights
    try:
        with torch.device("meta"):
            return _shapes(resolve_spec(name)[1].build().state_dict())
    except (ImportError, NotImplementedError, RuntimeError, ValueError):
        return None
    finally:
        logging.disable(before)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if not any(part in key for part in TABLES)}
