"""Features that outlive the process: a killed extraction continues where it stopped, a finished one is only read.

A cache has one folder for each (weights, data, transform, precision), and in it one file for every CHUNK items, which
appears whole or not at all. CHUNK is a multiple of the blocks that the model gets, so features have the same bits with
and without a cache, resumed or not, on any number of ranks. A damaged file is recomputed.

The key contains the state of every file with pictures: size, inode, and the times at which its content and its metadata
changed (a copy may keep an older time of content). If a picture was replaced, moved or touched, or the set copied
elsewhere, all features are recomputed. Labels are never cached. If the cache cannot be written, the run warns and
continues without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rwkv_clip.datasets import ClassificationSet
from rwkv_clip.dist import gather, max_over_ranks, rank_and_size
from rwkv_clip.features import on_all_ranks
from rwkv_clip.files import Bytes, write_whole
from rwkv_clip.serialization import CheckpointError, encode_tensors, read_tensors

from .encoder import Encoder

if TYPE_CHECKING:
    from rwkv_clip.factory import Loaded

SCHEMA = 2  # a new number when the same weights give different features
CHUNK = 2048  # items in a file: some seconds of work, and some MB
_SAMPLES = 16  # pictures whose content is hashed as well: a file system may not record useful times
log = logging.getLogger(__name__)


def encode_labelled(encoder: Encoder, data: ClassificationSet) -> Tensor:
    """Features (count, C) of the pictures of a set of classes; all ranks call it and get all features."""
    return encode_cached(encoder, lambda: data_key(data.name, data.split, data.count, data.open, data.files), data.open)


def encode_cached(encoder: Encoder, make_key: Callable[[], dict], open_one: Callable[[int], Image.Image]) -> Tensor:
    """Features of a whole set, with what the encoder's cache already has. make_key: gives the set's `data_key`."""
    key = on_all_ranks(make_key, encoder.device)
    folder = None
    if encoder.cache is not None:
        folder = _folder_of(encoder.cache, model_key(encoder.loaded) | key, encoder.device)
    parts = []

    def encode(start: int, stop: int) -> Tensor:
        return encoder.extractor.encode_images(lambda index: open_one(start + index), stop - start)

    for start in range(0, key["count"], CHUNK) or [0]:
        stop = min(start + CHUNK, key["count"])
        path = folder / f"{start:09}-{stop:09}.safetensors" if folder else None
        parts.append(cached(path, partial(encode, start, stop), encoder.device))
    return torch.cat(parts)


def cached(path: Path | None, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The features in a file, else make(), which the main rank then writes there; path None: no file. All ranks call
    it, as one that finds nothing (on its own disk) needs the others to compute."""
    found = _read(path) if path else None
    if max_over_ranks(torch.tensor(float(found is None), device=device)):
        found = make()
        if path:
            _keep(path, encode_tensors({"features": found, "checksum": _checksum(path, found)}))
    return found


def model_key(loaded: Loaded) -> dict:
    """What distinguishes models of `load_for_inference`: description, digest of the weights file, precision, samples of
    weights and transform.

    One file of weights may be read as several models (QuickGELU or not). Weights are sampled for `open_clip:NAME`
    without a tag, where they are random and new in every process. The transform is identified by its effect on a
    picture.
    """
    weights = hashlib.sha256()
    for name, value in sorted(loaded.model.state_dict().items()):
        weights.update(name.encode() + value.reshape(-1)[:64].float().cpu().numpy().tobytes())
    rows, columns = np.mgrid[0:150, 0:211]
    pixels = np.stack([rows * 7 % 256, columns * 5 % 256, rows * columns % 256], -1).astype(np.uint8)
    seen = loaded.preprocess(Image.fromarray(pixels))
    return {
        "model": repr(getattr(loaded.model, "spec", None)),
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
    """What distinguishes sets of pictures: name, split, number, some decoded pictures spread over the set, and of all
    `items`, in order, the names (strings) or also the state (paths of files)."""
    pictures, listing = hashlib.sha256(), hashlib.sha256()
    for place in np.linspace(0, count - 1, min(count, _SAMPLES)).astype(int).tolist():
        picture = open_one(place)
        pictures.update(f"{place} {picture.size}".encode() + picture.tobytes())
    for item in items:
        line = str(item)
        if isinstance(item, Path):
            state = os.stat(item)
            line = f"{item.name}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\0{state.st_ino}"
        listing.update(f"{line}\n".encode("utf-8", "backslashreplace"))
    found = {"pictures": pictures.hexdigest(), "items": listing.hexdigest()}
    return {"set": name, "split": split, "count": count, **found}


def _folder_of(root: Path, key: dict, device: torch.device) -> Path:
    """The folder of a key. Ranks that see different files (on disks of their own) share one for this combination."""
    text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
    every = gather(torch.tensor([list(digest)], dtype=torch.int64, device=device)).cpu()
    if (every != every[0]).any():
        digest = hashlib.sha256(every.numpy().tobytes()).digest()
    folder = root / digest.hex()[:24]
    if not (folder / "key.json").is_file():
        _keep(folder / "key.json", [text.encode("utf-8", "backslashreplace")])  # for readers: what is in here
    return folder


def _keep(path: Path, pieces: Iterable[Bytes]) -> None:
    """Write a file of the cache on the main rank; a warning if that fails."""
    if rank_and_size()[0]:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, pieces)
    except OSError as error:
        log.warning("cache: %s cannot be written (%s); the run continues without it", path, error.strerror)


def _read(path: Path) -> Tensor | None:
    """Features of a chunk; None if it is missing or not as it was written."""
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
        found = tensors["features"]
        return found if torch.equal(tensors["checksum"], _checksum(path, found)) else None
    except (CheckpointError, KeyError, OSError):
        return None


def _checksum(path: Path, features: Tensor) -> Tensor:
    """Includes the name: a good file in another place is wrong."""
    value = zlib.crc32(f"{path.parent.name}/{path.name}".encode())
    return torch.tensor([zlib.crc32(features.contiguous().numpy(), value)])
