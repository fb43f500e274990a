"""Training at another picture size or context than the weights were made for: tables of positions are resized, by the
rule of each family of towers, and a checkpoint describes the new size."""

import copy
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed

from helpers.tiny import make_smaller, make_tiny
from rwkv_clip import create_model, create_model_and_transforms
from rwkv_clip.checkpoint import find_checkpoint, read_description, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.factory import load_for_inference
from rwkv_clip.models import chinese_clip
from rwkv_clip.models.rwkv import resize_table
from rwkv_clip.serialization import encode_tensors
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.settings import Settings

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TRANSFORMER = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 12, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
BERT = {"kind": "bert", "context": 12, "vocab": 99, "width": 32, "depth": 2, "heads": 2, "ffn_width": 48}
MODELS = {
    "RWKV": {"image": RWKV_IMAGE, "text": RWKV_TEXT},
    "RWKV with a class token": {"image": RWKV_IMAGE | {"class_token": True}, "text": RWKV_TEXT},
    "CLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
    "CustomTextCLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "custom_text": True},
    "ViT and BERT": {
        **{"embed_dim": 24, "image": {"kind": "open_clip", **VIT}, "text": BERT | {"positions": 20}},
        "resize_mode": "squash",
    },
}
TABLES = {"CLIP": "visual.positional_embedding", "CustomTextCLIP": "visual.positional_embedding"}
SIZES = [48, 16, (24, 40), (8, 8)]


@pytest.fixture(params=MODELS)
def saved(request, tmp_path) -> tuple[str, dict, Path, dict[str, torch.Tensor]]:
    """Name, description, file of weights, weights, none of which is the same twice."""
    torch.manual_seed(0)
    state = create_model(MODELS[request.param]).state_dict()
    state = {key: value + torch.randn(value.shape) / 8 for key, value in state.items()}
    (tmp_path / "w.safetensors").write_bytes(b"".join(encode_tensors(state)))
    return request.param, MODELS[request.param], tmp_path / "w.safetensors", state


def test_the_same_size_changes_no_bit(saved):
    _, description, path, state = saved
    own = create_model(description, path)
    model = create_model(description, path, force_image_size=32, force_context_length=12)
    assert model.spec == own.spec and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("size", SIZES)
