"""What an objective may ask for (`rwkv_clip.losses.Objective`), with one that asks for all of it: features and
gradients, parameters and buffers of its own, through micro-batches, checkpoints and resumed runs."""

import json

import numpy as np
import pytest
import torch

import rwkv_clip
from helpers.tiny import MODEL, make_smaller, make_tiny
from helpers.toy_objective import ImageAlone, Toy
from rwkv_clip import losses
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.dist import World
from rwkv_clip.training.data.augment import draw_drops
from rwkv_clip.training.deterministic import DeterministicStep
from rwkv_clip.training.gradients import GradientStep, Inputs
from rwkv_clip.training.main import run
from rwkv_clip.training.optim import build_optimizer
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.settings import OptimizerSettings, ParallelSettings, Settings

BATCH, ONE = 8, World(0, 1, torch.device("cpu"))


def normalize(pixels):
    return pixels.double() / 255 - 0.5


def build() -> tuple[torch.nn.Module, Toy]:
    torch.manual_seed(0)
    model = rwkv_clip.create_model({**MODEL, "image": {**MODEL["image"], "drop_path": 0.4}})
    with torch.no_grad():  # away from the initial zeros, so that every parameter has a gradient
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.double().train(), Toy().double()


def make_inputs(model) -> Inputs:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (BATCH, 2, 3, 32, 32), generator=g, dtype=torch.uint8)
    text = torch.randint(1, 1000, (BATCH, 8), generator=g)
    drops = draw_drops(0, np.zeros(BATCH, np.int64), np.arange(BATCH), 2 * model.drop_branches).astype(np.float32)
    return Inputs(image, text, torch.from_numpy(drops).unflatten(0, (2, -1)).permute(1, 2, 0))


def gradients_of(model, objective) -> dict[str, torch.Tensor]:
    named = {**dict(model.named_parameters()), **dict(objective.named_parameters(prefix="objective"))}
    return {name: parameter.grad for name, parameter in named.items()}


@pytest.fixture(scope="module")
def plain():
    """Gradients and center by plain autograd over the whole batch."""
    (model, objective), data = build(), make_inputs(build()[0])
    model.set_drop_numbers(data.drop_numbers.flatten(1))
    found = model(normalize(data.image.flatten(0, 1)), data.text, needs=("image", "text", "image_tokens"))
    image, tokens = (found[name].unflatten(0, (BATCH, 2)) for name in ("image", "image_tokens"))
    made, _ = objective(image, found["text"], tokens, found["logit_scale"])
    sum(made.values()).backward()
    gradients = gradients_of(model, objective)
    assert all(g.abs().max() > 0 for g in gradients.values())
    return gradients, objective.center.clone()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 8},
        {"batch_size": 2, "accum_freq": 4},
        {"batch_size": 4, "accum_freq": 2, "grad_checkpointing": True},
        {"batch_size": 8, "deterministic": True, "max_ranks": 4},
        {"batch_size": 2, "accum_freq": 4, "deterministic": True, "max_ranks": 8},
    ],
    ids=str,
)
def test_gradients_in_micro_batches(plain, changes):
    settings = parse(ParallelSettings, {"precision": "fp32", **changes})
    model, objective = build()
    model.set_grad_checkpointing(settings.grad_checkpointing)
    kind = DeterministicStep if settings.deterministic else GradientStep
    step = kind(model, model, objective, settings, ONE, normalize, 0)
    computed = step.run(3, make_inputs(model), lambda loss: loss)
    expected, center = plain
    found = gradients_of(model, objective)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max() / gradient.abs().max()) <= 1e-12, name
    torch.testing.assert_close(objective.center, center, rtol=1e-12, atol=0)
    assert computed.features["image_tokens"].shape[:2] == (BATCH, 2) and set(computed.losses) == {
        "contrastive",
        "local",
    }


