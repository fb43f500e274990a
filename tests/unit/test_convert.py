"""`python -m rwkv_clip.convert`: the same bits in every layout, there and back; what one cannot hold is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch

import rwkv_clip
from helpers.tiny import make_tiny
from rwkv_clip.checkpoint import save_checkpoint
from rwkv_clip.config import ConfigError
from rwkv_clip.convert import convert
from rwkv_clip.factory import load_for_inference
from rwkv_clip.serialization import read_tensors
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import parse_settings

VIT = {"kind": "open_clip", "image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
RESNET = {"kind": "open_clip", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
BERT = {"kind": "bert", "context": 12, "width": 32, "depth": 3, "heads": 2, "ffn_width": 48, "positions": 12}
CHINESE = {"image": VIT | {"quick_gelu": True}, "text": BERT, "embed_dim": 24, "resize_mode": "squash"}
RWKV = {
    "image": {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64},
    "text": {"context": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64},
}


def write(folder, spec, half=False):
    """A checkpoint folder of random weights; -> path, weights."""
    torch.manual_seed(5)
    model = rwkv_clip.create_model(spec)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}
    facts = {"model": "mine", "spec": model.spec.to_json()}
    return save_checkpoint(folder / "checkpoints", 7, state, {"adam": torch.zeros(9)}, facts, keep=2), state


def same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) and value.dtype == other[key].dtype for key, value in state.items())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_round_trip_through_all_layouts(tmp_path, image, half):
    spec = CHINESE if image == "vit" else CHINESE | {"image": RESNET | {"quick_gelu": True}}
    path, state = write(tmp_path, spec, half)
    (tmp_path / "model.json").write_text(json.dumps(spec))
    model = str(tmp_path / "model.json")
    said = convert(tmp_path, tmp_path / "a" / "x.pt", "chinese-clip")
    assert "x.pt" in said and "mine" in said
    released = torch.load(tmp_path / "a" / "x.pt", weights_only=True)
    assert released.keys() == {"epoch", "step", "name", "state_dict"} and "optimizer" not in released
    assert all(key.startswith("module.") for key in released["state_dict"])
    assert not any("image_model" in key or "text_model" in key for key in released["state_dict"])
    source = tmp_path / "a" / "x.pt"
    if image == "vit":
        convert(source, tmp_path / "hub", "transformers", model)
        assert sorted(os.listdir(tmp_path / "hub")) == ["config.json", "model.safetensors", "vocab.txt"]
        source, model = tmp_path / "hub", None
    else:
        with pytest.raises(ConfigError, match="to: transformers has Chinese-CLIP with a plain ViT"):
            convert(source, tmp_path / "hub", "transformers", model)
        assert not (tmp_path / "hub").exists()
    convert(source, tmp_path / "y.safetensors", "safetensors", model)
    same(state, read_tensors(tmp_path / "y.safetensors"))
    loaded = load_for_inference(tmp_path / "y.safetensors")
    assert loaded.model.spec == load_for_inference(path).model.spec
    same({k: v.float() if half and v.is_floating_point() else v for k, v in state.items()}, loaded.model.state_dict())
    convert(tmp_path / "y.safetensors", tmp_path / "z.pt", "chinese-clip")
    same(released["state_dict"], torch.load(tmp_path / "z.pt", weights_only=True)["state_dict"])


def test_transformers_reads_our_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    path, _ = write(tmp_path, CHINESE)
    convert(path, tmp_path / "hub", "transformers")
    theirs = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "hub").eval()
    loaded = load_for_inference(path)
    text, image = loaded.tokenizer(["两只狗在草地上跑", "好"]), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        out = theirs(input_ids=text, pixel_values=image, attention_mask=(text != 0).long())
        own = loaded.model(image, text)
    torch.testing.assert_close(own[0], out.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own[1], out.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [RWKV, CHINESE | {"image": RWKV["image"]}, CHINESE | {"text": RWKV["text"]}])
def test_every_model_as_safetensors_and_what_is_refused(tmp_path, spec):
    path, state = write(tmp_path, spec)
    convert(path, tmp_path / "x.safetensors", "safetensors")
    loaded = load_for_inference(tmp_path / "x.safetensors")
    same(state, loaded.model.state_dict())
    assert loaded.name == "mine" and loaded.model.spec == load_for_inference(path).model.spec
    with pytest.raises(ConfigError, match=r"to: chinese-clip has CLIP's image towers with BERT, not .*rwkv"):
        convert(path, tmp_path / "x.pt", "chinese-clip")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("spec", [RWKV, CHINESE | {"image": RWKV["image"]}, CHINESE | {"text": RWKV["text"]}])
def test_transformers_gets_the_code_of_other_pairs(tmp_path, spec):
    """The folder is read here, by its own configuration and by transformers' alone."""
    path, state = write(tmp_path, spec)
    said = convert(path, tmp_path / "hub", "transformers")
    assert "config.json, model.safetensors, modeling_rwkv_clip.py, rwkv_clip_config.json" in said
    same(state, load_for_inference(tmp_path / "hub").model.state_dict())
    (tmp_path / "hub" / "rwkv_clip_config.json").unlink()
    loaded = load_for_inference(tmp_path / "hub").model
    same(state, loaded.state_dict())
    assert loaded.spec == load_for_inference(path).model.spec


