"""Sets for zero-shot classification: any folder of class folders, and the known sets through torchvision.

Nothing is downloaded here. A known set that is not there raises MissingData, which says what to fetch and
where to put it; the run reports it as skipped and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from rwkv_clip.features import open_picture

from . import prompts

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
IMAGEFOLDER = "imagefolder"


class MissingData(Exception):
    """A known set is not on this machine. The message says what to download and where to put it."""


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled pictures. `read(i)` -> (PIL RGB, label), 0 <= label < len(class_names)."""

    name: str
    path: str
    split: str
    count: int
    read: Callable[[int], tuple[Image, int]]
    class_names: Sequence[str]
    templates: Sequence[str]
    headline: str = "top1"  # or mean_per_class
    note: str = ""


@dataclass(frozen=True)
class KnownSet:
    """One row of the registry: how torchvision calls the set, its test split, prompts and headline metric."""

    loader: str  # class in torchvision.datasets; empty: class folders only
    templates: tuple[str, ...]
    source: str  # what to download
    arguments: dict = field(default_factory=dict)
    headline: str = "top1"
    split: str = "test"
    folders: tuple[str, ...] | None = None  # its classes as folder names, in label order, where known
    keep: Callable[[int], Sequence[int]] | None = None  # number of pictures -> those of the test part
    note: str = ""


def _caltech_test(count: int) -> list[int]:
    """Second part of a random split [3000, 5677] with torch generator seed 3072."""
    import torch

    if count != 8_677:
        raise ValueError(f"caltech101: {count} pictures instead of 8677; unpack 101_ObjectCategories again")
    return torch.randperm(count, generator=torch.Generator().manual_seed(3072))[3000:].tolist()


_TEST = {"split": "test"}
KNOWN = {
    "cifar10": KnownSet(
        "CIFAR10",
        prompts.CIFAR,
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, unpacked to {root}/cifar-10-batches-py",
        {"train": False},
        folders=prompts.CIFAR10_CLASSES,
    ),
    "cifar100": KnownSet(
        "CIFAR100",
        prompts.CIFAR,
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz, unpacked to {root}/cifar-100-python",
        {"train": False},
        folders=prompts.CIFAR100_CLASSES,
    ),
    "food101": KnownSet(
        "Food101",
        prompts.FOOD,
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz, unpacked to {root}/food-101",
        _TEST,
    ),
    "pets": KnownSet(
        "OxfordIIITPet",
        prompts.PETS,
        "images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets, unpacked to "
        "{root}/oxford-iiit-pet",
        _TEST,
        headline="mean_per_class",
    ),
    "flowers": KnownSet(
        "Flowers102",
        prompts.FLOWERS,
        "102flowers.tgz (unpacked), imagelabels.mat and setid.mat of "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102, in {root}/flowers-102 (needs scipy)",
        _TEST,
        headline="mean_per_class",
    ),
    "stanford_cars": KnownSet(
        "StanfordCars",
        prompts.CARS,
        "Stanford Cars: devkit, cars_test and cars_test_annos_withlabels.mat in {root}/stanford_cars (needs scipy)",
        _TEST,
    ),
    "dtd": KnownSet(
        "DTD",
        prompts.TEXTURES,
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz, unpacked to {root}/dtd",
        {"split": "test", "partition": 1},
        split="test, partition 1",
    ),
    "caltech101": KnownSet(
        "Caltech101",
        prompts.CALTECH,
        "https://data.caltech.edu/records/mzrjq-6wc02 (caltech-101.zip), unpacked to {root}/caltech101",
        headline="mean_per_class",
        split="random, seed 3072",
        keep=_caltech_test,
        note="class names are the folder names",
    ),
    "aircraft": KnownSet(
        "FGVCAircraft",
        prompts.AIRCRAFT,
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz, "
        "unpacked to {root}/fgvc-aircraft-2013b",
        {"split": "test", "annotation_level": "variant"},
        headline="mean_per_class",
    ),
    "imagenet": KnownSet(
        "",
        (),
        "the validation pictures of https://image-net.org as {root}/<wnid>/*.JPEG, 1000 class folders",
        split="val",
    ),
}


def load_classification(dataset: str, data: str | Path, names: str | Path | None = None) -> ClassificationSet:
    """A set by name. ValueError for a user's mistake, MissingData where a known set is not below `data`.

    dataset: "imagefolder" or a key of KNOWN; data: its folder (class folders, or torchvision's root); names:
    JSON file with class names and templates, see `read_names`; default `data`/names.json where that exists.
    """
    folder = Path(data)
    if dataset == IMAGEFOLDER:
        return _imagefolder(folder, names)
    if dataset not in KNOWN:
        raise ValueError(f"dataset: {dataset!r} is not known; known: {IMAGEFOLDER}, {', '.join(KNOWN)}")
    known = KNOWN[dataset]
    present = set(_subfolders(folder))
    folders = known.folders
    if dataset == "imagenet":
        folders = tuple(sorted(name for name in present if name[:1] == "n" and name[1:].isdigit()))
    if folders and present & set(folders):
        return _known_folder(dataset, folder, folders, names)
    if not known.loader:
        raise MissingData(f"not found; download {known.source.format(root=folder)}")
    if names is not None:
        raise ValueError(f"names: {names} goes with class folders; {dataset} has its own names and templates")
    return open_known(dataset, folder, KNOWN[dataset])


