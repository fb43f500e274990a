"""Sets that are a folder of class folders: anybody's, and benchmarks in this form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .benchmarks import TRAIN, Benchmark, say
from .folders import (
    IMAGE_SUFFIXES,
    class_folders,
    list_pictures,
    refuse_splits,
    refuse_unclear_order,
    refuse_unreadable,
)
from .imagenet import imagenet_prompts
from .labelled import ClassificationSet, set_of_files
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
    return _read_folders(folder, named, name=name, split="-", templates=templates or PLAIN)


def load_benchmark_folder(
    benchmark: Benchmark, root: Path, names: str | Path | None, split: str, language: str
) -> ClassificationSet | None:
    """A benchmark as class folders, with its own names unless a names file says otherwise; None where it is not there
    in this form."""
    folder, classes = _find(benchmark, root, split)
    if folder is None:
        return None
    if foreign := sorted(set(class_folders(folder)) - set(classes)):
        raise ValueError(
            f"data: {folder} holds {foreign[0]!r}, which is no class of {benchmark.name}; give its classes only"
        )
    about, named = benchmark.about(split), {name: benchmark.say(name) for name in classes}
    if benchmark.name == "imagenet":
        listed, about["templates"] = imagenet_prompts(language)
        if len(classes) != len(listed):
            raise ValueError(f"data: {folder} holds {len(classes)} of the 1000 ImageNet class folders; add the others")
        named = dict(zip(classes, listed))
    if path := find_names(folder, names):
        named, templates = read_names(path, classes)
        about["templates"] = templates or about["templates"]
    return _read_folders(folder, named, **about)


def _find(benchmark: Benchmark, root: Path, split: str) -> tuple[Path | None, Sequence[str]]:
    """The folder that holds class folders of a benchmark, and its classes in label order."""
    inside = ("train",) if split == TRAIN else ("test", "val")
    places = [place / name for place in (root, root / benchmark.name) for name in ("", *inside)]
    for folder in places[1:] if split == TRAIN else places:
        present, classes = class_folders(folder), benchmark.classes
        if benchmark.name == "imagenet":
            classes = [name for name in present if name[:1] == "n" and name[1:].isdigit()]
        if set(present) & set(classes):
            return folder, classes
    return None, ()


def _read_folders(folder: Path, named: dict[str, str], **about) -> ClassificationSet:
    """named: {class folder: name of the class} in label order; about: further fields of the set."""
    present, files, labels, left_out = set(class_folders(folder)), [], [], []
    for label, key in enumerate(named):
        pictures, others = list_pictures(folder / key) if key in present else ([], [])
        files += pictures
        labels += [label] * len(pictures)
        left_out += others
    if not files:
        raise ValueError(f"data: the class folders of {folder} hold no picture ({' '.join(IMAGE_SUFFIXES)})")
    left_out += list_pictures(folder, deep=False)[0]  # beside the class folders
    if left_out:
        example = left_out[0].relative_to(folder).as_posix()
        about["note"] = f"{len(left_out)} files that are no pictures, or in no class, left out, e.g. {example}"
    return set_of_files(files, labels, path=str(folder), class_names=list(named.values()), **about)
