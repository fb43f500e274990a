import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rwkv_clip.dist import World, _agree_on_name, gather, join_world, mean_over_ranks
from rwkv_clip.files import hold
from rwkv_clip.training.faults import watchdog
from rwkv_clip.training.faults.signals import Preemption
from rwkv_clip.training.faults.watchdog import Heartbeat, start_time, watch_peers


def test_one_process_is_a_world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    x = torch.ones(3, requires_grad=True)
    assert gather(x) is x
    assert mean_over_ranks({"a": torch.tensor(2.0), "b": 1e-3}, world.device) == {"a": 2.0, "b": 1e-3}


def test_absent_device_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
            join_world("cuda")


def test_each_start_on_a_store_has_a_name_of_its_own():
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        starts = [list(pool.map(lambda rank: _agree_on_name(store, rank, 3), range(3))) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in starts) and len({names[0] for names in starts}) == 3


def test_the_thread_of_a_process_that_is_alone_ends_with_the_watch():
    before = threading.active_count()
    with watch_peers(World(0, 1, torch.device("cpu")), 3.0):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# ---- what others write into the store --------------------------------------------------------------------------------

SIGN = {"count": 1, "step": 7, "state": watchdog.TRAINING, "place": "a.py:1", "signal": 0}
SIGN |= {"host": "here", "pid": 1234, "where": "kernel", "began": "99", "failed": False, "cause": "", "error": ""}
BROKEN = {
    "no JSON": b"\xff\x00",
    "nothing": b"",
    "nested": b"[" * 100_000,
    "a list": b"[1, 2]",
    "an endless number": b'{"count": ' + b"9" * 10_000 + b"}",
    **{f"no {key}": {k: v for k, v in SIGN.items() if k != key} for key in SIGN},
    "a step that is a text": SIGN | {"step": "7"},
    "a step that is true": SIGN | {"step": True},
    "a step that is a fraction": SIGN | {"step": 7.5},
    "a step of infinity": SIGN | {"step": float("inf")},
    "a step before the first": SIGN | {"step": -1},
    "a huge step": SIGN | {"step": 10**30},
    "a pid that is none": SIGN | {"pid": -1},
    "a place that is none": SIGN | {"place": None},
    "a signal that ends nothing": SIGN | {"signal": 9},
    "a cause that is a list": SIGN | {"cause": ["x"]},
}


def publish(store: dist.Store, rank: int, sign: dict | bytes) -> None:
    store.set(f"beat/{rank}", sign if isinstance(sign, bytes) else json.dumps(sign).encode())


@pytest.fixture
def quiet(monkeypatch):
    """A rank of two that exchanges signs when a test says so, and its store."""
    monkeypatch.setattr(Heartbeat, "_talk", lambda self: None)
    monkeypatch.setattr(Heartbeat, "_judge", lambda self: None)
    store = dist.HashStore()
    return Heartbeat(World(0, 2, torch.device("cpu"), store), 60.0), store


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sign_is_none(quiet, kind):
    heart, store = quiet
    publish(store, 1, BROKEN[kind])
    heart._exchange()
    assert 1 not in heart._seen
    publish(store, 1, SIGN)
    heart._exchange()
    publish(store, 1, BROKEN[kind])
    heart._exchange()
    assert heart._seen[1][0] == SIGN, "the last good one counts, and its age"


@pytest.mark.parametrize("change", [{"pid": 1}, {"host": "there"}, {"where": None}, {"began": "100"}], ids=str)
def test_who_a_rank_is_stays(quiet, change):
    """A later sign of somebody else is none: neither its process nor its cause nor its signal counts."""
    heart, store = quiet
    publish(store, 1, SIGN)
    heart._exchange()
    publish(store, 1, SIGN | change | {"count": 2, "cause": "an invention", "signal": 15})
    heart._exchange()
    assert heart._seen[1][0] == SIGN and not heart._preemption.signal
    publish(store, 0, SIGN | {"cause": "an invention"})  # nor somebody who says he is we
    publish(store, 1, SIGN | {"count": 3})
    heart._exchange()
    assert heart._seen[1][0]["count"] == 3 and not heart._seen.get(0, ({"cause": ""},))[0]["cause"]


