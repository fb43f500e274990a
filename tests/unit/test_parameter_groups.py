"""Rates by tower and layer are timm's, decay is grouped as before, and Muon gets the matrices of blocks."""

import math

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import rwkv_clip
from rwkv_clip.config import parse
from rwkv_clip.models.freezing import FreezeSettings, freeze_parameters
from rwkv_clip.training.optim import Schedule, build_optimizer, set_step
from rwkv_clip.training.optimizer_choice import find_optimizer
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.parameter_groups import Rates, build_groups, side_of
from rwkv_clip.training.settings import OptimizerSettings

RWKV = {"image_size": [32, 32], "patch": 16, "width": 32, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 12, "width": 32, "heads": 2, "ffn_width": 64}
VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32}
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
CLIP_TEXT = {"context_length": 12, "vocab_size": 600, "width": 48, "heads": 2}
BERT = {"kind": "bert", "context": 12, "width": 48, "heads": 2, "ffn_width": 64, "vocab": 600, "dropout": 0.0}
MODELS = {
    "RWKV, 2 and 5": {"image": {**RWKV, "depth": 2}, "text": {**RWKV_TEXT, "depth": 5}},
    "ViT, 2, and BERT, 6": {
        "image": {"kind": "open_clip", **VIT, "layers": 2},
        "text": {**BERT, "depth": 6},
        "embed_dim": 24,
    },
    "ResNet and RWKV, 3": {
        "image": {"kind": "open_clip", **RESNET},
        "text": {**RWKV_TEXT, "depth": 3},
        "embed_dim": 24,
    },
    "CLIP, 5 and 2": {"embed_dim": 24, "vision_cfg": {**VIT, "layers": 5}, "text_cfg": {**CLIP_TEXT, "layers": 2}},
    "CLIP, 1 and 4, custom text": {
        "embed_dim": 24,
        "vision_cfg": {**VIT, "layers": 1},
        "text_cfg": {**CLIP_TEXT, "layers": 4},
        "custom_text": True,
    },
}


class Scorer(nn.Module):
    """An objective with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)


def make(name: str, **changes) -> tuple[nn.Module, Shards, OptimizerSettings]:
    torch.manual_seed(0)
    model = rwkv_clip.create_model(MODELS[name])
    return model, Shards(model, Scorer()), parse(OptimizerSettings, changes)


def by_name(shards: Shards, groups: list[dict], key: str, default: float = 1.0) -> dict[str, float]:
    names = {parameter: name for name, parameter in shards.own.items()}
    return {names[p]: group.get(key, default) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", MODELS)
def test_equal_decays_are_timms(name):
    """Both towers with one decay: the groups of timm's factory for the whole model."""
    model, shards, settings = make(name, layer_decay_image=0.5, layer_decay_text=0.5)
    found = by_name(shards, build_groups(shards, settings, None), "lr_scale")
    groups = param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    assert {k: v for k, v in found.items() if not k.startswith("objective.")} == by_name(shards, groups, "lr_scale")
    assert found["objective.head.weight"] == found["logit_scale"] == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_has_its_own_rate_and_decay(name):
    """Each tower alone against timm's; what is not of the tower keeps --lr."""
    model, shards, both = make(name, layer_decay_image=0.5, layer_decay_text=0.5)
    timm = by_name(shards, build_groups(shards, both, None), "lr_scale")
    for side in ("image", "text"):
        settings = parse(OptimizerSettings, {"lr": 0.1, f"lr_{side}": 0.4, f"layer_decay_{side}": 0.5})
        found = by_name(shards, build_groups(shards, settings, None), "lr_scale")
        for key, scale in found.items():
            assert scale == (4.0 * timm[key] if side_of(key) == side else 1.0), key
        own = [found[key] for key in found if side_of(key) == side]
        assert Rates(shards, settings).named() == {f"lr_{side}": max(own), f"lr_{side}_first": min(own)}
        assert max(own) == 4.0 and min(own) < 4.0
    visual = {id(p) for p in model.visual.parameters()}
    assert all((side_of(key) == "image") == (id(p) in visual) for key, p in model.named_parameters())


