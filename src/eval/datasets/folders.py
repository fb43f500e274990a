"""Class folders: which folders are classes, in which order, and which files in them are pictures.

What begins with a dot, or what archives and storage leave behind (LITTER), never counts, at any depth.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
LITTER = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation|holdout)"
    r"([-_ ]?(set|split|data|images|imgs|\d+))?",
    re.IGNORECASE,
)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`: by number where all are numbers, else as texts; none where it is not there."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not _is_litter(entry.name)]
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else sorted(names)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether every name is a number, in digits."""
    return all(name.isascii() and name.isdigit() for name in names)


def list_pictures(folder: Path, deep: bool = True) -> tuple[list[Path], list[Path]]:
    """(pictures, what else is there), each sorted; deep: at any depth. Linked folders are not entered."""
    pictures, others = [], []
    for path in _walk(folder, deep):
        is_picture = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        (pictures if is_picture else others).append(path)
    return sorted(pictures), sorted(others)


def list_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; none where it does not exist."""
    return sorted(_walk(folder, True)) if folder.is_dir() else []


def refuse_unreadable(folder: Path, folders: Sequence[str]) -> None:
    """ValueError for a folder whose name is not UTF-8: it could not be said to a model."""
    for name in folders:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(
                f"data: {folder}: the folder {os.fsencode(name)!r} has a name that is not UTF-8; rename it"
            )


def refuse_splits(folder: Path, folders: Sequence[str], named: Collection[str] = ()) -> None:
    """ValueError where `folders` are splits, such as train and test, and not classes; `named`: those that are classes
    because somebody said so.

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
            f'{where}: "names" is a list, and the class folders ({folders[0]}, .., {other}, ..) come in another order '
            'by number than as texts; write {"names": {folder: name}}'
        )


def _walk(folder: Path, deep: bool) -> Iterator[Path]:
    """Files below a folder, and links to folders. OSError for one that cannot be looked into."""

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
