"""Settings that several tasks share; each task adds its own, and the command line is built from these types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rwkv_clip.config import ranged


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What every evaluation of a model needs."""

    checkpoint: str
    """Run folder, checkpoint folder, .safetensors, released .pt, or open_clip:NAME[:TAG]."""
    model: str | None = None
    """Model name or JSON, where the checkpoint does not describe its model."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best present."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the weights and of the arithmetic, as in open_clip's pure modes; decays, temperature and features stay
    float32, and metrics are exact."""
    batch_size: int = ranged(64, minimum=1)
    """Pictures kept ready for the model, which takes blocks of a fixed size; no figure depends on it."""
    workers: int = ranged(4, minimum=0)
    """Threads that decode pictures; 0: decode between batches."""
    logs: str = "logs/eval"
    """Folder in which the evaluation makes its own folder."""
    cache: str | None = None
    """Folder that keeps image features between runs, and when a run is killed. Default: LOGS/cache for linear-probe and
    features (pictures) and classification (class embeddings), none for retrieval."""
    name: str | None = None
    """Name of that folder; default: time, task and model. A number is added where it exists already."""

    @property
    def cache_folder(self) -> Path:
        """Where features are kept."""
        return Path(self.cache or Path(self.logs) / "cache")

    def problems(self) -> list[str]:
        """Problems that no evaluation may have."""
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            return [f"name: {self.name!r} is not a folder name; leave out slashes, `logs` sets the place"]
        return []


@dataclass(frozen=True, kw_only=True)
class CaptionedSettings(EvalSettings):
    """Where pictures with captions are, and which of them are used."""

    image_root: str | None = None
    """Folder of the pictures; default: the data file's folder or its `images` folder."""
    texts: Annotated[tuple[str, ...] | None, arg(aliases=("--views",))] = None
    """For records: names of the texts that count as captions; default: all."""
    allow_outside: bool = False
    """Take pictures whose names lead out of the pictures' folder (`..`, absolute, links)."""
    prefix: str = ""
    """Prepended to every caption; "a photo of " in the published tables of RWKV-CLIP and ALIP."""


@dataclass(frozen=True, kw_only=True)
class ClassesSettings(EvalSettings):
    """Which sets of classes are evaluated."""

    dataset: tuple[str, ...] = ("imagefolder",)
    """imagefolder (a folder per class), elevater (label_cn.txt, label.txt and test/000, ..) or benchmarks (cifar10
    cifar100 food101 ... imagenetv2), one after the other; all: the eleven benchmarks of the published tables."""