def test_its_parameters_follow_the_decay_rule():
    model, objective = build()
    decayed, spared = build_optimizer(Shards(model, objective), OptimizerSettings()).param_groups
    assert any(p is objective.head.weight for p in decayed["params"])
    assert sum(p is objective.head.bias or p is objective.temperature for p in spared["params"]) == 2


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A run with the objective, as a registered one."""
    monkeypatch.setitem(losses.OBJECTIVES, "toy", (Toy, None))
    settings = make_smaller(make_tiny(tmp_path))
    return settings | {"objective": "toy", "val_data": None, "batch_size": 4, "max_steps": 6, "save_every_n_steps": 3}


def tensors_of(folder) -> dict[str, torch.Tensor]:
    path = find_checkpoint(folder)
    return {**read_tensors(path / "model.safetensors"), **read_tensors(path / "optim.safetensors")}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_learns_saves_and_resumes(data):
    whole = tensors_of(run(parse(Settings, data | {"name": "whole"})))
    begun = Toy()
    moved = {key for key, value in begun.state_dict().items() if not torch.equal(value, whole[f"objective/{key}"])}
    assert moved == {"head.weight", "head.bias", "temperature", "center"}
    assert whole["objective.head.weight/exp_avg"].abs().max() > 0
    checkpoints = sorted((run(parse(Settings, data | {"name": "parts"})) / "checkpoints").iterdir())
    resumed = run(parse(Settings, data | {"name": "again", "resume": str(checkpoints[0]), "allow_change": []}))
    assert checkpoints[0].name == "step-00000003" and same(tensors_of(resumed), whole)
    log = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert all(record.keys() >= {"contrastive", "local", "center_norm"} for record in log if "loss" in record)


def test_another_objective_resumes_without_its_parameters(data):
    folder = run(parse(Settings, data | {"name": "toy", "max_steps": 3}))
    changes = {"name": "plain", "resume": str(folder), "objective": "infonce", "max_steps": 6}
    with pytest.raises(ConfigError, match="objective: 'toy' -> 'infonce'"):
        run(parse(Settings, data | changes))
    allowed = {"allow_change": ["objective", "max_steps", "total_steps"], "name": "plain 2"}
    found = tensors_of(run(parse(Settings, data | changes | allowed)))
    assert not any(key.startswith("objective") for key in found)


def test_needs_that_a_model_lacks_are_named_before_training(data, monkeypatch):
    monkeypatch.setattr(Toy, "needs", ("image", "text", "image_depth", "logit_scale"))
    with pytest.raises(ConfigError, match=r"objective: toy needs 'image_depth'.*valid names: image, text"):
        run(parse(Settings, data | {"name": "lacking"}))


def test_what_an_objective_does_not_use_resumes(data, monkeypatch):
    monkeypatch.setitem(losses.OBJECTIVES, "toy", (ImageAlone, None))
    whole = tensors_of(run(parse(Settings, data | {"name": "whole"})))
    unused = ("logit_scale", "text_model.emb.weight", "objective.unused.weight")
    assert all(whole[f"{name}/step"] == 6 and not whole[f"{name}/exp_avg"].any() for name in unused)
    first = min((run(parse(Settings, data | {"name": "parts"})) / "checkpoints").iterdir())
    assert same(tensors_of(run(parse(Settings, data | {"name": "again", "resume": str(first)}))), whole)


@pytest.mark.parametrize(
    "made, message",
    [
        (({}, {}), "objective: it returned no loss"),
        (({"local": torch.zeros(4)}, {}), r"objective: 'local' has shape \(4,\), should be a scalar"),
        (({"local": torch.zeros(())}, {"means": torch.zeros(2)}), r"objective: 'means' has shape \(2,\)"),
    ],
)
def test_what_an_objective_must_not_return(data, monkeypatch, made, message):
    monkeypatch.setattr(Toy, "forward", lambda self, **features: made)
    with pytest.raises(ValueError, match=message):
        run(parse(Settings, data))


@pytest.mark.parametrize(
    "need, message",
    [
        ("temperature", "objective: toy needs 'temperature', valid names: .*logit_scale"),
        ("logit_bias", "objective: needs logit_bias, which the model does not have"),
    ],
)
def test_scalars_that_a_model_lacks(data, monkeypatch, need, message):
    monkeypatch.setattr(Toy, "needs", (*Toy.needs, need))
    with pytest.raises(ConfigError, match=message):
        run(parse(Settings, data))
