"""Objectives: one file each, with its settings; one row each in the table below."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from .alip import ALIP, GateSettings
from .infonce import InfoNCE
from .objective import FACTS, Objective
from .siglip import SigLIP

__all__ = [
    "ALIP",
    "FACTS",
    "OBJECTIVES",
    "GateSettings",
    "InfoNCE",
    "LossSettings",
    "Objective",
    "SigLIP",
    "make_objective",
]

# Name -> class, and the name of the table in LossSettings that it is made with, if it has settings.
OBJECTIVES: dict[str, tuple[type[Objective], str | None]] = {
    "infonce": (InfoNCE, None),
    "siglip": (SigLIP, None),
    "alip": (ALIP, "gates"),
}
MASKING = ("infonce", "siglip")  # those that --positives is for


@dataclass(frozen=True)
class LossSettings:
    """Which objective, and its settings."""

    objective: Literal[tuple(OBJECTIVES)] = "infonce"  # type: ignore[valid-type]
    """What the towers are trained with."""
    positives: Literal["pairs", "mask"] = "pairs"
    """Which texts of a batch are negatives: all but the image's own (pairs), or of those only the ones that differ from
    it and belong to other images (mask); so repeated texts and images are no false negatives."""
    gates: GateSettings = field(default=GateSettings())
    """--objective alip: weights of samples and pairs."""

    def problems(self) -> list[str]:
        defaults = {f.name: f.default for f in fields(self)}
        found = [
            f"{table}: need objective {name}, not {self.objective}"
            for name, (_, table) in OBJECTIVES.items()
            if table and name != self.objective and getattr(self, table) != defaults[table]
        ]
        if self.positives != "pairs" and self.objective not in MASKING:
            found.append(
                f"positives: {self.positives} needs objective {' or '.join(MASKING)}, not {self.objective}, which "
                f"weighs all pairs; leave the flag out"
            )
        return found


def make_objective(settings: LossSettings) -> Objective:
    """The objective that the settings name."""
    kind, table = OBJECTIVES[settings.objective]
    if settings.objective in MASKING:
        return kind(settings.positives)
    return kind(getattr(settings, table)) if table else kind()
