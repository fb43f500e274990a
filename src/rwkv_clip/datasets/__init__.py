"""Sets for zero-shot classification and linear probes: any folder of class folders, and eleven benchmarks.

Nothing is downloaded here. A benchmark that is absent raises MissingData, which says what to fetch and where to put it.
Pictures come in an order that does not depend on the file system, so that all ranks and all machines agree on it.
"""

from __future__ import annotations

from pathlib import Path

from .benchmarks import BENCHMARKS, TEST
from .class_folders import load_benchmark_folder, load_image_folder, load_imagenet_v2
from .elevater import ELEVATER, load_elevater
from .imagenet import load_imagenet_records
from .labelled import ClassificationSet, MissingData
from .names import rename_classes
from .sun397 import load_sun397
from .torchvision_sets import load_torchvision

__all__ = [
    "BENCHMARKS",
    "ELEVATER",
    "IMAGEFOLDER",
    "IMAGENET_V2",
    "SETS",
    "ClassificationSet",
    "MissingData",
    "load_classification",
]
IMAGEFOLDER, IMAGENET_V2 = "imagefolder", "imagenetv2"
SETS = (*BENCHMARKS, IMAGENET_V2, IMAGEFOLDER, ELEVATER)  # all names that `load_classification` knows


def load_classification(
    dataset: str, data: str | Path, names: str | Path | None = None, *, split: str = TEST, language: str = "en"
) -> ClassificationSet:
    """A set by name, every label checked. ValueError for a user's mistake, MissingData where a benchmark is absent.

    dataset: "imagefolder", "elevater" (see `elevater`), "imagenetv2" or a key of BENCHMARKS; data: its folder, for a
    benchmark also one that holds NAME or NAME/test, or torchvision's root; names: JSON file with class names and
    templates, see `read_names`; default names.json in the folder of class folders, where that exists. split: test,
    train or (flowers, dtd, aircraft) val. language: en, or zh for imagenet and elevater.
    """
    folder = Path(data)
    if dataset == IMAGEFOLDER:
        return load_image_folder(folder, names)
    if dataset == ELEVATER:
        if names is not None:
            raise ValueError(f"names: {names} given, but {ELEVATER} has its own labels; leave names out")
        return load_elevater(folder, language, split)
    if dataset == IMAGENET_V2:
        return load_imagenet_v2(folder, names, split)
    if dataset not in BENCHMARKS:
        raise ValueError(f"dataset: {dataset!r} is not known; valid names: {', '.join(SETS)}")
    benchmark = BENCHMARKS[dataset]
    if split not in benchmark.splits:
        raise ValueError(f"split: {dataset} has no {split!r}; it has {', '.join(benchmark.splits)}")
    if language != "en" and dataset != "imagenet" and names is None:
        raise ValueError(f"language: {dataset} has no names in {language!r}; give names and templates by --names FILE")
    if dataset == "sun397":
        return rename_classes(*load_sun397(folder, split), names)
    if found := load_benchmark_folder(benchmark, folder, names, split, language):
        return found
    if dataset == "imagenet":
        return rename_classes(*load_imagenet_records(folder, split, language), names)
    return rename_classes(*load_torchvision(benchmark, folder, split), names)
