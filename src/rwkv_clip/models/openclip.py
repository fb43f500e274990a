"""open_clip's models and towers: descriptions, features by name, tags of weights, errors while they are fetched.

A whole model is one family, described by name or in open_clip's form; a tower of open_clip's may also be paired with
one of another family. `_embeds`, `_global_pool` and the builders of towers are private to open_clip, the same since
3.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from ..config import ConfigError
from ..errors import is_out_of_memory
from ..tokenizer import CLIP_BPE, Tokenizer, make_tokenizer
from ..transform import ResizeMode
from .outputs import name_features
from .specification import CLIP_PIXELS, ContrastiveModel, Encoded, Pixels, suggest

QUICK = "-quickgelu"  # how open_clip names a model that computes QuickGELU where the plain name computes exact GELU
_NETWORK = ("httpx", "httpcore", "requests", "urllib", "huggingface_hub", "ssl")  # modules of network errors
T = TypeVar("T")
log = logging.getLogger(__name__)


# ---- features by name ------------------------------------------------------------------------------------------------


def encode_image(tower: nn.Module, image: Tensor) -> Encoded:
    """`tower(image)` with its intermediate features. ValueError for a tower that does not have or expose them."""
    if not isinstance(tower, VisionTransformer) or (
        tower.attn_pool is not None or tower.final_ln_after_pool or tower.pool_type == "none"
    ):
        raise ValueError(_cannot("image", tower, "a ViT that pools after its last norm"))
    tokens = tower.ln_post(tower.transformer(tower._embeds(image)))
    pooled, _ = tower._global_pool(tokens)
    return Encoded(_project(pooled, tower.proj), pooled, tokens)


def encode_text(tower: nn.Module, text: Tensor) -> Encoded:
    """The same for a text tower."""
    if not isinstance(tower, TextTransformer) or tower.cls_emb is not None or tower.pool_type == "none":
        raise ValueError(_cannot("text", tower, "a text transformer without a class token"))
    x, mask = tower._embeds(text)
    tokens = tower.ln_final(tower.transformer(x, attn_mask=mask))
    pooled = text_global_pool(tokens, text, tower.pool_type, eos_token_id=tower.eos_id)
    return Encoded(_project(pooled, tower.text_projection), pooled, tokens)


def _cannot(side: str, tower: nn.Module, remedy: str) -> str:
    return (
        f"needs: open_clip's {type(tower).__name__} does not give {side}_pooled or {side}_tokens; "
        f"ask for {side} alone, or use {remedy}"
    )


def _project(pooled: Tensor, projection: nn.Module | nn.Parameter | None) -> Tensor:
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


class NamedFeatures(ContrastiveModel):
    """Mixin for a model class of open_clip's: the same model, which also takes `needs`."""

    visual: nn.Module
    text: nn.Module

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *arguments: Any,
        needs: Iterable[str] | None = None,
        **named: Any,
    ) -> Any:
        """open_clip's own; with `needs` see `name_features`."""
        if needs is not None:
            return name_features(self, image, text, needs)
        return super().forward(image, text, *arguments, **named)

    def encode_parts(self, side: str, inputs: Tensor) -> Encoded:
        """Features of one side, not normalised, and what they were made from."""
        return encode_image(self.visual, inputs) if side == "image" else self._encode_text_parts(inputs)

    def _encode_text_parts(self, text: Tensor) -> Encoded:
        return encode_text(self.text, text)


