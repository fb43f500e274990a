"""Descriptions and weights of Chinese-CLIP models that are not what they should be: an error in words, no crash."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_clip.config import ConfigError
from rwkv_clip.convert import convert
from rwkv_clip.factory import create_model, load_for_inference
from rwkv_clip.models import chinese_clip
from rwkv_clip.serialization import CheckpointError

RELEASED = {
    **{"embed_dim": 24, "image_resolution": 32, "vision_layers": 1, "vision_width": 32, "vision_patch_size": 8},
    **{"vision_head_width": 16, "vocab_size": 200, "text_hidden_size": 32, "text_num_hidden_layers": 1},
    **{"text_num_attention_heads": 2, "text_intermediate_size": 48, "text_max_position_embeddings": 16},
    **{"text_type_vocab_size": 2, "text_hidden_dropout_prob": 0.1, "text_attention_probs_dropout_prob": 0.1},
    "text_initializer_range": 0.02,
}
QUERY = "vision_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def state():
    return chinese_clip.to_released(create_model(RELEASED).state_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("vision_layers", value) for value in ("[,]", [], [1, 1, 1], [1, 1, 1, 0], True, 0, 2.0, "2", None)),
        *(("vision_patch_size", value) for value in (None, 0, "8", 8.0)),
        *(("vision_head_width", value) for value in (None, 0, "x", 15)),
        *(("image_resolution", value) for value in (-1, "32", None)),
        ("vision_width", 32.5),
    ],
)
def test_wrong_sizes_of_a_released_configuration_are_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: .*(is neither a number|is not a positive|does not divide)"):
        create_model(RELEASED | {key: value})


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_positions_that_are_no_grid(state, tmp_path, rows):
    torch.save(state | {"visual.positional_embedding": torch.ones(rows, 32)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"positional_embedding: {rows} and 17 rows are not 1 . a square grid"):
        create_model(RELEASED, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(32, 24).to_sparse(),
        torch.quantize_per_tensor(torch.ones(32, 24), 0.1, 0, torch.quint8),
        torch.ones(32, 24, device="meta"),
        torch.ones(32, 24, dtype=torch.complex64),
    ],
    ids=["sparse", "quantized", "meta", "complex"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_refused_with_their_key(state, tmp_path, value):
    torch.save({"state_dict": state | {"text_projection": value}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt: (text_projection is no plain tensor|is not a readable file)"):
        create_model(RELEASED, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "key", ["visual.positional_embedding", "text_projection", "bert.embeddings.word_embeddings.weight"]
)
def test_shapes_without_a_model_ask_for_its_name(state, tmp_path, key):
    torch.save(state | {key: torch.tensor(1.0)}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="not the shapes of a released model; name theirs"):
        load_for_inference(tmp_path / "x.pt")


@pytest.fixture
def hub(state, tmp_path):
    """A folder of transformers."""
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(json.dumps(RELEASED))
    convert(tmp_path / "x.pt", tmp_path / "hub", "transformers", str(tmp_path / "x.json"))
    return tmp_path / "hub"


@pytest.mark.parametrize("shape", [(16, 16), ()])
def test_attention_matrices_of_different_shapes(hub, shape):
    change = {f"{QUERY}.{part}": torch.ones(shape) for part in ("weight", "bias")}
    save_file(load_file(hub / "model.safetensors") | change, hub / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_for_inference(hub)


def test_an_activation_of_another_type(hub):
    about = json.loads((hub / "config.json").read_text())
    about["vision_config"]["hidden_act"] = []
    (hub / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"config.json: hidden_act is not one of"):
        load_for_inference(hub)


def test_weights_in_several_files_are_refused_with_a_remedy(hub):
    (hub / "model.safetensors").rename(hub / "model-00001-of-00001.safetensors")
    (hub / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"hub: its weights are in several files, .*max_shard_size"):
        load_for_inference(hub)
