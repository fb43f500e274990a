"""The best checkpoint by a metric (--keep-best), which stays as `checkpoints/best` however many newer ones follow.

Which one it is stands in its own state.json, so it is known after a resume, whatever the run was killed at.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from rwkv_clip.checkpoint import BEST, CheckpointError, find_best, name_best, read_description
from rwkv_clip.dist import World, max_over_ranks

from .state import Progress

log = logging.getLogger(__name__)


def note_best(metric: str | None, metrics: dict[str, float], progress: Progress, world: World) -> bool:
    """Whether the metric is better now than ever before, on all ranks as the main rank finds it; then `progress.best`
    says so, and a checkpoint of this step becomes the best. metrics: of this step, on the main rank."""
    if metric is None:
        return False
    value, before = metrics.get(metric, math.nan), progress.best.get("value", math.nan)
    sign = -1 if metric.endswith("loss") else 1
    better = math.isfinite(value) and not sign * value <= sign * before
    better = bool(max_over_ranks(torch.tensor(float(better and world.is_main), device=world.device)))
    if better:
        progress.best = {"metric": metric, "value": value, "step": progress.step}
    return better


def recall_best(folder: Path, metric: str | None, progress: Progress) -> None:
    """On the main rank, after a resume or a failed save: make `progress.best` what is there, and let `best` name it.

    folder: of checkpoints. Checkpoints that are later than the run is now, or the best by another metric, do not count.
    """
    best, progress.best = progress.best, {}
    if metric is None or not folder.is_dir():
        return
    if _fits(best, metric, progress.step):
        own = folder / f"step-{best['step']:08d}"
        named = find_best(folder)
        if named is not None and (named == own or _read(named).get("step") == best["step"]):
            progress.best = best
            return
        if own.is_dir():  # killed after the save, before it was named
            progress.best = best
            try:
                name_best(folder, own)
            except OSError as error:
                log.warning("keep_best: %s cannot be made (%s)", folder / BEST, error)
            return
    named = find_best(folder)
    there = _read(named) if named is not None else {}
    if _fits(there, metric, progress.step):
        progress.best = there
    elif best.get("metric") == metric:
        gone = folder / f"step-{best.get('step')}"
        log.warning("keep_best: %s, the best so far, is not there; the best of what follows is kept", gone)


def _read(path: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says of the best checkpoint, itself or an earlier one."""
    try:
        description = read_description(path)
    except CheckpointError:
        return {}
    return description.get("best", {}) if description else {}


def _fits(best: dict[str, Any], metric: str, step: int) -> bool:
    """Whether this, from a file, is the best by a metric at most at a step."""
    value, at = best.get("value"), best.get("step")
    known = isinstance(value, float) and math.isfinite(value) and isinstance(at, int) and 0 <= at <= step
    return known and best.get("metric") == metric
