"""Settings of an evaluation; the command line is built from these types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What every evaluation needs."""

    checkpoint: str
    """Run folder, checkpoint folder, .safetensors, released .pt, or open_clip:NAME[:TAG]."""
    model: str | None = None
    """Model name or JSON, where the checkpoint does not say what it holds."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best that is present."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype; features and metrics stay float32 and exact."""
    batch_size: int = 64
    """Pictures or texts per forward pass; no figure depends on it."""
    workers: int = 4
    """Threads that decode pictures."""
    logs: str = "logs/eval"
    """Folder in which the evaluation makes its own folder."""
    name: str | None = None
    """Name of that folder; default: time, task and model. A number is added where it exists already."""

    def check(self) -> None:
        """ValueError for a value that no evaluation can have."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; use at least 1")
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ValueError(f"name: {self.name!r} is no folder name; leave out slashes, `logs` sets the place")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers}; use 0 (decode between the batches) or more")


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(EvalSettings):
    """Zero-shot retrieval, image to text and text to image: recall at 1, 5 and 10."""

    data: str
    """JSON list, JSON lines, Karpathy JSON, or records (prefix, .rec, glob, comma list)."""
    split: str | None = None
    """Take only entries of this split ("all": every one); needed where the file holds several."""
    image_root: str | None = None
    """Folder of the pictures; default: the data file's folder or its `images` folder."""
    views: tuple[str, ...] | None = None
    """For records: names of the texts that count as captions; default: all."""
    dataset: str | None = None
    """Name in the report; flickr30k and coco bring the published rows. Default: from the file."""
    prefix: str = ""
    """Put before every caption; "a photo of " in the published tables of RWKV-CLIP and ALIP."""
    gallery: int = 8
    """Queries shown in retrieval.png with their five best pictures; 0: none."""

    def check(self) -> None:
        super().check()
        if self.gallery < 0:
            raise ValueError(f"gallery: {self.gallery}; use 0 (no picture) or more")


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(EvalSettings):
    """Zero-shot classification: top-1, top-5 and mean per class."""

    dataset: tuple[str, ...] = ("imagefolder",)
    """imagefolder (a folder per class) or known sets (cifar10 cifar100 food101 ...), one after the other."""
    data: str = "data"
    """Folder of class folders; for a known set also the root folder in which torchvision looks for it."""
    names: str | None = None
    """JSON {"names": {folder: name}, "templates": ["a photo of a {}."]}; "names" may be a list in the order
    of the sorted folders. Default: names.json in the data folder, else the folders and its own templates."""
