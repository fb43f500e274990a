"""What describes a model: one class per family of models or towers, all with the members below.

A family of towers is a file of this folder; its `TOWERS` names the class for each side that it has a tower for. A new
one is that file and a row in FAMILIES. A file may import heavy packages: it is imported when a model asks for it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..config import ConfigError
from ..tokenizer import Tokenizer
from ..transform import CLIP_MEAN, CLIP_STD, ResizeMode

Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel
CLIP_PIXELS: Pixels = (CLIP_MEAN, CLIP_STD)

FAMILIES = {"rwkv": "rwkv", "open_clip": "openclip", "bert": "bert"}  # `kind` of a tower -> file
DEFAULT_KIND = "rwkv"
MOST_NAMES = 40  # that an error lists


class Encoded(NamedTuple):
    """What a tower computes from its input."""

    features: Tensor  # (B, D), projected, not normalised
    pooled: Tensor  # (B, W), before the projection
    tokens: Tensor  # (B, L, W), after the last norm, before pooling


class TowerModule(Protocol):
    """What a model calls of a tower, as open_clip's towers have it: a float32 module, inputs -> features (B, D)."""

    def __call__(self, inputs: Tensor, /) -> Tensor: ...

    def set_grad_checkpointing(self, enable: bool = True, /) -> None: ...

    def lock(self, unlocked_groups: int = 0, /) -> None: ...


class ImageTowerModule(TowerModule, Protocol):
    """And of an image tower."""

    drop_numbers: Tensor | None  # read where its description has `drop_branches`, see `RWKVCLIP.set_drop_numbers`


class ContrastiveModel(nn.Module):
    """What every model of `create_model` has: open_clip's surface, and features by name. Declared only."""

    spec: ModelSpec
    logit_scale: nn.Parameter
    encode_image: Callable[..., Tensor]  # (image, normalize=False)
    encode_text: Callable[..., Tensor]  # (text, normalize=False)
    encode_parts: Callable[[str, Tensor], Encoded]  # of a side, "image" or "text"
    get_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (image, text)
    forward_intermediates: Callable[..., dict[str, Any]]
    no_weight_decay: Callable[[], set[str]]
    group_matcher: Callable[..., Callable[[str], int]]  # timm's
    output_dict: bool
    set_grad_checkpointing: Callable[[bool], None]
    set_drop_numbers: Callable[[Tensor | None], None]  # of a model with `drop_branches`


class TowerSpec(Protocol):
    """A tower: the table `image` or `text` of a model JSON."""

    @property
    def own_width(self) -> int | None:
        """Width of its features without an `embed_dim`; None for a tower that always has a projection."""

    @classmethod
    def parse(cls, table: dict[str, Any]) -> TowerSpec:
        """From its table without `kind`. ConfigError lists every problem."""

    def to_json(self) -> dict[str, Any]:
        """The table, as `parse_tower` reads it."""

    def build(self, embed_dim: int | None) -> TowerModule:
        """A tower with features (B, embed_dim), initial values from torch's global generator."""

    def encode(self, tower: Any, inputs: Tensor) -> Encoded:
        """The features of `tower(inputs)`, bit for bit, and what they were made from. ValueError if it cannot."""


class ImageSpec(TowerSpec, Protocol):
    """An image tower: pixels (B, 3, h, w) -> features."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height, width."""

    @property
    def pixels(self) -> Pixels: ...

    @property
    def drop_branches(self) -> int:
        """Residual branches that stochastic depth drops: rows of the tower's `drop_numbers`."""

    def build(self, embed_dim: int | None) -> ImageTowerModule: ...

    def with_drop_path(self, rate: float) -> ImageSpec:
        """The same with this rate of stochastic depth. ConfigError for a tower without it."""


class TextSpec(TowerSpec, Protocol):
    """A text tower: token ids (B, T) -> features."""

    @property
    def default_tokenizer(self) -> str: ...

    @property
    def context(self) -> int: ...

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids; None where only the library that builds the tower can tell."""

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer of this name, for this context."""


class ModelSpec(Protocol):
    """A whole model."""

    @property
    def name(self) -> str: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def pixels(self) -> Pixels: ...

    @property
    def resize_mode(self) -> ResizeMode: ...

    @property
    def vocabulary(self) -> int | None: ...

    def to_json(self) -> dict[str, Any]:
        """JSON data that `create_model` accepts; the same for a model in every version."""

    def build(self, tag: str | None = None) -> ContrastiveModel:
        """A model in float32: initial values from torch's global generator, or the weights of a tag."""

    def tokenizer(self) -> Tokenizer:
        """Texts -> int64 (n, context)."""

    def with_drop_path(self, rate: float) -> ModelSpec:
        """The same with this rate of stochastic depth in its image tower. ConfigError for a tower without it."""

    def find_tag(self, pretrained: str) -> tuple[ModelSpec, str | None]:
        """(the model that these weights were trained as, the tag that `build` takes), or (self, None) for a file."""


def load_family(kind: str) -> ModuleType:
    """The file of a family."""
    return importlib.import_module(f".{FAMILIES[kind]}", __package__)


def parse_tower(side: str, table: Any) -> Any:
    """The table `image` or `text` of a model JSON -> ImageSpec or TextSpec. ConfigError lists every problem."""
    if not isinstance(table, dict):
        raise ConfigError([f"{side}: expected a table of settings, got {table!r}"])
    kind = table.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError([f"{side}.kind: {kind!r} is not a family of towers; {suggest(kind, FAMILIES)}"])
    towers = load_family(kind).TOWERS
    if side not in towers:
        raise ConfigError([f"{side}.kind: {kind!r} has no {side} tower, only {', '.join(towers)}"])
    return towers[side].parse({key: value for key, value in table.items() if key != "kind"})


def suggest(name: Any, names: Iterable[str]) -> str:
    """A hint at what to write instead of an unknown name."""
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=1)
    listed = ", ".join(names[:MOST_NAMES]) + (" .." if len(names) > MOST_NAMES else "")
    return f"did you mean {near[0]!r}?" if near else f"valid names: {listed}"
