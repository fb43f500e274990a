"""Sets in the layout of ELEVATER's toolkit with Chinese labels, as Chinese-CLIP's zero-shot evaluation reads them.

    label_cn.txt   a class a line; label.txt has the English ones
    index.json     optional: a list of picture numbers, the order in which a submission lists them
    test/000/..    the pictures of class 0; with ten classes or fewer test/0/..; train/ alike

NOTE(parity): a picture's class is the number of its folder; the released code counts the folders that are there, so
that a missing one shifts all classes behind it.
"""

from __future__ import annotations

from pathlib import Path

from ..files import DamagedError, parse_json
from .benchmarks import TEST
from .class_folders import PLAIN, list_classes, list_pictures
from .labelled import ClassificationSet, MissingData, set_of_files

ELEVATER = "elevater"
LABELS = {"zh": "label_cn.txt", "en": "label.txt"}
# What torchvision's ImageFolder, whose order index.json counts in, takes for a picture.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Ours, in plain words. The released sets (183 templates and those of single data sets) can be given by --templates.
CHINESE_TEMPLATES = (
    "{}",
    "这是{}",
    "图中是{}",
    "画面里有{}",
    "拍到的是{}",
    "关于{}的图像",
    "凑近看到的{}",
    "远处的{}",
    "看不太清楚的{}",
    "看得很清楚的{}",
    "光线很暗时的{}",
    "只露出一部分的{}",
    "个头很小的{}",
    "占满画面的{}",
    "黑白画面里的{}",
    "有人画出来的{}",
)


def load_elevater(folder: Path, language: str = "zh", split: str = TEST) -> ClassificationSet:
    """The set in `folder`. MissingData where it has no labels or no split; ValueError for folders that are not named as
    above, DamagedError for an index.json that is no list of its pictures."""
    labels, place = folder / LABELS[language], folder / split
    if not labels.is_file() or not place.is_dir():
        missing = labels if not labels.is_file() else place
        raise MissingData(f"{missing} is missing; give a folder with {labels.name} and {split}/000, {split}/001, ..")
    text = labels.read_bytes().decode("utf-8-sig", "replace")
    names = [line.strip() for line in text.splitlines()]
    if not names or not all(names) or "\ufffd" in text:
        raise ValueError(f"{labels}: write one class a line, in UTF-8, and no empty line")
    files, of_file, left_out = [], [], 0
    for name in list_classes(place):
        label = _label_of(name, names, place)
        pictures, others = list_pictures(place / name)
        chosen = [path for path in pictures if path.suffix.lower() in SUFFIXES]
        left_out += len(pictures) + len(others) - len(chosen)
        files += chosen
        of_file += [label] * len(chosen)
    if not files:
        raise ValueError(f"data: the class folders of {place} hold no picture ({' '.join(SUFFIXES)})")
    return set_of_files(
        files,
        of_file,
        name=f"{ELEVATER}/{folder.resolve().name}",  # "food101" alone would pass for the published set
        path=str(folder),
        split=split,
        class_names=names,
        templates=CHINESE_TEMPLATES if language == "zh" else PLAIN,
        note=f"{left_out} files that are not pictures left out" if left_out else "",
        submission=_read_index(folder / "index.json", len(files)) if split == TEST else None,
    )


def _label_of(name: str, names: list[str], place: Path) -> int:
    """The class of a folder, which is named by its number."""
    digits = 3 if len(names) > 10 else 1
    if not (name.isascii() and name.isdigit() and len(name) == digits and int(name) < len(names)):
        last = f"{len(names) - 1:0{digits}}"
        raise ValueError(f"data: {place / name}: {len(names)} classes have folders {'0' * digits} .. {last}; rename it")
    return int(name)


def _read_index(path: Path, count: int) -> list[int] | None:
    if not path.is_file():
        return None
    index = parse_json(path.read_bytes(), str(path))
    if not isinstance(index, list) or not all(type(i) is int and 0 <= i < count for i in index):
        raise DamagedError(f"{path}: must be a list of numbers of pictures, 0 to {count - 1}")
    return index
