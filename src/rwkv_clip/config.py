"""Settings: typed, checked before any work, the same in JSON presets, on the command line and in checkpoints.

`parse` turns a dict into one of the dataclasses below and reports every mistake at once: unknown key (with the nearest
valid name), wrong type, value out of range. Presets are data: `configs/models/*.json` describe towers,
`configs/recipes/*.json` describe training runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .files import parse_json, read_bytes

CONFIGS = Path(__file__).parent / "configs"
MAX_JSON = 1 << 24  # bytes of a preset or model description that are read
LARGEST = (1 << 63) - 1  # what a tensor, a file and a seed can hold
T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that the user has to change; the message lists every problem found."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def ranged(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A dataclass field with limits: minimum, above (exclusive), maximum, below (exclusive)."""
    return field(default=default, metadata={"limits": limits})


@dataclass(frozen=True)
class GateConfig:
    """ALIP's gates: how much a sample, and each of its two pairs, counts. Defaults are those of the released code."""

    init: float = ranged(1.0, minimum=-1, maximum=1)
    """Running means of the similarities before the first step. They are 1 at most, so the weights begin near 0 and the
    loss warms up by itself."""
    momentum: float = ranged(0.99, minimum=0, maximum=1)
    """Share of a running mean that a step keeps."""
    sample_gamma: float = ranged(2.0, minimum=0)
    """How steeply a sample's weight falls where its two texts disagree (gamma_s)."""
    pair_gamma: float = ranged(2.0, minimum=0)
    """The same for the weight of a picture with one of its texts (gamma_p)."""

    def problems(self) -> list[str]:
        return []


Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Settings:
    """One training run. Names are open_clip's where open_clip has the setting."""

    model: str = "RWKV-CLIP-B-32"
    """Preset name, path of a model JSON, or an open_clip model name."""
    pretrained: str | None = None
    """Weights to start from: checkpoint folder, .safetensors or released .pt; an open_clip tag for its models."""
    train_data: str | None = None
    """Records: prefix, .rec file, folder, glob or comma-separated list."""
    val_data: str | None = None
    """Retrieval set for in-run validation: JSONL, JSON or records."""
    val_split: str | None = None
    """Take only entries of --val-data with this split."""
    val_prefix: str = ""
    """Put before every caption in validation."""
    logs: str = "logs"
    """Folder of run folders."""
    name: str | None = None
    """Run folder name; default: model and time."""
    resume: str | None = None
    """`latest` (go on in the run folder, start if there is nothing yet) or a checkpoint folder."""
    allow_change: tuple[str, ...] = ()
    """Names of settings that may differ from those of the run to resume; checkpoints note the change."""

    seed: int = ranged(0, minimum=0)
    epochs: int = ranged(32, minimum=1)
    """Passes over the records."""
    max_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """End (and end the schedule) after this many steps instead of --epochs."""
    batch_size: int = ranged(512, minimum=1)
    """Pairs per rank that the towers hold at a time; the pairs of all ranks and accumulations are negatives of each
    other."""
    accum_freq: int = ranged(1, minimum=1)
    """Batches per rank and step: batch_size x accum_freq x ranks pairs a step, in the memory of batch_size."""
    precision: Precision = "bf16"
    """Autocast dtype; weights, optimizer and loss stay float32. fp16 brings a gradient scaler; auto is bf16 where the
    device computes in it, else fp32."""
    device: str | None = None
    """cpu, cuda or mps; default: the best present."""
    torchcompile: bool = False
    """Compile the towers with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What a rank holds of the model: all (ddp), a share (fsdp), a share within its node (hsdp)."""
    deterministic: bool = False
    """The same bits on 1, 2, 4, .. --max-ranks ranks: the batch is computed in pieces and summed in a fixed order."""
    max_ranks: int = ranged(8, minimum=1)
    """With --deterministic: the largest number of ranks, a power of two."""
    timeout: float = ranged(120.0, above=0)
    """Seconds without a sign of life of a rank after which all ranks end."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite never reaches the weights: stop the run, or skip the step."""
    max_nonfinite: int = ranged(3, minimum=1)
    """--on-nonfinite skip: stop when more than this many steps in a row are not finite."""

    objective: Literal["infonce", "alip"] = "infonce"
    gates: GateConfig = GateConfig()
    """--objective alip: weights of samples and pairs."""
    views: Literal["one", "first", "all"] = "one"
    """Texts per image and step: one drawn at random (seeded by sample), always the first, or all of them."""
    texts: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Use the first so many texts of each record, which must hold as many; default: all."""
    drop_path: float | None = field(default=None, metadata={"limits": {"minimum": 0, "below": 1}})
    """Stochastic depth of the image tower; default: the model preset's."""

    lr: float = ranged(1e-3, above=0)
    wd: float = ranged(0.2, minimum=0)
    decay: Literal["all", "matrices"] = "matrices"
    """Weight decay on every parameter (as released) or only on tensors of two or more dimensions."""
    beta1: float = ranged(0.9, minimum=0, below=1)
    beta2: float = ranged(0.98, minimum=0, below=1)
    eps: float = ranged(1e-8, above=0)
    schedule: Literal["onecycle", "cosine", "constant"] = "cosine"
    """One-cycle: lr/25 up to lr, down to lr/25/1e4, both cosine. Cosine: linear warm-up, then down to 0."""
    cycle_beta1: bool = False
    """One-cycle only: move beta1 0.95 -> 0.85 -> 0.95 against the learning rate, as the released recipe does."""
    warmup: float = ranged(0.1, minimum=0, below=1)
    """Share of all steps spent warming up."""
    grad_clip_norm: float | None = field(default=1.0, metadata={"limits": {"above": 0}})

    workers: int = ranged(4, minimum=0)
    """Decoding processes (torch) or threads (DALI) per rank; 0 decodes in the training process."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI where it is installed and a GPU is present, else torch."""
    crop_area: tuple[float, float] = (0.7, 1.0)
    """Share of the picture that a random crop keeps."""
    crop_aspect: tuple[float, float] = (0.8, 1.25)
    """Width / height of a random crop, relative to the picture's pixels."""
    flip: float = ranged(0.5, minimum=0, maximum=1)
    """Probability of a mirrored picture."""
    max_bad: int = ranged(100, minimum=0)
    """Replaced (damaged) records that are always tolerated."""
    max_bad_share: float = ranged(0.001, minimum=0, maximum=1)
    """The run ends when more than --max-bad records and more than this share of those seen are damaged."""

    log_every_n_steps: int = ranged(10, minimum=1)
    val_every_n_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Steps between validations; default: only at the end."""
    save_every_n_steps: int = ranged(1000, minimum=1)
    keep_checkpoints: int = ranged(2, minimum=2)
    """Newest checkpoints kept; at least 2, so that a good one exists while the next is written."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def problems(self) -> list[str]:
        found = []
        if self.cycle_beta1 and self.schedule != "onecycle":
            found.append(f"cycle_beta1: needs schedule onecycle, not {self.schedule}")
        if self.gates != GateConfig() and self.objective != "alip":
            found.append(f"gates: need objective alip, not {self.objective}")
        names = [*(f.name for f in dataclasses.fields(self)), "global_batch", "total_steps"]
        for name in self.allow_change:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                found.append(f"allow_change: {name!r} is no setting" + (f"; did you mean {near[0]!r}?" if near else ""))
        if self.max_ranks & (self.max_ranks - 1):
            found.append(f"max_ranks: {self.max_ranks} is not a power of two (1, 2, 4, 8, ..)")
        if self.deterministic and self.parallel != "ddp":
            found.append(f"deterministic: needs parallel ddp, not {self.parallel}")
        if self.device is not None and self.device.partition(":")[0] not in ("cpu", "cuda", "mps"):
            found.append(f"device: {self.device!r} is not cpu, cuda or mps")
        if self.name is not None and (Path(self.name).name != self.name or self.name == ".."):
            found.append(f"name: {self.name!r} is not the name of a folder; --logs says where it lies")
        for name in ("logs", "name", "resume", "pretrained"):
            value = getattr(self, name) or ""
            if value.encode(errors="replace") != value.encode(errors="surrogatepass"):
                found.append(f"{name}: {value!r} is not UTF-8, and safetensors reads no weights from there; rename it")
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_area" and high > 1):
                found.append(f"{name}: ({low}, {high}) is not an increasing range of positive numbers up to 1 (area)")
        return found


