"""Chinese-CLIP's released models: names, configurations and keys of weights, there and here.

The towers are CLIP's image tower (open_clip's) and BERT; nothing is computed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import CONFIGS, ConfigError, load_json
from .specification import suggest
from .two_tower import ModelConfig

PREFIX = "CN-CLIP-"  # of our presets
IMAGE_TOWERS = ("ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50")
TEXT_TOWERS = {  # their name -> a preset that has it
    "RoBERTa-wwm-ext-base-chinese": "ViT-B-16",
    "RoBERTa-wwm-ext-large-chinese": "ViT-H-14",
    "RBT3-chinese": "RN50",
}
CONTEXT = 52  # tokens, of the released command line
MOST = 1 << 16  # of layers, pixels and widths; more is a slip, and would be built for hours

# ---- names and configurations ----------------------------------------------------------------------------------------


def is_structure(name: str) -> bool:
    """Whether a name is of the form IMAGE@TEXT."""
    return "@" in name and "/" not in name and not name.endswith(".json")


def parse_structure(name: str) -> ModelConfig:
    """`ViT-B-16@RoBERTa-wwm-ext-base-chinese` and the like -> model. ConfigError names the part that is not known."""
    image, _, text = name.partition("@")
    problems = [
        f"model: {part!r} in {name!r} is not {what} of Chinese-CLIP; {suggest(part, names)}"
        for part, what, names in ((image, "an image tower", IMAGE_TOWERS), (text, "a text tower", TEXT_TOWERS))
        if part not in names
    ]
    if problems:
        raise ConfigError(problems)
    return ModelConfig.parse(_load(image) | {"text": _load(TEXT_TOWERS[text])["text"]})


def _load(image_tower: str) -> dict[str, Any]:
    return load_json(CONFIGS / "models" / f"{PREFIX}{image_tower}.json")


_IMAGE_KEYS = {"embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size"}
_TEXT_KEYS = {  # theirs -> ours
    "text_hidden_size": "width",
    "text_num_hidden_layers": "depth",
    "text_num_attention_heads": "heads",
    "text_intermediate_size": "ffn_width",
    "text_max_position_embeddings": "positions",
    "text_type_vocab_size": "token_types",
    "text_hidden_dropout_prob": "dropout",
    "text_attention_probs_dropout_prob": "attention_dropout",
    "text_initializer_range": "init_std",
    "vocab_size": "vocab",
}
_OPTIONAL = {"vision_head_width", "text_hidden_act"}


def is_configuration(data: dict[str, Any]) -> bool:
    """Whether a model JSON has Chinese-CLIP's released keys, those of both towers merged."""
    return "vision_layers" in data or "text_hidden_size" in data


def convert_configuration(data: dict[str, Any]) -> ModelConfig:
    """Released keys -> model. ConfigError lists every problem."""
    valid = {*_IMAGE_KEYS, *_TEXT_KEYS, *_OPTIONAL}
    problems = [
        f"{key}: missing in a released Chinese-CLIP configuration; merge the files of both towers"
        for key in (*sorted(_IMAGE_KEYS), *_TEXT_KEYS)
        if key not in data
    ]
    problems += [
        f"{key}: unknown key in a Chinese-CLIP configuration; {suggest(key, valid)}"
        for key in sorted(data.keys() - valid)
    ]
    if data.get("text_hidden_act", "gelu") != "gelu":
        problems.append(f"text_hidden_act: {data['text_hidden_act']!r} is not supported; released models have 'gelu'")
    layers = data.get("vision_layers")
    if isinstance(layers, str):
        layers = (
            [int(number) for number in re.findall(r"\d+", layers)]
            if re.fullmatch(r"[\[(][\d, ]+[\])]", layers)
            else None
        )
    stages = isinstance(layers, (list, tuple)) and len(layers) == 4 and all(map(_is_count, layers))
    if not stages and not _is_count(layers) and "vision_layers" in data:
        problems.append(f"vision_layers: {data['vision_layers']!r} is neither a number nor a list such as [3,4,6,3]")
    sizes = ["image_resolution", "vision_width", *([] if stages else ["vision_patch_size", "vision_head_width"])]
    problems += [
        f"{key}: {data[key]!r} is not a positive whole number" for key in sizes if not _is_count(data.get(key, 1))
    ]
    head, width = data.get("vision_head_width", 64), data.get("vision_width")
    if not stages and not problems and width % head:
        problems.append(f"vision_head_width: {head} does not divide vision_width {width}")
    if problems:
        raise ConfigError(problems)
    text = {ours: data[theirs] for theirs, ours in _TEXT_KEYS.items()}
    positions = text["positions"]
    text |= {"kind": "bert", "context": min(CONTEXT, positions) if isinstance(positions, int) else positions}
    image = {
        **{"kind": "open_clip", "quick_gelu": True, "image_size": data["image_resolution"]},
        **{"layers": layers, "width": data["vision_width"], "patch_size": data["vision_patch_size"]},
        **({"head_width": data["vision_head_width"]} if data.get("vision_head_width", 64) != 64 else {}),
    }
    return ModelConfig.parse({"image": image, "text": text, "embed_dim": data["embed_dim"], "resize_mode": "squash"})


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST


