"""The same bits on 1, 2 and 4 ranks, and when a run moves between them (promise P3)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.ranks import digest, read_ids, run_ranks, train_logging_ids
from helpers.tiny import COUNT, make_tiny
from rwkv_clip.checkpoint import find_checkpoint
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.dist import World
from rwkv_clip.training.deterministic import DeterministicStep
from rwkv_clip.training.settings import ParallelSettings

STEPS, BATCH = 12, 16


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_tiny(new_folder("tiny"))
    return settings | {"max_steps": STEPS, "val_data": None, "lr": 1e-3, "save_every_n_steps": 4, "keep_checkpoints": 9}


class Runs:
    """Runs of one kind, by the numbers of ranks that take turns."""

    def __init__(self, data: dict, changes: dict):
        self.data, self.changes = data, changes

    def __call__(self, *worlds: int, accum: int = 1) -> tuple[str, list[list[int]], list[float]]:
        """Digest, record ids of every step, losses. Of several numbers of ranks each trains for a third of the run."""
        name = "-".join(map(str, [*self.changes, *worlds, accum]))
        folder = Path(self.data["logs"]) / name
        for turn, world in enumerate(worlds):
            if turn:  # as if the run had been killed after that many thirds
                for path in (folder / "checkpoints").iterdir():
                    if int(path.name[5:]) > 4 * turn:
                        shutil.rmtree(path)
            batch = {"batch_size": BATCH // world // accum, "accum_freq": accum}
            settings = self.data | self.changes | batch | {"name": name, "resume": "latest"}
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("ids.*"):
                if int(path.name.split(".")[1]) >= 4 * turn:
                    path.unlink()
            run_ranks(world, folder, train_logging_ids, settings, str(folder / "ids"))
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return digest(find_checkpoint(folder)), read_ids(str(folder / "ids")), [r["loss"] for r in records]


@pytest.fixture(scope="module")
def fixed(data):
    return Runs(data, {"deterministic": True, "max_ranks": 4})


@pytest.fixture(scope="module")
def one_rank(fixed):
    return fixed(1)


def test_order_is_that_of_the_run(one_rank):
    ids = [i for step in one_rank[1] for i in step]
    assert len(ids) == STEPS * BATCH and len(set(ids[:COUNT])) == COUNT


@pytest.mark.parametrize("worlds", [(2,), (4,), (1, 2, 4), (4, 1), (2, 4, 2)], ids=str)
def test_same_bits(fixed, one_rank, worlds):
    assert fixed(*worlds) == one_rank


@pytest.mark.parametrize("world, accum", [(1, 4), (2, 2)])
def test_same_bits_with_accumulation(fixed, one_rank, world, accum):
    assert fixed(world, accum=accum) == one_rank


def test_the_mode_matters(data, one_rank):
    """Without it the order is the same and the loss nearly: another sum, the same mathematics. (A low rate: AdamW's
    first steps turn a gradient that is mere rounding into a step of the full rate.)"""
    plain = Runs(data, {"lr": 1e-5, "schedule": "constant", "cycle_beta1": False, "max_steps": 20})
    found = {world: plain(world) for world in (1, 2, 4)}
    for _, ids, losses in found.values():
        assert ids[:STEPS] == one_rank[1]
        assert losses == pytest.approx(found[1][2], rel=1e-6)
    assert found[2][0] != found[1][0], "if these agree, the digest sees nothing"


@pytest.mark.parametrize("changes", [{"precision": "amp_bf16"}, {"grad_checkpointing": True}], ids=str)
def test_same_bits_in_other_modes(data, changes):
    runs = Runs(data, {"deterministic": True, "max_ranks": 4, "max_steps": 5, **changes})
    assert runs(2)[0] == runs(1)[0]


def cut(ranks: int, **changes):
    settings = {"deterministic": True, "max_ranks": 4, "batch_size": 4, **changes}
    return DeterministicStep.cut_batch(parse(ParallelSettings, settings), World(0, ranks, torch.device("cpu")))


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"deterministic: 3 ranks cannot share .* use 1, 2, 4 ranks"):
        cut(3)
    with pytest.raises(ConfigError, match="8 ranks"):
        cut(8)
    with pytest.raises(ConfigError, match=r"max_ranks: 4 micro-batches of 16 pairs, .* of at least 16"):
        cut(2, accum_freq=8)
    with pytest.raises(ConfigError, match="max_ranks: 3 is not a power of two"):
        cut(2, max_ranks=3)
    assert cut(4).size == 4 and cut(2).count == 2 and cut(1, batch_size=6).count == 2