def parse(cls: type[T], data: dict[str, Any], base: T | None = None, where: str = "") -> T:
    """dict -> cls; missing keys come from `base` or the defaults. ConfigError lists every problem at once."""
    problems: list[str] = []
    value = _parse(cls, data, base, where, problems)
    if not problems:
        problems = check(value, where)
    if problems:
        raise ConfigError(problems)
    return value


def check(value: Any, where: str = "") -> list[str]:
    """Problems of a settings object: limits first, then what fields must be together."""
    found: list[str] = []
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item):
            found += check(item, f"{where}{f.name}.")
        elif item is not None:
            found += _beyond_limits(f"{where}{f.name}", item, f.metadata.get("limits", {}))
    return found or value.problems()


def to_dict(value: Any) -> dict[str, Any]:
    """Settings as plain JSON data."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _parse(cls: type, data: Any, base: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        problems.append(f"{where.rstrip('.') or cls.__name__}: expected a table of settings, got {data!r}")
        return None
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {name: getattr(base, name) for name in names} if base is not None else {}
    for key, item in data.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(names)}"
            problems.append(f"{where}{key}: unknown setting; {hint}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _parse(hints[key], item, values.get(key), f"{where}{key}.", problems)
        else:
            values[key] = _convert(hints[key], item, f"{where}{key}", problems)
    return cls(**values) if not problems else None


def _convert(hint: Any, item: Any, where: str, problems: list[str]) -> Any:
    """Accept only what the type says; an int where a float is asked, a list where a tuple is asked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if item is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), item, where, problems)
    if origin is Literal:
        if item in args:
            return item
        problems.append(f"{where}: {item!r} is not one of {', '.join(map(repr, args))}")
    elif origin is tuple:
        size = None if args[-1] is Ellipsis else len(args)
        if isinstance(item, (list, tuple)) and size in (None, len(item)):
            return tuple(_convert(args[0], x, where, problems) for x in item)
        problems.append(f"{where}: {item!r} is not a list{f' of {size} values' if size else ''}")
    elif hint is float and isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(max(-LARGEST, min(item, LARGEST))) if isinstance(item, int) else item
    elif isinstance(item, hint) and (hint is bool or not isinstance(item, bool)):
        return item
    else:
        problems.append(f"{where}: {item!r} is not of type {hint.__name__}")
    return None


