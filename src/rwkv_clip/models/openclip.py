"""open_clip's models and towers: descriptions, features by name, tags of weights, errors while they are fetched.

A whole model is one family, described by name or in open_clip's form; a tower of open_clip's may also be paired with
one of another family. `_embeds`, `_global_pool` and the builders of towers are private to open_clip, the same since
3.1.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from ..config import ConfigError
from ..downloads import asking_once, fetching, first_line
from ..errors import is_out_of_memory
from ..ops.watched import refuse_fused_attention
from ..tokenizer import CLIP_BPE, Tokenizer, make_tokenizer
from ..transform import ResizeMode
from .hugging_text import check_places, find_text_tower
from .layers import number_layers
from .outputs import name_features
from .preprocessing import PREPROCESSING, check_size, parse_pixels, read_preprocessing
from .specification import CLIP_PIXELS, ContrastiveModel, Encoded, Pixels, suggest

QUICK = "-quickgelu"  # how open_clip names a model that computes QuickGELU where the plain name computes exact GELU
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

    def encode_image(self, image: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """open_clip's own. RuntimeError where its attention cannot be differentiated."""
        refuse_fused_attention()
        return super().encode_image(image, *arguments, **named)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Name of a parameter -> number of its layer, for timm's layer decay, see `layers.number_layers`."""
        return number_layers(self)

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
    resize_mode: ResizeMode = "shortest"
    interpolation: str = "bicubic"  # or bilinear, of pictures

    def __repr__(self) -> str:
        """Unchanged since version 0.2: it is part of the key of cached features."""
        return repr(self.to_json())

    @classmethod
    def parse(cls, data: dict[str, Any]) -> OpenClipConfig:
        """From {"open_clip": source, "pixels": ..} or the description alone. ConfigError lists every problem."""
        table = data if "open_clip" in data else {"open_clip": data}
        source, pixels = table["open_clip"], table.get("pixels", CLIP_PIXELS)
        names = [f.name for f in dataclasses.fields(cls)][1:]
        problems = [
            f"{key}: unknown setting; {suggest(key, ('open_clip', *names))}"
            for key in table
            if key not in ("open_clip", *names)
        ]
        ways: dict[str, Any] = {key: table[key] for key in PREPROCESSING if key in table}
        problems += [
            f"{key}: {value!r} is not one of {', '.join(PREPROCESSING[key])}"
            for key, value in ways.items()
            if value not in PREPROCESSING[key]
        ]
        if isinstance(source, dict):
            problems += [
                f"{key}: missing in a model in open_clip's form; add a table of its settings"
                for key in ("vision_cfg", "text_cfg")
                if not isinstance(source.get(key), dict)
            ]
            problems += check_places(source) + check_size(source.get("vision_cfg"))
        elif source not in open_clip.list_models():
            near = suggest(source, open_clip.list_models())
            problems.append(f"open_clip: {source!r} is neither a model of open_clip's nor a table; {near}")
        try:
            mean, std = parse_pixels(pixels)
        except ValueError:
            problems.append(f"pixels: {pixels!r} is not two lists of three numbers, mean and std")
        if problems:
            raise ConfigError(problems)
        return cls(source, (mean, std), **ways)

    @classmethod
    def from_layout(cls, data: dict[str, Any], where: str) -> OpenClipConfig:
        """The content of an open_clip_config.json -> model, without the weights of towers that it may name: a file of
        the whole follows. ConfigError, with `where`, for what is not one, or not supported."""
        model, images = data.get("model_cfg"), data.get("preprocess_cfg", {})
        if not isinstance(model, dict) or not isinstance(images, dict):
            raise ConfigError([f"{where}: model_cfg and preprocess_cfg are tables in open_clip's layout; correct it"])
        source = json.loads(json.dumps(model))
        for table, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
            if isinstance(source.get(table), dict) and source[table].get(key.removesuffix("pretrained") + "name"):
                source[table][key] = False
        try:
            if images.get("mode", "RGB") != "RGB":
                raise ConfigError([f"mode: {images['mode']!r} pictures are not read, only RGB; correct it"])
            return cls.parse({"open_clip": source, **read_preprocessing(images)})
        except ConfigError as error:
            raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None

    def to_json(self) -> dict[str, Any]:
        plain = OpenClipConfig("")
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
        return json.loads(json.dumps({"open_clip": self.source, **changed}))

    def to_layout(self) -> dict[str, Any]:
        """The content of an open_clip_config.json."""
        mean, std = self.pixels
        images = {"mean": mean, "std": std, "interpolation": self.interpolation, "resize_mode": self.resize_mode}
        return {"model_cfg": self.description, "preprocess_cfg": json.loads(json.dumps(images))}

    def build(self, tag: str | None = None) -> ContrastiveModel:
        if isinstance(self.source, str):
            pixels = dict(zip(("mean", "std"), self.pixels))
            text = self.description.get("text_cfg", {})
            find_text_tower(text)  # it can be had
            with (asking_once if tag or "hf_model_name" in text else fetching)(
                "pretrained" if tag else "model", tag or self.source
            ):
                device = torch.empty(0).device  # the default: meta, where only a structure is wanted
                model = open_clip.create_model(self.source, pretrained=tag, device=device, force_preprocess_cfg=pixels)
            model.__class__ = _CLASSES[type(model)]
            return model
        source = {**self.source, "text_cfg": find_text_tower(self.source["text_cfg"])}
        custom = source.pop("custom_text", False) or "hf_model_name" in source["text_cfg"]
        kind: Any = CoCa if "multimodal_cfg" in source else CustomTextCLIP if custom else CLIP
        with fetching("model", str(source["text_cfg"].get("hf_model_name", "model"))):
            return _build("model", source, lambda: kind(**source))

    def tokenizer(self) -> Tokenizer:
        text = self.description.get("text_cfg", {})
        if not isinstance(self.source, str) and "hf_tokenizer_name" not in text:
            return make_tokenizer(context=text.get("context_length", 77))
        remote = "hf_tokenizer_name" in text and not os.path.isdir(text["hf_tokenizer_name"])
        with (asking_once if remote else fetching)("tokenizer", f"that of {self.name}"):
            if isinstance(self.source, str):
                tokenizer = open_clip.get_tokenizer(self.source)
            else:  # a program that a repository brings is not run
                settings = {**(text.get("tokenizer_kwargs") or {}), "trust_remote_code": False}
                context = text.get("context_length", 77)
                tokenizer = HFTokenizer(text["hf_tokenizer_name"], context_length=context, **settings)
        if isinstance(tokenizer, open_clip.SimpleTokenizer):
            return make_tokenizer(context=tokenizer.context_length)
        vocab = tokenizer.vocab_size if hasattr(tokenizer, "vocab_size") else len(tokenizer.tokenizer)  # Hugging Face's
        return Tokenizer(f"open_clip:{self.name}", tokenizer, vocab, tokenizer.context_length)

    def with_drop_path(self, rate: float) -> OpenClipConfig:
        raise ConfigError([f"drop_path: {self.name} is an open_clip model; only RWKV towers take this setting"])

    def find_tag(self, pretrained: str) -> tuple[OpenClipConfig, str | None]:
        """ConfigError for what is neither a file nor a tag of a named model."""
        if not isinstance(self.source, str) or Path(pretrained).exists():
            return self, None
        name = name_for_tag(self.source, pretrained)
        weights = open_clip.get_pretrained_cfg(name.removesuffix(QUICK), pretrained)
        return OpenClipConfig.parse({"open_clip": name, **read_preprocessing(weights)}), pretrained

    @property
    def name(self) -> str:
        return self.source if isinstance(self.source, str) else "open_clip"

    @property
    def vocabulary(self) -> int | None:
        text = self.description.get("text_cfg", {})
        return None if "hf_model_name" in text else text.get("vocab_size", 49408)

    @property
    def image_size(self) -> tuple[int, int]:
        return _image_size(self.description.get("vision_cfg", {}))

    @property
    def description(self) -> dict[str, Any]:
        """In open_clip's form."""
        return self.source if isinstance(self.source, dict) else open_clip.get_model_config(self.source) or {}


def _image_size(vision: dict[str, Any]) -> tuple[int, int]:
    size = vision.get("image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _build(where: str, settings: dict[str, Any], make: Callable[[], T]) -> T:
    """`make()`. ConfigError for an unknown or missing field, or a value of the wrong type."""
    try:
        return make()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError([f"{where}: open_clip cannot build {sorted(settings)}: {first_line(error)}"]) from None


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
