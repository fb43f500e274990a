"""Runs resumed with another objective, model or optimizer that --allow-change names, and what they are resumed from."""

import pytest
import torch

from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.losses import LossSettings
from rwkv_clip.serialization import CheckpointError
from rwkv_clip.training.main import run
from rwkv_clip.training.optimizer_state import drop_state, unpack_state
from rwkv_clip.training.settings import OptimizerSettings, Settings


@pytest.fixture(scope="module")
def data(new_folder):
    """Settings of a run of two steps, of which the first is saved."""
    data = make_smaller(make_tiny(new_folder("changed"))) | {"val_data": None, "batch_size": 4, "max_steps": 2}
    return data | {"schedule": "constant", "cycle_beta1": False, "save_every_n_steps": 1}


@pytest.fixture(scope="module")
def averaged(data):
    """A run with averaged weights."""
    return run(parse(Settings, data | {"name": "averaged", "ema_decay": 0.9}))


def resume(data: dict, name: str, before: dict, after: dict, allowed: list[str]) -> dict[str, dict]:
    """Train with `before`, go on from the first step with `after`; tensors of the last checkpoint by file."""
    began = run(parse(Settings, data | before | {"name": f"{name}, begun"})) / "checkpoints" / "step-00000001"
    goes_on = {"name": f"{name}, resumed", "resume": str(began), "allow_change": allowed}
    folder = find_checkpoint(run(parse(Settings, data | after | goes_on)))
    return {path.stem: read_tensors(path) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "common",
    [{"ema_decay": 0.9}, {"opt": "lion"}, {"opt": "muon", "ema_decay": 0.9}, {"lora_rank": 2}],
    ids=lambda common: ", ".join(common),
)
@pytest.mark.parametrize("to", ["siglip", "infonce"])
def test_another_objective_brings_or_takes_the_bias_of_the_scores(data, averaged, common, to):
    if "lora_rank" in common:
        pytest.importorskip("peft", reason="the extra [lora]")
        common = common | {"pretrained": str(averaged)}
    before, after = (
        {"objective": name} | common for name in (("infonce", "siglip") if to == "siglip" else ("siglip", "infonce"))
    )
    found = resume(data, f"{to}, {' '.join(common)}", before, after, ["objective", "model"])
    assert ("logit_bias" in found["model"]) == (to == "siglip")
    if "ema" in found:
        assert found["ema"].keys() == found["model"].keys()
    if to == "siglip":
        assert found["model"]["logit_bias"] != -10, "it trains"


@pytest.mark.parametrize("opt", ["adamw", "lion"])
def test_positions_of_another_size_need_a_new_run(data, opt):
    """AdamW's fused kernel would read beyond the state's memory."""
    allowed = ["force_image_size", "model"]
    with pytest.raises(CheckpointError, match=r"pos_embed has the shape .*--pretrained"):
        resume(data, f"size, {opt}", {"opt": opt}, {"opt": opt, "force_image_size": [32]}, allowed)


def test_positions_of_another_size_may_begin_with_another_optimizer(data):
    allowed = ["force_image_size", "model", "opt"]
    found = resume(data, "size and optimizer", {"opt": "lion"}, {"force_image_size": [32]}, allowed)
    assert found["model"]["image_model.pos_embed"].shape == found["optim"]["image_model.pos_embed/exp_avg"].shape


def test_state_of_another_shape_is_refused():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    state = {"w/step": torch.ones(()), "w/exp_avg": torch.zeros(2, 2), "w/exp_avg_sq": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"shape of w/exp_avg: \(2, 2\), should be \(3, 2\)"):
        unpack_state(torch.optim.AdamW([weight]), {"w": weight}, state)


@pytest.mark.parametrize("numbers", [None, {}, {"slots": [], "numbers": 3}, {"slots": {"m": "x"}, "numbers": {"m": 1}}])
def test_a_parameter_is_dropped_from_damaged_numbers_too(numbers):
    kept, left = drop_state("w", {"w/m": torch.zeros(1), "v/m": torch.zeros(1)}, numbers)
    assert kept.keys() == {"v/m"} and left == (numbers or None)


def test_a_parameter_is_dropped_with_its_numbers():
    numbers = {"slots": {"m": 2}, "numbers": {"step": {"w": 3, "v": 3}}, "groups": {}}
    _, left = drop_state("w", {"w/m": torch.zeros(1), "v/m": torch.zeros(1)}, numbers)
    assert left == {"slots": {"m": 1}, "numbers": {"step": {"v": 3}}, "groups": {}}
    assert numbers["slots"] == {"m": 2}, "the file's own are not changed"


@pytest.mark.parametrize("use", ["lora_rank", "distill_model"])
def test_averaged_weights_serve_as_base_and_teacher(data, averaged, use):
    if use == "lora_rank":
        pytest.importorskip("peft", reason="the extra [lora]")
    place = f"{averaged}@ema"
    settings = {"distill_model": place} if use == "distill_model" else {"lora_rank": 2, "pretrained": place}
    assert find_checkpoint(run(parse(Settings, data | settings | {"name": f"averaged, {use}", "max_steps": 1})))


@pytest.mark.parametrize("name", ["distill_model", "distill_features"])
def test_an_empty_teacher_is_a_mistake(name):
    with pytest.raises(ConfigError, match=f"{name}: '' names nothing"):
        parse(LossSettings, {name: ""})


@pytest.mark.parametrize(("opt", "option"), [("adamw", "amsgrad=2"), ("lion", "caution=yes"), ("sgd", "nesterov=1")])
def test_switches_of_optimizers_are_true_or_false(opt, option):
    with pytest.raises(ConfigError, match="is not True or False"):
        parse(OptimizerSettings, {"opt": opt, "opt_kwargs": [option]})
