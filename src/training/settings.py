"""Settings of a training run: tables of typed fields, checked before any work.

Flags (`--batch-size`), keys of JSON files and names in messages are flat: tables only group what a function receives.
The names are open_clip's, with open_clip's meaning, wherever open_clip has the setting.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rwkv_clip.config import ConfigError, flat, flat_names, load_preset, parse, ranged
from rwkv_clip.losses import LossSettings
from rwkv_clip.models.freezing import FreezeSettings

from .policy import build_policy

log = logging.getLogger(__name__)
Precision = Literal["auto", "fp32", "amp", "amp_bf16"]


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

    def problems(self) -> list[str]:
        found = []
        names = [*flat_names(Settings), "global_batch", "total_steps"]
        for name in self.allow_change:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                found.append(f"allow_change: {name!r} is not a setting{hint}")
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
class DataSettings:
    """What is read, and how samples are made from it."""

    train_data: str | None = None
    """Records: prefix, .rec file, folder, glob or comma-separated list; or folders of Chinese-CLIP's LMDB."""
    val_data: str | None = None
    """Retrieval set for validation during the run: JSONL, JSON or records."""
    val_split: str | None = None
    """Use only the entries of --val-data that belong to this split."""
    val_prefix: str = ""
    """Prepended to every caption in validation."""
    val_batch_size: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Pairs that the validation loss compares with each other; default: --batch-size."""
    text_choice: Literal["one", "first", "all"] = "one"
    """Texts per image and step: one drawn at random (seeded by sample), always the first, or all of them."""
    texts: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Use the first N texts of each record, which must hold at least N; default: all."""
    text_probs: tuple[float, ...] | None = None
    """Probability of each text, in the records' order, with --text-choice one; default: the same for all."""
    workers: int = ranged(4, minimum=0)
    """Decoding processes (torch) or threads (DALI) per rank; 0 decodes in the training process."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI where it is installed, a GPU is present and the settings are nothing beyond it, else torch."""
    crop: Literal["random", "whole"] = "random"
    """What an image shows: a random crop, or all of it, squashed to the model's size."""
    crop_area: tuple[float, float] = (0.7, 1.0)
    """Fraction of the image that a random crop keeps."""
    crop_aspect: tuple[float, float] = (0.8, 1.25)
    """Width / height of a random crop, relative to the image's pixels."""
    flip: float = ranged(0.5, minimum=0, maximum=1)
    """Probability of mirroring an image."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, in either case antialiased; bicubic needs the torch loader."""
    auto_augment: str | None = None
    """timm's policy applied to each crop: original (AutoAugment), rand-m9-mstd0.5, ..; needs the torch loader."""
    max_bad: int = ranged(100, minimum=0)
    """Up to this many damaged records are always tolerated, each replaced by the next good one."""
    max_bad_fraction: float = ranged(0.001, minimum=0, maximum=1)
    """The run ends when more than --max-bad records and more than this fraction of those seen are damaged."""

    def problems(self) -> list[str]:
        found = []
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_area" and high > 1):
                found.append(f"{name}: ({low}, {high}) is not an increasing range of positive numbers up to 1 (area)")
        if (probs := self.text_probs) is not None:
            if self.text_choice != "one":
                found.append(
                    f"text_probs: {list(probs)} is for --text-choice one, not {self.text_choice}; leave it out"
                )
            if min(probs, default=-1.0) < 0 or abs(sum(probs) - 1) > 1e-6:
                found.append(f"text_probs: {list(probs)} are no probabilities, which are 0 or more and have the sum 1")
            if self.texts not in (None, len(probs)):
                found.append(f"text_probs: {len(probs)} numbers for --texts {self.texts}; give one for each text")
        if self.loader == "dali" and (unable := self.beyond_dali()):
            found.append(f"{unable} is nothing that the loader dali does; use --loader torch")
        if self.auto_augment is not None:
            try:
                build_policy(self.auto_augment, (224, 224), self.interpolation)
            except ValueError as error:
                found.append(str(error))
        return found

    def beyond_dali(self) -> str:
        """The setting, with its value, that only the torch loader can do; "" without one."""
        if self.auto_augment is not None:
            return f"auto_augment: {self.auto_augment!r}"
        return "" if self.interpolation == "bilinear" else f"interpolation: {self.interpolation}"


