"""What each block of a tower puts out, by the names and options of open_clip's `forward_intermediates`.

The towers that are written here run as always; hooks on their blocks collect. open_clip's towers have the function
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .specification import suggest

_OF_A_SIDE = {"indices": None, "output_fmt": "", "output_extra_tokens": False}
_OPTIONS = (
    *("normalize", "normalize_intermediates", "intermediates_only", "stop_early"),
    *("output_logits", "output_logit_scale_bias"),
)


def run_model(model: Any, image: Tensor | None, text: Tensor | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Features of a model and what its blocks put out.

    image_features, text_features: (B, D), normalised unless normalize=False; image_intermediates: of each block
    (B, W, rows, columns), or (B, T, W) with image_output_fmt="NLC"; text_intermediates: (B, T, W);
    image_intermediates_prefix, with image_output_extra_tokens: the class token (B, 1, W). image_indices, text_indices:
    which blocks: None for all, N for the last N, or their numbers. normalize_intermediates: through the tower's last
    norm. intermediates_only: no features. output_logits: image_logits, text_logits; output_logit_scale_bias:
    logit_scale, exponentiated, and logit_bias where the model has one. stop_early has no effect. ValueError for another
    option or value.
    """
    names = (*_OPTIONS, *(f"{side}_{name}" for side in ("image", "text") for name in _OF_A_SIDE))
    for name in options:
        if name not in names:
            raise ValueError(f"{name}: not an option of forward_intermediates; {suggest(name, names)}")
    only = bool(options.get("intermediates_only"))
    if options.get("output_logits") and not only and (image is None or text is None):
        raise ValueError("output_logits: needs both image and text")
    found: dict[str, Any] = {}
    for side, inputs in (("image", image), ("text", text)):
        if inputs is None:
            continue
        own = {name: options[f"{side}_{name}"] for name in _OF_A_SIDE if f"{side}_{name}" in options}
        own |= {name: options[name] for name in ("normalize_intermediates", "intermediates_only") if name in options}
        own = {key.replace("normalize_intermediates", "norm"): value for key, value in own.items()}
        part = run_tower(getattr(model, f"{side}_model"), side, inputs, own)
        if options.get("normalize", True) and f"{side}_features" in part:
            part[f"{side}_features"] = F.normalize(part[f"{side}_features"], dim=-1)
        found |= part
    scalars = {"logit_scale": model.logit_scale.exp()}
    if model.logit_bias is not None:
        scalars["logit_bias"] = model.logit_bias
    if options.get("output_logits") and not only:
        logits = scalars["logit_scale"] * found["image_features"] @ found["text_features"].T
        found["image_logits"] = logits + scalars["logit_bias"] if "logit_bias" in scalars else logits
        found["text_logits"] = found["image_logits"].T
    return found | (scalars if options.get("output_logit_scale_bias") else {})


def run_tower(tower: Any, side: str, inputs: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """The same of one tower, features not normalised. options: indices, norm, intermediates_only, output_fmt,
    output_extra_tokens."""
    if not hasattr(tower, "collect_blocks"):  # open_clip's
        theirs = {"normalize_intermediates" if key == "norm" else key: value for key, value in options.items()}
        return tower.forward_intermediates(inputs, **theirs)
    form = options.get("output_fmt") or ("NCHW" if side == "image" else "NLC")
    if form not in ("NCHW", "NLC") or (side == "text" and form != "NLC"):
        raise ValueError(f"{side}_output_fmt: {form!r} is not {'NCHW or ' if side == 'image' else ''}NLC")
    features, blocks = tower.collect_blocks(inputs)
    chosen = [blocks[i] for i in _choose(side, options.get("indices"), len(blocks))]
    if options.get("norm") and tower.last_norm is not None:
        chosen = [tower.last_norm(block) for block in chosen]
    found: dict[str, Any] = {}
    if side == "image":
        grid = tower.grid_of(inputs.shape[-2:])
        patches = grid[0] * grid[1]
        if options.get("output_extra_tokens") and tower.cls_token is not None:
            found["image_intermediates_prefix"] = [block[:, patches:] for block in chosen]
        chosen = [block[:, :patches] for block in chosen]
        if form == "NCHW":
            chosen = [block.transpose(1, 2).unflatten(2, grid).contiguous() for block in chosen]
    found[f"{side}_intermediates"] = chosen
    return found | ({} if options.get("intermediates_only") else {f"{side}_features": features})


def _choose(side: str, indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Numbers of blocks: all, the last N, or those given (negative ones from the end)."""
    numbers = (
        range(count) if indices is None else range(count - indices, count) if isinstance(indices, int) else indices
    )
    if any(not -count <= i < count for i in numbers) or (isinstance(indices, int) and not 0 < indices <= count):
        raise ValueError(f"{side}_indices: {indices!r} does not fit {count} blocks; use numbers from 0 to {count - 1}")
    return sorted({i % count for i in numbers})


def collect(modules: Sequence[nn.Module], run: Any) -> tuple[Any, list[tuple[tuple, Any]]]:
    """run() and, for each module that it calls, inputs and output, in order."""
    seen: list[tuple[tuple, Any]] = []
    hooks = [module.register_forward_hook(lambda _, args, out: seen.append((args, out))) for module in modules]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()
