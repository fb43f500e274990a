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
    """Preset name, path of a model JSON, an open_clip model name, or what holds weights to start from, too:
    hf-hub:org/name, a folder with a configuration, the path of a run folder."""
    pretrained: str | None = None
    """Weights to start from: checkpoint folder, .safetensors or released .pt; an open_clip tag for its models."""
    pretrained_image: str | None = None
    """Weights of the image tower alone, the text tower starts anew (LiT): of a run or checkpoint, any file that
    --pretrained takes, open_clip:NAME:TAG, or an ImageNet classifier of timm's for a tower of timm's."""
    pretrained_text: str | None = None
    """Weights of the text tower alone, in the same ways, or a BERT's without its pooler and heads, whose projection
    starts anew."""
    force_image_size: tuple[int, ...] | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Train at another picture size than the model's: N, or height and width; positions of the weights are resized."""
    force_context_length: int | None = field(default=None, metadata={"limits": {"minimum": 2}})
    """Train at another number of tokens per text than the model's; positions of the weights are resized."""
    drop_path: float | None = field(default=None, metadata={"limits": {"minimum": 0, "below": 1}})
    """Stochastic depth of the image tower; default: the model preset's."""
    force_patch_dropout: float = ranged(0.0, minimum=0, below=1)
    """Fraction of the patches that a ViT leaves out in training, others for each image and step (FLIP: arXiv
    2212.00794)."""

    @property
    def overrides(self) -> dict[str, int | tuple[int, ...] | None]:
        """What `create_model` changes in the description of the model."""
        size = self.force_image_size
        size = size if size is None or len(size) > 1 else size[0]  # type: ignore[assignment]
        return {"force_image_size": size, "force_context_length": self.force_context_length}

    def problems(self) -> list[str]:
        names = ("pretrained", "pretrained_image", "pretrained_text")
        found = [problem for name in names for problem in not_utf8(name, getattr(self, name))]
        if self.force_image_size is not None and not 1 <= len(self.force_image_size) <= 2:
            size = " ".join(map(str, self.force_image_size)) or "nothing"
            found.append(f"force_image_size: {size} is neither one number nor height and width; give one or two")
        return found


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
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the records of log.jsonl go as well. wandb reads its own environment variables (WANDB_ENTITY, WANDB_MODE
    ..), and trackio its own (TRACKIO_SPACE_ID ..)."""
    wandb_project_name: str | None = None
    """Project in wandb or trackio; default: WANDB_PROJECT, else rwkv-clip."""
    wandb_notes: str | None = None
    """Notes on the run in wandb; default: WANDB_NOTES."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run in wandb; default: WANDB_TAGS."""

    def problems(self) -> list[str]:
        return []


def not_utf8(key: str, value: str | None) -> list[str]:
    """Problems with a path that safetensors could not open."""
    value = value or ""
    if value.encode(errors="replace") == value.encode(errors="surrogatepass"):
        return []
    return [f"{key}: {value!r} is not UTF-8, so safetensors cannot read weights from it; rename it"]
