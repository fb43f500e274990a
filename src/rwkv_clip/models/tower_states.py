"""Towers in files of weights: which tensors of a state dict belong to a tower, and what kind of tower they are.

A tower's tensors are named here as the tower itself names them, without what the model around it puts before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from . import chinese_clip

State = dict[str, Tensor]
IMAGE = ("image_model.", "visual.")  # ours, open_clip's
TEXT = ("text_model.", "text.")
# open_clip's CLIP has the text tower at its top level, with OpenAI's names.
PLAIN_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
# What follows a tower: files of a BERT or of a classifier have none, and then it starts anew.
PROJECTIONS = {"image": re.compile(r"proj|head\..+"), "text": re.compile(r"proj|text_projection|proj\..+")}
CLASSIFIER = re.compile(
    r"(head|head_dist|fc|classifier)\.(fc\.|l\.)?(weight|bias)"
)  # of timm's and torchvision's models
BERT, TRUNK = "transformer.embeddings.word_embeddings.weight", "trunk."  # open_clip's towers around others' models
_BLOCKS = re.compile(r"(?:^|\.)(?:layers|blocks|resblocks|layer)\.(\d+)\.")


def find_prefix(keys: Iterable[str], side: str) -> str | None:
    """What comes before the names of a tower in a model with these keys; "" for a text tower at its top level, None
    without such a tower."""
    keys = list(keys)
    for prefix in IMAGE if side == "image" else TEXT:
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return "" if side == "text" and any(key.startswith(PLAIN_TEXT) for key in keys) else None


def cut_tower(state: Mapping[str, Tensor], side: str, prefix: str) -> State:
    """The tensors of a tower, by its own names."""
    if prefix:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if key.startswith(PLAIN_TEXT)}


def find_tower(state: State, side: str, own: Iterable[str]) -> State:
    """The tower of a side in the weights of a model of ours or of open_clip's, or of a tower alone: as the towers name
    theirs, as a BERT does, as an ImageNet classifier of timm's. own: names of the tower that it is for. Empty where
    there is none."""
    own = set(own)
    if side == "text" and any(key.startswith(("bert.", "embeddings.word_embeddings.")) for key in state):
        own_projection = {key: state[key] for key in ("proj",) if key in state and key in own}
        return chinese_clip.text_tower_of(state, "transformer." if BERT in own else "") | own_projection
    alone = not any(key.startswith((*IMAGE, *TEXT)) for key in state)
    if alone and own - {key for key in own if PROJECTIONS[side].fullmatch(key)} <= state.keys():
        return state
    prefix = find_prefix(state, side)
    if prefix is not None:
        return cut_tower(state, side, prefix)
    if find_prefix(state, "image") is not None or find_prefix(state, "text") is not None:
        return {}
    kept = {key: value for key, value in state.items() if not CLASSIFIER.fullmatch(key)}
    trunk = any(key.startswith(TRUNK) for key in own)
    return {f"{TRUNK}{key}": value for key, value in kept.items()} if trunk and side == "image" else kept


def lacks_projection(tower: Iterable[str], side: str) -> bool:
    """Whether a tower ends without a projection."""
    return not any(PROJECTIONS[side].fullmatch(key) for key in tower)


def describe_tower(tower: Mapping[str, Tensor]) -> str:
    """What kind of tower these tensors are, and its sizes: for messages."""
    if not tower:
        return "no such tower"
    found = {int(match[1]) for key in tower if (match := _BLOCKS.search(key))}
    blocks = f"{len(found)} blocks" if found else ""

    def sizes(kind: str, key: str, names: tuple[str, ...], more: str = blocks) -> str:
        numbers = [f"{name} {tower[key].shape[axis]}" for axis, name in enumerate(names) if name]
        return f"{kind} of {', '.join([*numbers, *([more] if more else [])])}"

    kinds = (
        ("patch_embed.projection.weight", "an RWKV image tower", ("width", "", "patch")),
        ("emb.weight", "an RWKV text tower", ("vocabulary", "width")),
        ("token_embedding.weight", "a CLIP text transformer", ("vocabulary", "width")),
        ("embeddings.word_embeddings.weight", "a BERT", ("vocabulary", "width")),
        (BERT, "a BERT in a tower of open_clip's", ("vocabulary", "width")),
    )
    for key, kind, names in kinds:
        if key in tower and tower[key].dim() >= len(names):
            return sizes(kind, key, names)
    if "conv1.weight" in tower and tower["conv1.weight"].dim() == 4:
        if any(key.startswith("transformer.") for key in tower):
            return sizes("a CLIP ViT", "conv1.weight", ("width", "", "patch"))
        clip = any(key.startswith("attnpool.") for key in tower)
        stages = [len({key.split(".")[1] for key in tower if key.startswith(f"layer{i}.")}) for i in range(1, 5)]
        return f"a {'CLIP' if clip else 'plain'} ResNet of {'+'.join(map(str, stages))} blocks"
    if any(key.startswith(TRUNK) for key in tower):
        return f"a model of timm's in a tower of open_clip's, {blocks or f'{len(tower)} tensors'}"
    if "patch_embed.proj.weight" in tower and tower["patch_embed.proj.weight"].dim() == 4:
        return sizes("a ViT of timm's", "patch_embed.proj.weight", ("width", "", "patch"))
    return f"something else ({len(tower)} tensors like {', '.join(sorted(tower)[:2])})"


def describe_model(state: Mapping[str, Tensor]) -> str:
    """The same of both towers of a model; empty where there are none."""
    prefixes = {side: find_prefix(state, side) for side in PROJECTIONS}
    found = [describe_tower(cut_tower(state, side, prefix)) for side, prefix in prefixes.items() if prefix is not None]
    return " with ".join(found)
