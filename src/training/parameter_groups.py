"""Parameter groups: which parameters decay, at which rate a tower and its layers learn, and what Muon takes.

Layers are those of timm's layer decay, see `rwkv_clip.models.layers`: the last layer of a tower (its last norm and
projection) learns at the tower's rate, each layer before it at the decay times the rate of the next (BEiT: arXiv
2106.08254, appendix; timm's param_groups_layer_decay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rwkv_clip.models.freezing import IMAGE_TOWERS

from .optimizer_choice import Choice
from .parallel import Shards
from .settings import OptimizerSettings

OBJECTIVE = "objective."  # parameters of the objective: of no tower
NO_TOWER = ("logit_scale", "logit_bias", OBJECTIVE)


def side_of(name: str) -> str | None:
    """`image` or `text`, the tower of a parameter; None for the temperature and what belongs to the objective."""
    if name.startswith(NO_TOWER):
        return None
    return "image" if name.startswith(IMAGE_TOWERS) else "text"


@dataclass
class _Tower:
    """Numbers of a tower's layers, and its rate."""

    lr: float | None
    decay: float | None
    layers: set[int] = field(default_factory=set)


class Rates:
    """At which multiple of --lr a parameter learns."""

    def __init__(self, shards: Shards, settings: OptimizerSettings):
        self._lr = settings.lr
        self._towers = {
            "image": _Tower(settings.lr_image, settings.layer_decay_image),
            "text": _Tower(settings.lr_text, settings.layer_decay_text),
        }
        self._number = _number_layers(shards) if any(t.decay is not None for t in self._towers.values()) else None
        if self._number is not None:
            for name, _ in shards.whole():
                if side := side_of(name):
                    self._towers[side].layers.add(self._number(name))

    def scale(self, name: str) -> float:
        """Of the parameter `name`; 1.0 exactly where no rate is set."""
        side = side_of(name)
        if side is None:
            return 1.0
        tower = self._towers[side]
        scale = 1.0 if tower.lr is None else tower.lr / self._lr
        if tower.decay is not None and self._number is not None:
            scale *= tower.decay ** (max(tower.layers) - self._number(name))
        return scale

    def named(self) -> dict[str, float]:
        """What the log shows beside `lr`, as multiples of it: `lr_image` and `lr_text` of a tower's last layer,
        `lr_image_first` and `lr_text_first` of its first; only those that are set to another rate."""
        found: dict[str, float] = {}
        for side, tower in self._towers.items():
            last = 1.0 if tower.lr is None else tower.lr / self._lr
            first = last * (tower.decay or 1.0) ** (max(tower.layers, default=0) - min(tower.layers, default=0))
            found |= {f"lr_{side}": last} if last != 1.0 else {}
            found |= {f"lr_{side}_first": first} if first != last else {}
        return found


def build_groups(shards: Shards, settings: OptimizerSettings, choice: Choice | None) -> list[dict[str, Any]]:
    """Groups of what this rank holds of the trained parameters: `params`, `weight_decay`, `lr_scale` where the rate is
    not --lr, and for Muon `use_fallback` for those that AdamW takes. choice: None for AdamW of torch.

    decay=matrices exempts tensors of fewer than two dimensions (after squeezing): norms, biases, mixing coefficients,
    temperature; with an optimizer of timm also what the model's `no_weight_decay()` names, as in timm's and open_clip's
    factory."""
    rates = Rates(shards, settings)
    undecayed = _undecayed(shards) if choice and choice.home == "timm" else set()
    muon_takes = _hidden_matrices(shards) if choice and choice.is_muon else None
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in shards.whole():
        if parameter.requires_grad:
            sides = sum(side > 1 for side in parameter.shape)  # of the whole: a shard may have one row
            spared = settings.decay != "all" and (sides < 2 or name in undecayed)
            other = False
            if choice and muon_takes is not None:
                dims = 2 if choice.home == "torch" else parameter.dim()
                other = name not in muon_takes or sides < 2 or parameter.dim() != dims
            groups.setdefault((spared, other, rates.scale(name)), []).append(shards.own[name])
    found = []
    for (spared, other, scale), parameters in sorted(groups.items(), key=lambda group: group[0][:2]):
        more: dict[str, Any] = {"lr_scale": scale} if scale != 1.0 else {}
        more |= {"use_fallback": True} if other else {}
        found.append({"params": parameters, "weight_decay": 0.0 if spared else settings.wd, **more})
    return found


def _number_layers(shards: Shards) -> Callable[[str], int]:
    model: Any = shards.model
    return model.group_matcher()


def _undecayed(shards: Shards) -> set[str]:
    listed = getattr(shards.model, "no_weight_decay", None)
    return set(listed()) if callable(listed) else set()


def _hidden_matrices(shards: Shards) -> set[str]:
    """Names of what Muon is made for (https://kellerjordan.github.io/posts/muon/): matrices between the first layer of
    a tower, its embeddings, and the last, its projection. What is not decayed is no matrix to multiply with."""
    number, undecayed = _number_layers(shards), _undecayed(shards)
    layers: dict[str | None, list[int]] = {}
    for name, _ in shards.whole():
        if side := side_of(name):
            layers.setdefault(side, []).append(number(name))
    inner = {side: range(min(found) + 1, max(found)) for side, found in layers.items()}
    return {
        name for name, _ in shards.whole() if name not in undecayed and number(name) in inner.get(side_of(name), ())
    }
