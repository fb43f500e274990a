"""Settings of a training run: tables of typed fields, checked before any work.

Flags (`--batch-size`), keys of JSON files and names in messages are flat: tables only group what a function receives.
The names are open_clip's, with open_clip's meaning, wherever open_clip has the setting.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from rwkv_clip.config import flat, flat_names, load_preset, parse
from rwkv_clip.losses import LossSettings
from rwkv_clip.models.adapters import AdapterSettings
from rwkv_clip.models.freezing import FreezeSettings

from .data import DataSettings, DatasetType
from .evaluation import EvaluationSettings
from .names import update_flags, update_names
from .run import FaultSettings, LogSettings, ModelSettings, RunSettings
from .step import OptimizerSettings, ParallelSettings, Precision, PublishedSettings

__all__ = [
    "DataSettings",
    "DatasetType",
    "EvaluationSettings",
    "FaultSettings",
    "LogSettings",
    "ModelSettings",
    "OptimizerSettings",
    "ParallelSettings",
    "Precision",
    "PublishedSettings",
    "RunSettings",
    "Settings",
    "load_settings",
    "parse_settings",
    "update_flags",
    "update_names",
]


@dataclass(frozen=True)
class Settings:
    """One training run."""

    run: RunSettings = flat(RunSettings)
    model: ModelSettings = flat(ModelSettings)
    freezing: FreezeSettings = flat(FreezeSettings)
    adapters: AdapterSettings = flat(AdapterSettings)
    data: DataSettings = flat(DataSettings)
    loss: LossSettings = flat(LossSettings)
    parallel: ParallelSettings = flat(ParallelSettings)
    optimizer: OptimizerSettings = flat(OptimizerSettings)
    evaluation: EvaluationSettings = flat(EvaluationSettings)
    faults: FaultSettings = flat(FaultSettings)
    log: LogSettings = flat(LogSettings)

    def problems(self) -> list[str]:
        averages = self.optimizer.ema_decay is not None
        found = self.evaluation.best_problems(self.data.val_data is not None, averages)
        towers = ("pretrained_image", "pretrained_text")
        if self.adapters.lora_rank is not None and any(getattr(self.model, name) for name in towers):
            found.append("lora_rank: adapters belong to one file of whole weights; name it with --pretrained alone")
        if self.adapters.lora_rank is not None and averages:
            found.append(
                "ema_decay: averages are of whole models, and checkpoints of --lora-rank hold none; leave one out"
            )
        names = [*flat_names(Settings), "global_batch", "total_steps"]
        for name in self.run.allow_change:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                found.append(f"allow_change: {name!r} is not a setting{hint}")
        if self.parallel.parallel != "ddp" and not self.optimizer.takes_shards:
            found.append(
                f"parallel: {self.parallel.parallel} holds shards of parameters, and opt {self.optimizer.opt} needs "
                f"whole ones; use --parallel ddp, or an optimizer such as lion that works element by element"
            )
        return found + self._rates_of_nothing()

    def _rates_of_nothing(self) -> list[str]:
        """Rates of a tower of which nothing trains."""
        freezing, found = self.freezing, []
        locked = {
            "image": freezing.lock_image and not freezing.lock_image_unlocked_groups,
            "text": freezing.lock_text
            and not freezing.lock_text_unlocked_layers
            and freezing.lock_text_freeze_layer_norm,
        }
        for side in (side for side, whole in locked.items() if whole):
            for name in (f"lr_{side}", f"layer_decay_{side}"):
                if getattr(self.optimizer, name) is not None:
                    found.append(f"{name}: --lock-{side} freezes the whole {side} tower; leave one of them out")
        return found


def parse_settings(data: dict[str, Any]) -> Settings:
    """Settings from flat JSON data of this or any earlier version. ConfigError lists every problem."""
    return parse(Settings, update_names(data))


def load_settings(preset: str | None) -> Settings:
    """Settings of a training preset: a shipped name or the path of a JSON file; None gives the defaults."""
    return Settings() if preset is None else parse_settings(load_preset("training", preset))
