"""ALIP on several gloo ranks, in pieces and in chunks is ALIP of one process: losses, gradients, running means, log."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.alip_formulas import BATCH, STEPS, ReferenceALIP, features
from helpers.ranks import digest, run_ranks, train_logging_ids
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.dist import join_world, leave_world, mean_over_ranks
from rwkv_clip.losses import ALIP, GateSettings, pairs
from rwkv_clip.training import main

GATES = {"init": 0.25, "momentum": 0.5}


def work(folder: str) -> None:
    """On a rank: three steps on its rows of the whole batch, gradients averaged over ranks as DDP does."""
    world = join_world("cpu")
    pairs.CPU_ROWS = 3  # chunks that end within a rank's share
    alip, found = ALIP(GateSettings(**GATES)).double(), []
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for step in range(STEPS):
        *whole, scale = (leaf.detach() for leaf in features(step, torch.float64))
        leaves = [leaf.requires_grad_() for leaf in (*(part[own] for part in whole), scale)]
        losses, report = alip(leaves[0], torch.stack(leaves[1:3], 1), leaves[3])
        *gradients, d_scale = torch.autograd.grad(sum(losses.values()), leaves)
        dist.all_reduce(d_scale)
        values = mean_over_ranks(losses | report, world.device)
        found.append([[g / world.size for g in (*gradients, d_scale)], alip.mean_similarity.clone(), values])
    torch.save(found, f"{folder}/rank{world.rank}")
    leave_world()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_one_process(world, tmp_path):
    run_ranks(world, tmp_path, work, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(world)]
    theirs, ours = ReferenceALIP(**GATES), ALIP(GateSettings(**GATES)).double()
    for step in range(STEPS):
        leaves = features(step, torch.float64)
        losses, log, _ = theirs(*leaves)
        ours(leaves[0], torch.stack(leaves[1:3], 1), leaves[3])
        *expected, d_scale = torch.autograd.grad(sum(losses.values()), leaves)
        for rank, ((*found, found_scale), means, values) in enumerate(found[step] for found in ranks):
            rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            for gradient, whole in zip(found, expected):
                torch.testing.assert_close(gradient, whole[rows], rtol=1e-11, atol=1e-15)
            torch.testing.assert_close(found_scale, d_scale, rtol=1e-11, atol=1e-15)
            assert torch.equal(means, ours.mean_similarity), "the bits of one process, on every rank"
            expected_values = {name: value.item() for name, value in losses.items()} | log
            assert values == pytest.approx(expected_values, rel=1e-12)


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_smaller(make_tiny(new_folder("tiny")))
    alip = {"objective": "alip", "text_choice": "all", "texts": 2, "gates": {"init": 0.5, "momentum": 0.75}}
    return settings | alip | {"val_data": None, "max_steps": 4, "save_every_n_steps": 4, "drop_path": 0.0}


def train(settings: dict) -> None:
    """On a rank: a training run without its picture, half of such a short run's time."""
    main.plot_training = lambda folder: None
    train_logging_ids(settings)


class Runs:
    """Training runs of one global batch of 16, by the number of ranks and accumulations."""

    def __init__(self, data: dict, changes: dict):
        self.data, self.changes, self.made = data, changes, {}

    def __call__(self, world: int, accum: int = 1) -> Path:
        if (world, accum) not in self.made:
            folder = Path(self.data["logs"]) / "-".join(map(str, [*self.changes, world, accum]))
            folder.mkdir(parents=True)
            batch = {"batch_size": 16 // world // accum, "accum_freq": accum, "name": folder.name}
            run_ranks(world, folder, train, self.data | self.changes | batch)
            self.made[world, accum] = folder
        return self.made[world, accum]


def logged(folder: Path) -> list[dict[str, float]]:
    """Without what depends on the clock, and the records left out (none)."""
    timed = {"samples_per_second", "wait_share", "eta_seconds", "seconds", "peak_memory_mb", "skipped"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.fixture(scope="module")
def plain(data):
    """A low rate: AdamW's first steps turn a gradient that is mere rounding into a step of the full rate."""
    return Runs(data, {"lr": 1e-5, "schedule": "constant", "cycle_beta1": False})


@pytest.mark.parametrize("world, accum", [(1, 2), (1, 4), (2, 2)])
def test_runs_agree(plain, world, accum):
    """Once a step however the batch is cut: a mean that moved with every piece would be another after a step."""
    found, expected = logged(plain(world, accum)), logged(plain(1))
    assert [set(line) for line in found] == [set(line) for line in expected]
    for line, whole in zip(found, expected):
        assert line == pytest.approx(whole, rel=2e-5, abs=1e-6)
    means = [read_tensors(find_checkpoint(plain(*cut)) / "optim.safetensors") for cut in ((world, accum), (1, 1))]
    torch.testing.assert_close(*(m["objective/mean_similarity"] for m in means), rtol=1e-6, atol=0)
    assert "momentum_text_sim" in expected[0] and expected[0]["momentum_text_sim"] != expected[-1]["momentum_text_sim"]


def test_a_sharded_run_agrees(data, plain):
    found = logged(Runs(data, plain.changes | {"parallel": "fsdp"})(2))
    for line, whole in zip(found, logged(plain(1)), strict=True):
        assert line == pytest.approx(whole, rel=2e-5, abs=1e-6)


@pytest.fixture(scope="module")
def fixed(data):
    return Runs(data, {"deterministic": True, "max_ranks": 4, "drop_path": 0.2})


@pytest.mark.parametrize("world, accum", [(2, 1), (4, 1), (1, 4)])
def test_same_bits(fixed, world, accum):
    assert digest(find_checkpoint(fixed(world, accum))) == digest(find_checkpoint(fixed(1)))
    assert logged(fixed(world, accum)) == logged(fixed(1))
