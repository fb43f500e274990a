"""Which run it is, what it trains, what it survives, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rwkv_clip.config import ranged


@dataclass(frozen=True)
class RunSettings:
    """Which run this is, and where it is stored."""

    logs: str = "logs"
    """Folder of run folders."""
    name: str | None = None
    """Run folder name; default: model and time."""
    resume: str | None = None
    """`latest` (resume in the run folder, or start if it holds no checkpoint yet) or a checkpoint folder."""
    allow_change: tuple[str, ...] = ()
    """Names of settings that may differ from those of the run to resume; checkpoints record the change."""
    seed: int = ranged(0, minimum=0)
    """Of the initial weights, and of all that is random in a run."""

    def problems(self) -> list[str]:
        found = []
        if self.name is not None and (Path(self.name).name != self.name or self.name == ".."):
            found.append(f"name: {self.name!r} is not the name of a folder; --logs sets where it goes")
        return found + [problem for key in ("logs", "name", "resume") for problem in not_utf8(key, getattr(self, key))]


@dataclass(frozen=True)
class ModelSettings:
    """What is trained, and from which weights."""

    model: str = "RWKV-CLIP-B-32"
    """Preset name, path of a model JSON, or an open_clip model name."""
    pretrained: str | None = None
    """Weights to start from: checkpoint folder, .safetensors or released .pt; an open_clip tag for its models."""
    pretrained_image: str | None = None
    """Weights of the image tower alone: a CLIP's with OpenAI's keys, of which visual.* and logit_scale are taken."""
    pretrained_text: str | None = None
    """Weights of a BERT text tower alone: a BERT's, without its pooler and heads; the projection starts anew."""
    drop_path: float | None = field(default=None, metadata={"limits": {"minimum": 0, "below": 1}})
    """Stochastic depth of the image tower; default: the model preset's."""
    force_patch_dropout: float = ranged(0.0, minimum=0, below=1)
    """Fraction of the patches that a ViT leaves out in training, others for each image and step (FLIP: arXiv
    2212.00794)."""

    def problems(self) -> list[str]:
        names = ("pretrained", "pretrained_image", "pretrained_text")
        return [problem for name in names for problem in not_utf8(name, getattr(self, name))]


@dataclass(frozen=True)
class FaultSettings:
    """What a run survives."""

    timeout: float = ranged(120.0, above=0)
    """Seconds without a sign of life from a rank after which all ranks exit."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient never reaches the weights: stop the run, or skip the step."""
    max_nonfinite: int = ranged(3, minimum=1)
    """With --on-nonfinite skip: stop after more than this many non-finite steps in a row."""

    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True)
class LogSettings:
    """What a run writes, and how often."""

    log_every_n_steps: int = ranged(10, minimum=1)
    """Steps between log lines."""
    report_training_batch_acc: bool = False
    """Log how often an image of the batch scores highest with its own text, and a text with its own image."""
    val_every_n_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Steps between validations; default: only at the end."""
    val_frequency: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Epochs between validations, besides --val-every-n-steps: after the step that completes the epoch."""
    save_every_n_steps: int = ranged(1000, minimum=1)
    """Steps between checkpoints."""
    save_frequency: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Epochs between checkpoints, besides --save-every-n-steps."""
    keep_checkpoints: int = ranged(2, minimum=2)
    """Newest checkpoints kept; at least 2, so that a good one exists while the next is written."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def problems(self) -> list[str]:
        return []


def not_utf8(key: str, value: str | None) -> list[str]:
    """Problems with a path that safetensors could not open."""
    value = value or ""
    if value.encode(errors="replace") == value.encode(errors="surrogatepass"):
        return []
    return [f"{key}: {value!r} is not UTF-8, so safetensors cannot read weights from it; rename it"]
