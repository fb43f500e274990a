"""Sets for zero-shot classification and linear probes: any folder of class folders, and the eleven known sets.

Nothing is downloaded here. A known set that is not there raises MissingData, which says what to fetch and
where to put it; the run reports it as skipped and goes on. Pictures come in an order that does not depend on the
file system, so that all ranks and all machines agree on it.

Class folders are `folders`' business: what counts as one, in which order, and what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from rwkv_clip.data.image import open_picture
from rwkv_clip.files import parse_json

from . import prompts
from .cache import on_all_ranks
from .folders import (
    IMAGE_SUFFIXES,
    are_numbers,
    class_folders,
    list_files,
    list_pictures,
    refuse_splits,
    refuse_unclear_order,
    refuse_unreadable,
)
from .known import KNOWN, TEST, TRAIN, random_part
from .prompts import spoken

IMAGEFOLDER = "imagefolder"
SUN_COUNT, SUN_TRAIN, SUN_TEST, SUN_SEED = 108_754, 19_850, 19_850, 0


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
    label_of: Callable[[int], int] | None = None  # label i without its picture; default: by `read`
    files: Sequence[Path] = ()  # all files that the pictures lie in

    def labels(self) -> Tensor:
        """int64 (count,): every label, read now. ValueError for one that is no class."""
        label_of = self.label_of or (lambda index: self.read(index)[1])
        return torch.tensor([label_of(index) for index in range(self.count)], dtype=torch.int64)

    def checked(self) -> ClassificationSet:
        """The set, once every label has been seen. ValueError for one that is no class."""
        self.labels()
        return self

    def open_one(self, labels: Tensor) -> Callable[[int], Image]:
        """`read` for the pictures alone. ValueError where one comes with another label than `labels` has."""

        def open_one(index: int) -> Image:
            picture, label = self.read(index)
            if label != labels[index]:
                raise ValueError(f"{self.path}: picture {index} has label {label}, and had {int(labels[index])} before")
            return picture

        return open_one


# The name of a set, and what was made of it or its result: why it is not evaluated.
Asked = tuple[str, Any]


def load_each(
    datasets: Sequence[str], make: Callable[[str], object], device: torch.device, hint: str = ""
) -> list[Asked]:
    """make(name) of every set ("all": of all known ones), before any model is loaded; all ranks call it.

    A set that is missing is a result `skipped` (its reason ends with `hint`), one that fails a result `failed`.
    ValueError with all reasons where nothing is left to evaluate.
    """
    found: list[Asked] = []
    for dataset in KNOWN if tuple(datasets) == ("all",) else datasets:
        try:
            found.append((dataset, on_all_ranks(lambda name=dataset: make(name), device)))
        except MissingData as error:
            found.append((dataset, {"dataset": dataset, "status": "skipped", "reason": f"{error}{hint}"}))
        except (ValueError, OSError) as error:
            found.append((dataset, {"dataset": dataset, "status": "failed", "reason": str(error)}))
    if all(isinstance(result, dict) for _, result in found):
        named = [("" if name == IMAGEFOLDER else f"{name}: ") + result["reason"] for name, result in found]
        raise ValueError("; ".join(named))
    return found


def load_classification(
    dataset: str, data: str | Path, names: str | Path | None = None, *, part: str = TEST, language: str = "en"
) -> ClassificationSet:
    """A set by name. ValueError for a user's mistake, MissingData where a known set is not below `data`.

    dataset: "imagefolder" or a key of KNOWN; data: its folder of class folders (for a known set also one that holds
    NAME or NAME/test), or torchvision's root; names: JSON file with class names and templates, see `read_names`;
    default names.json in the folder of class folders, where that exists. part: test, train or (flowers, dtd, aircraft)
    val. language: en, or zh for imagenet.
    """
    folder = Path(data)
    if dataset == IMAGEFOLDER:
        return _imagefolder(folder, names)
    if dataset not in KNOWN:
        raise ValueError(f"dataset: {dataset!r} is not known; known: {IMAGEFOLDER}, {', '.join(KNOWN)}")
    known = KNOWN[dataset]
    if part not in known.parts:
        raise ValueError(f"part: {dataset} has no {part!r}; it has {', '.join(known.parts)}")
    if language != "en" and dataset != "imagenet" and names is None:
        raise ValueError(f"language: {dataset} has no names in {language!r}; give names and templates by --names FILE")
    if dataset == "sun397":
        return _with_names(_sun397(folder, part), names)
    found = _class_folders(dataset, folder, part)
    if found:
        return _known_folder(dataset, *found, names, part, language)
    if dataset == "imagenet":
        return _with_names(_imagenet_records(folder, part, language), names)
    return _with_names(_torchvision(dataset, folder, part), names)


def read_names(path: str | Path, folders: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names and templates from a JSON file: ({folder: class name} in label order, templates; () for none).

    {"names": {folder: name} or a list with the name of each of the `folders` in their order (by number where all are
    numbers), "templates": ["a {}.", ...]}, both optional; "classes" is read as "names". A class of the file without a
    folder stays a candidate.
    """
    content = _names_content(path)
    folders = sorted(folders, key=int) if are_numbers(folders) else folders
    names = content.get("names", content.get("classes", {folder: spoken(folder) for folder in folders}))
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


