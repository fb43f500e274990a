"""LoRA: adapters train beside frozen weights, alone are in checkpoints, resume with the same bits, and are merged for
whoever reads such a checkpoint."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.tiny import make_smaller, make_tiny
from rwkv_clip import create_model
from rwkv_clip.checkpoint import find_checkpoint, list_checkpoints, read_description, read_tensors
from rwkv_clip.config import ConfigError, check, parse
from rwkv_clip.factory import load_for_inference
from rwkv_clip.hub import save_pretrained
from rwkv_clip.models.adapters import AdapterSettings, SplitAttention, add_adapters, kept_state, merge, name_kept
from rwkv_clip.models.freezing import FreezeSettings, freeze_parameters
from rwkv_clip.serialization import CheckpointError
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

pytest.importorskip("peft", reason="pip install -e '.[lora]'")

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TRANSFORMER = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 8, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
BERT = {"kind": "bert", "context": 8, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 48, "positions": 8}
MODELS = {
    "RWKV": {"image": RWKV_IMAGE, "text": RWKV_TEXT},
    "CLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
    "CustomTextCLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "custom_text": True},
    "ViT and BERT": {"embed_dim": 24, "image": {"kind": "open_clip", **VIT}, "text": BERT},
}
LAYERS = {"RWKV": 2 * 2 * 8, "CLIP": 2 * 2 * 4, "CustomTextCLIP": 2 * 2 * 4, "ViT and BERT": 2 * 4 + 2 * 6}


def adapt(description: dict, rank: int = 4, freezing: dict | None = None, **more) -> tuple[nn.Module, nn.Module, list]:
    """(the model before, with adapters, their layers)."""
    torch.manual_seed(0)
    model = create_model(description)
    before = copy.deepcopy(model)
    freeze_parameters(model, parse(FreezeSettings, freezing or {}))
    return before, model, add_adapters(model, parse(AdapterSettings, {"lora_rank": rank, **more}))


def train_a_little(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim():
                parameter.add_(torch.randn_like(parameter) / 10)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 3, 32, 32), torch.randint(1, 99, (3, 8))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_begin_as_nothing_and_alone_train(name):
    before, model, layers = adapt(MODELS[name])
    assert len(layers) == LAYERS[name]
    image, text = inputs()
    for ours, theirs in zip(before(image, text)[:2], model(image, text)[:2]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in trained if ".lora_" not in key} == {"logit_scale"}
    assert len(trained) == 1 + 2 * len(layers)
    out = model.train()(image, text, needs=["image", "text"])
    (out["image"] @ out["text"].T * out["logit_scale"]).square().sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_the_model_that_was_trained(name):
    before, model, _ = adapt(MODELS[name], lora_alpha=8)
    train_a_little(model)
    kept = {name_kept(key): value for key, value in kept_state(model).items()}
    own = {key for key in kept if ".lora_" not in key}
    assert own - {"logit_scale"} <= {key for key, _ in before.named_buffers()}
    merged = create_model(MODELS[name])
    merged.load_state_dict(merge(before.state_dict(), kept, 2.0))
    image, text = inputs()
    for ours, theirs in zip(merged(image, text)[:2], model(image, text)[:2]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours - before(image, text)[0]).abs().max() > 1e-3, "it has learned"


def test_merging_has_the_bits_of_peft():
    from peft.tuners.lora import LoraLayer

    before, model, _ = adapt(MODELS["RWKV"], lora_alpha=3)
    train_a_little(model)
    found = merge(before.state_dict(), {name_kept(k): v for k, v in kept_state(model).items()}, 0.75)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.merge()
            assert torch.equal(module.get_base_layer().weight, found[f"{name}.weight"])


@pytest.mark.parametrize("batch_first", [True, False])
def test_split_attention_is_torchs(batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2, batch_first=batch_first)
    x = torch.randn(3, 5, 32) if batch_first else torch.randn(5, 3, 32)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for given in (None, mask):
        expected = attention(x, x, x, need_weights=False, attn_mask=given)[0]
        found = SplitAttention(attention)(x, x, x, need_weights=False, attn_mask=given)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_locked_towers_get_none():
    _, model, layers = adapt(MODELS["CLIP"], freezing={"lock_image": True})
    assert layers and all(name.startswith("transformer.") for name in layers)
    assert not [key for key, _ in model.named_parameters() if key.startswith("visual.") and ".lora_" in key]
    _, model, layers = adapt(MODELS["CLIP"], freezing={"freeze": ["logit_scale"]})
    assert not model.logit_scale.requires_grad


def test_patterns():
    _, _, layers = adapt(MODELS["RWKV"], lora_targets=["text_model.*.att.key", "image_model.layers.1.*"])
    assert {name.split(".")[0] for name in layers} == {"image_model", "text_model"} and len(layers) == 2 + 8


@pytest.mark.parametrize(
    "model, freezing, changes, message",
    [
        ("RWKV", {}, {"lora_targets": ["*.atn.key"]}, r"'\*.atn.key' matches no linear layer; names are like "),
        ("RWKV", {"lock_image": True}, {"lora_targets": ["image*"]}, "'image.' matches frozen layers only"),
        ("RWKV", {"freeze": ["*_model.*"]}, {}, "lora_rank: no linear layer is left to adapt"),
    ],
)
def test_mistakes_are_named(model, freezing, changes, message):
    with pytest.raises(ConfigError, match=message):
        adapt(MODELS[model], freezing=freezing, **changes)


def test_a_resnet_has_no_layers_to_adapt():
    description = {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TRANSFORMER}
    with pytest.raises(ConfigError, match=r"the image tower \(ModifiedResNet\) has no linear layers to adapt"):
        adapt(description)
    _, _, layers = adapt(description, freezing={"lock_image": True})
    assert len(layers) == 2 * 4


def test_settings_that_have_no_effect():
    assert check(AdapterSettings(lora_alpha=8.0, lora_targets=("*",))) == [
        "lora_alpha: 8.0 has no effect without lora_rank; set it, too",
        "lora_targets: * has no effect without lora_rank; set it, too",
    ]
    settings = {"lora_rank": 4, "pretrained": "x", "pretrained_image": "y"}
    with pytest.raises(ConfigError, match="lora_rank: adapters belong to one file of whole weights"):
        parse(Settings, settings)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(new_folder) -> tuple[dict, Path, Path]:
    """(settings of a run with adapters, the run of its base, the run: four steps, saved every two)."""
    data = make_smaller(make_tiny(new_folder("adapters"))) | {
        "val_data": None,
        "batch_size": 4,
        "save_every_n_steps": 2,
    }
    data |= {"schedule": "constant", "cycle_beta1": False}
    base = run(parse(Settings, data | {"max_steps": 1, "name": "base"}))
    data |= {"pretrained": str(base), "lora_rank": 2, "lora_alpha": 4}
    return data, base, run(parse(Settings, data | {"max_steps": 4, "name": "run"}))


def read(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return read_tensors(find_checkpoint(folder) / file)


def test_a_checkpoint_holds_adapters_only(trained):
    _, base, folder = trained
    weights, optim = read(folder), read(folder, "optim.safetensors")
    assert {key for key in weights if ".lora_" not in key} == {"logit_scale"} and len(weights) > 1
    assert {key.rpartition("/")[0].replace(".default", "") for key in optim} == weights.keys()
    about = read_description(find_checkpoint(folder))["adapters"]
    assert about["base"] == str((find_checkpoint(base) / "model.safetensors").resolve()) and about["scale"] == 2.0
    assert any(value.abs().max() > 0 for key, value in weights.items() if ".lora_B." in key), "they have learned"


def test_a_resumed_run_has_the_same_bits(trained):
    data, _, folder = trained
    data = data | {"name": "parts", "allow_change": ["max_steps", "total_steps"], "resume": "latest"}
    for steps in (2, 4):
        parts = run(parse(Settings, data | {"max_steps": steps}))
    for file in ("model.safetensors", "optim.safetensors"):
        one, other = read(folder, file), read(parts, file)
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_whoever_reads_it_sees_a_merged_model(trained, tmp_path):
    _, base, folder = trained
    loaded = load_for_inference(folder)
    weights, plain = read(folder), read(base)
    expected = merge(plain, weights, 2.0)
    state = loaded.model.state_dict()
    assert state.keys() == plain.keys() and all(torch.equal(value, state[key]) for key, value in expected.items())
    assert any(not torch.equal(value, plain[key]) for key, value in state.items() if key.endswith("att.key.weight"))
    again = create_model(loaded.model.spec, folder).state_dict()
    exported = create_model(save_pretrained(folder, tmp_path / "export")).state_dict()
    for other in (again, exported, create_model(folder).state_dict(), create_model(str(folder)).state_dict()):
        assert other.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in other.items())
    assert loaded.digest != load_for_inference(base).digest
    older = list_checkpoints(folder)[0]
    assert load_for_inference(older).digest != loaded.digest


def test_a_base_that_is_gone_or_another_is_named(trained, tmp_path):
    data, base, folder = trained
    file = find_checkpoint(base) / "model.safetensors"
    content = file.read_bytes()
    away = file.with_name("away")
    file.rename(away)
    try:
        with pytest.raises(
            CheckpointError, match=r"holds adapters of .*which is not there; put it back, or copy it to"
        ):
            load_for_inference(folder)
        (folder / "base.safetensors").write_bytes(content)
        load_for_inference(folder)
        (folder / "base.safetensors").write_bytes(content[:-1] + b"!")
        file.write_bytes(content[:-1] + b"!")
        with pytest.raises(CheckpointError, match="which has changed"):
            load_for_inference(folder)
    finally:
        away.rename(file)
        (folder / "base.safetensors").unlink()
    other = run(parse(Settings, {**data, "lora_rank": None, "lora_alpha": None, "max_steps": 1, "name": tmp_path.name}))
    with pytest.raises(ConfigError, match=r"pretrained: '.*' -> '.*"):
        run(parse(Settings, data | {"max_steps": 4, "name": "run", "resume": "latest", "pretrained": str(other)}))


def test_what_cannot_be_a_base_is_named(trained):
    data, _, folder = trained
    for changes, message in (
        (
            {"pretrained": str(folder)},
            "holds adapters; merge them into whole weights first: python -m rwkv_clip.convert",
        ),
        ({"pretrained": None}, "lora_rank: adapters need weights to belong to; name them with --pretrained"),
        ({"pretrained": "laion2b"}, "pretrained: laion2b is no file, and adapters .* for a tag save it first"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(parse(Settings, data | {"max_steps": 1, "name": "x"} | changes))


@pytest.mark.parametrize("damage", [{"scale": "x"}, {"sha256": 3}, {"base": None}], ids=str)
def test_a_damaged_entry_is_an_error_of_ours(trained, tmp_path, damage):
    from rwkv_clip.base_weights import adapters_of

    about = json.loads((find_checkpoint(trained[2]) / "state.json").read_text())
    about["adapters"] |= damage
    (tmp_path / "state.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="adapters needs base, sha256 and scale; it is damaged"):
        adapters_of(tmp_path)


def test_every_mode_of_a_step(trained):
    """Accumulation and recomputation take the steps of the plain mode; a compiled model the same to rounding."""
    data, _, folder = trained
    expected = read(folder)
    for name, way in {
        "accumulated": {"accum_freq": 2, "batch_size": 2},
        "recomputed": {"grad_checkpointing": True},
        "compiled": {"torchcompile": True},
    }.items():
        found = read(run(parse(Settings, data | {"max_steps": 4, "name": name} | way)))
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, at=(name, key): f"{at} {text}"
            )