def test_what_others_say_is_fit_for_a_terminal(quiet):
    heart, store = quiet
    publish(store, 1, SIGN | {"cause": "red \x1b[31m\n" + "x" * 100_000, "host": "a\rb"})
    heart._exchange()
    sign = heart._seen[1][0]
    assert sign["cause"].isprintable() and len(sign["cause"]) <= 1000 and sign["host"] == "a b"


def test_a_signal_of_another_rank_is_heard(quiet):
    heart, store = quiet
    publish(store, 1, SIGN | {"signal": int(signal.SIGHUP)})
    heart._exchange()
    assert heart._preemption.signal == signal.SIGHUP


def test_a_rank_says_for_whom_it_waits(quiet):
    heart, store = quiet
    publish(store, 1, SIGN)
    heart.follow(iter(range(99)).__next__)  # beyond its first step
    with heart.waiting(lambda: "data worker 12 (stopped)"):
        heart._exchange()
    sign = heart._seen[0][0]
    assert (sign["state"], sign["place"]) == (watchdog.WAITING, "the wait for data, for data worker 12 (stopped)")
    heart._exchange()
    assert heart._seen[0][0]["state"] == watchdog.TRAINING and heart._seen[0][0]["place"].startswith("faults/")


def sleep(**environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, **environment})


RUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("theirs", "killed"),
    [({}, True), ({"RANK": "3"}, False), ({"MASTER_PORT": "1"}, False), ({"WORLD_SIZE": "4"}, False), (None, False)],
    ids=str,
)
def test_only_a_rank_of_this_run_is_killed(monkeypatch, theirs, killed):
    """Whoever writes the first sign of rank 1 may name any process; only that of rank 1 is ended. torchrun's ranks have
    their place in their environment."""
    launch_of = watchdog._launch_of
    own = RUN | {"RANK": "0"}
    monkeypatch.setattr(watchdog, "_launch_of", lambda pid: own if pid == os.getpid() else launch_of(pid))
    monkeypatch.setattr(watchdog, "end_process", lambda error: None)
    environment = {} if theirs is None else RUN | theirs
    process = sleep(**environment)
    try:
        while "-c" not in Path(f"/proc/{process.pid}/cmdline").read_text():  # until then it is a copy of this one
            time.sleep(0.01)
        heart = Heartbeat(World(0, 1, torch.device("cpu")), 3.0)
        sign = {"where": heart._self["where"], "pid": process.pid, "began": start_time(process.pid)}
        heart._seen = {1: (sign, time.monotonic() - 100)}
        heart._stop({1: watchdog.SILENT})
        heart.leave(None)
        if killed:
            assert process.wait(10) == -signal.SIGKILL
        else:
            time.sleep(0.2)
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_namesake_is_not_killed(monkeypatch):
    """A process number that another process has got since is nobody's of ours."""
    heart = Heartbeat(World(0, 1, torch.device("cpu")), 3.0)
    heart.leave(None)
    heart._end.clear()
    heart._self = {"where": "here"}
    sign = {"where": "here", "pid": os.getpid(), "began": start_time(os.getpid())}
    killed, ended = [], []
    monkeypatch.setattr(watchdog.os, "kill", lambda *arguments: killed.append(arguments))
    monkeypatch.setattr(watchdog, "is_rank", lambda pid, rank: True)
    monkeypatch.setattr(watchdog, "end_process", ended.append)
    for changes in ({}, {"began": "1"}, {"where": "elsewhere"}, {"where": None}):
        heart._seen = {1: (sign | changes, -100.0)}
        heart._stop({1: watchdog.SILENT})
    assert len(killed) == 1 and killed[0][0] == os.getpid() and len(ended) == 4


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_signal_unless_it_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert preemption.signal == (0 if ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_hears_a_signal_before_its_handler_runs():
    """The main thread may be in a collective, where no handler runs."""
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        until = time.monotonic() + 10
        while not preemption._told and time.monotonic() < until:
            preemption.listen()
        assert preemption._told == signal.SIGUSR1 == preemption.signal


def test_a_file_system_without_locks_is_a_warning(monkeypatch, tmp_path, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with hold(tmp_path / "run.lock", "run", "wait"):
        pass
    assert "cannot be locked" in caplog.text