def _names_content(path: str | Path) -> dict:
    try:
        content = parse_json(Path(path).read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as JSON ({error}); write {{"names": ..., ...}}') from error
    if not isinstance(content, dict) or not content.keys() <= {"names", "classes", "templates"}:
        raise ValueError(f'{path}: write an object with "names" and "templates" and nothing else')
    return content


def _imagefolder(folder: Path, names: str | Path | None) -> ClassificationSet:
    folders = class_folders(folder)
    if not folders:
        raise ValueError(f"data: {folder} holds no class folders; give a folder with one folder of pictures a class")
    refuse_unreadable(folder, folders)
    path = _names_path(folder, names)
    content = _names_content(path) if path else {}
    named = content.get("names", content.get("classes", ()))
    if isinstance(named, list):
        refuse_unclear_order(folders, str(path))
    else:
        refuse_splits(folder, folders, named if isinstance(named, dict) else ())
    said, templates = read_names(path, folders) if path else ({name: spoken(name) for name in folders}, ())
    # Two levels of the path: "cifar10" alone would pass for the published set, and "test" says little.
    name = "/".join(folder.resolve().parts[-2:])
    return _from_folders(name, folder, said, templates or prompts.PLAIN, "-")


def _class_folders(dataset: str, root: Path, part: str) -> tuple[Path, Sequence[str]] | None:
    """The folder that holds class folders of a known set, and its classes in label order."""
    inside = ("train",) if part == TRAIN else ("test", "val")
    near = [root] if part != TRAIN else []
    for folder in (*near, *(root / name for name in inside), root / dataset, *(root / dataset / i for i in inside)):
        present = class_folders(folder)
        folders = KNOWN[dataset].folders
        if dataset == "imagenet":
            folders = [name for name in present if name[:1] == "n" and name[1:].isdigit()]
        if folders and set(present) & set(folders):
            return folder, folders
    return None


def _known_folder(
    dataset: str, folder: Path, folders: Sequence[str], names: str | Path | None, part: str, language: str
) -> ClassificationSet:
    """A known set as class folders: its own names unless a names file says otherwise."""
    known, templates = KNOWN[dataset], KNOWN[dataset].templates
    foreign = sorted(set(class_folders(folder)) - set(folders))
    if foreign:
        raise ValueError(f"data: {folder} holds {foreign[0]!r}, which is no class of {dataset}; give its classes only")
    if dataset == "imagenet":
        listed, templates = prompts.imagenet_prompts(language)
        if len(folders) != len(listed):
            raise ValueError(f"data: {folder} holds {len(folders)} of the 1000 ImageNet class folders; add the others")
        said = dict(zip(folders, listed))
    else:
        said = {name: spoken(name, dataset) for name in folders}
    if path := _names_path(folder, names):
        said, others = read_names(path, folders)
        templates = others or templates
    return _from_folders(dataset, folder, said, templates, known.split(part), known.headline)


def _names_path(folder: Path, names: str | Path | None) -> Path | None:
    """The names file that was given, else that of the folder, if it has one."""
    path = Path(names) if names is not None else folder / "names.json"
    return path if names is not None or path.is_file() else None


def _with_names(data: tuple[ClassificationSet, Sequence[str]], names: str | Path | None) -> ClassificationSet:
    """A set and its classes as their owner calls them -> the set, with what a names file says."""
    found, classes = data
    if names is None:
        return found
    said, templates = read_names(names, classes)
    place = {name: label for label, name in enumerate(said)}

    def label_of(index: int) -> int:
        return place[classes[found.label_of(index)]]

    def read(index: int) -> tuple[Image, int]:
        picture, label = found.read(index)
        return picture, place[classes[label]]

    said = list(said.values())
    return replace(found, read=read, label_of=label_of, class_names=said, templates=templates or found.templates)


def _from_folders(
    name: str,
    folder: Path,
    said: dict[str, str],
    templates: Sequence[str],
    split: str,
    headline: str = "top1",
) -> ClassificationSet:
    present, items, passed = set(class_folders(folder)), [], []
    for label, key in enumerate(said):
        pictures, others = list_pictures(folder / key) if key in present else ([], [])
        items += [(path, label) for path in pictures]
        passed += others
    if not items:
        raise ValueError(f"data: the class folders of {folder} hold no picture ({' '.join(IMAGE_SUFFIXES)})")
    passed += list_pictures(folder, deep=False)[0]  # beside the class folders
    example = passed and passed[0].relative_to(folder).as_posix()
    note = f"{len(passed)} files that are no pictures, or in no class, left out, e.g. {example}" if passed else ""
    return _from_items(name, folder, split, items, list(said.values()), templates, headline, note)


def _from_items(
    name: str,
    folder: Path,
    split: str,
    items: Sequence[tuple[Path, int]],
    *about,
) -> ClassificationSet:
    """The set of files with their labels; about: class names, templates, headline, note."""

    def read(index: int) -> tuple[Image, int]:
        path, label = items[index]
        return open_picture(path), label

    files = [path for path, _ in items]
    found = ClassificationSet(name, str(folder), split, len(items), read, *about)
    return replace(found, label_of=lambda index: items[index][1], files=files)


def _sun397(root: Path, part: str) -> tuple[ClassificationSet, list[str]]:
    """Official partition 1 where its list is there, else a split by a fixed seed of the published sizes."""
    known, folder = KNOWN["sun397"], root / "SUN397"
    classes_file = folder / "ClassName.txt"
    if not classes_file.is_file():
        raise MissingData(f"no {classes_file}; download {known.source.format(root=root)}")
    lines = classes_file.read_text(encoding="utf-8").split()  # /a/abbey, /a/apartment_building/outdoor
    labels = {line.strip("/"): label for label, line in enumerate(lines)}
    listing = "Training_01.txt" if part == TRAIN else "Testing_01.txt"
    lists = (folder / listing, folder / "Partitions" / listing, root / "Partitions" / listing)
    found = next((path for path in lists if path.is_file()), None)
    if found:
        paths, split = found.read_text(encoding="utf-8").split(), f"partition 1, {part}"
    else:
        every = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("sun_*.jpg"))
        if len(every) != SUN_COUNT:
            raise ValueError(f"sun397: {len(every)} pictures instead of {SUN_COUNT}; unpack SUN397.tar.gz again")
        paths = [every[i] for i in random_part(SUN_COUNT, SUN_TRAIN, SUN_TEST, part, SUN_SEED)]
        split = f"random {part} part of {len(paths)}, seed {SUN_SEED}"
    items = []
    for path in paths:
        name = path.strip("/").rpartition("/")[0]
        if name not in labels or ".." in name.split("/"):
            raise ValueError(f"{found or folder}: {path} is in no class of {classes_file.name}; download both again")
        items.append((folder / path.strip("/"), labels[name]))
    missing = [path for path, _ in items if not path.is_file()]
    if missing:
        raise ValueError(f"sun397: {len(missing)} of {len(items)} pictures are missing, the first is {missing[0]}")
    classes = [name.partition("/")[2] for name in labels]
    note = "" if found else f"no {listing}: not the official partition 1"
    said = [spoken(name) for name in classes]
    return _from_items("sun397", folder, split, items, said, known.templates, known.headline, note), classes


