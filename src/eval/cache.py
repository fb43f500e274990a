"""Features that outlive the process that computed them: a killed extraction goes on, a finished one is only read.

A cache folder has one folder for each (weights, data, transform, precision), and in it one file for every CHUNK items,
which appears whole or not at all. CHUNK is a multiple of the blocks that the model gets, so features are the same bits
with and without a cache, resumed or not, on any number of ranks. A file that is damaged is made again.

The key sees the state of every file that pictures lie in: size, time of change (of content, and of anything else: a
copy may bring an older time of content along) and inode. A picture that was replaced, moved or touched makes all
features new; a copy of the set elsewhere as well. Labels are never kept. A cache is an aid: where it cannot be
written, the run goes on without, and says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rwkv_clip.dist import gather, max_over_ranks, rank_and_size
from rwkv_clip.features import FeatureExtractor, raise_together
from rwkv_clip.files import write_whole
from rwkv_clip.serialization import CheckpointError, encode_tensors, read_tensors

SCHEMA = 2  # a new number when the same weights give other features
CHUNK = 2048  # items in a file: some seconds of work, and some MB
T = TypeVar("T")
_SAMPLES = 16  # pictures that are looked at all the same: a file system may have no times worth the name
log = logging.getLogger(__name__)


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
) -> Tensor:
    """`FeatureExtractor.encode_images` of a whole set, with what the cache below `root` (None: no cache) already has.

    loaded: a model of `load_for_inference`; data: the set's `data_key`. All ranks call it and get all features; the
    main rank alone writes.
    """
    folder = _folder_of(Path(root), model_key(loaded) | data, device) if root is not None else None
    extractor = FeatureExtractor.of(loaded, device, batch_size=batch_size, workers=workers, progress=True)
    parts = []
    for start in range(0, count, CHUNK) or [0]:
        stop = min(start + CHUNK, count)
        path = folder / f"{start:09}-{stop:09}.safetensors" if folder else None
        found = _read(path) if path else None
        # One rank that lacks a chunk (a disk of its own) needs the others to compute it.
        if max_over_ranks(torch.tensor(float(found is None), device=device)):
            found = extractor.encode_images(lambda i, start=start: open_one(start + i), stop - start)
            if path:
                keep(path, encode_tensors({"features": found, "checksum": _checksum(path, found)}))
        parts.append(found)
    return torch.cat(parts)


def keep(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file of a cache, by the main rank. Where that cannot be, a warning says so."""
    if rank_and_size()[0]:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, pieces)
    except OSError as error:
        log.warning("cache: %s cannot be written (%s); the run goes on without it", path, error.strerror)


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
    labels = on_all_ranks(data.labels, work["device"])

    def make_key() -> dict:
        return data_key(data.name, data.split, data.count, lambda index: data.read(index)[0], data.files)

    key = on_all_ranks(make_key, work["device"])
    return encode_cached(root, loaded, key, data.open_one(labels), data.count, **work), labels


def model_key(loaded) -> dict:
    """What tells one model of `load_for_inference` from another: its description, the digest of the weights, precision,
    a look at weights and transform.

    One file of weights may be read as several models (QuickGELU or not). The look at the weights is for
    `open_clip:NAME` without a tag, whose weights are random and new in every process. The transform is known by what
    it does to a picture.
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
    """What tells one set of pictures from another: name, split, number, some decoded pictures spread over it, and of
    all `items`, in their order, the names (strings) or also the state (paths of files)."""
    pictures, listing = hashlib.sha256(), hashlib.sha256()
    for place in np.linspace(0, count - 1, min(count, _SAMPLES)).astype(int).tolist():
        picture = open_one(place)
        pictures.update(f"{place} {picture.size}".encode() + picture.tobytes())
    for item in items:
        known = str(item)
        if isinstance(item, Path):
            state = os.stat(item)
            known = f"{item.name}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\0{state.st_ino}"
        listing.update(f"{known}\n".encode("utf-8", "backslashreplace"))
    found = {"pictures": pictures.hexdigest(), "items": listing.hexdigest()}
    return {"set": name, "split": split, "count": count, **found}


def _folder_of(root: Path, key: dict, device: torch.device) -> Path:
    """The folder of a key. Ranks that see other files (disks of their own) have one for all that they see together."""
    text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
    every = gather(torch.tensor([list(digest)], dtype=torch.int64, device=device)).cpu()
    if (every != every[0]).any():
        digest = hashlib.sha256(every.numpy().tobytes()).digest()
    folder = root / digest.hex()[:24]
    if not (folder / "key.json").is_file():
        keep(folder / "key.json", [text.encode("utf-8", "backslashreplace")])  # for people: what is in here
    return folder


def _read(path: Path) -> Tensor | None:
    """Features of a chunk; None where it is not there or not as it was written."""
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
        found = tensors["features"]
        return found if torch.equal(tensors["checksum"], _checksum(path, found)) else None
    except (CheckpointError, KeyError, OSError):
        return None


def _checksum(path: Path, features: Tensor) -> Tensor:
    """Of the place as well: a good file under another name is wrong."""
    value = zlib.crc32(f"{path.parent.name}/{path.name}".encode())
    return torch.tensor([zlib.crc32(features.contiguous().numpy(), value)])
