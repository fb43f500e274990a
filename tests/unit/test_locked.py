"""A locked tower costs no backward pass: nothing of its forward is kept, and the optimizer holds nothing for it."""

import pytest
import torch

import rwkv_clip
from helpers.tiny import make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import parse
from rwkv_clip.models.freezing import FreezeSettings, freeze_parameters
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TRANSFORMER = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 8, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
BERT = {"kind": "bert", "context": 8, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 48}
MODELS = {
    "RWKV": {"image": RWKV_IMAGE, "text": RWKV_TEXT},
    "ViT": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
    "ViT, custom": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "custom_text": True},
    "ResNet": {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TRANSFORMER},
    "ViT and BERT": {"embed_dim": 24, "image": {"kind": "open_clip", **VIT}, "text": BERT},
    "ResNet and RWKV": {"embed_dim": 24, "image": {"kind": "open_clip", **RESNET}, "text": RWKV_TEXT},
}
LOCKS = {
    "image": {"lock_image": True},
    "text": {"lock_text": True, "lock_text_freeze_layer_norm": True},
}


def kept_bytes(model: torch.nn.Module, needs: list[str], **inputs: torch.Tensor | None) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights aside."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(**{"image": None, "text": None, **inputs}, needs=needs)
    del output
    return sum(kept.values())


def record_modes(model: torch.nn.Module) -> dict[str, set[bool]]:
    """What comes to hold, for each tower, whether gradients were enabled in its LayerNorms, or its convolution."""
    found: dict[str, set[bool]] = {"image": set(), "text": set()}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.Conv2d)):
            side = "image" if name.startswith(("image_model.", "visual.")) else "text"
            module.register_forward_hook(lambda *_, side=side: found[side].add(torch.is_grad_enabled()))
    return found


@pytest.mark.parametrize("needs", [(), ("pooled",)], ids=["features", "and what they are made from"])
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_kept_of_a_locked_tower(name, side, needs):
    if needs and name.startswith("ResNet") and side == "image":
        pytest.skip("a ResNet does not give what its features are made from")
    torch.manual_seed(0)
    model = rwkv_clip.create_model(MODELS[name]).train()
    inputs = {"image": torch.randn(3, 3, 32, 32), "text": torch.randint(1, 99, (3, 8))}
    names = [side, *(f"{side}_{extra}" for extra in needs)]
    before = kept_bytes(model, names, **{side: inputs[side]})
    freeze_parameters(model, parse(FreezeSettings, LOCKS[side]))
    torch.manual_seed(1)  # of dropout
    frozen = getattr(model, f"encode_{side}")(inputs[side], normalize=True)
    torch.manual_seed(1)
    modes = record_modes(model)
    locked = model(**inputs, needs=names)
    assert modes == {side: {False}, "text" if side == "image" else "image": {True}}, "run without and with gradients"
    assert torch.equal(locked[side], frozen), "the same bits as with a graph that holds frozen weights"
    assert all(locked[key].grad_fn is None for key in names) and locked["logit_scale"].requires_grad
    other = "text" if side == "image" else "image"
    assert locked[other].grad_fn is not None
    small = kept_bytes(model, names, **{side: inputs[side]})
    assert small <= 64 < 10_000 < before, "only the temperature's"


def test_what_is_unlocked_again_trains():
    model = rwkv_clip.create_model(MODELS["RWKV"])
    model.requires_grad_(False)
    image = torch.randn(2, 3, 32, 32)
    assert model(image, needs=["image"])["image"].grad_fn is None
    model.image_model.ln1.requires_grad_(True)
    assert model(image, needs=["image"])["image"].grad_fn is not None
    model.requires_grad_(False)
    image.requires_grad_(True)  # who asks for the gradients of pixels gets them
    model(image, needs=["image"])["image"][0, 0].backward()
    assert image.grad.abs().max() > 0


@pytest.mark.parametrize("way", [{}, {"accum_freq": 2}, {"deterministic": True}, {"grad_checkpointing": True}], ids=str)
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_run_with_a_locked_tower(new_folder, side, way):
    """Its weights stay, and the optimizer has no state for them; everything else trains."""
    data = make_tiny(new_folder("locked")) | {
        "val_data": None,
        "max_steps": 2,
        "batch_size": 8 // way.get("accum_freq", 1),
    }
    folder = find_checkpoint(run(parse(Settings, data | LOCKS[side] | way | {"max_ranks": 2})))
    weights, state = read_tensors(folder / "model.safetensors"), read_tensors(folder / "optim.safetensors")
    torch.manual_seed(0)
    start = rwkv_clip.create_model(data["model"]).state_dict()
    for key, value in weights.items():
        locked = key.startswith(f"{side}_model.")
        assert (f"{key}/exp_avg" in state) != locked
        assert not locked or torch.equal(value, start[key])
    assert not torch.equal(weights["logit_scale"], start["logit_scale"])
