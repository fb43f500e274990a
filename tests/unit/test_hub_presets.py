"""Every preset, small: saved and opened again by its name as a place, by open_clip or by transformers, to the bit."""

import ast
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import rwkv_clip
from rwkv_clip.config import ConfigError, load_json
from rwkv_clip.factory import CONFIGS

PRESETS = rwkv_clip.list_models()
TEXTS = ["a dog", "two cats on a mat", "一只狗", ""]
RWKV = {"image_size": [32, 32], "patch": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 12, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
VIT = {"kind": "open_clip", "image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
RESNET = {"kind": "open_clip", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
CLIP_TEXT = {"kind": "open_clip", "context_length": 12, "width": 48, "heads": 2, "layers": 3}
BERT = {"kind": "bert", "context": 12, "width": 48, "depth": 3, "heads": 2, "ffn_width": 64, "vocab": 21128}
PAIRS: dict[str, dict[str, Any]] = {
    "RWKV and CLIP's text": {"image": RWKV, "text": CLIP_TEXT},
    "RWKV with a class token and BERT": {"image": {**RWKV, "class_token": True}, "text": BERT, "resize_mode": "squash"},
    "ViT and RWKV": {"image": {**VIT, "image_size": [32, 48], "mlp_ratio": 2.0}, "text": RWKV_TEXT},
    "ViT and CLIP's text, QuickGELU": {
        "image": {**VIT, "quick_gelu": True},
        "text": {**CLIP_TEXT, "quick_gelu": True, "mlp_ratio": 2.0},
    },
    "RWKV and CLIP's text in Chinese": {"image": RWKV, "text": CLIP_TEXT, "tokenizer": "bert-chinese"},
}


def shrink(name: str) -> dict[str, Any]:
    """The JSON of a preset with narrow and few layers; all other settings are its own."""
    data = load_json(CONFIGS / "models" / f"{name}.json")
    if "vision_cfg" in data:
        return data  # small as they are
    narrow = {"width": 64, "ffn_width": 96}
    for side, table in ((side, data[side]) for side in ("image", "text")):
        table |= {key: min(value, table[key]) for key, value in narrow.items() if key in table}
        table |= {"layers": [1, 1, 1, 1], "width": 8} if isinstance(table.get("layers"), list) else {}
        table |= {key: 2 for key in ("depth", "layers") if isinstance(table.get(key), int)}
        table |= {"heads": 2} if "heads" in table else {"head_width": 32} if table.get("patch_size") else {}
        data[side] = table
    return data


def build(data: Any) -> Any:
    """No parameter at its initial zero."""
    torch.manual_seed(0)
    model = rwkv_clip.create_model(data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def run(model: Any, spec: Any) -> list[Tensor]:
    """Image and text features, normalised."""
    height, width = spec.image_size
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return [model.encode_image(image, normalize=True), model.encode_text(spec.tokenizer()(TEXTS), normalize=True)]


def check_equal(first: list[Tensor], second: list[Tensor]) -> None:
    """Difference 0.0."""
    assert all((a - b).abs().max() == 0 for a, b in zip(first, second)) and len(first) == len(second)


def run_theirs(model: nn.Module, spec: Any) -> list[Tensor]:
    """The same of a model of transformers."""
    height, width = spec.image_size
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    ids = spec.tokenizer()(TEXTS)
    more = {"attention_mask": ids.ne(0)} if model.config.model_type == "chinese_clip" else {}
    with torch.no_grad():
        found = model(pixel_values=image, input_ids=ids, **more)
    return [found.image_embeds, found.text_embeds]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_opened_again(preset, tmp_path):
    model = build(shrink(preset))
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export")
    expected = run(model, model.spec)
    for again in (
        rwkv_clip.create_model(f"local-dir:{folder}"),
        rwkv_clip.create_model(shrink(preset), pretrained=f"local-dir:{folder}"),
        rwkv_clip.load_for_inference(folder).model,
    ):
        assert again.spec.image_size == model.spec.image_size and again.spec.resize_mode == model.spec.resize_mode
        check_equal(run(again, model.spec), expected)
    if (folder / "open_clip_config.json").exists():
        check_equal(run(open_clip.create_model(f"local-dir:{folder}").eval(), model.spec), expected)


@pytest.mark.parametrize("name", [*PRESETS, *PAIRS])
def test_every_model_in_transformers(name, transformers, tmp_path):
    """Its own features to rounding; saved there and opened there and here, to the bit; else a line that says why."""
    data = {"embed_dim": 24, **PAIRS[name]} if name in PAIRS else shrink(name)
    model = build(data)
    if "vision_cfg" in data or data["image"].get("layers") == [1, 1, 1, 1]:
        reason = "is open_clip's; save it without" if "vision_cfg" in data else "no code for image.layers of a ResNet"
        with pytest.raises(ConfigError, match=reason) as caught:
            rwkv_clip.save_pretrained(model, tmp_path / "export", transformers=True)
        assert "\n" not in str(caught.value) and not (tmp_path / "export").exists()
        return
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export", transformers=True)
    expected = run(model, model.spec)
    loaded = rwkv_clip.load_for_inference(folder)
    assert loaded.tokenizer.context == model.spec.tokenizer().context
    assert loaded.model.spec.resize_mode == model.spec.resize_mode
    check_equal(run(loaded.model, model.spec), expected)
    native = not (folder / "modeling_rwkv_clip.py").exists()
    open_there = transformers.ChineseCLIPModel if native else transformers.AutoModel
    trust = {} if native else {"trust_remote_code": True}
    theirs = open_there.from_pretrained(folder, **trust).eval()
    found = run_theirs(theirs, model.spec)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    check_equal(run_theirs(open_there.from_pretrained(tmp_path / "again", **trust).eval(), model.spec), found)
    here = rwkv_clip.load_for_inference(tmp_path / "again")
    assert here.tokenizer.context == model.spec.tokenizer().context
    assert here.model.spec.resize_mode == model.spec.resize_mode
    check_equal(run(here.model, model.spec), expected)


@pytest.mark.parametrize("pair", ["RWKV and CLIP's text", "RWKV with a class token and BERT"])
def test_gradients_in_transformers(pair, transformers, tmp_path):
    """The same gradient of every weight, as far as float32 goes."""
    text = {**PAIRS[pair]["text"], **({"dropout": 0.0, "attention_dropout": 0.0} if "BERT" in pair else {})}
    model = build({"embed_dim": 24, **PAIRS[pair], "text": text})
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export", transformers=True)
    theirs = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).train()
    image, ids = torch.randn(2, 3, 32, 32), model.spec.tokenizer()(TEXTS[:2])
    model.train().get_logits(image, ids)[0].square().mean().backward()
    theirs(pixel_values=image, input_ids=ids).logits_per_image.square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "setting", "value"),
    [("image", "ls_init_value", 0.1), ("image", "no_ln_pre", True), ("text", "proj_bias", True)],
)
def test_settings_without_code_are_named(side, setting, value, tmp_path):
    tables = {"image": VIT, "text": CLIP_TEXT}
    model = rwkv_clip.create_model({"embed_dim": 24, **tables, side: {**tables[side], setting: value}})
    with pytest.raises(ConfigError, match=f"there is no code for {side}.{setting}; save it without transformers"):
        rwkv_clip.save_pretrained(model, tmp_path / "export", transformers=True)


def test_the_code_needs_torch_and_transformers_only():
    code = ast.parse((Path(rwkv_clip.__file__).parent / "models" / "modeling_rwkv_clip.py").read_text())
    names = [node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)]
    names += [one.name for node in ast.walk(code) if isinstance(node, ast.Import) for one in node.names]
    assert {name.split(".")[0] for name in names} == {"math", "dataclasses", "typing", "torch", "transformers"}
