"""The eleven benchmarks of the published tables, a row of benchmarks.json each: splits, prompts, headline, source.

Prompt templates are those of the CLIP paper's public list; `{}` takes the class name. ImageNet's are in `imagenet`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TEST, TRAIN, VAL = "test", "train", "val"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What torchvision calls a benchmark, and what its splits and classes are."""

    name: str
    source: str  # what to download, and where to put it below {root}
    splits: Mapping[str, dict]  # split -> arguments of the loader
    loader: str = ""  # class in torchvision.datasets; empty: class folders, or a reader of ours
    folder: str = ""  # torchvision's folder of the set, below its root
    reported: Mapping[str, str] = field(default_factory=dict)  # split -> what a report calls it, where it needs words
    random: Mapping[str, int] | None = None  # count, train, test, seed of a random split
    headline: str = "top1"  # or mean_per_class
    templates: Sequence[str] = ()
    classes: Sequence[str] = ()  # as folder names, in label order, where known
    spoken: Mapping[str, str] = field(default_factory=dict)  # class -> its natural words, where `say` differs

    def about(self, split: str) -> dict[str, Any]:
        """Fields of a `ClassificationSet` for a split, whatever its pictures are read from."""
        reported = self.reported.get(split, split)
        return {"name": self.name, "split": reported, "templates": self.templates, "headline": self.headline}

    def say(self, name: str) -> str:
        """A class in natural words."""
        return self.spoken.get(name) or say(name)

    def places(self, split: str) -> list[int]:
        """Indices of a split of `random_split(range(count), [train, test, ..])`, in its order."""
        generator = torch.Generator().manual_seed(self.random["seed"])
        order = torch.randperm(self.random["count"], generator=generator).tolist()
        train, test = self.random[TRAIN], self.random[TEST]
        return order[:train] if split == TRAIN else order[train : train + test]


def say(name: str) -> str:
    """A class, named like a folder, with spaces for underscores and slashes."""
    return name.replace("_", " ").replace("/", " ")


_ROWS = json.loads(Path(__file__).with_name("benchmarks.json").read_text(encoding="utf-8"))
BENCHMARKS = {name: Benchmark(name=name, **row) for name, row in _ROWS.items()}
