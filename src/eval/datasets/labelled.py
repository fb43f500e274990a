"""A set of pictures with class labels, whatever it was read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from torch import Tensor


class MissingData(Exception):
    """A benchmark is not on this machine. The message says what to download and where to put it."""


@dataclass(frozen=True)
class ClassificationSet:
    """Pictures, `open(i)` -> PIL RGB, and their labels int64 (count,), 0 <= label < len(class_names)."""

    name: str
    path: str
    split: str
    labels: Tensor
    open: Callable[[int], Image]
    class_names: Sequence[str]
    templates: Sequence[str]
    headline: str = "top1"  # or mean_per_class
    note: str = ""
    files: Sequence[Path] = ()  # all files that the pictures lie in

    @property
    def count(self) -> int:
        return len(self.labels)
