"""timm's layer decay: every parameter is in the layer that the gradients say it is in, in towers of unequal depth."""

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import rwkv_clip

RWKV = {"image_size": [32, 32], "patch": 16, "width": 32, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 12, "width": 32, "heads": 2, "ffn_width": 64}
VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32}
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
CLIP_TEXT = {"context_length": 12, "vocab_size": 600, "width": 48, "heads": 2}
BERT = {"kind": "bert", "context": 12, "width": 48, "heads": 2, "ffn_width": 64, "vocab": 600, "dropout": 0.0}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
MODELS: dict[str, dict[str, Any]] = {
    "RWKV, 2 and 5": {"image": {**RWKV, "depth": 2}, "text": {**RWKV_TEXT, "depth": 5}},
    "RWKV with a class token, 4, and CLIP's text, 1": {
        "image": {**RWKV, "depth": 4, "class_token": True},
        "text": {"kind": "open_clip", **CLIP_TEXT, "layers": 1},
        "embed_dim": 24,
    },
    "ViT, 2, and BERT, 6": {
        "image": {"kind": "open_clip", **VIT, "layers": 2},
        "text": {**BERT, "depth": 6},
        "embed_dim": 24,
    },
    "ResNet and BERT, 2": {"image": {"kind": "open_clip", **RESNET}, "text": {**BERT, "depth": 2}, "embed_dim": 24},
    "CLIP, 5 and 2": {"embed_dim": 24, "vision_cfg": {**VIT, "layers": 5}, "text_cfg": {**CLIP_TEXT, "layers": 2}},
    "CLIP, 1 and 4, custom text": {
        "embed_dim": 24,
        "vision_cfg": {**VIT, "layers": 1},
        "text_cfg": {**CLIP_TEXT, "layers": 4},
        "custom_text": True,
    },
    "timm's ViT, 12, and 3": {"embed_dim": 192, "vision_cfg": TIMM, "text_cfg": {**CLIP_TEXT, "layers": 3}},
}
TEXT = torch.tensor([[5] * 11 + [599], [7] * 6 + [599] * 6])


def blocks_of(model: Any, side: str) -> list[nn.Module]:
    """A tower's blocks in the order of the computation; of a ResNet its four stages."""
    tower = model.visual if side == "image" else getattr(model, "text", model)
    for path in ("trunk.blocks", "transformer.resblocks", "layers", "blocks"):
        try:
            return list(tower.get_submodule(path))
        except AttributeError:
            continue
    return [getattr(tower, f"layer{i}") for i in (1, 2, 3, 4)] if side == "image" else list(tower.encoder["layer"])


def differentiate(model: Any, side: str) -> set[str]:
    """Names of the parameters that the features of a side have a gradient for."""
    model.zero_grad()
    image = torch.randn(2, 3, *model.spec.image_size)
    (model.encode_image(image) if side == "image" else model.encode_text(TEXT)).square().sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def after(model: Any, side: str, block: nn.Module, before: bool) -> set[str]:
    """Names of the parameters of a tower that get a gradient when none passes through the output (or, with `before`,
    the input) of a block."""

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    hook = (
        block.register_forward_pre_hook(lambda _, inputs: tuple(map(cut, inputs)))
        if before
        else block.register_forward_hook(lambda _, inputs, output: cut(output))
    )
    names = differentiate(model, side)
    hook.remove()
    return names


def find_layers(model: Any) -> dict[str, int]:
    """Name of each parameter of both towers -> layers between it and the output: 0 after the last block."""
    found: dict[str, int] = {}
    for side in ("image", "text"):
        blocks = blocks_of(model, side)
        found |= dict.fromkeys(differentiate(model, side), len(blocks) + 1)
        found |= dict.fromkeys(after(model, side, blocks[0], before=True), len(blocks))
        for i, block in enumerate(blocks):
            found |= dict.fromkeys(after(model, side, block, before=False), len(blocks) - 1 - i)
    found |= {name: 1 for name in found if ".trunk.norm." in name}  # timm counts it to the last block
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_the_layer_that_gradients_tell(name):
    from timm.optim import param_groups_layer_decay

    torch.manual_seed(0)
    model = rwkv_clip.create_model(MODELS[name]).train()
    with torch.no_grad():
        for parameter in model.parameters():  # none is zero, and stops the gradient of others
            parameter.add_(0.05 * torch.randn_like(parameter))
    expected = find_layers(model)
    parameters = dict(model.named_parameters())
    unused = parameters.keys() - expected.keys()
    assert unused == {"logit_scale"}
    decay, undecayed = 0.5, model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.1, undecayed, layer_decay=decay)
    names = {id(parameter): name for name, parameter in parameters.items()}
    rates = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rates == {**{key: decay**layer for key, layer in expected.items()}, "logit_scale": 1.0}
    weights = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    plain = {key for key, parameter in parameters.items() if parameter.dim() > 1 and key not in undecayed}
    assert {key for key, weight in weights.items() if weight} == plain and plain
    assert undecayed <= parameters.keys()


@pytest.mark.parametrize("name", ["RWKV, 2 and 5", "ViT, 2, and BERT, 6"])
def test_one_tower_alone_has_the_same_order(name):
    model = rwkv_clip.create_model(MODELS[name])
    for tower, side in ((model.visual, "image"), (model.text, "text")):
        if not hasattr(tower, "group_matcher"):  # open_clip's towers have none
            continue
        number, depth = tower.group_matcher(), len(blocks_of(model, side))
        found = {key: number(key) for key, _ in tower.named_parameters()}
        assert set(found.values()) == set(range(depth + 2))
        whole = model.group_matcher()
        shift = {whole(f"{side}_model.{key}") - value for key, value in found.items()}
        assert len(shift) == 1, "in the model it is numbered in another order"


def test_the_decoder_of_coca_is_a_tower():
    with torch.device("meta"):
        model = rwkv_clip.create_model("coca_ViT-B-32")
    number = model.group_matcher()
    depth = open_clip.get_model_config("coca_ViT-B-32")["multimodal_cfg"]["layers"]
    for key, _ in model.named_parameters():
        if key.startswith("text_decoder.") and ".ln_final" not in key and "text_projection" not in key:
            assert number(key) == 1 + int(key.split(".")[2]), key
    assert number("text_decoder.ln_final.weight") == number("logit_scale") == depth + 1


@pytest.mark.parametrize("name", ["convnext_base", "EVA02-B-16", "MobileCLIP-S1", "swin_base_patch4_window7_224"])
def test_models_of_timm_begin_where_pictures_come_in(name):
    with torch.device("meta"):
        model = rwkv_clip.create_model(name)
    number = model.group_matcher()
    names = [key for key, _ in model.visual.trunk.named_parameters()]
    stem = [key for key in names if key.startswith(("stem", "patch_embed"))]
    last = number("logit_scale")
    assert stem and len({number(f"visual.trunk.{key}") for key in stem}) <= 3  # some stems are several layers
    assert max(number(f"visual.trunk.{key}") for key in stem) < min(
        number(f"visual.trunk.{key}") for key in names if key.startswith(("norm", "head", "attn_pool", "fc_norm"))
    )
    assert max(number(f"visual.trunk.{key}") for key in names) >= last - 1  # where a head follows