class CLIP(NamedFeatures, open_clip.CLIP):
    """open_clip's CLIP, whose text tower is the model itself."""

    transformer: Transformer
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    ln_final: nn.Module
    text_projection: nn.Module | nn.Parameter | None

    def _encode_text_parts(self, text: Tensor) -> Encoded:
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding.to(dtype)
        tokens = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
        pooled = text_global_pool(tokens, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        return Encoded(_project(pooled, self.text_projection), pooled, tokens)


class CustomTextCLIP(NamedFeatures, open_clip.CustomTextCLIP):
    """open_clip's CustomTextCLIP."""


class CoCa(NamedFeatures, open_clip.CoCa):
    """open_clip's CoCa."""


_CLASSES = {cls.__bases__[1]: cls for cls in (CLIP, CustomTextCLIP, CoCa)}


# ---- whole models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenClipConfig:
    """A model of open_clip's, by name or by a description in its form: embed_dim, vision_cfg, text_cfg, .."""

    source: str | dict[str, Any]
    pixels: Pixels = CLIP_PIXELS  # of the weights that it was made from
    resize_mode: ClassVar[ResizeMode] = "shortest"

    def __repr__(self) -> str:
        """Unchanged since version 0.2: it is part of the key of cached features."""
        return repr(self.to_json())

    @classmethod
    def parse(cls, data: dict[str, Any]) -> OpenClipConfig:
        """From {"open_clip": source, "pixels": ..} or the description alone. ConfigError lists every problem."""
        table = data if "open_clip" in data else {"open_clip": data}
        source, pixels = table["open_clip"], table.get("pixels", CLIP_PIXELS)
        problems = [
            f"{key}: unknown setting; {suggest(key, ('open_clip', 'pixels'))}"
            for key in table
            if key not in ("open_clip", "pixels")
        ]
        if isinstance(source, dict):
            problems += [
                f"{key}: missing in a model in open_clip's form; add a table of its settings"
                for key in ("vision_cfg", "text_cfg")
                if not isinstance(source.get(key), dict)
            ]
        elif source not in (names := open_clip.list_models()):
            problems.append(
                f"open_clip: {source!r} is neither a model of open_clip's nor a table; {suggest(source, names)}"
            )
        try:
            mean, std = (tuple(map(float, values)) for values in pixels)
        except (TypeError, ValueError):
            problems.append(f"pixels: {pixels!r} is not two lists of three numbers, mean and std")
        if problems:
            raise ConfigError(problems)
        return cls(source, (mean, std))

    def to_json(self) -> dict[str, Any]:
        pixels = {} if self.pixels == CLIP_PIXELS else {"pixels": self.pixels}
        return json.loads(json.dumps({"open_clip": self.source, **pixels}))

    def build(self, tag: str | None = None) -> ContrastiveModel:
        if isinstance(self.source, str):
            pixels = dict(zip(("mean", "std"), self.pixels))
            with fetching("pretrained" if tag else "model", tag or self.source):
                model = open_clip.create_model(self.source, pretrained=tag, force_preprocess_cfg=pixels)
            model.__class__ = _CLASSES[type(model)]
            return model
        source = dict(self.source)
        kind = CustomTextCLIP if source.pop("custom_text", False) else CLIP
        return _build("model", source, lambda: kind(**source))

    def tokenizer(self) -> Tokenizer:
        if not isinstance(self.source, str):
            return make_tokenizer(context=self.source["text_cfg"].get("context_length", 77))
        with fetching("tokenizer", f"that of {self.source}"):
            tokenizer = open_clip.get_tokenizer(self.source)
        if isinstance(tokenizer, open_clip.SimpleTokenizer):
            return make_tokenizer(context=tokenizer.context_length)
        vocab = tokenizer.vocab_size if hasattr(tokenizer, "vocab_size") else len(tokenizer.tokenizer)  # Hugging Face's
        return Tokenizer(f"open_clip:{self.source}", tokenizer, vocab, tokenizer.context_length)

    def with_drop_path(self, rate: float) -> OpenClipConfig:
        raise ConfigError([f"drop_path: {self.name} is an open_clip model; only RWKV towers take this setting"])

    def find_tag(self, pretrained: str) -> tuple[OpenClipConfig, str | None]:
        """ConfigError for what is neither a file nor a tag of a named model."""
        if not isinstance(self.source, str) or Path(pretrained).exists():
            return self, None
        name = name_for_tag(self.source, pretrained)
        weights = open_clip.get_pretrained_cfg(name.removesuffix(QUICK), pretrained)
        mean, std = (tuple(weights.get(key) or own) for key, own in zip(("mean", "std"), CLIP_PIXELS))
        return OpenClipConfig(name, (mean, std)), pretrained

    @property
    def name(self) -> str:
        return self.source if isinstance(self.source, str) else "open_clip"

    @property
    def vocabulary(self) -> int | None:
        text = self._description.get("text_cfg", {})
        return None if "hf_model_name" in text else text.get("vocab_size", 49408)

    @property
    def image_size(self) -> tuple[int, int]:
        return _image_size(self._description.get("vision_cfg", {}))

    @property
    def _description(self) -> dict[str, Any]:
        return self.source if isinstance(self.source, dict) else open_clip.get_model_config(self.source) or {}


def _image_size(vision: dict[str, Any]) -> tuple[int, int]:
    size = vision.get("image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _build(where: str, settings: dict[str, Any], make: Callable[[], T]) -> T:
    """`make()`. ConfigError for an unknown or missing field, or a value of the wrong type."""
    try:
        return make()
    except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError([f"{where}: open_clip cannot build {sorted(settings)}: {error}"]) from None


# ---- towers beside one of ours ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TowerConfig:
    """A table in the form of `vision_cfg` or `text_cfg`, with the whole model's `quick_gelu`."""

    config: dict[str, Any]

    side: ClassVar[str]
    fields: ClassVar[type]  # open_clip's settings
    build_tower: ClassVar[Callable[..., Any]]
    own_width: ClassVar[None] = None
    # Weights and tokenizers that open_clip would fetch, and outputs that `needs` asks for.
    refused: ClassVar[set[str]] = {"output_tokens", "timm_model_pretrained", "hf_model_name", "hf_tokenizer_name"}

    @classmethod
    def parse(cls, table: dict[str, Any]) -> Any:
        names = [f.name for f in dataclasses.fields(cls.fields) if f.name not in cls.refused] + ["quick_gelu"]
        problems = [f"{cls.side}.{key}: unknown setting; {suggest(key, names)}" for key in table if key not in names]
        problems += [
            f"{cls.side}.{key}: {table[key]!r} is not a positive whole number"
            for key in ("width", "heads", "context_length", "vocab_size")
            if key in table and key in names and not (type(table[key]) is int and table[key] > 0)
        ]
        if problems:
            raise ConfigError(problems)
        return cls(table)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({"kind": "open_clip", **self.config}))

    def build(self, embed_dim: int | None) -> Any:
        config = dict(self.config)
        quick = config.pop("quick_gelu", False)
        return _build(self.side, self.config, lambda: type(self).build_tower(embed_dim, config, quick_gelu=quick))


class OpenClipImageConfig(_TowerConfig):
    """An image tower of open_clip's."""

    side, fields, build_tower = "image", CLIPVisionCfg, staticmethod(_build_vision_tower)
    pixels = CLIP_PIXELS
    drop_branches = 0

    def encode(self, tower: nn.Module, image: Tensor) -> Encoded:
        return encode_image(tower, image)

    def with_drop_path(self, rate: float) -> OpenClipImageConfig:
        raise ConfigError(["drop_path: the image tower is open_clip's; only RWKV towers take this setting"])

    @property
    def image_size(self) -> tuple[int, int]:
        return _image_size(self.config)


class OpenClipTextConfig(_TowerConfig):
    """A text tower of open_clip's, with CLIP's tokenizer."""

    side, fields, build_tower = "text", CLIPTextCfg, staticmethod(_build_text_tower)
    default_tokenizer = CLIP_BPE

    def encode(self, tower: nn.Module, text: Tensor) -> Encoded:
        return encode_text(tower, text)

    def tokenizer(self, name: str) -> Tokenizer:
        return make_tokenizer(name, self.context)

    @property
    def context(self) -> int:
        return self.config.get("context_length", 77)

    @property
    def vocabulary(self) -> int:
        return self.config.get("vocab_size", 49408)


TOWERS = {"image": OpenClipImageConfig, "text": OpenClipTextConfig}


# ---- weights that open_clip fetches ----------------------------------------------------------------------------------


@contextlib.contextmanager
def fetching(field: str, what: str) -> Iterator[None]:
    """While open_clip may fetch `what` from the network: a ConfigError that names it if that fails.

    Its libraries raise many kinds of errors, one caused by the other: a failed download has a system's or a network's
    error somewhere in that chain. An error of this machine (a full disk, no memory) is raised unchanged.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        if own := next(filter(_is_of_this_machine, chain), None):
            raise own from None
        if not any(isinstance(e, OSError) or type(e).__module__.startswith(_NETWORK) for e in chain):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            [
                f"{field}: {what!r} must be downloaded once, which failed ({reason[:200]}); run it where there is a "
                "network, copy its cache (~/.cache/huggingface) here, or give the weights as a file"
            ]
        ) from error


def _is_of_this_machine(error: BaseException) -> bool:
    """Whether a disk is full or not writable, or memory ran out."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    closed = isinstance(error, PermissionError) and error.filename is not None
    return full or closed or is_out_of_memory(error)


def name_for_tag(name: str, tag: str) -> str:
    """open_clip's name of the model that a tag's weights were trained as; open_clip would warn and compute another.

    ConfigError for an unknown tag, or where open_clip has no such model."""
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
        log.warning("the weights %r were trained as %s: using this model instead of %s", tag, fits, name)
    return fits
