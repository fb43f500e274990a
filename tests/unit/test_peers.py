"""The watchdog: what counts as a sign of life, who may say what, who is guilty and whom it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rwkv_clip.dist import World
from rwkv_clip.training.faults import peers as peers_module
from rwkv_clip.training.faults import process, watchdog
from rwkv_clip.training.faults.peers import LEFT, TRAINING, WAITING, Peers, Sign, read_sign
from rwkv_clip.training.faults.process import Process, place_of, start_time
from rwkv_clip.training.faults.signals import Preemption
from rwkv_clip.training.faults.watchdog import PeerWatchdog, watch_peers


def test_the_thread_of_a_single_process_ends_with_the_watch():
    before = threading.active_count()
    with watch_peers(World(0, 1, torch.device("cpu")), 3.0):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# ---- what others write into the store --------------------------------------------------------------------------------

PROCESS = Process("here", 1234, "kernel", "99")
SIGN = Sign(PROCESS, 1, 7, TRAINING, "a.py:1", in_collective=False, signal=0, failed=False, cause="", error="")
FIELDS = asdict(SIGN)
BROKEN = {
    "no JSON": b"\xff\x00",
    "nothing": b"",
    "nested": b"[" * 100_000,
    "a list": b"[1, 2]",
    "an endless number": b'{"count": ' + b"9" * 10_000 + b"}",
    **{f"no {key}": {k: v for k, v in FIELDS.items() if k != key} for key in FIELDS},
    "a process without a number": FIELDS | {"process": {"host": "here", "namespace": None, "began": None}},
    "a step that is a text": FIELDS | {"step": "7"},
    "a step that is true": FIELDS | {"step": True},
    "a step that is a fraction": FIELDS | {"step": 7.5},
    "a step of infinity": FIELDS | {"step": float("inf")},
    "a step before the first": FIELDS | {"step": -1},
    "a huge step": FIELDS | {"step": 10**30},
    "a pid that is none": FIELDS | {"process": FIELDS["process"] | {"pid": -1}},
    "a place that is none": FIELDS | {"place": None},
    "a signal that ends nothing": FIELDS | {"signal": 9},
    "a cause that is a list": FIELDS | {"cause": ["x"]},
    "a cause that changes the terminal": FIELDS | {"cause": "red \x1b[31m"},
    "a host of two lines": FIELDS | {"process": FIELDS["process"] | {"host": "a\rb"}},
    "an endless place": FIELDS | {"place": "x" * 100_000},
}


def publish(store: dist.Store, rank: int, sign: Sign | dict | bytes) -> None:
    sign = asdict(sign) if isinstance(sign, Sign) else sign
    store.set(f"watchdog/{rank}", sign if isinstance(sign, bytes) else json.dumps(sign).encode())


@pytest.fixture
def quiet():
    """The watchdog of a rank of two, without its threads, and its store."""
    store = dist.HashStore()
    return PeerWatchdog(World(0, 2, torch.device("cpu"), store), 60.0, Preemption()), store


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sign_does_not_count(quiet, kind):
    dog, store = quiet
    publish(store, 1, BROKEN[kind])
    dog._exchange()
    assert 1 not in dog.peers.heard
    publish(store, 1, SIGN)
    dog._exchange()
    publish(store, 1, BROKEN[kind])
    dog._exchange()
    assert dog.peers.heard[1][0] == SIGN, "the last good one counts, and its age"


@pytest.mark.parametrize("change", [{"pid": 1}, {"host": "there"}, {"namespace": None}, {"began": "100"}], ids=str)
def test_a_rank_stays_the_same_process(quiet, change):
    """A later sign of another process does not count: neither its place nor its cause nor its signal."""
    dog, store = quiet
    publish(store, 1, SIGN)
    dog._exchange()
    other = replace(SIGN, process=replace(PROCESS, **change), count=2, cause="an invention", signal=15)
    publish(store, 1, other)
    dog._exchange()
    assert dog.peers.heard[1][0] == SIGN and not dog._preemption.signal
    dog.peers.hear([replace(SIGN, cause="an invention"), replace(SIGN, count=3)])  # nor one in this rank's name
    assert dog.peers.heard[1][0].count == 3 and not dog.peers.heard[0][0].cause


def test_own_signs_are_fit_for_a_terminal(quiet):
    """An error's text may hold anything; the others must hear of it all the same."""
    dog, store = quiet
    dog.leave(RuntimeError("red \x1b[31m\0" + "x" * 100_000))
    sign = read_sign(store.get("watchdog/0"))
    assert sign.state == LEFT and sign.error.startswith("RuntimeError: red  [31m x") and len(sign.error) == 1000


def test_a_signal_of_another_rank_is_heard(quiet):
    dog, store = quiet
    publish(store, 1, replace(SIGN, signal=int(signal.SIGHUP)))
    dog._exchange()
    assert dog._preemption.signal == signal.SIGHUP


