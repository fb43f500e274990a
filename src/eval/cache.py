"""Features that outlive the process that computed them: a killed extraction goes on, a finished one is only read.

A cache folder has one folder for each (weights, data, transform, precision), and in it one file for every CHUNK items,
which appears whole or not at all. CHUNK is a multiple of the blocks that the model gets, so features are the same bits
with and without a cache, resumed or not, on any number of ranks. A file that is damaged is made again. What a key does
not see: a change to some pictures only of a set that keeps its names, see `data_key`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rwkv_clip.dist import AUTOCAST, max_over_ranks, rank_and_size
from rwkv_clip.features import encode_images, raise_together
from rwkv_clip.files import write_whole
from rwkv_clip.tensorfile import CheckpointError, encode_tensors, read_tensors

SCHEMA = 1  # a new number when the same weights give other features
CHUNK = 2048  # items in a file: some seconds of work, and some MB
T = TypeVar("T")
_SAMPLES = 16  # pictures that stand for a set


def encode_cached(
    root: str | Path | None,
    loaded,
    data: dict,
    open_one: Callable[[int], Image.Image],
    count: int,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    labels: Tensor | None = None,
) -> Tensor:
    """`features.encode_images` of a whole set, with what the cache below `root` (None: no cache) already has.

    loaded: a model of `load_for_inference`; data: the set's `data_key`. All ranks call it and get all features; the
    lead alone writes. labels: int64 (count,) of -1 that open_one fills in where it is called; the cache fills the rest.
    """
    labels = torch.full((count,), -1) if labels is None else labels
    folder = None
    if root is not None:
        folder = on_all_ranks(lambda: _open_folder(root, model_key(loaded) | data), device)
    parts = []
    for start in range(0, count, CHUNK) or [0]:
        stop = min(start + CHUNK, count)
        path = folder / f"{start:09}-{stop:09}.safetensors" if folder else None
        found = _read(path) if path else None
        # One rank that lacks a chunk (a disk of its own) needs the others to compute it.
        if max_over_ranks(torch.tensor(float(found is None), device=device)):
            found = (
                encode_images(
                    loaded.model,
                    lambda i, start=start: open_one(start + i),
                    stop - start,
                    loaded.preprocess,
                    device=device,
                    batch_size=batch_size,
                    autocast=AUTOCAST[loaded.precision],
                    workers=workers,
                    progress=True,
                ),
                max_over_ranks(labels[start:stop].to(device)).cpu(),
            )
            if path and rank_and_size()[0] == 0:
                tensors = {"features": found[0], "labels": found[1], "checksum": _checksum(path, *found)}
                write_whole(path, encode_tensors(tensors))
        parts.append(found[0])
        labels[start:stop] = found[1]
    return torch.cat(parts)


def on_all_ranks(make: Callable[[], T], device: torch.device) -> T:
    """make() on every rank, or its error on all of them: a rank may have a disk of its own."""
    made, problem = None, None
    try:
        made = make()
    except Exception as error:  # whatever it is: nobody goes on alone
        problem = error
    raise_together(problem, 0, device)
    return made


def encode_labelled(root: str | Path | None, loaded, data, **work) -> tuple[Tensor, Tensor]:
    """Features and labels (count,) of a `ClassificationSet`; `work` goes to `encode_cached`."""
    labels = torch.full((data.count,), -1, dtype=torch.int64)

    def open_one(index: int) -> Image.Image:
        picture, labels[index] = data.read(index)
        return picture

    def make_key() -> dict:
        return data_key(data.name, data.split, data.count, lambda index: data.read(index)[0], data.class_names)

    key = on_all_ranks(make_key, work["device"])
    return encode_cached(root, loaded, key, open_one, data.count, labels=labels, **work), labels


def model_key(loaded) -> dict:
    """What tells one model of `load_for_inference` from another: digest, precision, a look at weights and transform.

    The look at the weights is for `open_clip:NAME` without a tag, whose weights are random and new in every process.
    The transform is known by what it does to a picture.
    """
    weights = hashlib.sha256()
    for name, value in sorted(loaded.model.state_dict().items()):
        weights.update(name.encode() + value.reshape(-1)[:64].float().cpu().numpy().tobytes())
    rows, columns = np.mgrid[0:150, 0:211]
    pixels = np.stack([rows * 7 % 256, columns * 5 % 256, rows * columns % 256], -1).astype(np.uint8)
    seen = loaded.preprocess(Image.fromarray(pixels))
    return {
        "checkpoint": loaded.digest,
        "precision": loaded.precision,
        "weights": weights.hexdigest(),
        "transform": hashlib.sha256(seen.numpy().tobytes()).hexdigest(),
    }


def data_key(
    name: str,
    split: str | None,
    count: int,
    open_one: Callable[[int], Image.Image],
    items: Iterable[str | Path] = (),
) -> dict:
    """What tells one set of pictures from another: name, split, number, some decoded pictures spread over it, and the
    names of all (strings) or also size and time of change (paths of files) where they are known."""
    pictures, listing = hashlib.sha256(), hashlib.sha256()
    for place in np.linspace(0, count - 1, min(count, _SAMPLES)).astype(int).tolist():
        picture = open_one(place)
        pictures.update(f"{place} {picture.size}".encode() + picture.tobytes())
    for item in items:
        state = os.stat(item) if isinstance(item, Path) else None
        known = f"{item.name}\0{state.st_size}\0{state.st_mtime_ns}" if state else str(item)
        listing.update(f"{known}\n".encode(errors="surrogateescape"))
    found = {"pictures": pictures.hexdigest(), "items": listing.hexdigest()}
    return {"set": name, "split": split, "count": count, **found}


def _open_folder(root: str | Path, key: dict) -> Path:
    text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True, indent=1, ensure_ascii=False)
    folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key.json").is_file():
        write_whole(folder / "key.json", [text.encode()])  # for people: what is in here
    return folder


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    """Features and labels of a chunk; None where it is not there or not as it was written."""
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
        found = tensors["features"], tensors["labels"]
        return found if torch.equal(tensors["checksum"], _checksum(path, *found)) else None
    except (CheckpointError, KeyError):
        return None


def _checksum(path: Path, features: Tensor, labels: Tensor) -> Tensor:
    """Of the place as well: a good file under another name is wrong."""
    value = zlib.crc32(f"{path.parent.name}/{path.name}".encode())
    for tensor in (features, labels):
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return torch.tensor([value])