def test_positions_are_resized_by_the_rule_of_the_family(saved, size):
    """open_clip's function for its models, Chinese-CLIP's for its ViT, the forward pass of the original for RWKV."""
    name, description, path, state = saved
    if name == "ViT and BERT" and size == (24, 40):
        with pytest.raises(ValueError, match=r"16 rows are not 1 . a square grid"):
            create_model(description, path, force_image_size=size)
        return
    model = create_model(description, path, force_image_size=size)
    rows, columns = (size, size) if isinstance(size, int) else size
    assert model.spec.image_size == (rows, columns) == tuple(model.image_size if name == "RWKV" else (rows, columns))
    found, table = model.state_dict(), TABLES.get(name, "image_model.positional_embedding")
    grid = (rows // 8, columns // 8)
    if name.startswith("RWKV"):
        table = "image_model.pos_embed"
        expected = resize_table(state[table], (4, 4), grid)
        image = torch.randn(3, 3, rows, columns)
        assert torch.equal(model.encode_image(image), create_model(description, path).encode_image(image))
    elif name == "ViT and BERT":
        expected = chinese_clip.fit_positions(state[table], 1 + grid[0] * grid[1])
    else:
        theirs = copy.copy(state)
        resize_pos_embed(theirs, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
        expected = theirs[table]
    assert torch.equal(found[table], expected)
    assert all(torch.equal(value, state[key]) for key, value in found.items() if key != table), "nothing else changes"
    assert model(torch.randn(2, 3, rows, columns), torch.randint(1, 99, (2, 12)))[0].isfinite().all()


@pytest.mark.parametrize("context", [6, 20])
def test_text_positions(saved, context):
    name, description, path, state = saved
    model = create_model(description, path, force_context_length=context)
    key, theirs = "positional_embedding" if name == "CLIP" else "text.positional_embedding", copy.copy(state)
    if name in TABLES:
        resize_text_pos_embed(theirs, model)
        assert len(theirs[key]) == context
    # RWKV has no positions of texts; of BERT's the first are read
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    assert model.context_length == context
    assert model.encode_text(torch.randint(1, 99, (2, context))).isfinite().all()


def test_of_a_bert_only_positions_that_exist_are_read(tmp_path):
    with pytest.raises(ConfigError, match=r"text.context: 21 is more than text.positions 20"):
        create_model(MODELS["ViT and BERT"], force_context_length=21)


def test_transforms_have_the_new_size():
    _, train, preprocess = create_model_and_transforms(MODELS["RWKV"], force_image_size=(24, 40))
    picture = torch.zeros(50, 60, 3, dtype=torch.uint8).numpy()
    from PIL import Image

    assert train(Image.fromarray(picture)).shape == preprocess(Image.fromarray(picture)).shape == (3, 24, 40)


def test_command_line():
    words = ["--train-data", "x", "--force-image-size"]
    assert read_command_line([*words, "48"]).model.overrides["force_image_size"] == 48
    settings = read_command_line([*words, "24", "40", "--force-context-length", "16"])
    assert settings.model.overrides == {"force_image_size": (24, 40), "force_context_length": 16}
    with pytest.raises(ConfigError, match="force_image_size: 1 2 3 is neither one number nor height and width"):
        read_command_line([*words, "1", "2", "3"])
    with pytest.raises(ConfigError, match="force_image_size: 0 must be at least 1"):
        read_command_line([*words, "0"])


def test_a_run_at_another_size(tmp_path):
    """From weights of 16 x 16: the checkpoint describes 32 x 48, a resume has the bits of an uninterrupted run, and
    evaluation needs no flag."""
    data = make_smaller(make_tiny(tmp_path)) | {"val_data": None, "batch_size": 4, "schedule": "constant"}
    data["cycle_beta1"] = False
    first = run(parse(Settings, data | {"max_steps": 1, "name": "first"}))
    small = read_tensors(find_checkpoint(first) / "model.safetensors")["image_model.pos_embed"]
    assert small.shape[1] == 1
    larger = {"force_image_size": [32, 48], "pretrained": str(first), "save_every_n_steps": 2, "lr": 1e-3}
    whole = run(parse(Settings, data | larger | {"max_steps": 4, "name": "whole"}))
    changed = {"allow_change": ["max_steps", "total_steps"], "resume": "latest"}
    run(parse(Settings, data | larger | {"max_steps": 2, "name": "parts"}))
    parts = run(parse(Settings, data | larger | changed | {"max_steps": 4, "name": "parts"}))
    one, other = (read_tensors(find_checkpoint(folder) / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert one["image_model.pos_embed"].shape[1] == 6
    assert read_description(find_checkpoint(whole))["spec"]["image"]["image_size"] == [32, 48]
    assert load_for_inference(whole).model.spec.image_size == (32, 48)
    larger |= {"force_image_size": None, "resume": "latest"}
    with pytest.raises(ConfigError, match=r"force_image_size: \[32, 48\] -> None"):
        run(parse(Settings, data | larger | {"max_steps": 4, "name": "parts"}))


def test_records_of_another_context_are_named(tmp_path):
    data = make_smaller(make_tiny(tmp_path)) | {"val_data": None}
    with pytest.raises(ConfigError, match="8 tokens per text, the model's context is 6; build the records with --c"):
        run(parse(Settings, data | {"force_context_length": 6}))


def test_open_clip_builds_the_same(tmp_path):
    """A model of open_clip's by name, with a file: open_clip's own numbers at the new size."""
    name = "ViT-S-32-alt"
    torch.manual_seed(0)
    theirs = open_clip.create_model(name)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    own = create_model(name, tmp_path / "w.pt", force_image_size=96, force_context_length=20).eval()
    other = open_clip.create_model(
        name, pretrained=str(tmp_path / "w.pt"), force_image_size=96, force_context_length=20
    ).eval()
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in other.state_dict().items())
