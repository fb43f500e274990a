"""Two nodes, rehearsed on this machine: two torchruns that meet on loopback. A rank lost on one of them ends both, by
name, or starts both again, with the same bits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ranks import digest, run_ranks, train_logging_ids
from helpers.tiny import make_tiny, to_arguments

STEPS = 20


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_tiny(new_folder("tiny")) | {"max_steps": STEPS, "timeout": 30.0}
    del settings["val_data"]
    return settings


def start_nodes(folder: Path, port: int, plan: str, per_node: int, restarts: int, settings: dict) -> list:
    """One torchrun per node; output of node n in `folder/node<n>`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(per_node)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "rehearsal"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    command += ["-m", "helpers.fail_at", str(folder), plan, "--", *to_arguments(settings)]
    nodes = []
    for node in range(2):
        with open(folder / f"node{node}", "w") as out:
            nodes.append(subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    return nodes


def finish(nodes: list, folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes and output of the nodes."""
    try:
        codes = [node.wait(1800) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return codes, [(folder / f"node{node}").read_text() for node in range(2)]


def test_a_lost_rank_starts_both_nodes_again_with_the_same_bits(data, tmp_path, free_port):
    folder = Path(data["logs"])
    run_ranks(2, tmp_path, train_logging_ids, data | {"name": "whole", "batch_size": 4})
    settings = data | {"name": "again", "batch_size": 4}
    codes, said = finish(start_nodes(tmp_path, free_port, "1:13:SIGKILL", 1, 1, settings), tmp_path)
    assert codes == [0, 0], said
    assert sum("error: rank 1 last seen at step 13, " in text for text in said) == 1
    assert re.search(r"resumed at step (9|12) ", "".join(said))
    last = f"checkpoints/step-{STEPS:08}"
    assert digest(folder / "again" / last) == digest(folder / "whole" / last)


def test_a_lost_rank_ends_both_nodes_by_name(data, tmp_path, free_port):
    settings = data | {"name": "ended", "batch_size": 2}
    codes, said = finish(start_nodes(tmp_path, free_port, "3:13:SIGKILL", 2, 0, settings), tmp_path)
    assert all(codes)
    assert "on 4 x cpu" in "".join(said)
    for text in said:
        assert "error: rank 3 last seen at step 13, " in text
