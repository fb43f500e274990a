"""Dead, silent, stuck and failing ranks: the others end in seconds and say why; a restarted run has the same bits."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers.fail_at import fail_at, failure_times
from helpers.ranks import digest, start_ranks
from helpers.tiny import make_tiny, to_arguments

TIMEOUT, STEPS = 3.0, 20
WAYS = ["rank 0", "rank 1", "rank 0 with the store"]


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_tiny(new_folder("tiny")) | {"batch_size": 4, "max_steps": STEPS, "timeout": TIMEOUT}
    del settings["val_data"]
    return settings | {"resume": "latest"}


@pytest.fixture(scope="module")
def reference(data, new_folder) -> str:
    """sha256 of an uninterrupted run's last checkpoint, on two ranks."""
    folder = new_folder("reference")
    finish(start_ranks(2, folder, work, str(folder), "", data | {"name": "reference"}), [0, 0], folder)
    return last_digest(data, "reference")


def last_digest(data: dict, name: str) -> str:
    return digest(Path(data["logs"], name, "checkpoints", f"step-{STEPS:08}"))


def work(folder: str, plan: str, settings: dict, store: int | None = None, slow: bool = False) -> None:
    """What a rank does: train, failing by plan, stderr in a file. store: port of a store that outlives the ranks."""
    from rwkv_clip.training import main

    multiprocessing.set_start_method("fork", force=True)  # data workers as in a run of its own, not by a server
    rank = os.environ["RANK"]
    errors = os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    if store:
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(store))
    if slow:
        slow_down(main, rank)
    fail_at(folder, plan)
    sys.argv = ["train", *to_arguments(settings)]
    main.main()


def slow_down(main, rank: str) -> None:
    """What may take its time: a first step on one rank, validation on the main rank."""
    evaluate, step = main.evaluate_retrieval, main.Trainer.step

    def first(self, batch):
        if self.state.progress.step == 0 and rank == "1":
            time.sleep(TIMEOUT + 2.5)
        return step(self, batch)

    def long(*arguments, **more):
        time.sleep(TIMEOUT + 2.5)
        return evaluate(*arguments, **more)

    main.Trainer.step, main.evaluate_retrieval = first, long


def finish(ranks: list, codes: list[int], folder: Path, within: float = 30) -> float:
    """Wait for all ranks, check their exit codes; returns when the last one ended."""
    until = time.monotonic() + within
    for process in ranks:
        process.join(max(0, until - time.monotonic()))
    ended = time.monotonic()
    found = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    said = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*err*")))
    assert found == codes, said
    return ended


