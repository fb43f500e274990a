"""Schedules against sequences of the released code, and what decay=matrices spares."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rwkv_clip
from rwkv_clip.training.optim import Schedule, build_optimizer, set_step
from rwkv_clip.training.optimizer_state import pack_state, unpack_state
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.settings import OptimizerSettings

SEQUENCES = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())


@pytest.mark.parametrize("name", sorted(SEQUENCES["onecycle"]))
def test_one_cycle(name):
    expected = SEQUENCES["onecycle"][name]
    total = len(expected["lr_used"])
    schedule = Schedule("onecycle", expected["max_lr"], total, 0.1 * total, 0.9, cycle_beta1=True)
    for step, (lr, beta1) in enumerate(zip(expected["lr_used"], expected["beta1_used"])):
        assert schedule.lr(step) == pytest.approx(lr, rel=1e-9)
        assert schedule.beta1_at(step) == pytest.approx(beta1, rel=1e-9)


def test_cosine_with_warm_up():
    expected = SEQUENCES["cn_cosine_lr"]
    schedule = Schedule("cosine", expected["base_lr"], expected["steps"], expected["warmup"], 0.9)
    assert [schedule.lr(step) for step in range(expected["steps"])] == pytest.approx(expected["lr"], rel=1e-9)
    assert schedule.beta1_at(3) == 0.9


@pytest.mark.parametrize("kind", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_short_runs_have_positive_finite_rates(kind, total):
    schedule = Schedule(kind, 1.0, total, 0.1 * total, 0.9)
    assert all(0 < schedule.lr(step) <= 1.0 for step in range(total))


def model():
    image = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64}
    return rwkv_clip.create_model(
        {
            "image": image,
            "text": {"context": 8, "vocab": 50, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
        }
    )


def test_weight_decay_groups():
    net = model()
    names = {parameter: name for name, parameter in net.named_parameters()}
    everything = build_optimizer(Shards(net, nn.Module()), OptimizerSettings(decay="all", wd=0.2)).param_groups
    assert [len(g["params"]) for g in everything] == [len(names)] and everything[0]["weight_decay"] == 0.2
    matrices, spared = build_optimizer(
        Shards(net, nn.Module()), OptimizerSettings(decay="matrices", wd=0.2)
    ).param_groups
    assert spared["weight_decay"] == 0
    kept = {names[p].rsplit(".", 1)[-1] for p in matrices["params"]}
    assert kept == {
        "weight",
        "time_maa_w1",
        "time_maa_w2",
        "time_decay_w1",
        "time_decay_w2",
        "time_faaaa",
        "pos_embed",
    }
    assert not any("ln" in names[p] for p in matrices["params"])


def test_optimizer_state_round_trip_is_exact():
    torch.manual_seed(0)
    nets = [model(), model()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [build_optimizer(Shards(net, nn.Module()), OptimizerSettings()) for net in nets]

    def step(net, optimizer, at):
        torch.manual_seed(at)
        set_step(optimizer, Schedule("constant", 1e-2, 9, 0, 0.9), at)
        net(torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 8)))[0].sum().backward()
        for p in net.parameters():
            p.grad = torch.randn_like(p) if p.grad is None else p.grad
        optimizer.step()
        optimizer.zero_grad()

    for at in range(3):
        step(nets[0], optimizers[0], at)
    nets[1].load_state_dict(nets[0].state_dict())
    own = [dict(net.named_parameters()) for net in nets]
    unpack_state(optimizers[1], own[1], {k: v.clone() for k, v in pack_state(optimizers[0], own[0]).items()})
    for net, optimizer in zip(nets, optimizers):
        step(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))
    packed = pack_state(optimizers[0], own[0])
    packed.pop("logit_scale/step")
    packed.pop("logit_scale/exp_avg")
    packed.pop("logit_scale/exp_avg_sq")
    with pytest.raises(ValueError, match="3 tensors are missing, the first is logit_scale/step"):
        unpack_state(build_optimizer(Shards(nets[1], nn.Module()), OptimizerSettings()), own[1], packed)