def test_a_rank_says_for_whom_it_waits(quiet):
    dog, store = quiet
    publish(store, 1, SIGN)
    dog.follow(iter(range(99)).__next__)  # beyond its first step
    with dog.waiting(lambda: "data worker 12 (stopped)"):
        dog._exchange()
    sign = dog.peers.heard[0][0]
    assert (sign.state, sign.place) == (WAITING, "the wait for data, for data worker 12 (stopped)")
    dog._exchange()
    sign = dog.peers.heard[0][0]
    assert sign.state == TRAINING and sign.place.startswith("faults/") and not sign.in_collective


# ---- who is guilty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, expected", [("torch.distributed.nn", True), ("distributed.mine", False)])
def test_a_thread_in_a_collective_is_recognized_by_its_module(module, expected):
    """Not by a folder that happens to be called distributed."""
    stands, ends = threading.Event(), threading.Event()
    space = {"__name__": module, "stands": stands, "ends": ends}
    exec(compile("def wait():\n    stands.set()\n    ends.wait()", "/home/me/distributed/mine.py", "exec"), space)
    thread = threading.Thread(target=space["wait"])
    thread.start()
    try:
        assert stands.wait(30)
        assert place_of(thread.ident) == ("distributed/mine.py:3", expected)
    finally:
        ends.set()
        thread.join()


WAITS = replace(SIGN, place="torch/distributed/c10d.py:1", in_collective=True)
COMPUTES = replace(SIGN, place="distributed/mine.py:3")


@pytest.mark.parametrize(
    ("signs", "guilty"),
    [
        ([WAITS, COMPUTES, WAITS], {1}),
        ([COMPUTES, COMPUTES, WAITS], {0, 1}),
        ([WAITS, WAITS, WAITS], {0, 1, 2}),
        ([WAITS, COMPUTES, replace(WAITS, step=6)], {2}),
        ([WAITS, replace(COMPUTES, state="saving"), WAITS], set()),
    ],
)
def test_who_is_guilty_where_all_stand_still(signs, guilty):
    """The ranks with the fewest steps, and among these the ones that are not waiting for others."""
    peers = Peers(0, 3.0, 0.1)
    assert not peers.find_lost(7, TRAINING, hurry=False)  # notes the step
    peers.forgive(-5)
    peers.hear([None])  # the store answers
    peers.heard = {rank: (sign, time.monotonic()) for rank, sign in enumerate(signs)}
    lost = peers.find_lost(7, TRAINING, hurry=False)
    assert set(lost) == guilty and all(why.startswith("stuck at ") for why in lost.values())


# ---- who is killed ---------------------------------------------------------------------------------------------------


def sleep(**environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, **environment})


RUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture
def ending(quiet, monkeypatch):
    """A watchdog that would end this process, and the errors by which it does so."""
    ended = []
    monkeypatch.setattr(watchdog, "end_process", ended.append)
    return quiet[0], ended


@pytest.mark.parametrize(
    ("theirs", "killed"),
    [({}, True), ({"RANK": "3"}, False), ({"MASTER_PORT": "1"}, False), ({"WORLD_SIZE": "4"}, False), (None, False)],
    ids=str,
)
def test_only_a_rank_of_this_run_is_killed(ending, monkeypatch, theirs, killed):
    """Whoever writes the first sign of rank 1 may name any process; only that of rank 1 is ended. torchrun's ranks have
    their place in their environment."""
    launch_of, own = process._launch_of, RUN | {"RANK": "0"}
    monkeypatch.setattr(process, "_launch_of", lambda pid: own if pid == os.getpid() else launch_of(pid))
    child = sleep(**({} if theirs is None else RUN | theirs))
    try:
        while "-c" not in Path(f"/proc/{child.pid}/cmdline").read_text():  # until then it is a copy of this one
            time.sleep(0.01)
        dog, ended = ending
        rank = replace(Process.own(), pid=child.pid, began=start_time(child.pid))
        dog.peers.heard = {1: (replace(SIGN, process=rank), time.monotonic() - 100)}
        dog._stop([1])
        assert len(ended) == 1
        if killed:
            assert child.wait(10) == -signal.SIGKILL
        else:
            time.sleep(0.2)
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("changes", "silence", "killed"),
    [
        ({}, 100, True),
        ({}, 50, False),
        ({"began": "1"}, 100, False),
        ({"namespace": "elsewhere"}, 100, False),
        ({"namespace": None}, 100, False),
    ],
    ids=str,
)
def test_a_namesake_is_not_killed(ending, monkeypatch, changes, silence, killed):
    """A process number that another process has got since is not ours; and nobody is killed before the timeout."""
    dog, ended = ending
    signals = []
    monkeypatch.setattr(watchdog.os, "kill", lambda *arguments: signals.append(arguments))
    monkeypatch.setattr(peers_module, "is_rank", lambda pid, rank: True)
    monkeypatch.setattr(watchdog, "GRACE", 0.2)
    rank = replace(Process.own(), **changes)
    dog.peers.heard = {1: (replace(SIGN, process=rank), time.monotonic() - silence)}
    dog._stop([1])
    assert signals == [(os.getpid(), signal.SIGKILL)] * killed and len(ended) == 1
