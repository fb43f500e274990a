"""A model's features by name, which objectives ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .specification import ContrastiveModel

SIDES = ("image", "text")
IMAGE_TOWER = "visual."  # in open_clip's CLIP, all else is its text tower
EXTRAS = ("pooled", "tokens")  # fields of Encoded
SCALARS = ("logit_scale", "logit_bias")  # of the whole model, always given
NAMES = (*SIDES, *(f"{side}_{extra}" for extra in EXTRAS for side in SIDES))


def name_features(
    model: ContrastiveModel, image: Tensor | None, text: Tensor | None, needs: Iterable[str]
) -> dict[str, Tensor]:
    """Features of the inputs that are given, by name.

    `image` and `text`: (B, D), normalised, always; `image_pooled`, `text_pooled`: (B, W), before the projection, not
    normalised; `image_tokens`, `text_tokens`: (B, L, W), after the last norm, before pooling; `logit_scale`:
    exponentiated; `logit_bias` where the model has one. Each tower runs once. ValueError for a name that is not one of
    these, or that a tower cannot give.
    """
    valid = (*NAMES, *SCALARS)
    needs = {needs} if isinstance(needs, str) else set(needs)
    if unknown := sorted(needs.difference(valid)):
        raise ValueError(f"needs: unknown {', '.join(map(repr, unknown))}; valid names: {', '.join(valid)}")
    found: dict[str, Tensor] = {}
    for side, inputs in zip(SIDES, (image, text)):
        if inputs is None:
            continue
        extras = [extra for extra in EXTRAS if f"{side}_{extra}" in needs]
        with torch.no_grad() if _is_locked(model, side, inputs) else contextlib.nullcontext():
            found |= _name_side(model, side, inputs, extras)
    found["logit_scale"] = model.logit_scale.exp()
    if (bias := getattr(model, "logit_bias", None)) is not None:
        found["logit_bias"] = bias
    return found


def _name_side(model: ContrastiveModel, side: str, inputs: Tensor, extras: list[str]) -> dict[str, Tensor]:
    if not extras:  # as it is called everywhere else
        return {side: getattr(model, f"encode_{side}")(inputs, normalize=True)}
    encoded = model.encode_parts(side, inputs)
    named = {f"{side}_{extra}": getattr(encoded, extra) for extra in extras}
    return {side: F.normalize(encoded.features, dim=-1), **named}


def _is_locked(model: ContrastiveModel, side: str, inputs: Tensor) -> bool:
    """Whether nothing of a tower trains, so that no graph is to be kept of it. (A compiler finds that out itself.)"""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or inputs.requires_grad:
        return False
    tower: Any = getattr(model, "visual" if side == "image" else "text", None)
    if tower is not None:
        return not any(parameter.requires_grad for parameter in tower.parameters())
    rest = (item for item in model.named_parameters() if not item[0].startswith(IMAGE_TOWER) and item[0] not in SCALARS)
    return side == "text" and not any(parameter.requires_grad for _, parameter in rest)  # open_clip's CLIP
