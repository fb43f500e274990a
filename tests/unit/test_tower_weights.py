"""--pretrained-image and --pretrained-text: one tower's weights from wherever they are, all of them or an error that
says what is there instead; the other tower starts anew."""

import json

import open_clip
import pytest
import timm
import torch

import rwkv_clip
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip import create_model
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.hub import save_pretrained
from rwkv_clip.models import chinese_clip
from rwkv_clip.serialization import encode_tensors
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TRANSFORMER = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 16, "width": 24, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 8, "vocab": 99, "width": 24, "depth": 2, "heads": 2, "ffn_width": 64}
BERT = {"kind": "bert", "context": 8, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 48, "positions": 8}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
MODELS = {
    "CLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
    "CustomTextCLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "custom_text": True},
    "ResNet": {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TRANSFORMER},
    "RWKV": {"image": RWKV_IMAGE, "text": RWKV_TEXT},
    "projected": {"embed_dim": 24, "image": RWKV_IMAGE, "text": RWKV_TEXT},
    "ViT and RWKV": {"embed_dim": 24, "image": {"kind": "open_clip", **VIT}, "text": RWKV_TEXT},
    "ViT and BERT": {"embed_dim": 24, "image": {"kind": "open_clip", **VIT}, "text": BERT},
    "RWKV and CLIP": {"embed_dim": 24, "image": RWKV_IMAGE, "text": {"kind": "open_clip", **TRANSFORMER}},
    "timm": {"embed_dim": 24, "vision_cfg": TIMM | {"image_size": 160}, "text_cfg": TRANSFORMER},
}


def build(name: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = create_model(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def write(path, state) -> str:
    path.write_bytes(b"".join(encode_tensors({key: value.clone() for key, value in state.items()})))
    return str(path)


def tower_of(model, side: str) -> dict[str, torch.Tensor]:
    if side == "text" and not hasattr(model, "text"):  # open_clip's CLIP
        names = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
        return {key: value for key, value in model.state_dict().items() if key.startswith(names)}
    return (model.visual if side == "image" else model.text).state_dict()


IMAGES = [
    *(("CLIP", "CustomTextCLIP"), ("CLIP", "ViT and RWKV"), ("ViT and BERT", "CLIP"), ("ResNet", "ResNet")),
    *(("RWKV", "RWKV"), ("projected", "RWKV and CLIP"), ("timm", "timm")),
]
TEXTS = [
    *(("CLIP", "CustomTextCLIP"), ("CustomTextCLIP", "CLIP"), ("CLIP", "RWKV and CLIP"), ("ResNet", "CLIP")),
    *(("RWKV and CLIP", "ResNet"), ("projected", "ViT and RWKV"), ("ViT and BERT", "ViT and BERT")),
]


@pytest.mark.parametrize("alone", [False, True], ids=["a model", "a tower"])
@pytest.mark.parametrize("side, source, target", [("image", *p) for p in IMAGES] + [("text", *p) for p in TEXTS])
def test_a_tower_of_one_model_starts_another(tmp_path, side, source, target, alone):
    source = build(source, 1)
    path = write(tmp_path / "w.safetensors", tower_of(source, side) if alone else source.state_dict())
    torch.manual_seed(2)
    fresh = create_model(MODELS[target])
    torch.manual_seed(2)
    model = create_model(MODELS[target], **{f"pretrained_{side}": path})
    expected, found = tower_of(source, side), tower_of(model, side)
    assert found.keys() == expected.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())
    other = "text" if side == "image" else "image"
    assert all(torch.equal(value, tower_of(model, other)[key]) for key, value in tower_of(fresh, other).items())
    comes = side == "image" and not alone
    assert torch.equal(model.logit_scale, source.logit_scale if comes else fresh.logit_scale)


def test_from_every_kind_of_place(tmp_path, monkeypatch):
    """A run, a checkpoint, a folder of the hub's layouts, files of other layouts, a tag."""
    source = build("ViT and BERT", 1)
    places = {"ours": str(save_pretrained(source, tmp_path / "ours"))}
    places["transformers"] = str(save_pretrained(source, tmp_path / "theirs", transformers=True))
    released = {f"module.{key}": value for key, value in chinese_clip.to_released(source.state_dict()).items()}
    torch.save({"state_dict": released}, tmp_path / "released.pt")
    places |= {"released": str(tmp_path / "released.pt"), "local": f"local-dir:{places['ours']}"}
    clip = build("CLIP", 1)
    folder = save_pretrained(clip, tmp_path / "open_clip")
    for name, place in places.items():
        model = create_model(MODELS["ViT and BERT"], pretrained_image=place, pretrained_text=place)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items()), name
    from rwkv_clip.models.openclip import OpenClipConfig

    monkeypatch.setattr(OpenClipConfig, "find_tag", lambda spec, tag: (spec, tag))
    monkeypatch.setattr(OpenClipConfig, "build", lambda spec, tag: clip)  # in place of a download
    for place in (str(folder), "open_clip:ViT-B-32:tag"):
        model = create_model(MODELS["ViT and RWKV"], pretrained_image=place)
        assert all(torch.equal(value, tower_of(model, "image")[key]) for key, value in tower_of(clip, "image").items())
    with pytest.raises(ConfigError, match="open_clip:ViT-B-32 names no weights; open_clip:NAME:TAG does"):
        create_model(MODELS["ViT and RWKV"], pretrained_image="open_clip:ViT-B-32")


