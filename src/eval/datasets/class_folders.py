"""Sets that are a folder of class folders: anybody's, and benchmarks in this form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rwkv_clip.data.image import open_picture

from .benchmarks import BENCHMARKS, TRAIN, say
from .folders import (
    IMAGE_SUFFIXES,
    class_folders,
    list_pictures,
    refuse_splits,
    refuse_unclear_order,
    refuse_unreadable,
)
from .imagenet import imagenet_prompts
from .labelled import ClassificationSet
from .names import find_names, read_names, read_names_file

PLAIN = ("a photo of a {}.",)


def load_image_folder(folder: Path, names: str | Path | None) -> ClassificationSet:
    """A folder of class folders that is no benchmark."""
    folders = class_folders(folder)
    if not folders:
        raise ValueError(f"data: {folder} holds no class folders; give a folder with one folder of pictures a class")
    refuse_unreadable(folder, folders)
    path = find_names(folder, names)
    listed = read_names_file(path).get("names", ()) if path else ()
    if isinstance(listed, list):
        refuse_unclear_order(folders, str(path))
    else:
        refuse_splits(folder, folders, listed if isinstance(listed, dict) else ())
    named, templates = read_names(path, folders) if path else ({name: say(name) for name in folders}, ())
    # Two levels of the path: "cifar10" alone would pass for the published set, and "test" says little.
    name = "/".join(folder.resolve().parts[-2:])
    return _read_folders(name, folder, "-", named, templates or PLAIN)


def find_class_folders(dataset: str, root: Path, split: str) -> tuple[Path, Sequence[str]] | None:
    """The folder that holds class folders of a benchmark, and its classes in label order."""
    inside = ("train",) if split == TRAIN else ("test", "val")
    near = [root] if split != TRAIN else []
    for folder in (*near, *(root / name for name in inside), root / dataset, *(root / dataset / i for i in inside)):
        present, classes = class_folders(folder), BENCHMARKS[dataset].classes
        if dataset == "imagenet":
            classes = [name for name in present if name[:1] == "n" and name[1:].isdigit()]
        if set(present) & set(classes):
            return folder, classes
    return None


def load_benchmark_folder(
    dataset: str, folder: Path, classes: Sequence[str], names: str | Path | None, split: str, language: str
) -> ClassificationSet:
    """A benchmark as class folders: its own names unless a names file says otherwise."""
    benchmark = BENCHMARKS[dataset]
    templates = benchmark.templates
    foreign = sorted(set(class_folders(folder)) - set(classes))
    if foreign:
        raise ValueError(f"data: {folder} holds {foreign[0]!r}, which is no class of {dataset}; give its classes only")
    if dataset == "imagenet":
        listed, templates = imagenet_prompts(language)
        if len(classes) != len(listed):
            raise ValueError(f"data: {folder} holds {len(classes)} of the 1000 ImageNet class folders; add the others")
        named = dict(zip(classes, listed))
    else:
        named = {name: benchmark.say(name) for name in classes}
    if path := find_names(folder, names):
        named, others = read_names(path, classes)
        templates = others or templates
    return _read_folders(dataset, folder, benchmark.report(split), named, templates, benchmark.headline)


def _read_folders(
    name: str, folder: Path, split: str, named: dict[str, str], templates: Sequence[str], headline: str = "top1"
) -> ClassificationSet:
    """named: {class folder: name of the class} in label order."""
    present, files, labels, left_out = set(class_folders(folder)), [], [], []
    for label, key in enumerate(named):
        pictures, others = list_pictures(folder / key) if key in present else ([], [])
        files += pictures
        labels += [label] * len(pictures)
        left_out += others
    if not files:
        raise ValueError(f"data: the class folders of {folder} hold no picture ({' '.join(IMAGE_SUFFIXES)})")
    left_out += list_pictures(folder, deep=False)[0]  # beside the class folders
    note = ""
    if left_out:
        example = left_out[0].relative_to(folder).as_posix()
        note = f"{len(left_out)} files that are no pictures, or in no class, left out, e.g. {example}"
    return ClassificationSet(
        name=name,
        path=str(folder),
        split=split,
        labels=torch.tensor(labels, dtype=torch.int64),
        open=lambda index: open_picture(files[index]),
        class_names=list(named.values()),
        templates=templates,
        headline=headline,
        note=note,
        files=files,
    )