def said(folder: Path, rank: int) -> str:
    """The reason a rank gave: one line, and nothing else of ours."""
    lines = [line for line in (folder / f"stderr{rank}").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert "Traceback" not in (folder / f"stderr{rank}").read_text()
    return lines[0]


@pytest.fixture
def store():
    """Keeps the ranks' facts as torchrun does: in a process that outlives them."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    yield server
    del server


@pytest.mark.parametrize("victim, agent", [(0, True), (1, True), (0, False)], ids=WAYS)
def test_a_killed_rank_ends_the_others_at_once(data, tmp_path, store, victim, agent):
    port = store.port if agent else None
    ranks = start_ranks(2, tmp_path, work, str(tmp_path), f"{victim}:13:SIGKILL", data | {"name": tmp_path.name}, port)
    codes = [5, 5]
    codes[victim] = -signal.SIGKILL
    ended = finish(ranks, codes, tmp_path)
    assert ended - failure_times(tmp_path)[0] <= 5
    pattern = (
        rf"error: rank {victim} last seen at step 13, \d\.\d s ago \(\S+, pid {ranks[victim].pid}\): its process is"
    )
    assert re.match(pattern, said(tmp_path, 1 - victim))


def test_two_ranks_killed_are_both_named(data, tmp_path, store):
    plan = "1:13:SIGKILL,2:13:SIGKILL"
    ranks = start_ranks(3, tmp_path, work, str(tmp_path), plan, data | {"name": tmp_path.name}, store.port)
    ended = finish(ranks, [5, -signal.SIGKILL, -signal.SIGKILL], tmp_path)
    assert ended - failure_times(tmp_path)[0] <= 5
    assert re.search(r"rank 1 last seen at step 13.*; rank 2 last seen at step 13", said(tmp_path, 0))


@pytest.mark.parametrize("victim, agent", [(0, True), (1, True), (0, False)], ids=WAYS)
def test_a_stopped_rank_ends_all(data, tmp_path, store, victim, agent):
    port = store.port if agent else None
    ranks = start_ranks(2, tmp_path, work, str(tmp_path), f"{victim}:13:SIGSTOP", data | {"name": tmp_path.name}, port)
    codes = [5, 5]
    codes[victim] = -signal.SIGKILL  # its peer ends it: torchrun would wait for half a minute
    ended = finish(ranks, codes, tmp_path)
    assert TIMEOUT - 1 <= ended - failure_times(tmp_path)[0] <= TIMEOUT + 5
    pattern = rf"error: rank {victim} last seen at step 13, [2-9]\.\d s ago \(\S+, pid {ranks[victim].pid}\): "
    assert re.match(pattern, said(tmp_path, 1 - victim))


def test_a_stuck_rank_ends_all_and_says_where(data, tmp_path, store):
    ranks = start_ranks(2, tmp_path, work, str(tmp_path), "1:13:hang", data | {"name": tmp_path.name}, store.port)
    ended = finish(ranks, [5, 5], tmp_path)
    assert ended - failure_times(tmp_path)[0] <= TIMEOUT + 6
    for rank in range(2):
        assert re.search(
            r"rank 1 last seen at step 13, .*: stuck at helpers/fail_at.py:\d+ for [45] s", said(tmp_path, rank)
        )


def test_a_process_that_is_alone_and_stuck_ends_and_says_where(data, tmp_path):
    ranks = start_ranks(1, tmp_path, work, str(tmp_path), "0:13:hang", data | {"name": tmp_path.name})
    ended = finish(ranks, [5], tmp_path)
    assert TIMEOUT - 1 <= ended - failure_times(tmp_path)[0] <= TIMEOUT + 6
    pattern = (
        r"error: step 13 has lasted [3-6] s, at helpers/fail_at.py:\d+, and computes nothing: stuck; --timeout 3 allows"
    )
    assert re.match(pattern, said(tmp_path, 0))


def test_a_process_that_is_alone_and_slow_goes_on(data, tmp_path):
    """A step that computes for longer than the timeout is worth a warning, once each time that it is over."""
    ranks = start_ranks(1, tmp_path, work, str(tmp_path), "0:13:compute", data | {"name": tmp_path.name})
    finish(ranks, [0], tmp_path, within=60)
    lines = [line for line in (tmp_path / "stderr0").read_text().splitlines() if "it is computing, so the run" in line]
    assert 1 <= len(lines) <= 2 and all(
        re.search(r"step 13 has lasted \d+ s, at helpers/fail_at.py:\d+; ", x) for x in lines
    )


def test_an_error_of_one_rank_is_told_to_the_others(data, tmp_path, store):
    ranks = start_ranks(2, tmp_path, work, str(tmp_path), "1:13:error", data | {"name": tmp_path.name}, store.port)
    ended = finish(ranks, [5, 3], tmp_path)
    assert ended - failure_times(tmp_path)[0] <= 5
    assert said(tmp_path, 1) == "error: a planted error"
    assert re.search(r"rank 1 last seen at step 13, .*: DataError: a planted error$", said(tmp_path, 0))


def test_a_slow_start_and_a_long_validation_are_no_failure(data, tmp_path, store):
    settings = data | {
        "name": tmp_path.name,
        "max_steps": 3,
        "val_data": str(Path(data["train_data"]).parent / "val.jsonl"),
    }
    ranks = start_ranks(2, tmp_path, work, str(tmp_path), "", settings, store.port, True)
    finish(ranks, [0, 0], tmp_path)


def test_a_run_folder_has_one_owner(data, tmp_path, request):
    settings = data | {"name": tmp_path.name, "workers": 1}
    (first,) = start_ranks(1, tmp_path, work, str(tmp_path), "0:13:SIGSTOP", settings)
    request.addfinalizer(first.kill)  # a stopped process would be waited for without end
    until = time.monotonic() + 30
    while not failure_times(tmp_path) and time.monotonic() < until:
        time.sleep(0.02)
    began = time.monotonic()
    second = start_ranks(1, tmp_path, work, str(tmp_path), "", settings)
    assert finish(second, [76], tmp_path) - began <= 2  # a process started, no import: the lock takes < 0.1 s of it
    line = said(tmp_path, 0)
    assert f"pid {first.pid}, since" in line and "--name" in line and data["logs"] in line
    os.kill(first.pid, signal.SIGKILL)
    first.join(10)
    third = start_ranks(1, tmp_path, work, str(tmp_path), "", settings)
    finish(third, [0], tmp_path)


def test_torchrun_restarts_a_run_with_the_same_bits(data, reference, tmp_path, free_port):
    settings = data | {"name": "restarted"}
    del settings["resume"]  # the second and third start go on all the same
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "2"]
    command += ["--master_port", str(free_port), "-m", "helpers.fail_at", str(tmp_path)]
    command += ["0:13:SIGKILL,1:17:SIGKILL", "--", *to_arguments(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, step in ((0, 13), (1, 17)):
        assert f"error: rank {rank} last seen at step {step}, " in done.stderr
    assert re.findall(r"resumed at step (\d+)", done.stdout) and len(failure_times(tmp_path)) == 2
    assert last_digest(data, "restarted") == reference
