"""A set of pictures with class labels, whatever it is read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from ..data.image import open_picture


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
    files: Sequence[Path] = ()  # all files that hold the pictures
    submission: Sequence[int] | None = None  # the pictures that a file of predictions lists, in order; None: all

    @property
    def count(self) -> int:
        return len(self.labels)


def set_of_files(files: Sequence[Path], labels: Sequence[int], **about) -> ClassificationSet:
    """The set of picture files with their labels; about: its other fields."""
    return ClassificationSet(
        labels=torch.tensor(labels, dtype=torch.int64),
        open=lambda index: open_picture(files[index]),
        files=files,
        **about,
    )