def test_a_classifier_of_timms_starts_a_tower_of_timms(tmp_path):
    """Its last layer, of classes, is left out; the projection starts anew."""
    torch.manual_seed(1)
    theirs = timm.create_model("test_vit", num_classes=10, global_pool="")
    path = write(tmp_path / "w.safetensors", theirs.state_dict())
    torch.manual_seed(2)
    fresh = create_model(MODELS["timm"])
    torch.manual_seed(2)
    model = create_model(MODELS["timm"], pretrained_image=path)
    for key, value in model.visual.state_dict().items():
        name = key.removeprefix("trunk.")
        expected = theirs.state_dict()[name] if key.startswith("trunk.") else fresh.visual.state_dict()[key]
        assert torch.equal(value, expected), key
    assert any(key.startswith("head.") for key in theirs.state_dict())
    with pytest.raises(ValueError, match=r"it holds a ViT of timm's of width 64, patch 16, 6 blocks; .* is a CLIP ViT"):
        create_model(MODELS["CLIP"], pretrained_image=path)


def test_positions_are_resized(tmp_path):
    source = build("CLIP", 1)
    path = write(tmp_path / "w.safetensors", source.state_dict())
    model = create_model(MODELS["ViT and RWKV"], pretrained_image=path, force_image_size=64)
    assert len(model.visual.positional_embedding) == 1 + 16
    assert torch.equal(model.visual.positional_embedding[0], source.visual.positional_embedding[0])


@pytest.mark.parametrize(
    "side, source, target, message",
    [
        (
            "image",
            "RWKV",
            "CLIP",
            "holds an RWKV image tower of width 24, patch 16, 2 blocks; the model's image tower is",
        ),
        (
            "image",
            "CLIP",
            "RWKV",
            "holds a CLIP ViT of width 32, patch 16, 2 blocks; the model's image tower is an RWKV",
        ),
        ("image", "ResNet", "CLIP", r"holds a CLIP ResNet of 1\+1\+1\+1 blocks; .* is a CLIP ViT of width 32"),
        (
            "text",
            "CLIP",
            "RWKV",
            "holds a CLIP text transformer of vocabulary 99, width 32, 2 blocks; .* is an RWKV text",
        ),
        ("text", "ViT and BERT", "CLIP", "holds a BERT of vocabulary 99, width 32, 2 blocks; .* is a CLIP text transf"),
        ("text", "RWKV", "ViT and BERT", "holds an RWKV text tower of vocabulary 99, width 24, 2 blocks; .* is a BERT"),
    ],
)
def test_another_tower_is_named(tmp_path, side, source, target, message):
    path = write(tmp_path / "w.safetensors", build(source, 1).state_dict())
    with pytest.raises(ValueError, match=message):
        create_model(MODELS[target], **{f"pretrained_{side}": path})


def test_a_part_of_a_tower_is_not_enough(tmp_path):
    state = build("CLIP", 1).state_dict()
    del state["visual.ln_post.bias"]
    with pytest.raises(ValueError, match=r"does not fit the model \(1 keys\)[^\n]*\n  missing: visual.ln_post.bias"):
        create_model(MODELS["CLIP"], pretrained_image=write(tmp_path / "w.safetensors", state))
    state = build("CLIP", 1).state_dict() | {"visual.proj": torch.zeros(32, 20)}
    with pytest.raises(ValueError, match=r"shape of visual.proj: checkpoint \(32, 20\), model \(32, 24\)"):
        create_model(MODELS["CLIP"], pretrained_image=write(tmp_path / "w.safetensors", state))
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    with pytest.raises(ValueError, match="it holds no such tower"):
        create_model(MODELS["CLIP"], pretrained_image=write(tmp_path / "w.safetensors", text))


def test_a_run_of_locked_image_tuning(tmp_path):
    """LiT: the image tower of another run, locked; only the text tower learns."""
    data = make_smaller(make_tiny(tmp_path)) | {"val_data": None, "batch_size": 4, "max_steps": 2}
    first = run(parse(Settings, data | {"name": "first"}))
    second = run(
        parse(Settings, data | {"name": "second", "seed": 1, "pretrained_image": str(first), "lock_image": True})
    )
    one, other = (read_tensors(find_checkpoint(folder) / "model.safetensors") for folder in (first, second))
    same = {key for key, value in one.items() if torch.equal(value, other[key])}
    assert {key for key in one if key.startswith("image_model.")} <= same and "text_model.emb.weight" not in same
    torch.manual_seed(1)
    assert rwkv_clip.create_model(json.loads((tmp_path / "model.json").read_text())).text.emb.weight.shape


def test_open_clips_own_names(tmp_path):
    """A state dict that open_clip saves, with its name of the argument."""
    torch.manual_seed(1)
    theirs = open_clip.CLIP(24, VIT, TRANSFORMER)
    torch.save(theirs.state_dict(), tmp_path / "open_clip.pt")
    model = create_model(MODELS["ViT and RWKV"], pretrained_image_path=tmp_path / "open_clip.pt")
    assert all(torch.equal(value, model.visual.state_dict()[key]) for key, value in theirs.visual.state_dict().items())


def test_whole_weights_of_another_model_are_named(tmp_path):
    path = write(tmp_path / "w.safetensors", build("ViT and BERT", 1).state_dict())
    message = (
        "it holds a CLIP ViT of width 32, patch 16, 2 blocks with a BERT of vocabulary 99, width 32, 2 blocks; the "
        "model is an RWKV image tower of width 24, patch 16, 2 blocks with an RWKV text tower of vocabulary 99"
    )
    with pytest.raises(ValueError, match=message):
        create_model(MODELS["RWKV"], path)
