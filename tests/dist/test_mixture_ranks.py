"""Several sources on several ranks: the same records in the same order, and with --deterministic the same bits."""

from pathlib import Path

import pytest

from helpers.mixtures import STEPS, make_mixture
from helpers.ranks import digest, read_ids, run_ranks, train_logging_ids
from rwkv_clip.checkpoint import find_checkpoint
from rwkv_clip.data.mixture import open_mixture
from rwkv_clip.data.records import RecordSet
from rwkv_clip.training.data.order import make_order


@pytest.fixture(scope="module")
def data(new_folder) -> dict:
    return make_mixture(new_folder("tiny")) | {"save_every_n_steps": 99}


def test_one_and_two_ranks_see_the_same_and_end_with_the_same_bits(data):
    ends = []
    for world in (1, 2):
        folder = Path(data["logs"]) / f"ranks{world}"
        folder.mkdir(parents=True)
        changes = {"name": folder.name, "resume": "latest", "batch_size": 8 // world}
        fixed = {"deterministic": True, "max_ranks": 2}
        run_ranks(world, folder, train_logging_ids, data | changes | fixed, str(folder / "ids"))
        ends.append((digest(find_checkpoint(folder)), read_ids(str(folder / "ids"))))
    assert ends[0] == ends[1]
    records = open_mixture(data["train_data"], data["train_data_upsampling_factors"], None, RecordSet)
    order = make_order(records, 0)
    assert [i for step in ends[0][1] for i in step] == [order.at(position) for position in range(STEPS * 8)]