def _imagenet_records(root: Path, part: str, language: str) -> tuple[ClassificationSet, list[str]]:
    """ImageNet in RecordIO files, the number of the class (in the order of the sorted folder names) for a label."""
    from rwkv_clip.data.recordio import RecordFile, unpack

    known, stem = KNOWN["imagenet"], "train" if part == TRAIN else "val"
    places = [root / "imagenet" / f"{stem}.rec", root / f"{stem}.rec", *([root] if root.suffix == ".rec" else [])]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise MissingData(f"not found; download {known.source.format(root=root)}")
    records = RecordFile(path)
    said, templates = prompts.imagenet_prompts(language)

    def label_of(index: int) -> int:
        header = unpack(records.view(index))[0]
        label = float(header.label) if header.flag == 0 else -1.0
        if label not in range(len(said)):
            name = f"{path}: record {records.key(index)}"
            raise ValueError(f"{name}: its label is {header.label}, should be one number from 0 to {len(said) - 1}")
        return int(label)

    def read(index: int) -> tuple[Image, int]:
        payload = unpack(records.view(index))[1]
        return open_picture(bytes(payload), f"{path}: record {records.key(index)}"), label_of(index)

    split, files = known.split(part), (records.path, records.index_path)
    data = ClassificationSet("imagenet", str(path), split, len(records), read, said, templates, known.headline)
    return replace(data, label_of=label_of, files=files), [str(label) for label in range(len(said))]


