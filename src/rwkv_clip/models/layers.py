"""Which layer a parameter belongs to, and which are not decayed: what timm's parameter groups ask a model for."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

# Blocks of the families: RWKV's image and text tower, open_clip's transformers and ResNets, timm's, BERT.
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|resblocks|layer)\.(\d+)\.|(?:^|\.)layer([1-4])\.")
_IMAGE = ("image_model.", "visual.")
# Besides what has one dimension: tables of positions, class tokens, and RWKV's vectors, which are stored as (1, 1, W).
_UNDECAYED = re.compile(
    r"(?:^|\.)(?:pos_embed|cls_token|positional_embedding|class_embedding|position_embeddings\.weight"
    r"|token_type_embeddings\.weight|time_maa_[xwkvrg]|spatial_mix_[kr]|time_decay|time_faaaa)$"
)
# At the end of a tower: its last norm and projection; everything else outside of blocks is at its beginning.
_END = re.compile(r"(?:^|\.)(?:ln_post|ln_final|ln_out|ln1|proj|text_projection|attn_pool|attnpool|head)(?:\.|$)")
_WHOLE = ("logit_scale", "logit_bias")


def find_undecayed(module: nn.Module) -> set[str]:
    """Names of the parameters of a model or tower that get no weight decay, besides those of one dimension."""
    return {name for name, _ in module.named_parameters() if _UNDECAYED.search(name)}


def number_layers(module: nn.Module) -> Callable[[str], int]:
    """A function from the name of a parameter to the number of its layer, as timm's `group_matcher(coarse=False)`.

    A tower's embeddings are layer 0, its blocks 1, 2, .., what follows them the last. In a model of two towers both
    end at the same layer, so that equal distance from the output means equal layer; the temperature is in the last.
    """
    names = [name for name, _ in module.named_parameters()]
    depths: dict[bool, int] = {}
    for name in names:
        if (block := _block(name)) is not None:
            depths[_is_image(name)] = max(depths.get(_is_image(name), 0), block + 1)
    last = max(depths.values(), default=0) + 1

    def number(name: str) -> int:
        block, depth = _block(name), depths.get(_is_image(name), 0)
        if block is not None:
            return last - depth + block
        return last if name in _WHOLE or _END.search(name) else last - depth - 1

    return number


def _is_image(name: str) -> bool:
    return name.startswith(_IMAGE)


def _block(name: str) -> int | None:
    found = _BLOCK.search(name)
    return None if found is None else int(found[1]) if found[1] else int(found[2]) - 1
