"""Freezing: patterns, open_clip's locks with open_clip's meaning on its towers and ours, statistics that stay."""

import copy

import open_clip
import pytest
import torch
from torch import nn

import rwkv_clip
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, check, parse
from rwkv_clip.models.freezing import FreezeSettings, freeze_parameters
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TRANSFORMER = {"context_length": 8, "vocab_size": 99, "width": 48, "heads": 2, "layers": 3}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 3, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 8, "vocab": 99, "width": 32, "depth": 3, "heads": 2, "ffn_width": 64}
OPEN_CLIP = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER}
CUSTOM = OPEN_CLIP | {"custom_text": True}
RWKV = {"image": RWKV_IMAGE | {"class_token": True}, "text": RWKV_TEXT}
PROJECTED = {"embed_dim": 24, **RWKV}
MIXED = {"embed_dim": 24, "image": {"kind": "open_clip", **RESNET}, "text": RWKV_TEXT}


def freeze(description: dict, **changes) -> tuple[nn.Module, list[str]]:
    model = rwkv_clip.create_model(description)
    return model, freeze_parameters(model, parse(FreezeSettings, changes))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("description", [OPEN_CLIP, CUSTOM], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("image, text", [(0, None), (None, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (99, 0)])
def test_locks_of_open_clips_towers_are_open_clips(description, image, text):
    kind = open_clip.CustomTextCLIP if "custom_text" in description else open_clip.CLIP
    theirs = kind(**{key: value for key, value in description.items() if key != "custom_text"})
    changes = {}
    if image is not None:
        theirs.lock_image_tower(unlocked_groups=image)
        changes |= {"lock_image": True, "lock_image_unlocked_groups": image}
    if text is not None:
        theirs.lock_text_tower(unlocked_layers=text, freeze_layer_norm=True)
        changes |= {"lock_text": True, "lock_text_unlocked_layers": text, "lock_text_freeze_layer_norm": True}
    model, frozen = freeze(description, **changes)
    assert trained(model) == trained(theirs) != set()
    assert sorted(frozen) == sorted(dict(model.named_parameters()).keys() - trained(theirs))


def of(prefix: str, names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(prefix)}


@pytest.mark.parametrize("description", [RWKV, PROJECTED], ids=["one width", "projected"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_groups_of_rwkv_towers(description, side):
    """From the end: the projection, the last block with the last norm, the other blocks, the embedding."""
    flag = "lock_image_unlocked_groups" if side == "image" else "lock_text_unlocked_layers"
    lock = {f"lock_{side}": True} | ({} if side == "image" else {"lock_text_freeze_layer_norm": True})
    blocks, norm = {"image": ("layers", "ln1"), "text": ("blocks", "ln_out")}[side]
    groups = [(f"{blocks}.2.", f"{norm}."), (f"{blocks}.1.",), (f"{blocks}.0.",)]
    groups += [("patch_embed.", "pos_embed", "cls_token") if side == "image" else ("emb.",)]
    if "embed_dim" in description:
        groups.insert(0, ("proj",))
    every = set(dict(rwkv_clip.create_model(description).named_parameters()))
    expected: set[str] = set()
    for count in range(len(groups) + 2):
        model, frozen = freeze(description, **lock, **({flag: count} if count else {}))
        own = of(f"{side}_model.", every)
        if 0 < count <= len(groups):
            expected |= {name for name in own if name.removeprefix(f"{side}_model.").startswith(groups[count - 1])}
        assert of(f"{side}_model.", trained(model)) == expected and set(frozen) == own - expected, count
        assert trained(model) - own == every - own, "the other tower and the temperature train"
    assert expected == own


@pytest.mark.parametrize("description", [OPEN_CLIP, CUSTOM, RWKV], ids=["CLIP", "CustomTextCLIP", "RWKV"])
def test_layer_norms_of_a_locked_text_tower_train_unless_they_are_frozen(description):
    model, _ = freeze(description, lock_text=True)
    image = ("visual.", "image_model.")
    left = {name for name in trained(model) if not name.startswith(image) and name != "logit_scale"}
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key in ("weight", "bias")
        if isinstance(module, nn.LayerNorm) and not name.startswith(image)
    }
    assert left == norms and len(norms) >= 2 * (2 * 3 + 1)
    assert of("visual.", trained(model)) | of("image_model.", trained(model))


@pytest.mark.parametrize(
    "description, prefix",
    [({"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TRANSFORMER}, "visual."), (MIXED, "image_model.")],
)
def test_statistics_of_batch_norms(description, prefix):
    """They stay, also after `train()` and in a copy, and compute as open_clip's frozen ones; unfrozen they move."""
    model, _ = freeze(description, lock_image=True, lock_image_freeze_bn_stats=True)
    assert not of(prefix, trained(model))
    image = torch.randn(4, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval().encode_image(image)
    for net in (model, copy.deepcopy(model)):
        assert torch.equal(net.train().encode_image(image), expected)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert before.keys() == rwkv_clip.create_model(description).state_dict().keys(), "its checkpoints load everywhere"
    theirs = open_clip.CLIP(24, RESNET, TRANSFORMER)
    theirs.visual.load_state_dict({k.removeprefix(prefix): v for k, v in before.items() if k.startswith(prefix)})
    theirs.lock_image_tower(freeze_bn_stats=True)
    torch.testing.assert_close(theirs.train().encode_image(image), expected, rtol=1e-4, atol=1e-4)
    free, _ = freeze(description, lock_image=True)
    moved = free.state_dict()[f"{prefix}bn1.running_mean"].clone()
    free.train().encode_image(image)
    assert not torch.equal(free.state_dict()[f"{prefix}bn1.running_mean"], moved)


def test_statistics_stay_in_a_compiled_model():
    model, _ = freeze(MIXED, lock_image=True, lock_image_freeze_bn_stats=True)
    before = model.image_model.bn1.running_mean.clone()
    image, text = torch.randn(4, 3, 64, 64), torch.randint(1, 99, (4, 8))
    expected = model.eval()(image, text)[0]
    model.train().compile(backend="aot_eager")
    torch.testing.assert_close(model(image, text)[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.image_model.bn1.running_mean, before)


def test_patterns():
    model, frozen = freeze(RWKV, freeze=["logit_scale", "text_model.emb.*", "image_model.layers.[01].*"])
    every = set(dict(model.named_parameters()))
    expected = {"logit_scale", "text_model.emb.weight"}
    expected |= of("image_model.layers.0.", every) | of("image_model.layers.1.", every)
    assert set(frozen) == expected == every - trained(model)
    with pytest.raises(ConfigError) as error:
        freeze(RWKV, freeze=["text_model.embed.weight", "text_model.emb.*", "zzz"])
    first, second = error.value.problems
    assert first.startswith(
        "freeze: 'text_model.embed.weight' matches no parameter; names are like text_model.emb.weight"
    )
    assert second.startswith("freeze: 'zzz' matches no parameter; names are like logit_scale")


def test_a_frozen_model_learns_in_the_rest_only():
    model, frozen = freeze(PROJECTED, lock_image=True, lock_image_unlocked_groups=1, freeze=["text_model.emb.*"])
    with torch.no_grad():  # away from the initial zeros
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    features = model.train()(torch.randn(3, 3, 32, 32), torch.randint(1, 99, (3, 8)), needs=["image", "text"])
    (features["image"] @ features["text"].T * features["logit_scale"]).square().sum().backward()
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.grad is None} == set(frozen)
    assert parameters["image_model.proj"].grad.abs().max() > 0


@pytest.mark.parametrize(
    "description, changes, message",
    [
        (RWKV, {"freeze": ["*"]}, r"freeze: nothing is left to train"),
        (MIXED, {"lock_image": True, "lock_image_unlocked_groups": 1}, r"lock_image: 1 groups .*partial locking"),
        (RWKV, {"lock_image_unlocked_groups": 1}, r"lock_image_unlocked_groups: 1 has no effect without lock_image"),
        (RWKV, {"lock_image_freeze_bn_stats": True}, r"lock_image_freeze_bn_stats: True has no effect"),
        (
            RWKV,
            {"lock_text_freeze_layer_norm": True},
            r"lock_text_freeze_layer_norm: True has no effect without lock_text",
        ),
        (
            RWKV,
            {"lock_text": True, "lock_text_unlocked_layers": -1},
            r"lock_text_unlocked_layers: -1 must be at least 0",
        ),
        (RWKV, {"freze": ["*"]}, r"freze: unknown setting; did you mean 'freeze'"),
    ],
)
def test_mistakes_are_named(description, changes, message):
    with pytest.raises(ConfigError, match=message):
        freeze(description, **changes)


def test_without_settings_nothing_is_frozen():
    model, frozen = freeze(RWKV)
    assert frozen == [] and all(parameter.requires_grad for parameter in model.parameters())
    assert check(FreezeSettings()) == []


def test_a_run_goes_on_with_other_freezing(tmp_path):
    data = make_smaller(make_tiny(tmp_path)) | {"val_data": None, "batch_size": 4, "max_steps": 2, "name": "run"}
    folder = run(parse(Settings, data | {"lock_image": True}))
    locked = read_tensors(find_checkpoint(folder) / "model.safetensors")
    names = ["lock_image", "max_steps", "total_steps"]
    more = data | {"resume": "latest", "max_steps": 4}
    with pytest.raises(ConfigError, match="lock_image: True -> False"):
        run(parse(Settings, more))
    run(parse(Settings, more | {"allow_change": names}))
    checkpoint = find_checkpoint(folder)
    state, weights = read_tensors(checkpoint / "optim.safetensors"), read_tensors(checkpoint / "model.safetensors")
    assert state["image_model.ln1.weight/step"] == 2 and state["logit_scale/step"] == 4
    assert not torch.equal(weights["image_model.ln1.weight"], locked["image_model.ln1.weight"])
    run(parse(Settings, more | {"max_steps": 6, "lock_image": True, "allow_change": names}))
    ended = read_tensors(find_checkpoint(folder) / "model.safetensors")
    image = [name for name in weights if name.startswith("image_model.")]
    assert image and all(torch.equal(ended[name], weights[name]) for name in image)