def _beyond_limits(where: str, item: Any, limits: dict[str, float]) -> list[str]:
    if isinstance(item, float) and not math.isfinite(item):
        return [f"{where}: {item} is not a finite number"]
    if isinstance(item, int) and abs(item) > LARGEST:
        return [f"{where}: a number of {len(str(item))} digits; use at most {LARGEST}"]
    if isinstance(item, str) and "\0" in item:
        return [f"{where}: {item!r} holds a NUL character; leave it out"]
    if isinstance(item, tuple):
        return [problem for part in item for problem in _beyond_limits(where, part, limits)]
    tests = {
        "minimum": (lambda a, b: a >= b, "at least"),
        "above": (lambda a, b: a > b, "more than"),
        "maximum": (lambda a, b: a <= b, "at most"),
        "below": (lambda a, b: a < b, "less than"),
    }
    return [
        f"{where}: {item} must be {tests[kind][1]} {bound}"
        for kind, bound in limits.items()
        if not tests[kind][0](item, bound)
    ]


# ---- presets -------------------------------------------------------------------------------------------------------


def list_presets(kind: str) -> list[str]:
    """Names of the shipped presets of a kind: `models` or `recipes`."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.json"))


def load_json(path: str | Path) -> Any:
    """Read JSON; ConfigError names the file when it is absent or broken."""
    try:
        return parse_json(read_bytes(Path(path), MAX_JSON), str(path))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except ValueError as error:
        named = str(error).startswith(f"{path}: ")  # unlike a path that no file can have
        raise ConfigError([str(error) if named else f"{path!r}: cannot be read ({error})"]) from None


def load_settings(recipe: str | None) -> Settings:
    """Settings of a recipe: a shipped name or the path of a JSON file; None gives the defaults."""
    if recipe is None:
        return Settings()
    path = CONFIGS / "recipes" / f"{recipe}.json"
    if recipe not in list_presets("recipes"):
        path = Path(recipe)
        if path.suffix != ".json":
            near = difflib.get_close_matches(recipe, list_presets("recipes"), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(list_presets('recipes'))}"
            raise ConfigError([f"preset: {recipe!r} is neither a shipped recipe nor a .json file; {hint}"])
    return parse(Settings, load_json(path))
