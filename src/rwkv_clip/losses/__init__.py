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
    distill_model: str | None = None
    """Teacher: a model whose scores of each batch the student's are to resemble, besides the objective. A name with
    --distill-pretrained, or what holds weights: run or export folder, open_clip:NAME:TAG, hf-hub:org/name."""
    distill_pretrained: str | None = None
    """Weights of the teacher, as for --pretrained."""
    distill_features: str | None = None
    """Instead: a folder of a teacher's features of the training images and texts, written by the evaluation's command
    `features`. The teacher saw each image once and whole, not the crops of the run."""
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
        for name in ("distill_model", "distill_pretrained", "distill_features"):
            if getattr(self, name) == "":
                found.append(f"{name}: '' names nothing; leave the flag out")
        if self.distill_pretrained and not self.distill_model:
            found.append("distill_pretrained: has no effect without distill_model; name the model, too")
        if self.distill_features and self.distill_model:
            found.append("distill_features: there is a distill_model, too; leave one of them out")
        return found


def make_objective(settings: LossSettings) -> Objective:
    """The objective that the settings name, without a teacher."""
    kind, table = OBJECTIVES[settings.objective]
    if settings.objective in MASKING:
        return kind(settings.positives)
    return kind(getattr(settings, table)) if table else kind()
