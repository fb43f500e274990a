"""The sets that an evaluation was asked for: one that is missing or fails is reported, and the others are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from rwkv_clip.datasets import IMAGEFOLDER, MissingData
from rwkv_clip.datasets.benchmarks import BENCHMARKS
from rwkv_clip.features import on_all_ranks

# The name of a requested set, and what was made of it, or its result, a dict: why it is not evaluated.
Asked = tuple[str, Any]


def load_each(
    datasets: Sequence[str], make: Callable[[str], object], device: torch.device, hint: str = ""
) -> list[Asked]:
    """make(name) of every set ("all": of all benchmarks), before any model is loaded; all ranks call it.

    hint: appended to the reason of a missing set. ValueError with all reasons where nothing is left to evaluate.
    """
    names = BENCHMARKS if tuple(datasets) == ("all",) else datasets
    asked = ((name, name) for name in names)
    found = list(on_each(asked, lambda name: on_all_ranks(lambda: make(name), device), hint))
    if all(isinstance(result, dict) for _, result in found):
        reasons = [("" if name == IMAGEFOLDER else f"{name}: ") + result["reason"] for name, result in found]
        raise ValueError("; ".join(reasons))
    return found


def on_each(sets: Iterable[Asked], step: Callable[[Any], Any], hint: str = "") -> Iterator[Asked]:
    """step(what was made) for one set after the other; results pass through.

    A set that is missing is a result `skipped` from there on, one that fails a result `failed`.
    """
    for name, made in sets:
        try:
            yield name, made if isinstance(made, dict) else step(made)
        except MissingData as error:
            yield name, {"dataset": name, "status": "skipped", "reason": f"{error}{hint}"}
        except (ValueError, OSError) as error:
            yield name, {"dataset": name, "status": "failed", "reason": str(error)}
