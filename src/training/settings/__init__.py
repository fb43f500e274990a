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
from rwkv_clip.models.freezing import FreezeSettings

from .data import DataSettings
from .evaluation import EvaluationSettings
from .names import update_flags, update_names
from .run import FaultSettings, LogSettings, ModelSettings, RunSettings
from .step import OptimizerSettings, ParallelSettings, Precision, PublishedSettings

__all__ = [
    "DataSettings",
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
    data: DataSettings = flat(DataSettings)
    loss: LossSettings = flat(LossSettings)
    parallel: ParallelSettings = flat(ParallelSettings)
    optimizer: OptimizerSettings = flat(OptimizerSettings)
    evaluation: EvaluationSettings = flat(EvaluationSettings)
    faults: FaultSettings = flat(FaultSettings)
    log: LogSettings = flat(LogSettings)

    def problems(self) -> list[str]:
        found = self.evaluation.best_problems(validates=self.data.val_data is not None)
        names = [*flat_names(Settings), "global_batch", "total_steps"]
        for name in self.run.allow_change:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                found.append(f"allow_change: {name!r} is not a setting{hint}")
        return found


def parse_settings(data: dict[str, Any]) -> Settings:
    """Settings from flat JSON data of this or any earlier version. ConfigError lists every problem."""
    return parse(Settings, update_names(data))


def load_settings(preset: str | None) -> Settings:
    """Settings of a training preset: a shipped name or the path of a JSON file; None gives the defaults."""
    return Settings() if preset is None else parse_settings(load_preset("training", preset))
