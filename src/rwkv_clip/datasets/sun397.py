"""SUN397 as its authors pack it: official partition 1 where its list is present, else a random split."""

from __future__ import annotations

from pathlib import Path

from .benchmarks import BENCHMARKS, TRAIN
from .labelled import ClassificationSet, MissingData, set_of_files


def load_sun397(root: Path, split: str) -> tuple[ClassificationSet, list[str]]:
    """The set below `root`, and its classes as ClassName.txt has them."""
    benchmark, folder = BENCHMARKS["sun397"], root / "SUN397"
    classes_file = folder / "ClassName.txt"
    if not classes_file.is_file():
        raise MissingData(f"no {classes_file}; download {benchmark.source.format(root=root)}")
    lines = classes_file.read_text(encoding="utf-8").split()  # /a/abbey, /a/apartment_building/outdoor
    labels = {line.strip("/"): label for label, line in enumerate(lines)}
    listing = "Training_01.txt" if split == TRAIN else "Testing_01.txt"
    lists = (folder / listing, folder / "Partitions" / listing, root / "Partitions" / listing)
    found = next((path for path in lists if path.is_file()), None)
    if found:
        paths, reported = found.read_text(encoding="utf-8").split(), f"partition 1, {split}"
    else:
        paths, reported = _draw(folder, split)
    files, own = [], []
    for path in paths:
        name = path.strip("/").rpartition("/")[0]
        if name not in labels or ".." in name.split("/"):
            raise ValueError(f"{found or folder}: {path} is in no class of {classes_file.name}; download both again")
        files.append(folder / path.strip("/"))
        own.append(labels[name])
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"sun397: {len(missing)} of {len(files)} pictures are missing, the first is {missing[0]}")
    classes = [name.partition("/")[2] for name in labels]
    about = benchmark.about(split) | {"split": reported, "path": str(folder)}
    about["note"] = "" if found else f"no {listing}: not the official partition 1"
    about["class_names"] = [benchmark.say(name) for name in classes]
    return set_of_files(files, own, **about), classes


def _draw(folder: Path, split: str) -> tuple[list[str], str]:
    """Pictures of a random split of the published sizes, and what a report calls it."""
    random = BENCHMARKS["sun397"].random
    every = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("sun_*.jpg"))
    if len(every) != random["count"]:
        raise ValueError(f"sun397: {len(every)} pictures instead of {random['count']}; unpack SUN397.tar.gz again")
    paths = [every[place] for place in BENCHMARKS["sun397"].places(split)]
    return paths, f"random {split} part of {len(paths)}, seed {random['seed']}"
