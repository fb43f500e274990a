"""Weights that do not fit the named model: the error says which one they fit."""

from pathlib import Path

import pytest
import torch

from rwkv_clip import create_model, load_checkpoint
from rwkv_clip.recognition import recognize

RUN = Path(__file__).resolve().parents[1] / "parity" / "golden_ckpt" / "v1-0.5.0"


def describe_misfit(name, path) -> str:
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_checkpoint(create_model(name), path)
    return str(error.value)


@pytest.mark.parametrize(
    "own, named", [("RWKV-CLIP-Ti-8", "RWKV-CLIP-Ti-16"), ("RWKV-CLIP-Ti-8", "ViT-Ti-8"), ("CN-CLIP-Ti-8", "ViT-Ti-8")]
)
def test_presets_are_recognized(own, named, tmp_path):
    torch.save(create_model(own).state_dict(), tmp_path / "weights.pt")
    said = describe_misfit(named, tmp_path / "weights.pt")
    assert f"; it fits {own}: name that model\n" in said and len(said.splitlines()) == 5


def test_models_of_open_clip_are_recognized(tmp_path):
    state = create_model("ViT-S-32-alt").state_dict()
    assert recognize(state) == ["ViT-S-32-alt"]
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "weights.pt")
    assert "; it fits ViT-S-32-alt: name that model" in describe_misfit("ViT-Ti-8", tmp_path / "weights.pt")


def test_other_numbers_of_positions_are_the_same_model():
    state = create_model("ViT-Ti-8").state_dict()
    state["visual.positional_embedding"] = torch.zeros(5, state["visual.positional_embedding"].shape[1])
    assert recognize(state) == ["ViT-Ti-8"]


def test_a_run_tells_its_model():
    assert "belongs to a model of its own, 'model'; name that model's JSON" in describe_misfit("RWKV-CLIP-Ti-8", RUN)


@pytest.mark.parametrize("state", [{}, {"text_projection": torch.tensor(1.0)}, {"x": torch.zeros(2)}])
def test_unknown_weights(state):
    assert recognize(state) == []


def test_unknown_weights_list_their_keys(tmp_path):
    torch.save({f"layer.{i}": torch.zeros(1) for i in range(30)}, tmp_path / "weights.pt")
    said = describe_misfit("ViT-Ti-8", tmp_path / "weights.pt")
    assert "fits" not in said and len(said.splitlines()) == 22
