"""Other optimizers, rates by tower and averaged weights on ranks: one process, DDP and FSDP do the same."""

import pytest
import torch

from helpers.ranks import digest, run_ranks
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_description, read_tensors
from rwkv_clip.config import parse
from rwkv_clip.dist import leave_world
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

# Madgrad keeps sums and numbers and has no sign that a rounding turns.
OWN = {"opt": "madgrad", "lr": 1e-3, "lr_image": 5e-4, "layer_decay_text": 0.5, "ema_decay": 0.9}


def train(settings: dict) -> None:
    run(parse(Settings, settings))
    leave_world()


@pytest.fixture(scope="module")
def runs(new_folder):
    """Checkpoint of a run by its ranks and settings."""
    folder = new_folder("runs")
    data = make_smaller(make_tiny(folder))
    data = {key: value for key, value in data.items() if key not in ("schedule", "cycle_beta1")}
    base = data | {"val_every_n_steps": 2, "max_steps": 3, "resume": "latest", **OWN}

    def start(ranks: int, **changes):
        name = changes.pop("name", f"{ranks} {sorted(changes.items())}".replace("/", "-"))
        run_ranks(ranks, folder, train, base | {"batch_size": 8 // ranks, "name": name, **changes})
        return find_checkpoint(folder / "logs" / name)

    return start


@pytest.fixture(scope="module")
def one(runs):
    return runs(1, save_every_n_steps=2)


def gaps(a, b) -> dict[str, float]:
    """Largest differences of weights, state and average, relative to the largest number of each tensor."""
    found = {}
    for file in ("model", "optim", "ema"):
        one, other = (read_tensors(path / f"{file}.safetensors") for path in (a, b))
        assert one.keys() == other.keys() and all(one[key].shape == other[key].shape for key in one)
        for key in one:
            scale = max(float(other[key].abs().max()), 1e-3)
            found[f"{file}/{key}"] = float((one[key] - other[key]).abs().max()) / scale
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_do_what_one_does(runs, one, parallel):
    two = runs(2, parallel=parallel)
    assert 0 < max(gaps(two, one).values()) < 2e-3
    assert read_description(two).get("optimizer") == read_description(one).get("optimizer")


def test_fsdp_resumes_what_one_process_saved(runs, one):
    begun = one.with_name("step-00000002")
    assert max(gaps(runs(2, parallel="fsdp", resume=str(begun), name="moved"), one).values()) < 2e-3


def test_a_sharded_run_resumes_with_the_same_bits(runs):
    whole = runs(2, parallel="fsdp", save_every_n_steps=2, name="whole")
    begun = whole.with_name("step-00000002")
    again = runs(2, parallel="fsdp", resume=str(begun), name="again")
    assert digest(whole) == digest(again)
    assert (whole / "ema.safetensors").read_bytes() == (again / "ema.safetensors").read_bytes()


@pytest.mark.parametrize("opt", ["muon", "lamb"])
def test_deterministic_bits(runs, opt):
    """What works on whole matrices, too."""
    same = {"deterministic": True, "max_ranks": 2, "opt": opt}
    one, two = runs(1, **same), runs(2, **same)
    assert digest(one) == digest(two)
    assert (one / "ema.safetensors").read_bytes() == (two / "ema.safetensors").read_bytes()
    assert torch.equal(*(read_tensors(path / "ema.safetensors")["logit_scale"] for path in (one, two)))
