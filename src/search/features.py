"""A folder of features that `eval.main features` wrote, as a collection: about.json, images.safetensors, images.npy or
X.img_feat.jsonl, images.jsonl with ids and labels, and texts.jsonl with the captions of the images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_clip.data.rows import iterate_lines
from rwkv_clip.files import DamagedError, parse_json, read_bytes
from rwkv_clip.serialization import read_tensors

from .pictures import Pictures
from .rows import MAX_JSON, ListedRows, make_row
from .vectors import Vectors, map_matrix

SCHEMA = 1
FEATURES = "*.img_feat.jsonl"  # Chinese-CLIP's
AGAIN = "write the features again"


def is_features(folder: Path) -> bool:
    """Whether the folder holds features of images."""
    return any((folder / name).is_file() for name in ("images.safetensors", "images.npy")) or any(folder.glob(FEATURES))


def read_features(folder: Path, images: Path | None) -> tuple[dict[str, Any], ListedRows, Vectors]:
    """(about.json, {} where there is none, rows, vectors). images: folder of the pictures. ValueError, DamagedError."""
    about = _read_about(folder)
    if (path := folder / "images.safetensors").is_file():
        found = read_tensors(path).get("features")
        if found is None:
            raise DamagedError(f"{path}: holds no `features`; {AGAIN}")
        ids, matrix = None, found.float().numpy()
    elif (path := folder / "images.npy").is_file():
        ids, matrix = None, map_matrix(path)
    else:
        paths = sorted(folder.glob(FEATURES))
        if len(paths) > 1:
            raise ValueError(f"{folder}: holds {paths[0].name} and {paths[1].name}; leave one")
        path = paths[0]
        ids, matrix = _read_lines(path)
    listed = folder / "images.jsonl"
    facts = list(_read_rows(listed)) if listed.is_file() else [{"image_id": i} for i in ids or []]
    if matrix.ndim != 2 or len(matrix) != len(facts):
        raise DamagedError(f"{path}: shape {matrix.shape} for {len(facts)} ids; {AGAIN}")
    texts = _read_captions(folder / "texts.jsonl")
    rows = []
    for fact in facts:
        name = str(fact["image_id"])
        fields = {key: value for key, value in fact.items() if key != "image_id"}
        rows.append(make_row(name, "\n".join(texts.get(name, [])), fields, {"file": name, "root": None}))
    roots = [images] if images else _find_roots(about, folder)
    return about, ListedRows(rows, Pictures(roots)), Vectors.of([matrix], str(path))


def _read_about(folder: Path) -> dict[str, Any]:
    where = folder / "about.json"
    if not where.is_file():
        return {}
    about = parse_json(read_bytes(where, MAX_JSON), str(where))
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise DamagedError(f"{where}: is not of schema {SCHEMA}; {AGAIN}")
    return about


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


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in iterate_lines(file, path):
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict) or not isinstance(row.get("image_id"), (str, int)):
                raise DamagedError(f"{path}:{number}: has no `image_id`; {AGAIN}")
            yield row


def _read_lines(path: Path) -> tuple[list[str | int], np.ndarray]:
    """Ids and vectors of {"image_id", "feature"} lines."""
    ids: list[str | int] = []
    vectors: list[np.ndarray] = []
    for number, row in enumerate(_read_rows(path), 1):
        try:
            vector = np.asarray(row.get("feature"), np.float32)
        except (TypeError, ValueError):
            vector = np.empty(0, np.float32)
        if vector.ndim != 1 or not len(vector) or (vectors and vector.shape != vectors[0].shape):
            raise DamagedError(f"{path}:{number}: `feature` is no list of as many numbers as before; {AGAIN}")
        ids.append(row["image_id"])
        vectors.append(vector)
    if not vectors:
        raise DamagedError(f"{path}: is empty; {AGAIN}")
    return ids, np.stack(vectors)


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
