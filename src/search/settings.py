"""Settings of the commands: typed, checked before any work."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rwkv_clip.config import ranged

from .engines import EXACT

INDICES = Path("logs") / "search"  # where indices go that are given no place


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What pictures are indexed, and by which model."""

    images: str | None = None
    """Folder of pictures (no captions needed), .rec, tar, JSONL, Parquet, a glob of these, or a picture. A folder with
    pictures means these; name the manifest in it for what that says of them."""
    image_root: str | None = None
    """Folder of the pictures that a manifest names; default: that of the manifest, or images/ in it."""
    image_field: str | None = None
    """Field with the picture or its path, if it has none of the usual names."""
    allow_outside: bool = False
    """Names and links may lead out of the folder of the pictures."""
    checkpoint: str | None = None
    """Model: a run folder, checkpoint, weights file, or open_clip:NAME:TAG. Default: the one that made the vectors."""
    model: str | None = None
    """Model name or JSON, where the checkpoint does not describe its model."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best present."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model while it encodes pictures."""
    batch_size: int = ranged(64, minimum=1)
    """Pictures that are decoded ahead of the model."""
    workers: int = ranged(4, minimum=0)
    """Threads that decode pictures."""
    output: str | None = None
    """Folder of the index; default: one for each source in logs/search."""

    def index_folder(self) -> Path:
        """Where the index is."""
        return Path(self.output) if self.output else INDICES / name_index(self.images or "")

    def problems(self) -> list[str]:
        """What is missing."""
        found = []
        if self.images is not None and not self.images.strip():
            found.append("images: is empty; name a folder of pictures")
        if self.images and not self.checkpoint:
            found.append("checkpoint: not set; say which model encodes the pictures")
        return found


@dataclass(frozen=True, kw_only=True)
class CollectionSettings(SourceSettings):
    """What is searched: pictures, which are indexed first, or vectors that are there."""

    features: str | None = None
    """Folder of an index, of features that `eval.main features` wrote, or of clip-retrieval's files (img_emb/)."""
    engine: str = EXACT
    """exact, or what finds near rows beyond a few million: faiss:FACTORY (faiss:HNSW32), usearch, qdrant:TARGET or
    lancedb:FOLDER, the last two of what `export` wrote."""
    collection: str = "pictures"
    """Name of the collection or table of qdrant or lancedb."""

    def problems(self) -> list[str]:
        """None of the two, or both."""
        if bool(self.images) == bool(self.features):
            return ["images: give the pictures, or --features FOLDER, one of the two"]
        return super().problems()


def name_index(images: str) -> str:
    """A name for the index of a source: readable, and another one for each place."""
    place = os.path.abspath(images)
    digest = hashlib.blake2b(os.fsencode(place), digest_size=4).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", Path(place).stem.encode("utf-8", "replace").decode()).strip("-.")[:60]
    return f"{name or 'pictures'}-{digest}"


def parse_conditions(entries: tuple[str, ...]) -> dict[str, list[str]]:
    """("year=2020", "year=2021") -> {"year": ["2020", "2021"]}. ValueError for another form."""
    wanted: dict[str, list[str]] = {}
    for entry in entries:
        field, equals, value = entry.partition("=")
        if not equals or not field:
            raise ValueError(f"where: {entry!r} is not FIELD=VALUE")
        wanted.setdefault(field, []).append(value)
    return wanted
