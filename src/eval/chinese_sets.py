"""Chinese-CLIP's data as its extract_features.py reads it: all texts of a file, all images of an LMDB or TSV.

Texts and images are apart: no text needs an image (hidden test sets have none), and an image counts once, whoever
mentions it. Images of an LMDB come in the order of its keys' bytes ("10" before "9"), those of a TSV in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from rwkv_clip.data.chinese_clip import IMAGES_ENDING, TEXTS_ENDING, ImageFile
from rwkv_clip.data.image import open_picture
from rwkv_clip.data.lmdb import Split, find_splits, open_split
from rwkv_clip.files import DamagedError, parse_json

Sides = Literal["both", "images", "texts"]


@dataclass(frozen=True)
class ChineseClipSet:
    """Texts and images, each with its number; a side that was not asked for is empty. `open(i)` gives image i."""

    name: str
    path: str
    text_ids: Sequence[int] = ()
    texts: Sequence[str] = ()
    image_ids: Sequence[int] = ()
    open: Callable[[int], Image] | None = None
    files: Sequence[Path] = ()  # that hold the images

    @property
    def stem(self) -> str:
        """The path that names of files with features begin with: X for X_texts.jsonl and for an LMDB's folder X."""
        return self.path.removesuffix(".jsonl").removesuffix("_texts")


def load_chinese_clip(data: str | Path, image_data: str | Path | None = None, sides: Sides = "both") -> ChineseClipSet:
    """data: X_texts.jsonl, or the LMDB folder of a split; image_data: an LMDB's split folder, its `imgs` folder or
    X_imgs.tsv. Default: lmdb/X beside X_texts.jsonl where that exists, else X_imgs.tsv beside it.

    ValueError names what is not there; DamagedError file and line of a text, or an id, that cannot be read.
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give X_texts.jsonl or an LMDB's folder of a split")
    found: dict = {"name": path.name.removesuffix(TEXTS_ENDING), "path": str(path)}
    if sides != "images":
        ids, texts = _read_split_texts(path) if path.is_dir() else _read_texts(path)
        if not ids:
            raise ValueError(f"{path}: holds no texts")
        found |= {"text_ids": ids, "texts": texts}
    if sides != "texts":
        found |= _open_images(Path(image_data) if image_data else _find_images(path))
    return ChineseClipSet(**found)


def _find_images(path: Path) -> Path:
    """Where the images of the texts in `path` are."""
    if path.is_dir():
        return path
    name = path.name.removesuffix(".jsonl").removesuffix("_texts")
    places = [path.parent / "lmdb" / name, path.with_name(name + IMAGES_ENDING)]
    for place in places:
        if place.exists():
            return place
    raise ValueError(f"image_data: neither {places[0]} nor {places[1]} exists; name an LMDB's split folder or a TSV")


def _open_images(place: Path) -> dict:
    """The fields of a set that are about images."""
    # Opened once, here: pictures are read by several threads.
    if place.is_file():
        store: ImageFile | Split = ImageFile(place)
        names, files = store.ids, [place]
    else:
        # Its `pairs` are not needed here, but a split whose builder did not finish is none.
        folder = find_splits(str(place.parent if place.name == "imgs" else place))[0]
        store, files = open_split(folder), [folder / "imgs" / "data.mdb"]
        names = [name for name, _ in store.image_ids()]
    if not names:
        raise ValueError(f"{place}: holds no images")

    def open_one(index: int) -> Image:
        return open_picture(store.picture(names[index]), f"{place} image {names[index]}")

    return {"image_ids": [_number(name, place) for name in names], "open": open_one, "files": files}


def _number(name: str, place: Path) -> int:
    try:
        return int(name)
    except ValueError:
        raise DamagedError(f"{place}: the image id {name[:40]!r} is not a whole number; build the data again") from None


def _read_texts(path: Path) -> tuple[list[int], list[str]]:
    ids, texts = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            row = parse_json(line.strip(), where)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str) or type(row.get("text_id")) is not int:
                raise DamagedError(f'{where}: is no line {{"text_id": 1, "text": "..", ..}}; write the file again')
            ids.append(row["text_id"])
            texts.append(row["text"])
    return ids, texts


def _read_split_texts(folder: Path) -> tuple[list[int], list[str]]:
    """The texts of an LMDB, each once, in the order of their first pairs."""
    split = open_split(find_splits(str(folder))[0])
    texts: dict[int, str] = {}
    for index in range(split.count):
        pair = split.pair(index)
        texts.setdefault(_number(str(pair.text_id), folder), pair.text)
    return list(texts), list(texts.values())
