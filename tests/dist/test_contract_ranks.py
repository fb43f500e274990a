"""An objective with parameters, views and tokens on ranks: one process, DDP and FSDP do the same."""

import pytest

from helpers.ranks import digest, run_ranks
from helpers.tiny import make_smaller, make_tiny
from helpers.toy_objective import ImageAlone, Toy
from rwkv_clip import losses
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import parse
from rwkv_clip.dist import leave_world
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings


def train(settings: dict) -> None:
    losses.OBJECTIVES["toy"], losses.OBJECTIVES["alone"] = (Toy, None), (ImageAlone, None)
    run(parse(Settings, settings))
    leave_world()


@pytest.fixture(scope="module")
def runs(new_folder):
    """Folder of a run by its ranks and settings."""
    folder = new_folder("toy")
    data = make_smaller(make_tiny(folder))
    base = data | {"objective": "toy", "val_data": None, "max_steps": 3, "resume": "latest", "lr": 1e-3}

    def start(ranks: int, **changes):
        name = f"{ranks} {sorted(changes.items())}".replace("/", "-")
        settings = base | {"batch_size": 8 // ranks, "name": name, **changes}
        run_ranks(ranks, folder, train, settings)
        return find_checkpoint(folder / "logs" / settings["name"])

    return start


@pytest.fixture(scope="module")
def one(runs):
    return runs(1)


def largest_gap(a, b) -> float:
    a, b = (read_tensors(path / "model.safetensors") | read_tensors(path / "optim.safetensors") for path in (a, b))
    assert a.keys() == b.keys() and "objective.head.weight/exp_avg" in a and "objective/center" in a
    gaps = {key: float((a[key] - b[key]).abs().max() / max(float(b[key].abs().max()), 1e-3)) for key in a}
    assert max(gaps.values()) > 0, "not the same files"
    return max(gaps[key] for key in gaps if "exp_avg" in key or key.startswith("objective"))


@pytest.mark.parametrize("changes", [{}, {"parallel": "fsdp"}, {"accum_freq": 2, "batch_size": 2}], ids=str)
def test_two_ranks_do_what_one_does(runs, one, changes):
    assert largest_gap(runs(2, **changes), one) < 1e-3


def test_deterministic_bits(runs):
    same = {"deterministic": True, "max_ranks": 2}
    assert digest(runs(1, **same)) == digest(runs(2, **same))


def test_fsdp_resumes_what_one_process_saved(runs):
    whole = runs(1, save_every_n_steps=2, name="whole")
    begun = whole.with_name("step-00000002")
    assert largest_gap(runs(2, parallel="fsdp", resume=str(begun), name="moved"), whole) < 1e-3


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_an_objective_does_not_use_holds_up_no_rank(runs, parallel):
    state = read_tensors(runs(2, objective="alone", parallel=parallel) / "optim.safetensors")
    for name in ("logit_scale", "text_model.emb.weight", "objective.unused.weight"):
        assert state[f"{name}/step"] == 3 and not state[f"{name}/exp_avg"].any(), name
