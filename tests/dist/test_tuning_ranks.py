"""Fine-tuning on several ranks: a locked tower, adapters and synchronised batch norms are those of one process, whether
ranks hold the model or shards of it."""

import json
import re

import pytest
import torch
from torch import nn

from helpers.ranks import run_ranks, train_logging_ids
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, check, parse
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.training.batch_norm import synchronize_norms
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import ParallelSettings, Settings

STEPS, BATCH = 3, 8
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TRANSFORMER = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "locked": None,
    "adapters": None,
    "adapters of a ViT": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": TRANSFORMER,
    },
    "batch norms": {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TRANSFORMER},
}
FLAGS = {
    "locked": {"lock_image": True},
    "adapters": {"lora_rank": 2},
    "adapters of a ViT": {"lora_rank": 2},
    "batch norms": {"use_bn_sync": True},
}


def needs_peft(way: str) -> None:
    if "adapters" in way:
        pytest.importorskip("peft", reason="pip install -e '.[lora]'")


@pytest.fixture(scope="module")
def runs(new_folder):
    """Settings of a run of a kind, and the tensors that one process ends with; made when they are asked for."""
    folder, made = new_folder("tuning"), {}

    def make(way: str):
        if way not in made:
            own = folder / way.replace(" ", "-")
            data = make_smaller(make_tiny(own)) | {"val_data": None, "max_steps": STEPS, "lr": 1e-3}
            data |= {"schedule": "constant", "cycle_beta1": False}
            if MODELS[way]:
                (own / "other.json").write_text(json.dumps(MODELS[way]))
                data["model"] = str(own / "other.json")
            if "adapters" in way:
                data["pretrained"] = str(run(parse(Settings, data | {"max_steps": 1, "name": "base"})))
            data |= FLAGS[way]
            one = run(parse(Settings, data | {"batch_size": BATCH, "name": "one"}))
            made[way] = data, read_tensors(find_checkpoint(one) / "model.safetensors")
        return made[way]

    return make


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", MODELS)
def test_two_ranks_train_what_one_process_trains(runs, tmp_path, way, parallel):
    needs_peft(way)
    data, expected = runs(way)
    more = {"batch_size": BATCH // 2, "name": parallel, "parallel": parallel}
    run_ranks(2, tmp_path, train_logging_ids, data | more)
    found = read_tensors(find_checkpoint(f"{data['logs']}/{parallel}") / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(
            ("in_proj_bias", "k_proj.bias")
        ):  # that of the keys has a gradient of rounding alone, and AdamW enlarges it
            continue
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("way", ["locked", "adapters"])
def test_the_same_bits_on_any_number_of_ranks(runs, tmp_path, way):
    needs_peft(way)
    data, _ = runs(way)
    data = data | {"deterministic": True, "max_ranks": 2}
    one = run(parse(Settings, data | {"batch_size": BATCH, "name": "same 1"}))
    run_ranks(2, tmp_path, train_logging_ids, data | {"batch_size": BATCH // 2, "name": "same 2"})
    weights = [read_tensors(find_checkpoint(folder) / "model.safetensors") for folder in (one, one.with_name("same 2"))]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# ---- batch norms -----------------------------------------------------------------------------------------------------


def norms(kind: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A module with a norm, inputs and weights of what comes out."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6, affine=False, momentum=None))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3))
    shape = (8, 6) if kind == 1 else (8, 3, 7, 5)
    net = (linear if kind == 1 else conv).double()
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    return net, x, torch.randn_like(net(x))


def numbers(net: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = net(x)
    (out.square() * weights).sum().backward()
    grads = {f"{name}/grad": parameter.grad for name, parameter in net.named_parameters()}
    return {"out": out.detach(), "x/grad": x.grad, **grads, **dict(net.state_dict())}


def _measure(folder: str, kind: int) -> None:
    world = join_world("cpu")
    net, x, weights = norms(kind)
    synchronize_norms(net)
    rows = slice(0, 4) if world.rank == 0 else slice(4, 8)
    torch.save(numbers(net, x[rows], weights[rows]), f"{folder}/{world.rank}.pt")
    leave_world()


@pytest.mark.parametrize("kind", [1, 2])
def test_norms_of_two_ranks_are_those_of_one_process(tmp_path, kind):
    """Outputs, gradients of inputs and weights, running statistics."""
    run_ranks(2, tmp_path, _measure, str(tmp_path), kind)
    expected = numbers(*norms(kind))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in expected.items():
        pair = [part[key] for part in parts]
        found = torch.cat(pair) if key in ("out", "x/grad") else pair[0] + pair[1] if "/" in key else pair[0]
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
        assert "/" in key or key == "out" or torch.equal(*pair), "the same statistics on both ranks"


def test_one_process_computes_as_before():
    net, x, weights = norms(2)
    expected, (other, *_) = numbers(net, x, weights), norms(2)
    assert synchronize_norms(other) == 2
    assert all(torch.equal(value, expected[key]) for key, value in numbers(other, x, weights).items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"deterministic": True}, "use_bn_sync: not with deterministic: statistics depend on the number of ranks"),
        ({"accum_freq": 2}, "use_bn_sync: not with accum_freq: micro-batches are normalised one by one"),
        ({"torchcompile": True}, "use_bn_sync: not with torchcompile: a graph holds no exchange between ranks"),
    ],
)
def test_what_cannot_keep_its_promise_is_refused(changes, message):
    assert any(problem.startswith(message) for problem in check(ParallelSettings(use_bn_sync=True, **changes)))


def test_models_that_have_nothing_to_synchronise():
    with pytest.raises(ConfigError, match="use_bn_sync: the model has no batch norms; leave it out"):
        synchronize_norms(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=re.escape("use_bn_sync: BatchNorm3d cannot be synchronised")):
        synchronize_norms(nn.BatchNorm3d(3))
