"""Features on disk: normalised float32 vectors of pictures and texts with their ids, written and read back.

A folder holds about.json (written last: without it the folder is not finished) and for images and texts each

    images.jsonl    {"image_id": "a.jpg", "label": 3}                            line i belongs to row i
    texts.jsonl     {"text_id": 0, "text": "a dog", "image_ids": ["a.jpg"]}
    images.safetensors (key `features`), images.npy, or images.img_feat.jsonl with {"image_id", "feature"}
    texts.safetensors .., or texts.txt_feat.jsonl with {"text_id", "feature"}

The .jsonl forms are those of Chinese-CLIP's extract_features.py.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_clip.data.retrieval_set import RetrievalSet
from rwkv_clip.dist import rank_and_size
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.files import DamagedError, parse_json, write_whole
from rwkv_clip.serialization import encode_tensors, read_tensors

from . import retrieval
from .cache import data_key, encode_cached, encode_labelled, on_all_ranks
from .datasets import IMAGEFOLDER, ClassificationSet, MissingData, load_classification
from .known import TEST
from .report import new_folder
from .settings import FeaturesSettings

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


def load(settings: FeaturesSettings, device: torch.device) -> RetrievalSet | ClassificationSet:
    """The set that `settings` name; all ranks call it."""
    if not settings.dataset:
        return retrieval.load(settings, device)
    inapplicable = [name for name in ("image_root", "views", "allow_outside", "prefix") if getattr(settings, name)]
    inapplicable += ["split"] if settings.split and settings.dataset == IMAGEFOLDER else []
    if inapplicable:
        raise ValueError(f"{', '.join(inapplicable)}: does not go with dataset {settings.dataset}; leave it out")
    try:
        part = settings.split or TEST
        return on_all_ranks(lambda: load_classification(settings.dataset, settings.data, part=part).checked(), device)
    except MissingData as error:
        raise ValueError(f"dataset: {settings.dataset}: {error}") from None


def run(
    settings: FeaturesSettings, data: RetrievalSet | ClassificationSet, loaded, device: torch.device
) -> Path | None:
    """Encode the set of `load` and write it; returns the folder, None on ranks other than the main rank."""
    started = time.monotonic()
    about, found = (_labelled if settings.dataset else _captioned)(settings, data, loaded, device)
    if rank_and_size()[0]:
        return None
    about = {
        "schema": SCHEMA,
        "model": loaded.name,
        "checkpoint": _absolute(settings.checkpoint),
        "model_setting": _absolute(settings.model) if (settings.model or "").endswith(".json") else settings.model,
        "checkpoint_sha256": loaded.digest,
        "precision": loaded.precision,
        **about,
        **{features.kind: len(features.rows) for features in found},
        "width": found[0].vectors.shape[1],
        "seconds": round(time.monotonic() - started, 3),
    }
    parent = Path(settings.logs)
    parent.mkdir(parents=True, exist_ok=True)
    stamp, model = time.strftime("%Y%m%d-%H%M%S", time.gmtime()), re.sub(r"[^A-Za-z0-9._-]+", "-", loaded.name)
    folder = new_folder(parent, settings.name or f"{stamp}-features-{model}")
    for features in found:
        write_features(folder, features, settings.form)
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / "about.json", [text.encode("utf-8", "backslashreplace")])
    return folder


def write_features(folder: Path, features: Features, form: str) -> None:
    """Rows and vectors, each file whole or not at all; form: safetensors, npy or jsonl."""
    kind, key = features.kind, KINDS[features.kind]
    write_whole(folder / f"{kind}.jsonl", map(_line, features.rows))
    vectors = features.vectors.contiguous()
    if form == "safetensors":
        write_whole(folder / f"{kind}.safetensors", encode_tensors({"features": vectors}))
    elif form == "npy":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(vectors.numpy()))
        write_whole(folder / f"{kind}.npy", [header.getvalue(), vectors.numpy().data])
    else:
        lines = (_line({key: i, "feature": v.tolist()}) for i, v in zip(features.ids, vectors))
        write_whole(folder / f"{kind}.{CHINESE_CLIP[kind]}.jsonl", lines)


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
        ids, vectors = _read_lines(path, key)
        rows = [{key: i} for i in ids]
    if rows is None or (folder / f"{kind}.jsonl").is_file():
        rows = list(_rows(folder / f"{kind}.jsonl", key))
    return Features(kind, _checked(path, vectors, rows), rows)


def _absolute(place: str | None) -> str | None:
    """A file or folder as it is found from everywhere; a name stays one."""
    return os.path.abspath(place) if place and os.path.exists(place) else place


def _captioned(
    settings: FeaturesSettings, data: RetrievalSet, loaded, device: torch.device
) -> tuple[dict, list[Features]]:
    """A retrieval set: pictures, and texts with the pictures that they belong to."""
    tokens, cut = data.tokenize(loaded.tokenizer, settings.prefix)
    names = list(map(str, data.image_names))
    items = [*names, *data.files]
    key = on_all_ranks(lambda: data_key(data.name, data.split, len(names), data.open, items), device)
    work = {"device": device, "batch_size": settings.batch_size, "workers": settings.workers}
    images = encode_cached(settings.cache_folder, loaded, key, data.open, len(names), **work)
    texts = FeatureExtractor.of(loaded, device, progress=True).encode_tokens(tokens)
    owners = data.image_of_caption.tolist()
    image_rows = [{"image_id": name} for name in names]
    text_rows = [
        {"text_id": i, "text": data.caption_text(i), "image_ids": [names[owner]]} for i, owner in enumerate(owners)
    ]
    note = "; ".join(filter(None, [data.note, retrieval.cut_note(data, cut, loaded.tokenizer)]))
    about = {"dataset": data.name, "path": data.path, "split": data.split, "prefix": settings.prefix}
    about |= {"captions_cut": cut, "note": note}
    return about, [Features("images", images, image_rows), Features("texts", texts, text_rows)]


def _labelled(
    settings: FeaturesSettings, data: ClassificationSet, loaded, device: torch.device
) -> tuple[dict, list[Features]]:
    """A part of a classification set: pictures with their labels."""
    work = {"device": device, "batch_size": settings.batch_size, "workers": settings.workers}
    vectors, labels = encode_labelled(settings.cache_folder, loaded, data, **work)
    names = list(data.class_names)
    rows = [{"image_id": i, "label": label, "class": names[label]} for i, label in enumerate(labels.tolist())]
    empty = [name for label, name in enumerate(names) if not (labels == label).any()]
    note = "; ".join(filter(None, [data.note, f"no samples: {', '.join(empty)}" if empty else ""]))
    about = {"dataset": data.name, "path": data.path, "split": data.split, "class_names": names, "note": note}
    return about, [Features("images", vectors, rows)]


def _read_npy(path: Path) -> Tensor:
    try:  # as a mapping: a file that announces more than it holds takes no memory
        return torch.from_numpy(np.array(np.lib.format.open_memmap(path, mode="r")))
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python, which has many errors
        raise DamagedError(f"{path}: is not a readable .npy file ({error}); write the features again") from None


def _read_lines(path: Path, key: str) -> tuple[list, Tensor]:
    """Ids and vectors of Chinese-CLIP's lines {key, "feature"}."""
    ids, vectors = [], []
    for row in _rows(path, key):
        feature = row.get("feature")
        if not isinstance(feature, list) or (vectors and len(feature) != len(vectors[0])):
            raise ValueError(f"{path}:{len(ids) + 1}: `feature` must be a list of numbers, equally many in every line")
        try:
            vectors.append(np.asarray(feature, np.float32))
        except (TypeError, ValueError):
            raise ValueError(f"{path}:{len(ids) + 1}: `feature` holds something that is no number") from None
        ids.append(row[key])
    return ids, torch.from_numpy(np.stack(vectors)) if vectors else torch.zeros(0, 0)


def _rows(path: Path, key: str) -> Iterator[dict]:
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
    """The vectors, if they are unit vectors and as many as rows."""
    if vectors is None or vectors.ndim != 2 or not vectors.is_floating_point():
        raise ValueError(f"{path}: holds no matrix `features` of floats; write the features again")
    if len(vectors) != len(rows):
        raise ValueError(f"{path}: {len(vectors)} vectors and {len(rows)} ids; write the features again")
    vectors = vectors.float()
    wrong = torch.nonzero(~((vectors.norm(dim=1) - 1).abs() < 0.01)).flatten()
    if len(wrong):
        raise ValueError(f"{path}: row {int(wrong[0])} (of {len(wrong)} such rows) is no vector of length 1")
    return vectors


def _line(row: dict) -> bytes:
    # What UTF-8 cannot hold (a name, a text) is written as an escape, which JSON reads back.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
