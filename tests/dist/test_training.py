"""1, 2 and 4 gloo ranks train the same model from the same samples; a run moves between numbers of ranks."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.ranks import run_ranks, train_logging_ids
from helpers.tiny import BATCH, make_tiny


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_tiny(new_folder("tiny"))
    # lr: at 1e-2 this model bounces, and the order of float32 sums shows in the third digit of step 6
    return settings | {"drop_path": 0.0, "max_steps": 6, "save_every_n_steps": 3, "log_every_n_steps": 1, "lr": 3e-4}


@pytest.fixture(scope="module")
def one_rank(data, new_folder) -> Path:
    return launch(1, new_folder("one"), data | {"name": "one"})


def launch(world: int, folder: Path, settings: dict) -> Path:
    run_ranks(world, folder, train_logging_ids, settings | {"batch_size": BATCH // world})
    return Path(settings["logs"]) / settings["name"]


def curve(folder: Path) -> list[float]:
    """Global loss and gradient norm of every step; the norm sees every gradient of every rank."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record[key] for record in records if "loss" in record for key in ("loss", "grad_norm")]


@pytest.mark.parametrize("world", [2, 4])
def test_world_sizes_agree(data, one_rank, tmp_path, world):
    found, expected = curve(launch(world, tmp_path, data | {"name": f"world{world}"})), curve(one_rank)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 12


def test_a_run_goes_on_with_another_number_of_ranks(data, one_rank, tmp_path):
    part = one_rank.with_name("moved")
    shutil.copytree(one_rank, part)
    shutil.rmtree(part / "checkpoints" / "step-00000006")
    launch(2, tmp_path, data | {"name": "moved", "resume": "latest"})
    assert curve(part) == pytest.approx(curve(one_rank), rel=1e-4)


def test_a_batch_that_changes_is_refused(data, one_rank, tmp_path):
    with pytest.raises(AssertionError, match="global_batch: 8 -> 16"):
        run_ranks(2, tmp_path, train_logging_ids, data | {"name": "one", "resume": "latest", "batch_size": BATCH})