def _torchvision(dataset: str, root: Path, part: str) -> tuple[ClassificationSet, list[str]]:
    from torchvision import datasets

    known = KNOWN[dataset]
    if not root.is_dir():
        raise MissingData(f"no folder {root}; download {known.source.format(root=root)}")
    try:
        source = getattr(datasets, known.loader)(root=str(root), **known.parts[part])
    except (RuntimeError, OSError, ImportError) as error:
        # The rest of torchvision's message is about its own download switch.
        reason, hint = str(error).split(". ")[0], known.source.format(root=root)
        raise MissingData(f"torchvision below {root}: {reason}; download {hint}") from None
    classes = getattr(source, "classes", None) or getattr(source, "categories", None)
    if not classes:
        raise ValueError(f"{dataset}: this torchvision does not name its classes; install a newer one")
    kept = known.keep(len(source), part) if known.keep else range(len(source))

    labels = _torchvision_labels(source)

    def read(index: int) -> tuple[Image, int]:
        picture, label = source[kept[index]]
        return picture.convert("RGB"), int(label)

    said = [spoken(name, dataset) for name in classes]
    split = known.split(part)
    data = ClassificationSet(dataset, str(root), split, len(kept), read, said, known.templates, known.headline)
    files = list_files(root / known.folder)
    return replace(data, label_of=lambda index: int(labels(kept[index])), files=files), list(classes)


def _torchvision_labels(source) -> Callable[[int], int]:
    """Label i of a set of torchvision without its picture: it keeps them under one of a few names."""
    for name in ("targets", "_labels", "y"):
        found = getattr(source, name, None)
        if found is not None and len(found) == len(source):
            return found.__getitem__
    if samples := getattr(source, "_samples", None):  # of StanfordCars: (path, label)
        return lambda index: samples[index][1]
    return lambda index: source[index][1]
