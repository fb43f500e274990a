"""Features on disk: normalised float32 vectors of pictures and texts with their ids, written and read back.

A folder holds about.json (written last: without it the folder is incomplete) and for images and texts each

    images.jsonl    {"image_id": "a.jpg", "label": 3}                            line i belongs to row i
    texts.jsonl     {"text_id": 0, "text": "a dog", "image_ids": ["a.jpg"]}
    images.safetensors (key `features`), images.npy, or images.img_feat.jsonl with {"image_id", "feature"}
    texts.safetensors .., or texts.txt_feat.jsonl with {"text_id", "feature"}

The .jsonl forms are those of Chinese-CLIP's extract_features.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .feature_lines import read_feature_lines
from .files import DamagedError, parse_json, write_whole
from .serialization import encode_tensors, read_tensors

SCHEMA = 1
KINDS = {"images": "image_id", "texts": "text_id"}
CHINESE_CLIP = {"images": "img_feat", "texts": "txt_feat"}


@dataclass(frozen=True)
class Features:
    """Vectors of length 1, float32 (n, C), and a row of facts for each, its id first."""

    kind: str  # images or texts
    vectors: Tensor
    rows: Sequence[dict]

    @property
    def ids(self) -> list:
        return [row[KINDS[self.kind]] for row in self.rows]


def write_features(folder: Path, features: Features, form: str) -> None:
    """Rows and vectors, each file whole or not at all; form: safetensors, npy or jsonl."""
    kind, key = features.kind, KINDS[features.kind]
    write_whole(folder / f"{kind}.jsonl", map(json_line, features.rows))
    vectors = features.vectors.contiguous()
    if form == "safetensors":
        write_whole(folder / f"{kind}.safetensors", encode_tensors({"features": vectors}))
    elif form == "npy":
        content = io.BytesIO()
        np.save(content, vectors.numpy())
        write_whole(folder / f"{kind}.npy", [content.getbuffer()])
    else:
        lines = (json_line({key: i, "feature": v.tolist()}) for i, v in zip(features.ids, vectors))
        write_whole(folder / f"{kind}.{CHINESE_CLIP[kind]}.jsonl", lines)


def write_about(folder: Path, about: dict) -> None:
    """about.json, which says that the folder is finished."""
    text = json.dumps({"schema": SCHEMA, **about}, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / "about.json", [text.encode("utf-8", "backslashreplace")])


def read_about(folder: Path) -> dict:
    """about.json of a folder of features; {} for a folder that holds only Chinese-CLIP's files."""
    path = folder / "about.json"
    if path.is_file():
        about = parse_json(path.read_bytes(), str(path))
        if not isinstance(about, dict) or about.get("schema") != SCHEMA:
            raise ValueError(f"{path}: is not of schema {SCHEMA}; write the features again")
        return about
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `features` writes one")
    if not any(folder.glob("*_feat.jsonl")) or any(folder.glob("images.jsonl")) or any(folder.glob("texts.jsonl")):
        raise ValueError(f"{folder}: holds no about.json, so it is not finished; write the features again")
    return {}


def read_features(folder: Path, kind: str) -> Features | None:
    """Images or texts of a folder, in any of the three forms; None where it has none. ValueError names the file."""
    key, rows = KINDS[kind], None
    if (path := folder / f"{kind}.safetensors").is_file():
        vectors = read_tensors(path).get("features")
    elif (path := folder / f"{kind}.npy").is_file():
        vectors = _read_npy(path)
    else:
        paths = sorted(folder.glob(f"*.{CHINESE_CLIP[kind]}.jsonl"))
        if len(paths) > 1:
            raise ValueError(f"{folder}: holds {paths[0].name} and {paths[1].name}; leave one")
        if not paths:
            return None
        path = paths[0]
        ids, numbers = read_feature_lines(path, key)
        vectors = torch.from_numpy(numbers)
        rows = [{key: i} for i in ids]
    if rows is None or (folder / f"{kind}.jsonl").is_file():
        rows = list(read_rows(folder / f"{kind}.jsonl", key))
    return Features(kind, _checked(path, vectors, rows), rows)


def _read_npy(path: Path) -> Tensor:
    try:  # mapped: a file that claims to hold more than it does takes no memory
        return torch.from_numpy(np.array(np.lib.format.open_memmap(path, mode="r")))
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python, which has many errors
        raise DamagedError(f"{path}: is not a readable .npy file ({error}); write the features again") from None


def read_rows(path: Path, key: str) -> Iterator[dict]:
    """The JSON lines of a file, each an object with `key`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line, f"{path}:{number}")
            except ValueError as error:
                raise DamagedError(f"{error}; write the features again") from None
            if not isinstance(row, dict) or key not in row:
                raise ValueError(f"{path}:{number}: has no `{key}`; write the features again")
            yield row


def _checked(path: Path, vectors: Tensor | None, rows: Sequence[dict]) -> Tensor:
    """The vectors, if they are unit vectors, one for each row."""
    if vectors is None or vectors.ndim != 2 or not vectors.is_floating_point():
        raise ValueError(f"{path}: holds no matrix `features` of floats; write the features again")
    if len(vectors) != len(rows):
        raise ValueError(f"{path}: {len(vectors)} vectors and {len(rows)} ids; write the features again")
    vectors = vectors.float()
    wrong = torch.nonzero(~((vectors.norm(dim=1) - 1).abs() < 0.01)).flatten()
    if len(wrong):
        raise ValueError(f"{path}: row {int(wrong[0])} (of {len(wrong)} such rows) is not a vector of length 1")
    return vectors


def json_line(row: dict) -> bytes:
    """A line of JSON; what UTF-8 cannot encode (a name, a text) becomes an escape, which JSON reads back."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
