"""Benchmarks that torchvision reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image

from .benchmarks import Benchmark
from .class_folders import list_files
from .labelled import ClassificationSet, MissingData


def load_torchvision(benchmark: Benchmark, root: Path, split: str) -> tuple[ClassificationSet, list[str]]:
    """The set below `root`, and its classes as torchvision names them."""
    from torchvision import datasets

    hint = f"download {benchmark.source.format(root=root)}"
    if not root.is_dir():
        raise MissingData(f"no folder {root}; {hint}")
    try:
        source = getattr(datasets, benchmark.loader)(root=str(root), **benchmark.splits[split])
    except (RuntimeError, OSError, ImportError) as error:
        # The rest of torchvision's message is about its own download option.
        raise MissingData(f"torchvision below {root}: {str(error).split('. ')[0]}; {hint}") from None
    classes = getattr(source, "classes", None) or getattr(source, "categories", None)
    if not classes:
        raise ValueError(f"{benchmark.name}: this torchvision does not name its classes; install a newer one")
    places = range(len(source))
    if benchmark.random:
        if len(source) != benchmark.random["count"]:
            expected = benchmark.random["count"]
            raise ValueError(f"{benchmark.name}: {len(source)} pictures instead of {expected}; unpack it again")
        places = benchmark.places(split)
    label_of = _labels(source)
    labels = torch.tensor([int(label_of(place)) for place in places], dtype=torch.int64)

    def open_one(index: int) -> Image:
        picture, label = source[places[index]]
        if label != labels[index]:
            raise ValueError(f"{root}: picture {index} has label {label}, but had {int(labels[index])} before")
        return picture.convert("RGB")

    data = ClassificationSet(
        path=str(root),
        labels=labels,
        open=open_one,
        class_names=[benchmark.say(name) for name in classes],
        files=list_files(root / benchmark.folder),
        **benchmark.about(split),
    )
    return data, list(classes)


def _labels(source) -> Callable[[int], int]:
    """Label i of a set of torchvision without its picture: it keeps them under one of a few names."""
    for name in ("targets", "_labels", "y"):
        found = getattr(source, name, None)
        if found is not None and len(found) == len(source):
            return found.__getitem__
    if samples := getattr(source, "_samples", None):  # of StanfordCars: (path, label)
        return lambda index: samples[index][1]
    return lambda index: source[index][1]