def test_a_frozen_tower_is_in_no_group():
    model, shards, settings = make("CLIP, 5 and 2", layer_decay_image=0.5, lr_text=1e-4)
    freeze_parameters(model, parse(FreezeSettings, {"lock_image": True, "lock_image_unlocked_groups": 2}))
    found = by_name(shards, build_groups(shards, settings, None), "lr_scale")
    trained = {f"{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained | {"objective.head.weight", "objective.head.bias"}
    assert {v for k, v in found.items() if side_of(k) == "image"} == {1.0, 0.5}, "as deep as before"


def test_nothing_set_makes_the_two_groups_of_before():
    _, shards, settings = make("RWKV, 2 and 5")
    assert Rates(shards, settings).named() == {}
    matrices, spared = build_optimizer(shards, settings).param_groups
    assert (matrices["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    assert not {"lr_scale", "use_fallback"} & (matrices.keys() | spared.keys())
    own = [p for _, p in shards.whole()]
    wide = [p for p in own if sum(side > 1 for side in p.shape) > 1]
    assert list(map(id, matrices["params"])) == list(map(id, wide))
    assert len(spared["params"]) == len(own) - len(wide)


def test_the_schedule_multiplies_every_groups_rate():
    _, shards, settings = make("RWKV, 2 and 5", lr=0.1, lr_image=0.2, layer_decay_text=0.5)
    schedule = Schedule.from_settings(settings, 20)
    for opt in ("adamw", "lion"):
        optimizer = build_optimizer(
            shards, parse(OptimizerSettings, {"lr": 0.1, "lr_image": 0.2, "layer_decay_text": 0.5, "opt": opt})
        )
        for step in (0, 3, 19):
            set_step(optimizer, schedule, step)
            for group in optimizer.param_groups:
                assert math.isclose(float(group["lr"]), schedule.lr(step) * group.get("lr_scale", 1.0), rel_tol=1e-12)
        scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups}
        assert scales == {1.0, 2.0, *(0.5**n for n in range(7))}


@pytest.mark.parametrize("name", MODELS)
def test_optimizers_of_timm_spare_what_the_model_names(name):
    """As timm's and open_clip's factory; AdamW and torch's keep the groups of before."""
    model, shards, settings = make(name)
    undecayed = model.no_weight_decay()
    for opt, spares in (("adamw", False), ("torch/nadam", False), ("lion", True), ("timm/adamw", True)):
        decays = by_name(shards, build_groups(shards, settings, find_optimizer(opt)), "weight_decay")
        for key, parameter in shards.whole():
            matrix = sum(side > 1 for side in parameter.shape) > 1
            assert decays[key] == (0.2 if matrix and not (spares and key in undecayed) else 0.0), key
        everything = parse(OptimizerSettings, {"decay": "all"})
        groups = build_groups(shards, everything, find_optimizer(opt))
        assert {group["weight_decay"] for group in groups} == {0.2}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("opt", ["timm/muon", "torch/muon"])
def test_muon_takes_matrices_of_blocks(name, opt):
    if opt == "torch/muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon since 2.9")
    _, shards, _ = make(name)
    settings = parse(OptimizerSettings, {"opt": opt})
    optimizer = build_optimizer(shards, settings)
    for parameter in shards.own.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {parameter: key for key, parameter in shards.own.items()}
    muon = {names[p] for p, slots in optimizer.state.items() if "momentum_buffer" in slots}
    blocks = ("layers.", "blocks.", "resblocks.", "layer.", "layer1.", "layer2.", "layer3.", "layer4.")
    assert muon and all(any(f".{part}" in key for part in blocks) for key in muon)
    assert all(shards.own[key].dim() >= 2 for key in muon)
    others = shards.own.keys() - muon
    assert {"logit_scale", "objective.head.weight"} <= others
    linear = {key for key in others if key.endswith(("mlp.c_fc.weight", "in_proj_weight", "ffn.key.weight"))}
    assert not linear, "a matrix of a block is left to AdamW"
