"""A model of an image tower and a text tower, chosen independently, and a temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError, parse, ranged
from ..ops.watched import refuse_fused_attention
from ..tokenizer import BERT_CHINESE, CLIP_BPE, END, Tokenizer
from ..transform import ResizeMode
from .intermediates import run_model
from .layers import find_undecayed, number_layers
from .outputs import SIDES, name_features
from .rwkv import ImageTowerConfig, TextTowerConfig
from .specification import ContrastiveModel, Encoded, ImageSpec, Pixels, TextSpec, parse_tower
from .tower import Tower


@dataclass(frozen=True)
class _Description:
    """What a model JSON may hold. Each tower's table is checked by its family."""

    image: object = None
    text: object = None
    tokenizer: str | None = None
    embed_dim: int | None = ranged(None, minimum=1)
    resize_mode: ResizeMode = "shortest"
    init_logit_bias: float | None = None

    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True, repr=False)
class ModelConfig:
    """Two towers, of any widths where both are projected to `embed_dim`, else of equal width.

    init_logit_bias: what the bias of the scores begins with, by open_clip's name; None: the model has none."""

    name: ClassVar[str] = "RWKV-CLIP"

    image: ImageSpec = field(default_factory=ImageTowerConfig)
    text: TextSpec = field(default_factory=TextTowerConfig)
    tokenizer_name: str = CLIP_BPE
    embed_dim: int | None = None
    resize_mode: ResizeMode = "shortest"
    init_logit_bias: float | None = None

    def __repr__(self) -> str:
        """Unchanged since version 0.2: it is part of the key of cached features."""
        more = "" if self.embed_dim is None else f", embed_dim={self.embed_dim}"
        more += "" if self.resize_mode == "shortest" else f", resize_mode={self.resize_mode!r}"
        return f"ModelConfig(image={self.image!r}, text={self.text!r}, tokenizer={self.tokenizer_name!r}{more})"

    def problems(self) -> list[str]:
        """What is wrong with the towers together."""
        if self.embed_dim is not None:
            return []
        towers = (("image", self.image), ("text", self.text))
        if projected := [side for side, tower in towers if tower.own_width is None]:
            return [f"embed_dim: missing; the {side} tower needs the width to project to" for side in projected]
        if self.image.own_width != self.text.own_width:
            return [
                f"text.width: {self.text.own_width} differs from image.width {self.image.own_width}; "
                "features must match: set embed_dim to project both to one width"
            ]
        return []

    @classmethod
    def parse(cls, data: dict[str, Any]) -> ModelConfig:
        """From JSON data. ConfigError lists every problem."""
        problems: list[str] = []

        def attempt(make: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return make(*arguments)
            except ConfigError as error:
                problems.extend(error.problems)

        top = attempt(parse, _Description, data)
        image, text = (attempt(parse_tower, side, _add_pooling(side, data)) for side in SIDES)
        if not problems:
            tokenizer = top.tokenizer or text.default_tokenizer
            spec = cls(image, text, tokenizer, top.embed_dim, top.resize_mode, top.init_logit_bias)
            problems = spec.problems()
        if problems:
            raise ConfigError(problems)
        return spec

    def to_json(self) -> dict[str, Any]:
        """JSON data; what is not a tower or the tokenizer only where it is set, as before it existed."""
        towers = {"image": self.image.to_json(), "text": self.text.to_json()}
        projection = {} if self.embed_dim is None else {"embed_dim": self.embed_dim}
        resize = {} if self.resize_mode == "shortest" else {"resize_mode": self.resize_mode}
        bias = {} if self.init_logit_bias is None else {"init_logit_bias": self.init_logit_bias}
        return {**towers, "tokenizer": self.tokenizer_name, **projection, **resize, **bias}

    def build(self, tag: str | None = None) -> RWKVCLIP:
        assert tag is None, "find_tag knows none"
        return RWKVCLIP(self)

    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer(self.tokenizer_name)

    def with_drop_path(self, rate: float) -> ModelConfig:
        return replace(self, image=self.image.with_drop_path(rate))

    def find_tag(self, pretrained: str) -> tuple[ModelConfig, None]:
        return self, None

    @property
    def vocabulary(self) -> int | None:
        return self.text.vocabulary

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image.image_size

    @property
    def pixels(self) -> Pixels:
        return self.image.pixels


def _add_pooling(side: str, data: dict[str, Any]) -> Any:
    """The table of a tower. open_clip's text towers pool at the largest id, CLIP's end of text; BERT's end is another,
    by name."""
    table = data.get(side, {})
    chinese = side == "text" and data.get("tokenizer") == BERT_CHINESE
    if chinese and isinstance(table, dict) and table.get("kind") == "open_clip" and "pool_type" not in table:
        return {**table, "pool_type": "eos", "eos_id": END}
    return table


class RWKVCLIP(ContrastiveModel):
    """Two towers whose features are compared by cosine times exp(logit_scale), plus logit_bias where the model has one,
    which no softmax and no ranking sees. The interface is open_clip's."""

    spec: ModelConfig
    logit_bias: nn.Parameter | None
    output_dict = False

    def __init__(self, spec: ModelConfig):
        super().__init__()
        self.spec = spec
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        begin = spec.init_logit_bias
        self.register_parameter("logit_bias", None if begin is None else nn.Parameter(torch.tensor(begin)))
        self.text_model = spec.text.build(spec.embed_dim)
        self.image_model = spec.image.build(spec.embed_dim)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, h, w) normalised pixels -> (B, D)."""
        if not isinstance(self.image_model, Tower):  # open_clip's
            refuse_fused_attention()
        features = self.image_model(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, T) int64 token ids -> (B, D)."""
        features = self.text_model(text)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_parts(self, side: str, inputs: Tensor) -> Encoded:
        """Features of one side, not normalised, and what they were made from."""
        return getattr(self.spec, side).encode(getattr(self, f"{side}_model"), inputs)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, needs: Iterable[str] | None = None
    ) -> tuple[Tensor | None, ...] | dict[str, Any]:
        """Normalised image features, normalised text features, exp(logit_scale), and logit_bias where the model has
        one; of an input that is not given, None.

        As a dict with open_clip's names (image_features, text_features, ..) if `output_dict` is set; with `needs` see
        `name_features`."""
        if needs is not None:
            return name_features(self, image, text, needs)
        images = None if image is None else self.encode_image(image, normalize=True)
        texts = None if text is None else self.encode_text(text, normalize=True)
        found = {"image_features": images, "text_features": texts, "logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            found["logit_bias"] = self.logit_bias
        return found if self.output_dict else tuple(found.values())

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines plus the bias, images by texts, and their transpose."""
        images, texts = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * images @ texts.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def forward_intermediates(
        self, image: Tensor | None = None, text: Tensor | None = None, **options: Any
    ) -> dict[str, Any]:
        """Features and what the blocks put out, by open_clip's names and options, see `intermediates.run_model`."""
        return run_model(self, image, text, options)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass while training."""
        self.image_model.set_grad_checkpointing(enable)
        self.text_model.set_grad_checkpointing(enable)

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower except its last groups: embedding, blocks, last block with norm, projection.

        freeze_bn_stats: also the statistics of the batch norms of a ResNet; other towers have none."""
        tower: Any = self.image_model
        if freeze_bn_stats and hasattr(tower, "attnpool"):
            tower.lock(unlocked_groups, freeze_bn_stats)
        else:
            tower.lock(unlocked_groups)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """The same for the text tower. freeze_layer_norm=False leaves its LayerNorms as they are."""
        tower: Any = self.text_model
        norms = [module for module in tower.modules() if isinstance(module, nn.LayerNorm)]
        spared = [] if freeze_layer_norm else [parameter for norm in norms for parameter in norm.parameters()]
        before = [parameter.requires_grad for parameter in spared]
        tower.lock(unlocked_layers)
        for parameter, trains in zip(spared, before):
            parameter.requires_grad_(trains)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's and open_clip's optimizers should not decay, see `layers.find_undecayed`."""
        return find_undecayed(self)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Name of a parameter -> number of its layer, for timm's layer decay, see `layers.number_layers`."""
        return number_layers(self)

    @property
    def visual(self) -> Any:
        """The image tower, by open_clip's name. The names of parameters begin with image_model."""
        return self.image_model

    @property
    def text(self) -> Any:
        """The text tower, by open_clip's name. The names of parameters begin with text_model."""
        return self.text_model

    @property
    def drop_branches(self) -> int:
        """Residual branches that training drops at random: numbers a sample needs in `set_drop_numbers`."""
        return self.spec.image.drop_branches

    def set_drop_numbers(self, numbers: Tensor | None) -> None:
        """Decide what the coming forward passes drop: uniform numbers in [0, 1), (drop_branches, B) on the CPU, or None
        to draw new ones each time. With numbers that belong to samples, a sample's drops are the same in every
        batch."""
        self.image_model.drop_numbers = numbers

    @property
    def context_length(self) -> int:
        return self.spec.text.context

    @property
    def image_size(self) -> tuple[int, int]:
        return self.spec.image_size

    @property
    def vocab_size(self) -> int | None:
        return self.spec.vocabulary
