"""Optimizers by name: a run takes the steps of the optimizer itself, resumes with the same bits, and refuses what it
could not keep its promises with."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import rwkv_clip
from helpers.ranks import digest
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint, read_description, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.losses import Objective
from rwkv_clip.training import loop, trainer
from rwkv_clip.training.checkpointing import restore_snapshot
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.optim import build_optimizer, update_weights
from rwkv_clip.training.optimizer_choice import (
    Choice,
    choose_options,
    find_optimizer,
    list_optimizers,
    try_optimizer,
)
from rwkv_clip.training.optimizer_state import pack_numbers, pack_state, unpack_state
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.settings import OptimizerSettings, Settings

STEPS, STOP = 5, 2
BETAS = (0.9, 0.98)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_smaller(make_tiny(new_folder("tiny")))
    settings = {key: value for key, value in settings.items() if key not in ("schedule", "cycle_beta1", "val_data")}
    return settings | {"lr": 1e-3, "max_steps": STEPS, "save_every_n_steps": STOP, "resume": "latest"}


# ---- the steps are the optimizer's -----------------------------------------------------------------------------------


def torch_muon(groups: list[dict]) -> list[torch.optim.Optimizer]:
    adam = {"lr": 1e-3, "betas": BETAS}
    others = [group for group in groups if group.get("use_fallback")]
    return [
        torch.optim.Muon([group for group in groups if not group.get("use_fallback")], lr=1e-3),
        torch.optim.AdamW(others, **adam),
    ]


BY_HAND: dict[str, Callable[[list[dict]], list[torch.optim.Optimizer]]] = {
    "adamw": lambda groups: [torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, eps=1e-8, fused=True)],
    "lion": lambda groups: [create_optimizer_v2(groups, "lion", lr=1e-3, betas=BETAS)],
    "adafactor": lambda groups: [create_optimizer_v2(groups, "adafactor", lr=1e-3)],
    "timm/muon": lambda groups: [create_optimizer_v2(groups, "muon", lr=1e-3, betas=BETAS)],
    "sgd": lambda groups: [torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True)],
    "torch/nadam": lambda groups: [torch.optim.NAdam(groups, lr=1e-3, betas=BETAS)],
    "torch/muon": torch_muon,
}


@pytest.mark.parametrize("opt", [pytest.param(o, marks=needs_muon if o == "torch/muon" else ()) for o in BY_HAND])
def test_a_run_takes_the_steps_of_the_optimizer(data, opt, monkeypatch):
    """The same gradients, given to the optimizer of the library in a plain loop, make the same bits."""
    begin, gradients, groups = {}, [], []

    def watched(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        own = current[0].state.shards.own
        if not begin:
            begin.update({name: p.detach().clone() for name, p in own.items()})
            names = {parameter: name for name, parameter in own.items()}
            for group in optimizer.param_groups:
                about = {key: group[key] for key in ("weight_decay", "use_fallback") if key in group}
                groups.append({**about, "params": [names[p] for p in group["params"]]})
        gradients.append({name: p.grad.clone() for name, p in own.items()})
        update_weights(optimizer, skip)

    current: list[loop.Trainer] = []
    step = loop.Trainer.step
    monkeypatch.setattr(trainer, "update_weights", watched)
    monkeypatch.setattr(loop.Trainer, "step", lambda self, batch: current.append(self) or step(self, batch))
    run(parse(Settings, data | {"name": f"plain {opt}".replace("/", "-"), "opt": opt, "schedule": "constant"}))
    assert len(gradients) == STEPS

    own = {name: nn.Parameter(value.clone()) for name, value in begin.items()}
    optimizers = BY_HAND[opt]([{**group, "params": [own[name] for name in group["params"]]} for group in groups])
    for table in gradients:
        for name, parameter in own.items():
            parameter.grad = table[name]
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            own["logit_scale"].clamp_(*Objective.scale_limits)
    found = current[0].state.shards.own
    assert [name for name in own if not torch.equal(found[name], own[name])] == []
    assert sum(not torch.equal(own[name], begin[name]) for name in own) > 0.5 * len(own)


# ---- resume ----------------------------------------------------------------------------------------------------------

KEPT = {
    "lion": {},
    "adamw": {"opt_kwargs": ["amsgrad=True"]},
    "muon": {"layer_decay_image": 0.7, "ema_decay": 0.9},
    "torch/muon": {"lr_text": 5e-4},
    "adafactor": {},
    "lamb": {},  # counts in its groups, by tensors
    "adan": {},  # counts in its groups, by numbers
    "madgrad": {},
    "torch/nadam": {"parallel": "fsdp"},
}


@pytest.mark.parametrize("opt", [pytest.param(o, marks=needs_muon if o == "torch/muon" else ()) for o in KEPT])
def test_a_resumed_run_has_the_same_bits(data, opt):
    name = f"resumed {opt}".replace("/", "-")
    changes = data | {"opt": opt, **KEPT[opt]}
    whole = run(parse(Settings, changes | {"name": f"{name}, whole", "keep_checkpoints": 9}))
    half = whole / "checkpoints" / f"step-{STOP:08}"
    parts = run(parse(Settings, changes | {"name": f"{name}, parts", "resume": str(half)}))
    one, other = find_checkpoint(whole), find_checkpoint(parts)
    assert one.name == other.name == f"step-{STEPS:08}" and digest(one) == digest(other)
    kept = [read_description(path).get("optimizer") for path in (one, other)]
    assert kept[0] == kept[1] and (kept[0] is None or json.dumps(kept[0]))
    files = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    assert files[0] == files[1]
    if "ema.safetensors" in files[0]:
        assert (one / "ema.safetensors").read_bytes() == (other / "ema.safetensors").read_bytes()


def test_another_optimizer_begins_anew(data):
    """Allowed by name, it starts with its own state and the weights as they are."""
    begun = (
        run(parse(Settings, data | {"name": "first adamw", "keep_checkpoints": 9})) / "checkpoints" / "step-00000002"
    )
    changes = data | {"name": "then lion", "opt": "lion", "resume": str(begun)}
    with pytest.raises(ConfigError, match="opt: 'adamw' -> 'lion'"):
        run(parse(Settings, changes))
    found = find_checkpoint(run(parse(Settings, changes | {"allow_change": ["opt"]})))
    slots = {key.rpartition("/")[2] for key in read_tensors(found / "optim.safetensors")}
    assert slots == {"exp_avg"}, "Lion keeps no second moment"


@pytest.fixture
def saved(data) -> tuple[Path, dict]:
    name = "damaged"
    folder = run(parse(Settings, data | {"name": name, "opt": "muon", "max_steps": 1, "resume": "latest"}))
    return find_checkpoint(folder), read_description(find_checkpoint(folder))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda kept: kept.pop("numbers"), "has to hold the tables slots, numbers and groups"),
        (lambda kept: kept["slots"].update(momentum_buffer=99), "tensors momentum_buffer, should be 99"),
        (lambda kept: kept["numbers"].update(use_muon={"nobody": True}), "use_muon of nobody is damaged"),
        (lambda kept: kept["numbers"].update(use_muon=3), "use_muon of None is damaged"),
        (lambda kept: kept["groups"].update(lr=1.0), "lr of the groups is no counter"),
        (
            lambda kept: kept["groups"].update(count={"dtype": "complex64", "value": 1}),
            "count of the groups is no counter",
        ),
        (lambda kept: kept["groups"].update(count=[1]), "count of the groups is no number"),
    ],
)
def test_damaged_state_is_refused(data, saved, monkeypatch, damage, message):
    _, facts = saved
    damage(facts["optimizer"])
    trainers = []
    monkeypatch.setattr(
        "rwkv_clip.training.main.restore_snapshot",
        lambda state, path, _: trainers.append(1) or restore_snapshot(state, path, facts),
    )
    with pytest.raises(CheckpointError, match=message):
        run(parse(Settings, data | {"name": "damaged", "opt": "muon", "max_steps": 1}))
    assert trainers


# ---- skipped steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["adamw", "lion", "muon", "lamb", "adafactor"])
def test_a_skipped_step_leaves_no_trace(opt):
    net = small_model()
    shards = Shards(net, nn.Module())
    optimizer = build_optimizer(shards, parse(OptimizerSettings, {"opt": opt}))

    def step(value: float, skip: float) -> None:
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, value)
        update_weights(optimizer, torch.tensor(skip))

    def bits() -> dict[str, Tensor]:
        found = {**net.state_dict(), **pack_state(optimizer, shards.own)}
        return {key: value.clone() for key, value in found.items()}

    step(0.1, 0.0)
    before, numbers = bits(), pack_numbers(optimizer, shards.own)
    step(float("nan"), 1.0)
    after = bits()
    assert all(torch.equal(after[key], before[key]) for key in before) and after.keys() == before.keys()
    assert pack_numbers(optimizer, shards.own) == numbers
    step(0.1, 0.0)
    assert not torch.equal(bits()["logit_scale"], before["logit_scale"])


def small_model() -> nn.Module:
    tower = {"width": 32, "depth": 1, "heads": 2, "ffn_width": 64}
    image, text = {"image_size": [32, 32], "patch": 16, **tower}, {"context": 8, "vocab": 50, **tower}
    return rwkv_clip.create_model({"image": image, "text": text})


# ---- the trial -------------------------------------------------------------------------------------------------------

# Not for shards: what reduces over a tensor (norms, means, trust ratios) or multiplies matrices.
WHOLE = {
    *("adafactor", "adafactorbv", "adafactorbvc", "adamp", "adamuon", "lamb", "lambc", "lambcd", "lambcw", "lambw"),
    *(
        "larc",
        "lars",
        "mars",
        "muon",
        "nadamuon",
        "nlarc",
        "nlars",
        "nmuon",
        "novograd",
        "novogradc",
        "novogradw",
        "sgdp",
    ),
}


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_keeps_the_promises(name):
    """Cautious ones (a mean over a mask; their names begin with c) and WHOLE need whole parameters."""
    choice = find_optimizer(name)
    found = try_optimizer(choice, choose_options(choice, (), BETAS, 1e-8, None))
    cautious = name.startswith("c") and name[1:] in list_optimizers()
    assert found.problem == "" and found.sharded == (name not in WHOLE and not cautious)


class Plain(torch.optim.Optimizer):
    """SGD with something planted."""

    def __init__(self, groups, lr, planted: str = ""):
        self.planted, self.count = planted, 0
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self):
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                rate = group["lr"] * self.rate(parameter)
                parameter.sub_(rate * parameter.grad)

    def rate(self, parameter: Tensor) -> float:
        state = self.state[parameter]
        if self.planted == "chance":
            return random.random()
        if self.planted == "torch's chance":
            return float(torch.rand(()))
        if self.planted == "hidden count":
            return 1 / self.count
        if self.planted == "a list":
            state["kept"] = [1.0]
        if self.planted == "norm":
            return 1 / (1 + float(parameter.grad.norm()))
        if self.planted == "odd shape":
            state["kept"] = torch.zeros(3)
        if self.planted == "state of a text":
            self.state["k"]["kept"] = 1
        if self.planted == "error":
            raise RuntimeError("asks for a closure")
        return 1.0


@pytest.mark.parametrize(
    "planted, problem, sharded",
    [
        ("", "", True),
        ("chance", "draws random numbers", False),
        ("torch's chance", "draws random numbers", False),
        ("hidden count", "keeps something between steps", False),
        ("a list", "it keeps kept, a list, which is no tensor or number", False),
        ("state of a text", "it keeps 'k' for no parameter", False),
        ("error", "cannot be used with these options: asks for a closure", False),
        ("norm", "", False),
        ("odd shape", "", False),
    ],
)
def test_the_trial_sees_what_is_planted(monkeypatch, planted, problem, sharded):
    monkeypatch.setattr(Choice, "build", lambda self, groups, lr, options: Plain(groups, lr, planted))
    before = torch.random.get_rng_state(), random.getstate()
    found = try_optimizer.__wrapped__(Choice("torch", "sgd"), ())
    assert problem in found.problem and bool(problem) == bool(found.problem) and found.sharded == sharded
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]


# ---- names and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--opt liom", "opt: 'liom' is no optimizer of torch or timm that a run can use; did you mean lion"),
        ("--opt timm/asgd", "opt: 'timm/asgd' is no optimizer"),
        ("--opt keras/adam", "opt: 'keras/adam' is no optimizer"),
        ("--opt kron", "opt: 'kron' is no optimizer"),
        ("--opt lion --opt-kwargs cautoin=True", "opt_kwargs: timm/lion has no 'cautoin'; did you mean 'caution'"),
        ("--opt muon --opt-kwargs ns_coefficients=[1,[2],3]", "opt: timm/muon cannot be used with these options"),
        ("--opt muon --opt-kwargs ns_coefficients={1:2}", "opt: timm/muon cannot be used with these options"),
        ("--lock-image --lr-image 1e-4", "lr_image: --lock-image freezes the whole image tower"),
        ("--lock-text --lock-text-freeze-layer-norm --layer-decay-text 0.5", "layer_decay_text: --lock-text freezes"),
        ("--opt lion --opt-kwargs lr=1", "opt_kwargs: lr is set by --lr; leave it out"),
        ("--opt-kwargs eps=1", "opt_kwargs: eps is set by --eps; leave it out"),
        ("--opt-kwargs fused=False", "opt_kwargs: adamw has no 'fused'"),
        ("--opt-kwargs amsgrad", "opt_kwargs: 'amsgrad' is not KEY=VALUE"),
        ("--opt lion --opt-kwargs caution=True caution=False", "opt_kwargs: caution is given twice"),
        ("--momentum 0.9", "momentum: adamw has none"),
        ("--opt sgd --momentum 0.9 --opt-kwargs momentum=0.8", "opt_kwargs: momentum is set by --momentum, too"),
        ("--opt lion --eps 1e-6", "eps: 1e-06 is AdamW's, timm/lion has another; use --eps 1e-08"),
        ("--opt sgd --opt-kwargs nesterov=maybe --momentum 0", "opt_kwargs: nesterov: 'maybe' is not True or False"),
        ("--opt adafactor --cycle-beta1 --schedule onecycle", "cycle_beta1: timm/adafactor has no beta1"),
        ("--opt muon --parallel fsdp", "parallel: fsdp holds shards of parameters, and opt muon needs whole ones"),
        ("--opt lion --opt-kwargs caution=True --parallel hsdp", "parallel: hsdp holds shards"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments, message):
    with pytest.raises(ConfigError) as error:
        read_command_line(["--train-data", "x", *arguments.split()])
    assert any(problem.startswith(message) for problem in error.value.problems), error.value.problems


def test_names_in_any_case_and_of_both_libraries():
    assert find_optimizer("AdamW") is None and find_optimizer("torch/adamw") is None
    assert find_optimizer("timm/AdamW") == Choice("timm", "adamw")
    assert find_optimizer("Lion") == find_optimizer("timm/lion") == Choice("timm", "lion")
    assert find_optimizer("asgd") == find_optimizer("torch/ASGD") == Choice("torch", "asgd")
    options = choose_options(find_optimizer("lion"), ["caution=True", "betas=(0.5, 0.6)"], BETAS, 1e-8, None)
    assert dict(options) == {"betas": (0.5, 0.6), "caution": True}, "an option of its own wins"


def test_state_moves_to_the_parameters_type():
    """AdamW's; others keep the types they chose."""
    own = {"a": nn.Parameter(torch.zeros(2, dtype=torch.float64))}
    tensors = {"a/step": torch.tensor(3.0), "a/exp_avg": torch.ones(2), "a/exp_avg_sq": torch.ones(2)}
    optimizer = torch.optim.AdamW(own.values(), fused=True)
    unpack_state(optimizer, own, tensors)
    assert {slot: value.dtype for slot, value in optimizer.state[own["a"]].items()} == {
        "step": torch.float32,
        "exp_avg": torch.float64,
        "exp_avg_sq": torch.float64,
    }
