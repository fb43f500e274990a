"""A folder of features that `eval.main features` wrote, as a collection: about.json, images.safetensors, images.npy or
X.img_feat.jsonl, images.jsonl with ids and labels, and texts.jsonl with the captions of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_clip.data.rows import iterate_lines
from rwkv_clip.feature_files import CHINESE_CLIP, KINDS, read_about, read_features, read_rows
from rwkv_clip.files import DamagedError, parse_json

from .pictures import Pictures
from .rows import ListedRows, make_row
from .vectors import Vectors, map_matrix

FEATURES = f"*.{CHINESE_CLIP['images']}.jsonl"
ID = KINDS["images"]


def is_features(folder: Path) -> bool:
    """Whether the folder holds features of images."""
    return any((folder / name).is_file() for name in ("images.safetensors", "images.npy")) or any(folder.glob(FEATURES))


def open_features(folder: Path, images: Path | None) -> tuple[dict[str, Any], ListedRows, Vectors]:
    """(about.json, {} where there is none, rows, vectors). images: folder of the pictures. ValueError, DamagedError."""
    about = read_about(folder) if (folder / "about.json").is_file() else {}
    if not (folder / "images.safetensors").is_file() and (path := folder / "images.npy").is_file():
        matrix, facts = map_matrix(path), list(read_rows(folder / "images.jsonl", ID))  # which may not fit into memory
        if matrix.ndim != 2 or len(matrix) != len(facts):
            raise DamagedError(f"{path}: shape {matrix.shape} for {len(facts)} ids; write the features again")
    else:
        found = read_features(folder, "images")
        assert found is not None, "see is_features"
        matrix, facts = found.vectors.numpy(), list(found.rows)
    texts = _read_captions(folder / "texts.jsonl")
    rows = []
    for fact in facts:
        name = str(fact[ID])
        fields = {key: value for key, value in fact.items() if key != ID}
        rows.append(make_row(name, "\n".join(texts.get(name, [])), fields, {"file": name, "root": None}))
    roots = [images] if images else _find_roots(about, folder)
    return about, ListedRows(rows, Pictures(roots)), Vectors.of([matrix], str(folder))


def _find_roots(about: dict[str, Any], folder: Path) -> list[Path]:
    """Where the pictures' names start from: the folder of the data, and images/ in it. A name that is relative to where
    `features` was started is looked for in the folders above, too."""
    name = about.get("path")
    if not isinstance(name, str):
        return []
    for start in (Path(), *folder.resolve().parents):
        if (start / name).exists():
            found = (start / name).absolute()
            return [found] if found.is_dir() else [found.parent, found.parent / "images"]
    return []


def _read_captions(path: Path) -> dict[str, list[str]]:
    """{image_id: its texts}."""
    found: dict[str, list[str]] = {}
    if path.is_file():
        with open(path, "rb") as file:
            for number, line in iterate_lines(file, path):
                row = parse_json(line, f"{path}:{number}")
                if isinstance(row, dict) and isinstance(row.get("text"), str):
                    for image in row.get("image_ids") or []:
                        found.setdefault(str(image), []).append(row["text"])
    return found