@dataclass(frozen=True)
class ParallelSettings:
    """How a step is computed: batch size, precision, devices and ranks."""

    batch_size: int = ranged(512, minimum=1)
    """Pairs per rank that the towers process at once; the pairs of all ranks and micro-batches are each other's
    negatives."""
    accum_freq: int = ranged(1, minimum=1)
    """Micro-batches per rank and step: batch_size x accum_freq x ranks pairs a step, in the memory of batch_size."""
    precision: Precision = "amp_bf16"
    """amp_bf16 (bfloat16) and amp (float16, with a gradient scaler) autocast the towers; weights, optimizer and loss
    stay float32. auto: amp_bf16 where the device computes in it, else fp32."""
    device: str | None = None
    """cpu, cuda or mps; default: the best present."""
    torchcompile: bool = False
    """Compile the towers with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What each rank holds of the model: all of it (ddp), a shard (fsdp), or a shard within its node (hsdp)."""
    deterministic: bool = False
    """The same bits on 1, 2, 4, .. --max-ranks ranks: micro-batches of a fixed size, summed in a fixed order."""
    max_ranks: int = ranged(8, minimum=1)
    """With --deterministic: the largest number of ranks, a power of two."""

    def problems(self) -> list[str]:
        found = []
        if self.max_ranks & (self.max_ranks - 1):
            found.append(f"max_ranks: {self.max_ranks} is not a power of two (1, 2, 4, 8, ..)")
        if self.deterministic and self.parallel != "ddp":
            found.append(f"deterministic: needs parallel ddp, not {self.parallel}")
        if self.device is not None and self.device.partition(":")[0] not in ("cpu", "cuda", "mps"):
            found.append(f"device: {self.device!r} is not cpu, cuda or mps")
        return found


@dataclass(frozen=True)
class PublishedSettings:
    """What a recipe's learning rate was published with."""

    lr: float | None = field(default=None, metadata={"limits": {"above": 0}})
    batch: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Pairs in a step."""

    def problems(self) -> list[str]:
        if (self.lr is None) != (self.batch is None):
            return [f"published: lr {self.lr} and batch {self.batch}; set both or neither"]
        return []


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    epochs: int = ranged(32, minimum=1)
    """Passes over the records."""
    max_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Stop (and complete the schedule) after this many steps instead of after --epochs."""
    lr: float = ranged(1e-3, above=0)
    published: PublishedSettings = field(default=PublishedSettings())
    """Of a recipe: a run with a quarter of its batch or less, but not a lower --lr, is warned."""
    wd: float = ranged(0.2, minimum=0)
    decay: Literal["all", "matrices"] = "matrices"
    """Weight decay on every parameter (as released) or only on tensors of two or more dimensions."""
    beta1: float = ranged(0.9, minimum=0, below=1)
    beta2: float = ranged(0.98, minimum=0, below=1)
    eps: float = ranged(1e-8, above=0)
    schedule: Literal["onecycle", "cosine", "constant"] = "cosine"
    """One-cycle: lr/25 up to lr, down to lr/25/1e4, both cosine. Cosine: linear warm-up, then down to 0."""
    cycle_beta1: bool = False
    """One-cycle only: cycle beta1 0.95 -> 0.85 -> 0.95 inversely to the learning rate, as the released recipe does."""
    warmup: int | None = field(default=None, metadata={"limits": {"minimum": 0}})
    """Steps of warm-up; default: --warmup-fraction of all steps."""
    warmup_fraction: float = ranged(0.1, minimum=0, below=1)
    """Fraction of all steps spent warming up, unless --warmup counts them."""
    grad_clip_norm: float | None = field(default=1.0, metadata={"limits": {"above": 0}})

    def problems(self) -> list[str]:
        if self.cycle_beta1 and self.schedule != "onecycle":
            return [f"cycle_beta1: needs schedule onecycle, not {self.schedule}"]
        return []


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
    report_training_batch_acc: bool = False
    """Log how often an image of the batch scores highest with its own text, and a text with its own image."""
    val_every_n_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Steps between validations; default: only at the end."""
    val_frequency: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Epochs between validations, besides --val-every-n-steps: after the step that completes the epoch."""
    save_every_n_steps: int = ranged(1000, minimum=1)
    save_frequency: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Epochs between checkpoints, besides --save-every-n-steps."""
    keep_checkpoints: int = ranged(2, minimum=2)
    """Newest checkpoints kept; at least 2, so that a good one exists while the next is written."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Settings:
    """One training run."""

    run: RunSettings = flat(RunSettings)
    model: ModelSettings = flat(ModelSettings)
    freezing: FreezeSettings = flat(FreezeSettings)
    data: DataSettings = flat(DataSettings)
    loss: LossSettings = flat(LossSettings)
    parallel: ParallelSettings = flat(ParallelSettings)
    optimizer: OptimizerSettings = flat(OptimizerSettings)
    faults: FaultSettings = flat(FaultSettings)
    log: LogSettings = flat(LogSettings)

    def problems(self) -> list[str]:
        return []


