"""Checkpoints of every release load for ever: golden_ckpt/v<schema>-<release>/ is a run folder as it was written then.

expected.safetensors holds inputs and the features that the release computed for them. When the schema or what is saved
changes, a new folder is added (a run of two steps of towers of width 12); none is ever changed or removed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import rwkv_clip
from rwkv_clip.checkpoint import find_checkpoint, read_description, read_tensors
from rwkv_clip.dist import join_world
from rwkv_clip.files import hash_file
from rwkv_clip.losses import make_objective
from rwkv_clip.training.checkpointing import restore_snapshot
from rwkv_clip.training.loop import Trainer
from rwkv_clip.training.settings import parse_settings
from rwkv_clip.training.state import TrainState

GOLDEN = Path(__file__).parent / "golden_ckpt"
DIGESTS = {
    "v1-0.2.0": "1d975008a4c2f4cf0fd3d616aa7b2a9158b14b64c8ad3059368c0966a944fe01",
    "v1-0.3.0": "da4e8ebe23b33fd4e4581035629cb30ae67b62e1e6f5e9dca91bbb318e897906",
    "v1-0.4.0": "fba0499a8107c4a5cf00c07530e53103d004fd16800e092c8cb9074a8b15894b",  # objective alip
    "v1-0.5.0": "b04c741efe6f75bd8b9cc5accb6f0f906e53129517ad9a80c9ba0e5b107a6b4d",  # says its version and records
    "v1-0.6.0": "ffccfa0b79165e72a7726d6074d4b412f024d4949b0eb89b1a1f9c1464a6ce2e",  # two widths, projected; alip
    "v1-0.7.0": "e15582352a83c1d4e6110f6a543501aa7a3b50eb74b6a7799846cef0114b78fb",  # BERT; squashed; masked
    "v1-0.9.0": "afe7922c61f07edcbbe3edc4110f3c77b14d9174b8da09b0ad3331ce0c60591a",  # siglip; lion; an average
}
RECORDS = 16  # that the run was made with


@pytest.fixture(params=DIGESTS)
def golden(request, tmp_path) -> Path:
    """A copy, for reading may not change it, and nothing outside it may be needed."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / request.param))


def test_it_is_the_file_of_the_release():
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(DIGESTS)
    for name, digest in DIGESTS.items():
        assert hash_file(find_checkpoint(GOLDEN / name) / "MANIFEST.json") == digest
        assert sum(file.stat().st_size for file in (GOLDEN / name).rglob("*")) < 300_000


def test_features_are_those_of_the_release(golden):
    expected = read_tensors(golden / "expected.safetensors")
    model = rwkv_clip.load_for_inference(golden).model
    with torch.no_grad():
        features = {"image": model.encode_image(expected["image"]), "text": model.encode_text(expected["text"])}
    for name, feature in features.items():
        theirs = expected[f"{name}_features"]
        assert (feature - theirs).norm() / theirs.norm() < 1e-6


def test_training_goes_on_from_it(golden):
    path = find_checkpoint(golden)
    state = read_description(path)
    settings = parse_settings(state["settings"])
    model = rwkv_clip.create_model(state["spec"])
    objective = make_objective(settings.loss)
    trainer = Trainer(TrainState(model, objective, settings, join_world("cpu"), RECORDS))
    restore_snapshot(trainer.state, path, state)
    assert (trainer.state.progress.step, trainer.state.progress.samples_seen, trainer.state.total_steps) == (2, 8, 4)
    slots = read_tensors(path / "optim.safetensors")
    for name, parameter in model.named_parameters():
        for slot, value in trainer.state.optimizer.state[parameter].items():
            assert torch.equal(value, slots[f"{name}/{slot}"])
    for name, value in objective.state_dict().items():
        assert torch.equal(value, slots[f"objective/{name}"])
    assert len(objective.state_dict()) == sum(key.startswith("objective/") for key in slots)
    assert json.loads((path / "state.json").read_text()) == state