def read_names(path: str | Path, folders: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names and templates from a JSON file: ({folder: class name} in label order, templates; () for none).

    {"names": {folder: name} or a list with the name of each of the sorted `folders`, "templates": ["a {}.",
    ...]}, both optional; "classes" is read as "names". A class of the file without a folder stays a
    candidate.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path}: cannot be read as JSON ({error}); write {{"names": ..., ...}}') from error
    if not isinstance(content, dict) or not content.keys() <= {"names", "classes", "templates"}:
        raise ValueError(f'{path}: write an object with "names" and "templates" and nothing else')
    names = content.get("names", content.get("classes", {folder: _spoken(folder) for folder in folders}))
    if isinstance(names, list):
        if len(names) != len(folders):
            raise ValueError(f"{path}: {len(names)} names for {len(folders)} class folders; give one for each")
        names = dict(zip(folders, names))
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) and n for n in names.values()):
        raise ValueError(f'{path}: "names" must be {{folder: name}} or a list of names')
    unnamed = [folder for folder in folders if folder not in names]
    if unnamed:
        raise ValueError(f'{path}: "names" lacks the class folders {", ".join(unnamed[:5])}; name every one')
    templates = content.get("templates", [])
    if not isinstance(templates, list) or not all(isinstance(t, str) and "{}" in t for t in templates):
        raise ValueError(f'{path}: "templates" must be a list of texts with {{}} for the class name')
    return names, tuple(templates)


def _imagefolder(folder: Path, names: str | Path | None) -> ClassificationSet:
    folders = _subfolders(folder)
    if not folders:
        raise ValueError(f"data: {folder} holds no class folders; give a folder with one folder of pictures a class")
    spoken, templates = _names_for(folder, folders, names) or ({name: _spoken(name) for name in folders}, ())
    # Two levels of the path: "cifar10" alone would pass for the published set, and "test" says little.
    name = "/".join(folder.resolve().parts[-2:])
    return _from_folders(name, folder, spoken, templates or prompts.PLAIN, "-")


def _known_folder(dataset: str, folder: Path, folders: Sequence[str], names: str | Path | None) -> ClassificationSet:
    """A known set as class folders: its own names unless a names file says otherwise."""
    known, templates = KNOWN[dataset], KNOWN[dataset].templates
    foreign = sorted(set(_subfolders(folder)) - set(folders))
    if foreign:
        raise ValueError(f"data: {folder} holds {foreign[0]!r}, which is no class of {dataset}; give its classes only")
    if dataset == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

        if len(folders) != len(IMAGENET_CLASSNAMES):
            raise ValueError(f"data: {folder} holds {len(folders)} of the 1000 ImageNet class folders; add the others")
        spoken = dict(zip(folders, IMAGENET_CLASSNAMES))
        templates = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    else:
        spoken = {name: _spoken(name) for name in folders}
    given = _names_for(folder, folders, names)
    if given:
        spoken, templates = given[0], given[1] or templates
    return _from_folders(dataset, folder, spoken, templates, known.split, known.headline)


def _names_for(folder: Path, folders: Sequence[str], names: str | Path | None):
    path = Path(names) if names is not None else folder / "names.json"
    return read_names(path, folders) if names is not None or path.is_file() else None


def _from_folders(
    name: str,
    folder: Path,
    spoken: dict[str, str],
    templates: Sequence[str],
    split: str,
    headline: str = "top1",
) -> ClassificationSet:
    items = [
        (path, label)
        for label, key in enumerate(spoken)
        for path in sorted((folder / key).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not items:
        raise ValueError(f"data: the class folders of {folder} hold no picture ({' '.join(IMAGE_SUFFIXES)})")

    def read(index: int) -> tuple[Image, int]:
        path, label = items[index]
        return open_picture(path), label

    return ClassificationSet(name, str(folder), split, len(items), read, list(spoken.values()), templates, headline)


def open_known(dataset: str, root: Path, known: KnownSet) -> ClassificationSet:
    """A set through torchvision, of the part that `known` describes. MissingData where it is not below `root`."""
    from torchvision import datasets

    try:
        source = getattr(datasets, known.loader)(root=str(root), **known.arguments)
    except (RuntimeError, OSError) as error:
        # The rest of torchvision's message is about its own download switch.
        reason, hint = str(error).split(". ")[0], known.source.format(root=root)
        raise MissingData(f"torchvision below {root}: {reason}; download {hint}") from None
    classes = getattr(source, "classes", None) or getattr(source, "categories", None)
    if not classes:
        raise ValueError(f"{dataset}: this torchvision does not name its classes; install a newer one")
    kept = known.keep(len(source)) if known.keep else range(len(source))

    def read(index: int) -> tuple[Image, int]:
        picture, label = source[kept[index]]
        return picture.convert("RGB"), int(label)

    return ClassificationSet(
        dataset,
        str(root),
        known.split,
        len(kept),
        read,
        [_spoken(name) for name in classes],
        known.templates,
        known.headline,
        known.note,
    )


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _spoken(name: str) -> str:
    return name.replace("_", " ")
