"""Sets that are a folder of class folders: a user's own, and benchmarks in this form.

Names that begin with a dot, and what archives and storage systems leave (LITTER), never count, at any depth.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .benchmarks import TEST, TRAIN, Benchmark, say
from .imagenet import imagenet_prompts
from .labelled import ClassificationSet, MissingData, set_of_files
from .names import are_numbers, find_names, read_names, read_names_file

PLAIN = ("a photo of a {}.",)
V2 = "imagenetv2-matched-frequency-format-val"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
LITTER = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation|holdout)"
    r"([-_ ]?(set|split|data|images|imgs|\d+))?",
    re.IGNORECASE,
)


def load_image_folder(folder: Path, names: str | Path | None) -> ClassificationSet:
    """A folder of class folders that is not a benchmark."""
    folders = list_classes(folder)
    if not folders:
        raise ValueError(f"data: {folder} holds no class folders; give a folder with one folder of pictures per class")
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
    """A benchmark as class folders, with its own names unless a names file says otherwise; None where it is absent in
    this form."""
    folder, classes = _find(benchmark, root, split)
    if folder is None:
        return None
    if foreign := sorted(set(list_classes(folder)) - set(classes)):
        raise ValueError(
            f"data: {folder} holds {foreign[0]!r}, which is not a class of {benchmark.name}; give its classes only"
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


def load_imagenet_v2(root: Path, names: str | Path | None, split: str) -> ClassificationSet:
    """ImageNet-V2 (arXiv 1902.10811) as it is packed: folders 0 .. 999, numbered in the order of ImageNet's classes."""
    if names is not None or split != TEST:
        raise ValueError("imagenetv2: has ImageNet's names and test pictures only; leave names and split out")
    listed, templates = imagenet_prompts("en")
    numbers = [str(number) for number in range(len(listed))]
    folder = next((place for place in (root, root / V2) if set(list_classes(place)) & set(numbers)), None)
    if folder is None:
        raise MissingData(f"no class folders 0 .. 999 in {root}; download {V2}.tar.gz and unpack it to {root / V2}")
    if (found := list_classes(folder)) != numbers:
        raise ValueError(f"data: {folder} holds {len(found)} class folders, not 0 .. 999; unpack {V2}.tar.gz again")
    named = dict(zip(numbers, listed))
    return _read_folders(folder, named, name="imagenetv2", split="matched-frequency", templates=templates)


def _find(benchmark: Benchmark, root: Path, split: str) -> tuple[Path | None, Sequence[str]]:
    """The folder that holds class folders of a benchmark, and its classes in label order."""
    inside = ("train",) if split == TRAIN else ("test", "val")
    places = [place / name for place in (root, root / benchmark.name) for name in ("", *inside)]
    for folder in places[1:] if split == TRAIN else places:
        present, classes = list_classes(folder), benchmark.classes
        if benchmark.name == "imagenet":
            classes = [name for name in present if name[:1] == "n" and name[1:].isdigit()]
        if set(present) & set(classes):
            return folder, classes
    return None, ()


def _read_folders(folder: Path, named: dict[str, str], **about) -> ClassificationSet:
    """named: {class folder: name of the class} in label order; about: further fields of the set."""
    present, files, labels, left_out = set(list_classes(folder)), [], [], []
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
        about["note"] = f"{len(left_out)} files that are not pictures, or in no class, left out, e.g. {example}"
    return set_of_files(files, labels, path=str(folder), class_names=list(named.values()), **about)


def list_classes(folder: Path) -> list[str]:
    """Names of the folders in `folder`: by number where all are numbers, else as texts; none where it does not
    exist."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not _is_litter(entry.name)]
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else sorted(names)


def list_pictures(folder: Path, deep: bool = True) -> tuple[list[Path], list[Path]]:
    """(pictures, other files), each sorted; deep: at any depth. Linked folders are not entered."""
    pictures, others = [], []
    for path in _walk(folder, deep):
        is_picture = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        (pictures if is_picture else others).append(path)
    return sorted(pictures), sorted(others)


def list_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; none where it does not exist."""
    return sorted(_walk(folder, True)) if folder.is_dir() else []


def refuse_unreadable(folder: Path, folders: Sequence[str]) -> None:
    """ValueError for a folder whose name is not UTF-8: it could not be given to a model."""
    for name in folders:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(
                f"data: {folder}: the folder {os.fsencode(name)!r} has a name that is not UTF-8; rename it"
            )


def refuse_splits(folder: Path, folders: Sequence[str], named: Collection[str] = ()) -> None:
    """ValueError where `folders` are splits, such as train and test, and not classes; `named`: those that are classes
    because a names file says so.

    One folder of such a name among others may be a class (train, of vehicles), if there are pictures in it and not
    folders, and in others as well.
    """
    splits = [name for name in folders if SPLIT.fullmatch(name) and name not in named]
    if not splits:
        return
    if len(splits) == 1:
        pictures, others = (list_pictures(folder / splits[0], deep=False)[0], set(folders) - set(splits))
        if pictures and any(list_pictures(folder / name)[0] for name in others):
            return
    choice = next((name for kind in ("test", "val", "") for name in splits if name.lower().startswith(kind)), splits[0])
    raise ValueError(
        f"data: {folder} holds the splits {', '.join(splits)}, not classes; give one, --data {folder / choice}, "
        'or, if these are classes, name them in a names file: {"names": {"' + splits[0] + '": ..}}'
    )


def refuse_unclear_order(folders: Sequence[str], where: str) -> None:
    """ValueError where a list of names could mean two orders of the folders: class_1, class_2, class_10, or
    class_1, class_10, class_2."""

    def by_number(name: str) -> list:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

    other = next((name for name, natural in zip(folders, sorted(folders, key=by_number)) if name != natural), None)
    if other is not None and not are_numbers(folders):
        raise ValueError(
            f'{where}: "names" is a list, and the class folders ({folders[0]}, .., {other}, ..) come in a different '
            'order by number than as texts; write {"names": {folder: name}}'
        )


def _walk(folder: Path, deep: bool) -> Iterator[Path]:
    """Files below a folder, and links to folders. OSError for one that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not _is_litter(name)]
        here = Path(place)
        if deep:
            yield from (here / name for name in folders if (here / name).is_symlink())
        yield from (here / name for name in files if not _is_litter(name))
        if not deep:
            return


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in LITTER
