"""The eleven sets of the published tables: parts, prompts, headline metric, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import prompts

TEST, TRAIN, VAL = "test", "train", "val"


@dataclass(frozen=True)
class KnownSet:
    """How torchvision calls a set, and what its parts are."""

    loader: str  # class in torchvision.datasets; empty: class folders, or a reader of ours
    templates: tuple[str, ...]
    source: str  # what to download
    folder: str = ""  # torchvision's folder of the set, below its root
    parts: dict[str, dict] = field(default_factory=dict)  # part -> arguments of the loader
    headline: str = "top1"
    splits: dict[str, str] = field(default_factory=dict)  # part -> what a report calls it, where it needs words
    folders: tuple[str, ...] | None = None  # its classes as folder names, in label order, where known
    keep: Callable[[int, str], Sequence[int]] | None = None  # (number of pictures, part) -> those of the part

    def split(self, part: str) -> str:
        """What a report calls a part."""
        return self.splits.get(part, part)


def _caltech_part(count: int, part: str) -> list[int]:
    """Second part (test) or first of a random split [3000, 5677] with torch generator seed 3072."""
    if count != 8_677:
        raise ValueError(f"caltech101: {count} pictures instead of 8677; unpack 101_ObjectCategories again")
    return random_part(count, 3000, 5677, part, 3072)


def random_part(count: int, train: int, test: int, part: str, seed: int) -> list[int]:
    """Places of a part of `random_split(range(count), [train, test, ..])`, in its order."""
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:train] if part == TRAIN else order[train : train + test]


_BY_SPLIT = {TEST: {"split": "test"}, TRAIN: {"split": "train"}}
_WITH_VAL = _BY_SPLIT | {VAL: {"split": "val"}}
_BY_FLAG = {TEST: {"train": False}, TRAIN: {"train": True}}
KNOWN = {
    "cifar10": KnownSet(
        "CIFAR10",
        prompts.CIFAR,
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, unpacked to {root}/cifar-10-batches-py",
        "cifar-10-batches-py",
        _BY_FLAG,
        folders=prompts.CIFAR10_CLASSES,
    ),
    "cifar100": KnownSet(
        "CIFAR100",
        prompts.CIFAR,
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz, unpacked to {root}/cifar-100-python",
        "cifar-100-python",
        _BY_FLAG,
        folders=prompts.CIFAR100_CLASSES,
    ),
    "food101": KnownSet(
        "Food101",
        prompts.FOOD,
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz, unpacked to {root}/food-101",
        "food-101",
        _BY_SPLIT,
    ),
    "pets": KnownSet(
        "OxfordIIITPet",
        prompts.PETS,
        "images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets, unpacked to "
        "{root}/oxford-iiit-pet",
        "oxford-iiit-pet",
        {TEST: {"split": "test"}, TRAIN: {"split": "trainval"}},
        headline="mean_per_class",
        splits={TRAIN: "trainval"},
    ),
    "flowers": KnownSet(
        "Flowers102",
        prompts.FLOWERS,
        "102flowers.tgz (unpacked), imagelabels.mat and setid.mat of "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102, in {root}/flowers-102 (needs scipy)",
        "flowers-102",
        _WITH_VAL,
        headline="mean_per_class",
    ),
    "sun397": KnownSet(
        "",
        prompts.SCENES,
        "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz, unpacked to {root}/SUN397, and there too "
        "Testing_01.txt and Training_01.txt of https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
        parts={TEST: {}, TRAIN: {}},
    ),
    "stanford_cars": KnownSet(
        "StanfordCars",
        prompts.CARS,
        "Stanford Cars: devkit, cars_train, cars_test and cars_test_annos_withlabels.mat in {root}/stanford_cars "
        "(needs scipy)",
        "stanford_cars",
        _BY_SPLIT,
    ),
    "dtd": KnownSet(
        "DTD",
        prompts.TEXTURES,
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz, unpacked to {root}/dtd",
        "dtd",
        {part: arguments | {"partition": 1} for part, arguments in _WITH_VAL.items()},
        splits={part: f"{part}, partition 1" for part in _WITH_VAL},
    ),
    "caltech101": KnownSet(
        "Caltech101",
        prompts.CALTECH,
        "https://data.caltech.edu/records/mzrjq-6wc02 (caltech-101.zip), unpacked to {root}/caltech101",
        "caltech101",
        {TEST: {}, TRAIN: {}},
        headline="mean_per_class",
        splits={TEST: "random, seed 3072", TRAIN: "random, seed 3072, first part"},
        keep=_caltech_part,
    ),
    "aircraft": KnownSet(
        "FGVCAircraft",
        prompts.AIRCRAFT,
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz, "
        "unpacked to {root}/fgvc-aircraft-2013b",
        "fgvc-aircraft-2013b",
        {part: arguments | {"annotation_level": "variant"} for part, arguments in _WITH_VAL.items()},
        headline="mean_per_class",
    ),
    "imagenet": KnownSet(
        "",
        (),
        "the validation pictures of https://image-net.org as {root}/imagenet/val/<wnid>/*.JPEG, 1000 class folders, or "
        "as records with their class number for a label, {root}/imagenet/val.rec and val.idx",
        parts={TEST: {}, TRAIN: {}},
        splits={TEST: "val"},
    ),
}