def not_utf8(key: str, value: str | None) -> list[str]:
    """Problems with a path that safetensors could not open."""
    value = value or ""
    if value.encode(errors="replace") == value.encode(errors="surrogatepass"):
        return []
    return [f"{key}: {value!r} is not UTF-8, so safetensors cannot read weights from it; rename it"]


def parse_settings(data: dict[str, Any]) -> Settings:
    """Settings from flat JSON data of this or any earlier version. ConfigError lists every problem."""
    return parse(Settings, update_names(data))


# Names before 0.6 -> current names. As flags they still work, with a warning.
RENAMED = {"views": "text_choice", "max_bad_share": "max_bad_fraction"}
AUTOCAST_BEFORE = {"bf16": "amp_bf16", "fp16": "amp"}  # values of `precision`


def update_names(data: dict[str, Any]) -> dict[str, Any]:
    """Flat settings with current names and meanings. Before 0.6 `warmup` was a fraction and `precision` named the
    autocast dtype. ConfigError for an old name beside its new one."""
    if not isinstance(data, dict):
        return data
    twice = [f"{old}: is called {new} since 0.6, which is set, too; leave it out" for old, new in RENAMED.items()]
    if found := [problem for problem, (old, new) in zip(twice, RENAMED.items()) if old in data and new in data]:
        raise ConfigError(found)
    data = {RENAMED.get(key, key): value for key, value in data.items()}
    if isinstance(data.get("warmup"), float) and "warmup_fraction" not in data:
        data["warmup_fraction"] = data.pop("warmup")
    if isinstance(data.get("precision"), str):
        data["precision"] = AUTOCAST_BEFORE.get(data["precision"], data["precision"])
    return data


def update_flags(arguments: list[str]) -> list[str]:
    """Arguments with current names. ConfigError for a value whose meaning has changed."""
    updated, problems = [], []
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        value = value if equals else "".join(arguments[i + 1 : i + 2])
        if name in RENAMED:
            new = f"--{RENAMED[name].replace('_', '-')}"
            log.warning("%s is called %s since 0.6", flag, new)
            argument = f"{new}{equals}{value}" if equals else new
        elif name == "warmup" and value.startswith(("0.", ".")):
            problems.append(f"warmup: {value} is not a number of steps; use --warmup-fraction {value}")
        elif name == "precision" and value in AUTOCAST_BEFORE:
            problems.append(
                f"precision: {value!r} would be the type of the weights, which stay float32 in training; for autocast "
                f"in that type use --precision {AUTOCAST_BEFORE[value]}"
            )
        updated.append(argument)
    if problems:
        raise ConfigError(problems)
    return updated


def load_settings(preset: str | None) -> Settings:
    """Settings of a training preset: a shipped name or the path of a JSON file; None gives the defaults."""
    return Settings() if preset is None else parse_settings(load_preset("training", preset))
