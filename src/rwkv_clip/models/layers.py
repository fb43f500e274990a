"""Which layer a parameter belongs to, and which are not decayed: what timm's parameter groups ask a model for."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

# Blocks of the families: RWKV's image and text tower, open_clip's transformers and ResNets, transformers' encoders.
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|block|resblocks|cross_attn|layer)\.(\d+)\.|(?:^|\.)layer([1-4])\.")
_SIDES = ("image_model.", "visual.", "text_decoder.")  # CoCa's decoder is a tower, too; everything else is the text's
_TRUNK = re.compile(r"(?:^|\.)trunk$")  # a model of timm's in a tower of open_clip's
# Besides what has one dimension: tables of positions, class tokens, and RWKV's vectors, which are stored as (1, 1, W).
_UNDECAYED = re.compile(
    r"(?:^|\.)(?:pos_embed|cls_token|positional_embedding|class_embedding|position_embeddings\.weight"
    r"|token_type_embeddings\.weight|time_maa_[xwkvrg]|spatial_mix_[kr]|time_decay|time_faaaa)$"
)
# At the end of a tower: its last norm and projection; everything else outside of blocks is at its beginning.
_END = re.compile(
    r"(?:^|\.)(?:ln_post|ln_final|ln_out|ln1|proj|text_projection|attn_pool|attnpool|head|pooler|layer_norm"
    r"|final_layer_norm)(?:\.|$)"
)
_WHOLE = ("logit_scale", "logit_bias")


def find_undecayed(module: nn.Module) -> set[str]:
    """Names of the parameters of a model or tower that get no weight decay, besides those of one dimension."""
    return {name for name, _ in module.named_parameters() if _UNDECAYED.search(name)}


def number_layers(module: nn.Module) -> Callable[[str], int]:
    """A function from the name of a parameter to the number of its layer, as timm's `group_matcher(coarse=False)`.

    A tower's embeddings are layer 0, its blocks 1, 2, .., what follows them the last. In a model of several towers all
    end at the same layer, so that equal distance from the output means equal layer: the embeddings of a shallower one
    are in a later layer. The temperature is in the last. A model of timm's has the layers that timm gives it.
    """
    names = [name for name, _ in module.named_parameters()]
    trunks = _number_trunks(module)
    ends: dict[str, int] = {}  # number of the last layer of each tower, counted from its own first
    for name in names:
        block = _block(name)
        end = trunks[name] if name in trunks else 0 if block is None else block + 1
        # After a block comes at least a norm or a projection.
        ends[_side(name)] = max(ends.get(_side(name), 1), end + (block is not None))
    last = max(ends.values(), default=1)

    def number(name: str) -> int:
        first = last - ends.get(_side(name), 1)
        if name in trunks:
            return first + trunks[name]
        if (block := _block(name)) is not None:
            return first + 1 + block
        return last if name in _WHOLE or _END.search(name) else first

    return number


def _number_trunks(module: nn.Module) -> dict[str, int]:
    """The layers of timm's models in it, by the names of their parameters; empty where there is none."""
    found: dict[str, int] = {}
    for name, trunk in module.named_modules():
        if _TRUNK.search(name) and hasattr(trunk, "group_matcher"):
            from timm.models import group_parameters

            numbers = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
            found |= {f"{name}.{key}": number for key, number in numbers.items()}
    return found


def _side(name: str) -> str:
    return next((side for side in _SIDES if name.startswith(side)), "")


def _block(name: str) -> int | None:
    found = _BLOCK.search(name)
    return None if found is None else int(found[1]) if found[1] else int(found[2]) - 1