def test_models_of_open_clip_are_not_for_transformers(tmp_path):
    vit = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    path, _ = write(tmp_path, {"embed_dim": 8, "vision_cfg": vit, "text_cfg": text})
    with pytest.raises(ConfigError, match="is open_clip's; save it without transformers"):
        convert(path, tmp_path / "hub", "transformers")
    assert not (tmp_path / "hub").exists()


def test_models_of_open_clip(tmp_path):
    spec = {
        "embed_dim": 16,
        "vision_cfg": {k: v for k, v in VIT.items() if k != "kind"},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    }
    path, state = write(tmp_path, spec)
    convert(path, tmp_path / "x.safetensors", "safetensors")
    same(state, load_for_inference(tmp_path / "x.safetensors").model.state_dict())
    with pytest.raises(ConfigError, match="not open_clip; write safetensors"):
        convert(path, tmp_path / "x.pt", "chinese-clip")


def test_names_of_outputs(tmp_path):
    path, _ = write(tmp_path, RWKV)
    for name, to, message in (
        ("x.pt", "safetensors", r"is not the name of a \.safetensors file"),
        ("x.safetensors", "chinese-clip", r"is not the name of a \.pt file"),
        ("checkpoints", "transformers", "exists; name a new folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(path, tmp_path / name, to)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path, _ = write(tmp_path, CHINESE)
    (tmp_path / "x.safetensors").write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for name, to in (("x.safetensors", "safetensors"), ("hub", "transformers"), ("x.pt", "chinese-clip")):
        with pytest.raises(OSError, match="No space"):
            convert(path, tmp_path / name, to)
    assert (tmp_path / "x.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "x.safetensors"]


def test_command(tmp_path):
    path, _ = write(tmp_path, CHINESE)

    def call(*arguments):
        command = [sys.executable, "-m", "rwkv_clip.convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = call(path, tmp_path / "x.pt", "--to", "chinese-clip")
    assert done.returncode == 0 and "numbers of mine, as chinese-clip" in done.stdout
    refused = call(tmp_path / "x.pt", tmp_path / "y.safetensors", "--to", "safetensors")
    assert refused.returncode == 2 and "name theirs" in refused.stderr and "Traceback" not in refused.stderr


def test_a_run_with_patch_dropout_and_warm_start_is_exported(tmp_path):
    """From a tiny run on records of BERT tokens to files, with the flags of training."""
    data = make_tiny(tmp_path)
    from rwkv_clip.data.build import build_records

    rows = str(tmp_path / "all.jsonl")
    build_records(rows, str(tmp_path / "cn"), texts=("raw",), context=12, workers=1, tokenizer="bert-chinese")
    (tmp_path / "model.json").write_text(json.dumps(CHINESE))
    state = rwkv_clip.create_model(CHINESE).state_dict()
    torch.save(
        {k.replace("image_model.", "visual."): v for k, v in state.items() if "text" not in k}, tmp_path / "clip.pt"
    )
    bert = {k.replace("text_model.", "bert."): v for k, v in state.items() if k.startswith("text_model.")}
    torch.save(bert, tmp_path / "bert.pt")
    more = {"train_data": str(tmp_path / "cn"), "name": "run", "max_steps": 2, "force_patch_dropout": 0.5, "texts": 1}
    more |= {"pretrained_image": str(tmp_path / "clip.pt"), "pretrained_text": str(tmp_path / "bert.pt")}
    folder = run(parse_settings({**data, **more}))
    convert(folder, tmp_path / "out.safetensors", "safetensors")
    same(
        load_for_inference(folder).model.state_dict(),
        load_for_inference(tmp_path / "out.safetensors").model.state_dict(),
    )
