"""What stays frozen in a run: parameters by pattern, towers up to a depth, statistics of batch norms."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config import ConfigError, ranged

IMAGE_TOWERS = ("visual.", "image_model.")  # open_clip's name and ours


@dataclass(frozen=True)
class FreezeSettings:
    """Parameters that do not train. The locks are open_clip's, by name and meaning."""

    freeze: tuple[str, ...] = ()
    """Names of parameters, or patterns of them with * ? [..], such as 'text_model.emb.*'."""
    lock_image: bool = False
    """Freeze the image tower (LiT: arXiv 2111.07991), except its last --lock-image-unlocked-groups."""
    lock_image_unlocked_groups: int = ranged(0, minimum=0)
    """Groups of the image tower that train, counted from its end: projection, last block with the last norm, the other
    blocks, embedding. Without a projection, counting starts at the last block."""
    lock_image_freeze_bn_stats: bool = False
    """Freeze the running statistics of batch norms in what --lock-image freezes."""
    lock_text: bool = False
    """Freeze the text tower, except its last --lock-text-unlocked-layers."""
    lock_text_unlocked_layers: int = ranged(0, minimum=0)
    """Groups of the text tower that train, counted from its end like those of the image tower."""
    lock_text_freeze_layer_norm: bool = False
    """Also freeze the LayerNorms of what --lock-text freezes; otherwise they train."""

    def problems(self) -> list[str]:
        """Flags that would have no effect."""
        found = []
        for name in ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"):
            if getattr(self, name) and not self.lock_image:
                found.append(f"{name}: {getattr(self, name)} has no effect without lock_image; set it, too")
        for name in ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm"):
            if getattr(self, name) and not self.lock_text:
                found.append(f"{name}: {getattr(self, name)} has no effect without lock_text; set it, too")
        return found


def freeze_parameters(model: nn.Module, settings: FreezeSettings) -> list[str]:
    """Freeze what the settings say, in place. Returns the names of the parameters that were frozen.

    ConfigError for a pattern that matches nothing, a lock that a tower does not have, or if nothing is left to train.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if settings.lock_image:
        _lock(model, "lock_image", "lock_image_tower", settings.lock_image_unlocked_groups)
        if settings.lock_image_freeze_bn_stats:
            _keep_statistics(model)
    if settings.lock_text:
        free = [] if settings.lock_text_freeze_layer_norm else list(_find_text_norms(model))
        before = [parameter.requires_grad for parameter in free]
        _lock(model, "lock_text", "lock_text_tower", settings.lock_text_unlocked_layers)
        for parameter, trains in zip(free, before):
            parameter.requires_grad_(trains)
    _freeze_patterns(model, settings.freeze)
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(["freeze: nothing is left to train; freeze fewer parameters"])
    return [name for name in trained if not parameters[name].requires_grad]


def _lock(model: nn.Module, setting: str, method: str, unlocked: int) -> None:
    if not hasattr(model, method):
        raise ConfigError([f"{setting}: {type(model).__name__} has no {method}; name its parameters with freeze"])
    try:
        getattr(model, method)(unlocked)
    except AssertionError as error:  # open_clip's ResNets
        raise ConfigError([f"{setting}: {unlocked} groups cannot be left unlocked: {error}; use 0"]) from None


def _freeze_patterns(model: nn.Module, patterns: tuple[str, ...]) -> None:
    parameters, problems = dict(model.named_parameters()), []
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.5) or list(parameters)[:3]
            problems.append(f"freeze: {pattern!r} matches no parameter; names are like {', '.join(near)}")
        for name in matched:
            parameters[name].requires_grad_(False)
    if problems:
        raise ConfigError(problems)


def _find_text_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the text tower's LayerNorms; open_clip's CLIP has the text tower at its top level."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.startswith(IMAGE_TOWERS):
            yield from module.parameters()


def _keep_statistics(model: nn.Module) -> None:
    """Make batch norms of the image tower with no trained parameter compute as in evaluation, whatever `train()` says.

    open_clip replaces them by modules of another class, whose checkpoints lack num_batches_tracked."""
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and name.startswith(IMAGE_TOWERS)
        if norm and not any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(_evaluate)


def depends_on_the_batch(module: nn.Module) -> bool:
    """Whether a module is a batch norm that computes with the statistics of its batch."""
    kept = _evaluate in module._forward_pre_hooks.values()
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not kept


def _evaluate(norm: nn.Module, _: Any) -> None:
    norm.training = False
