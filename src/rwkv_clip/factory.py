"""Two towers and a temperature, and how models are made: by name, JSON, dict or from a checkpoint.

The surface is open_clip's: create_model_and_transforms, get_tokenizer, encode_image, encode_text, list_models. A name
that is not ours goes to open_clip, so any of its models trains and evaluates here.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import find_checkpoint, hash_file, read_description, read_weights
from .config import CONFIGS, ConfigError, ModelConfig, list_presets, load_json, parse, to_dict
from .errors import is_out_of_memory
from .models import ImageTower, TextTower
from .models.released import OPENAI_ENTRIES, convert_config, is_released_config, strip_prefixes
from .tokenizer import Tokenizer, make_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Ours, or {"open_clip": name or {embed_dim, ..}}, with "pixels": [mean, std] where these are not CLIP's.
ModelSpec = ModelConfig | dict[str, Any]
_NETWORK = ("httpx", "httpcore", "requests", "urllib", "huggingface_hub", "ssl")  # modules of network errors
QUICK = "-quickgelu"  # how open_clip names a model that computes QuickGELU where the plain name computes exact GELU
log = logging.getLogger(__name__)


class RWKVCLIP(nn.Module):
    """Image and text tower of one width; features are compared by cosine times exp(logit_scale)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_model = TextTower(config.text)
        self.image_model = ImageTower(config.image)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, h, w) normalised pixels -> (B, width)."""
        features = self.image_model(image.to(self.image_model.patch_embed.projection.weight.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, T) int64 token ids -> (B, width)."""
        features = self.text_model(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image features, normalised text features, exp(logit_scale)."""
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass while training."""
        self.image_model.recompute = self.text_model.recompute = enable

    @property
    def drop_branches(self) -> int:
        """Residual branches that training drops at random: numbers a sample needs in `set_drop_numbers`."""
        return 2 * self.config.image.depth if self.config.image.drop_path else 0

    def set_drop_numbers(self, numbers: Tensor | None) -> None:
        """Decide what the coming forward passes drop: uniform numbers in [0, 1), (drop_branches, B) on the CPU, or None
        to draw anew each time. With numbers that belong to samples, a sample's drops are the same in every batch."""
        self.image_model.drop_numbers = numbers

    def pack(self) -> None:
        """Nothing any more; scripts may call it. It held bfloat16 weights a second time, in oneDNN's order: the second
        copy could be older than the weights, and won 3 % of an encoder's time from batch 8 on, less than nothing on
        processors with AMX."""

    @property
    def context_length(self) -> int:
        return self.config.text.context

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image.image_size


def list_models() -> list[str]:
    """Our presets. `open_clip.list_models()` names work too."""
    return list_presets("models")


def resolve_spec(model: str | Path | dict[str, Any] | ModelConfig) -> tuple[str, ModelSpec]:
    """Name, JSON path, dict or ModelConfig -> (name, specification). ConfigError for anything else."""
    if isinstance(model, ModelConfig):
        return "RWKV-CLIP", model
    if isinstance(model, dict):
        if isinstance(model.get("open_clip", model), dict) and {"open_clip", "embed_dim"} & model.keys():
            _check_open_clip(model.get("open_clip", model))
        if "open_clip" in model:
            return str(model["open_clip"] if isinstance(model["open_clip"], str) else "open_clip"), model
        if "embed_dim" in model:
            return "open_clip", {"open_clip": model}
        if is_released_config(model):
            return "RWKV-CLIP", convert_config(model.get("config", model))
        return "RWKV-CLIP", parse(ModelConfig, model)
    name = str(model).replace("/", "-")
    if name in list_models():
        return name, resolve_spec(load_json(CONFIGS / "models" / f"{name}.json"))[1]
    if str(model).endswith(".json"):
        data = load_json(model)
        if not isinstance(data, dict):
            raise ConfigError([f"{model}: expected a JSON object that describes a model"])
        return Path(model).stem, resolve_spec(data)[1]
    import open_clip

    if name in open_clip.list_models():
        return name, {"open_clip": name}
    near = difflib.get_close_matches(name, [*list_models(), *open_clip.list_models()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"ours: {', '.join(list_models())}"
    raise ConfigError([f"model: {str(model)!r} is no preset, no .json file and no open_clip model; {hint}"])


def _check_open_clip(source: dict[str, Any]) -> None:
    missing = [key for key in ("vision_cfg", "text_cfg") if not isinstance(source.get(key), dict)]
    if missing:
        raise ConfigError(
            [f"{key}: missing in a model in open_clip's form; add a table of its settings" for key in missing]
        )


def build_model(spec: ModelSpec) -> nn.Module:
    """A model in float32 with initial values from torch's global generator."""
    if isinstance(spec, ModelConfig):
        return RWKVCLIP(spec)
    import open_clip

    source = spec["open_clip"]
    if isinstance(source, str):
        pixels = dict(zip(("mean", "std"), map(tuple, spec.get("pixels", ()))))
        with _fetching("model", source):
            return open_clip.create_model(source, force_preprocess_cfg=pixels or None)
    source = dict(source)
    kind = open_clip.CustomTextCLIP if source.pop("custom_text", False) else open_clip.CLIP
    try:
        return kind(**source)
    except TypeError as error:  # an unknown or missing field, or a value of the wrong type
        raise ConfigError([f"model: open_clip cannot build {sorted(source)}: {error}"]) from None


def create_model(
    model: str | Path | dict[str, Any] | ModelConfig,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    drop_path: float | None = None,
) -> nn.Module:
    """Build a model; `model` is a preset name, the path of a JSON, a dict (ours, released or open_clip's keys).

    pretrained: weights as for `load_checkpoint`, or an open_clip tag when the model is open_clip's. precision: fp32, or
    bf16 / fp16 to hold the weights in that type (decays stay float32). drop_path overrides the image tower's rate.
    """
    if precision not in DTYPES:
        raise ConfigError([f"precision: {precision!r} is not one of {', '.join(DTYPES)}"])
    name, spec = resolve_spec(model)
    if drop_path is not None:
        if not isinstance(spec, ModelConfig):
            raise ConfigError([f"drop_path: {name} is an open_clip model; only RWKV towers take this setting"])
        spec = replace(spec, image=replace(spec.image, drop_path=drop_path))
    known = isinstance(spec, dict) and isinstance(spec["open_clip"], str)
    if pretrained and known and not Path(pretrained).exists():
        import open_clip

        from .transform import CLIP_MEAN, CLIP_STD

        spec = {"open_clip": _name_for_tag(spec["open_clip"], str(pretrained))}
        with _fetching("pretrained", str(pretrained)):
            net = open_clip.create_model(spec["open_clip"], pretrained=str(pretrained))
        if (pixels := pixel_statistics(net)) != (CLIP_MEAN, CLIP_STD):
            spec["pixels"] = pixels
    else:
        net = build_model(spec)
        if pretrained:
            load_checkpoint(net, pretrained)
    net.spec = spec
    return cast_weights(net, DTYPES[precision]).to(device).eval()


@contextlib.contextmanager
def _fetching(field: str, what: str) -> Iterator[None]:
    """Inside, open_clip may fetch `what` from the network. ConfigError that names it where that fails.

    Its libraries raise errors of many kinds, one inside the other; what tells them is a system's or a network's error
    somewhere in the chain. One that is about this machine (a full disk, no memory) stays what it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        if own := next(filter(_is_of_this_machine, chain), None):
            raise own from None
        if not any(isinstance(e, OSError) or type(e).__module__.startswith(_NETWORK) for e in chain):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            [
                f"{field}: {what!r} has to be downloaded once, which failed ({reason[:200]}); run it where there is a "
                "network, copy its cache (~/.cache/huggingface) here, or give the weights as a file"
            ]
        ) from error


def _is_of_this_machine(error: BaseException) -> bool:
    """Whether a disk is full or closed, or memory ran out."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    closed = isinstance(error, PermissionError) and error.filename is not None
    return full or closed or is_out_of_memory(error)


def _name_for_tag(name: str, tag: str) -> str:
    """open_clip's name of the function that a tag's weights were trained as; open_clip would warn and compute another.

    ConfigError for a tag that it does not know, or where it has no such model."""
    import open_clip

    plain = name.removesuffix(QUICK)
    weights = open_clip.get_pretrained_cfg(plain, tag)
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(plain)) or "none"
        raise ConfigError([f"pretrained: {tag!r} is neither a file nor a tag of {name}; open_clip's tags: {tags}"])
    fits = plain
    if weights.get("quick_gelu") and not open_clip.get_model_config(plain).get("quick_gelu"):
        fits += QUICK
    if fits not in open_clip.list_models():
        raise ConfigError(
            [
                f"pretrained: {tag!r} was trained with QuickGELU, which {name} does not compute; save its weights as a "
                f'file, and describe the model in a JSON with "quick_gelu": true'
            ]
        )
    if fits != name:
        log.warning("the weights %r were trained as %s: taking this model instead of %s", tag, fits, name)
    return fits


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold the weights in `dtype`; decays, bonus and temperature stay float32, where rounding would compound."""
    exact = {"time_decay", "time_faaaa", "logit_scale"}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name.rsplit(".", 1)[-1] not in exact:
            parameter.data = parameter.data.to(dtype)
    return model


def create_model_and_transforms(
    model: str | Path | dict[str, Any] | ModelConfig,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Callable, Callable]:
    """(model, preprocess for training, preprocess for evaluation); transforms map a PIL image to (3, h, w) float."""
    from .transform import train_transform

    net = create_model(model, pretrained, precision, device)
    return net, train_transform(image_size_of(net)), preprocess_of(net)


def get_tokenizer(model: str | Path | dict[str, Any] | ModelConfig) -> Tokenizer:
    """Tokenizer of a model: texts -> int64 (n, context)."""
    return tokenizer_of(resolve_spec(model)[1])


def tokenizer_of(spec: ModelSpec) -> Tokenizer:
    """Tokenizer of a specification."""
    if isinstance(spec, ModelConfig):
        return make_tokenizer(spec.tokenizer, spec.text.context)
    source = spec["open_clip"]
    if not isinstance(source, str):
        return make_tokenizer(context=source["text_cfg"].get("context_length", 77))
    import open_clip

    with _fetching("tokenizer", f"that of {source}"):
        tokenizer = open_clip.get_tokenizer(source)
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return make_tokenizer(context=tokenizer.context_length)
    vocab = tokenizer.vocab_size if hasattr(tokenizer, "vocab_size") else len(tokenizer.tokenizer)  # Hugging Face's
    return Tokenizer(f"open_clip:{source}", tokenizer, vocab, tokenizer.context_length)


def vocab_of(spec: ModelSpec) -> int | None:
    """Number of token ids that the text tower knows; None where only the library that builds it can tell."""
    if isinstance(spec, ModelConfig):
        return spec.text.vocab
    source = spec["open_clip"]
    if isinstance(source, str):
        import open_clip

        source = open_clip.get_model_config(source) or {}
    text = source.get("text_cfg", {})
    return None if "hf_model_name" in text else text.get("vocab_size", 49408)


def image_size_of(model: nn.Module) -> tuple[int, int]:
    """(height, width) that a model was made for."""
    size = model.image_size if isinstance(model, RWKVCLIP) else model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def pixel_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel that a model's pixels are normalised with; CLIP's where it does not say."""
    from .transform import CLIP_MEAN, CLIP_STD

    visual = getattr(model, "visual", None)
    mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
    return (tuple(mean), tuple(std)) if mean else (CLIP_MEAN, CLIP_STD)


def preprocess_of(model: nn.Module) -> Callable:
    """Evaluation transform of a model: PIL image of any mode -> float (3, h, w)."""
    from .transform import CLIP_MEAN, CLIP_STD, prepare, val_transform

    mean, std = pixel_statistics(model)
    if (mean, std) == (CLIP_MEAN, CLIP_STD):
        return val_transform(image_size_of(model))
    import open_clip

    theirs = open_clip.image_transform(model.visual.image_size, is_train=False, mean=mean, std=std)
    theirs.transforms[:0] = prepare(image_size_of(model))
    return theirs


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights strictly: a checkpoint or run folder of ours, .safetensors, or a released .pt state dict.

    `module.` and `_orig_mod.` prefixes and what OpenAI's files hold besides weights are removed; values are cast to the
    model's dtypes. ValueError names every missing, unexpected and misshapen key.
    """
    model.load_state_dict(read_fitting_weights(model, path))


def read_fitting_weights(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """What `load_checkpoint` loads: whole tensors, one for each key of the model's state dict. ValueError as there."""
    state = strip_prefixes(read_weights(path))
    own = model.state_dict()
    marks = [state.pop(key) for key in OPENAI_ENTRIES if key in state and key not in own]
    if marks and not any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        log.warning("%s: looks like OpenAI's, trained with QuickGELU; this model has exact GELU (name%s)", path, QUICK)
    problems = [f"missing: {key}" for key in own if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in own]
    problems += [
        f"shape of {key}: checkpoint {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  .. and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{path}: does not fit the model ({len(problems)} keys)\n  {shown}")
    return state


@dataclass
class Loaded:
    """A model ready for inference, with what belongs to it."""

    model: nn.Module
    preprocess: Callable  # PIL image -> float (3, h, w)
    tokenizer: Tokenizer
    name: str
    digest: str  # sha256 of the weights file, or of the name where a library fetched the weights
    precision: str


def load_for_inference(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Loaded:
    """Open a run folder, checkpoint folder, weights file, or `open_clip:NAME[:TAG]`.

    Our checkpoints describe their model; a bare weights file needs `model` (a name or the path of a JSON).
    """
    text = str(checkpoint)
    if text.startswith("open_clip:"):
        _, name, *tag = text.split(":")
        net = create_model(name, tag[0] if tag else None, precision, device)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Loaded(net, preprocess_of(net), get_tokenizer(name), text[10:], digest, precision)
    path = find_checkpoint(checkpoint)
    described = read_description(path)
    if model is None:
        if described is None:
            raise ConfigError([f"model: {checkpoint} holds weights only; name its model (preset or JSON path)"])
        name, spec = described["model"], described["spec"]
    else:
        name, spec = resolve_spec(model)
    net = create_model(spec, path, precision, device)
    weights = path / "model.safetensors" if path.is_dir() else path
    return Loaded(net, preprocess_of(net), tokenizer_of(net.spec), name, hash_file(weights), precision)


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """A specification as JSON data that `create_model` takes back."""
    return to_dict(spec) if isinstance(spec, ModelConfig) else json.loads(json.dumps(spec))