# ---- weights ---------------------------------------------------------------------------------------------------------

_NAMES = (("visual.", "image_model."), ("bert.", "text_model."))  # theirs -> ours
_PROJECTION, _OWN_PROJECTION = "text_projection", "text_model.proj"
_DROPPED = ("bert.pooler.", "bert.embeddings.position_ids", "cls.")  # of seed-era files and of BERT's own


def is_released_state(keys: Iterable[str]) -> bool:
    """Whether a state dict has the released keys, without `module.`."""
    return "bert.embeddings.word_embeddings.weight" in keys


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released keys -> ours; what the model does not use (the pooler) is left out."""
    return {rename(key): value for key, value in state.items() if not key.startswith(_DROPPED)}


def rename(key: str) -> str:
    """Released key -> ours."""
    if key == _PROJECTION:
        return _OWN_PROJECTION
    return next((ours + key.removeprefix(theirs) for theirs, ours in _NAMES if key.startswith(theirs)), key)


def to_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our keys -> released ones, without `module.`."""
    pairs = [(ours, theirs) for theirs, ours in _NAMES]

    def name(key: str) -> str:
        if key == _OWN_PROJECTION:
            return _PROJECTION
        return next((theirs + key.removeprefix(ours) for ours, theirs in pairs if key.startswith(ours)), key)

    return {name(key): value for key, value in state.items()}


def text_tower_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Of the weights of a BERT, with or without `bert.` before its keys: embeddings and layers, under `prefix`.

    The pooler and the heads of its training are left out; `gamma` and `beta`, as early files call the parameters of
    norms, get their names of today."""
    plain = {key.removeprefix("bert."): value for key, value in state.items()}
    tower = {key: value for key, value in plain.items() if key.startswith(("embeddings.", "encoder."))}
    tower.pop("embeddings.position_ids", None)
    names = {key: re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", key)) for key in tower}
    return {prefix + names[key]: value for key, value in tower.items()}


POSITIONS = "image_model.positional_embedding"


def fit_positions(table: Tensor, rows: int) -> Tensor:
    """A ViT's position embeddings (1 + h * h, W) -> (rows, W): row 0 is kept, the square grid is resized (bicubic,
    corners aligned), as the released code does; unchanged where it fits. ValueError unless both grids are square."""
    if len(table) == rows:
        return table
    old, new = (math.isqrt(max(count - 1, 0)) for count in (len(table), rows))
    if not 0 < old * old == len(table) - 1 or not 0 < new * new == rows - 1:
        raise ValueError(f"positional_embedding: {len(table)} and {rows} rows are not 1 + a square grid; cannot resize")
    grid = table[1:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], grid.flatten(2)[0].T.to(table.dtype)])


def infer_configuration(state: dict[str, Tensor]) -> tuple[str, ModelConfig]:
    """Name and description of the released model that a state dict of released keys belongs to, by its shapes.

    The number of heads leaves no trace in them, so nothing else can be told. ConfigError where it is none of them.
    """
    for image in IMAGE_TOWERS:
        for text in TEXT_TOWERS:
            spec = parse_structure(f"{image}@{text}")
            if _shapes_of(spec) == _shapes_in(state):
                return f"{image}@{text}", spec
    raise ConfigError(
        ["model: the weights have Chinese-CLIP's keys, but not the shapes of a released model; name theirs (--model)"]
    )


def _shapes_of(spec: ModelConfig) -> tuple[Any, ...]:
    image, text = spec.image.to_json(), spec.text.to_json()
    width, layers, patch = image["width"], image["layers"], image["patch_size"]
    conv, blocks = ((width, 3, patch, patch), layers) if patch else ((width // 2, 3, 3, 3), layers[0])
    rows = (image["image_size"] // (patch or 32)) ** 2 + 1
    return (spec.embed_dim,), conv, blocks, (rows,), (text["vocab"], text["width"]), text["depth"]


def _shapes_in(state: dict[str, Tensor]) -> tuple[Any, ...]:
    def shape(key: str) -> tuple[int, ...]:
        return tuple(state[key].shape) if key in state else ()

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, key) is not None for key in state)

    rows = (shape("visual.positional_embedding") or shape("visual.attnpool.positional_embedding"))[:1]
    blocks = count(r"visual\.transformer\.resblocks\.\d+\.ln_1\.weight") or count(r"visual\.layer1\.\d+\.bn1\.weight")
    words = shape("bert.embeddings.word_embeddings.weight")
    depth = count(r"bert\.encoder\.layer\.\d+\.output\.dense\.weight")
    return shape(_PROJECTION)[-1:], shape("visual.conv1.weight"), blocks, rows, words, depth
