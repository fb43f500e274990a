"""Builds as processes: one writer per prefix, workers that end with their parent, signals, and a worker that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.pictures import picture
from helpers.sources import contents, save_jsonl
from rwkv_clip.data.build import build_records
from rwkv_clip.errors import explain
from rwkv_clip.files import InUse, hold
from rwkv_clip.processes import WorkerDied, map_ordered

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 10  # seconds that a process may outlive its command


# ---- one writer ------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from pathlib import Path
from rwkv_clip.data import build
with build._own(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owned(tmp_path):
    """A function that lets another process build under a prefix, until the test ends."""
    processes = []

    def own(prefix: Path) -> int:
        processes.append(
            subprocess.Popen([sys.executable, "-c", OWNER, str(prefix)], stdout=subprocess.PIPE, text=True)
        )
        assert processes[-1].stdout.readline() == "owned\n"
        return processes[-1].pid

    yield own
    for process in processes:
        process.kill()
        process.communicate()


def test_the_second_build_of_a_prefix_is_refused(tmp_path, owned, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    source = save_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg", "raw": "a"}] * 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "out" / "t.rec.tmp").touch()  # what the first one is writing
    pid = owned(tmp_path / "out" / "t")
    monkeypatch.chdir(tmp_path)
    for prefix in (tmp_path / "out/t", "out/t", "./out/../out/t.rec", "link/t", "out/t-00000", "link/t-00017.rec"):
        with pytest.raises(InUse) as error:
            build_records(source, str(prefix), overwrite=True)
        code, words = explain(error.value)
        assert code == 76 and f"pid {pid}" in words and "another prefix" in words
    assert (tmp_path / "out" / "t.rec.tmp").exists() and not list(tmp_path.glob("out/*.idx"))
    for prefix in ("out/t2", "out/t-0", "out/t-000000", "t"):
        assert build_records(source, prefix).count == 4


def test_what_may_be_a_shard_keeps_the_whole_away_but_not_its_neighbour(tmp_path, owned, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    source = save_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg", "raw": "a"}] * 4)
    owned(tmp_path / "t-00003")
    for size in (0, 2):
        with pytest.raises(InUse):
            build_records(source, str(tmp_path / "t"), shard_size=size)
    assert build_records(source, str(tmp_path / "t-00004")).count == 4
    with pytest.raises(InUse):  # the neighbour has ended, the first one has not
        build_records(source, str(tmp_path / "t"))


def test_a_shared_lock_is_removed_by_the_last_owner(tmp_path):
    lock = tmp_path / "a.lock"
    with hold(lock, "a", "wait", shared=True):
        assert lock.exists()
    assert not lock.exists()


def test_the_lock_of_a_killed_build_is_free(tmp_path, owned):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    source = save_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg", "raw": "a"}])
    pid = owned(tmp_path / "t")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "t.lock").exists() and build_records(source, str(tmp_path / "t")).count == 1
    assert not (tmp_path / "t.lock").exists()


# ---- workers ---------------------------------------------------------------------------------------------------------

# Workers sleep within an item, or have nothing to do while the parent waits for more items. Both are at work before
# anything happens: on a loaded machine a process may take longer to start than it may live on.
PARENT = """
import sys, time
from pathlib import Path
from rwkv_clip.processes import map_ordered

def items(folder, idle):
    while len(list(Path(folder).iterdir())) < 2:  # one worker may start long after the other
        yield f"import os, time; open({folder!r} + '/' + str(os.getpid()), 'w'); time.sleep(0.1)"
    print("running", flush=True)
    if idle:
        time.sleep(600)
    yield from ["import time; time.sleep(600)"] * 999

for _ in map_ordered(exec, items(sys.argv[2], sys.argv[1] == "idle"), 2):
    pass
"""


def children(pid: int) -> set[int]:
    """Process ids of all descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def wait_until_gone(processes: set[int]) -> set[int]:
    """Those that live on after LONGEST seconds; a zombie is none."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + LONGEST
    while (left := set(filter(alive, processes))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("state", ["busy", "idle"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_no_worker_outlives_its_parent(tmp_path, number, state):
    command = [sys.executable, "-c", PARENT, state, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "running\n"
    workers = children(parent.pid)
    assert len(workers) >= 2, "two workers, and the tracker of multiprocessing"
    parent.send_signal(number)
    assert parent.wait(60) == -number
    assert not wait_until_gone(workers)


def ignores_hangup(pid: int) -> bool:
    """As a worker does once it has begun; multiprocessing's tracker does not."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigIgn:")[2].split()[0], 16) >> (signal.SIGHUP - 1) & 1 == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reaches a stopped process")
def test_no_stopped_worker_outlives_its_parent(tmp_path):
    command = [sys.executable, "-c", PARENT, "busy", str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "running\n"
    deadline = time.monotonic() + 60
    while len(workers := set(filter(ignores_hangup, children(parent.pid)))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    everybody = children(parent.pid)
    parent.kill()
    assert parent.wait(60) == -signal.SIGKILL
    assert len(workers) == 2 and not wait_until_gone(everybody)


@pytest.mark.parametrize("function, argument", [(os._exit, 9), (signal.raise_signal, signal.SIGKILL)])
def test_a_worker_that_dies_is_an_error_in_words(function, argument):
    with pytest.raises(WorkerDied) as error:
        list(map_ordered(function, [argument] * 40, 2))
    assert explain(error.value)[0] == 2 and "use fewer --workers" in explain(error.value)[1]


def run_out_of_memory(_) -> None:
    raise MemoryError


def test_memory_that_runs_out_in_a_worker_is_an_error_in_words():
    with pytest.raises(MemoryError) as error:
        list(map_ordered(run_out_of_memory, [1], 2))
    assert explain(error.value, "use fewer --workers") == (2, "out of memory (MemoryError); use fewer --workers")


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, group, workers, code",
    [
        (signal.SIGTERM, False, 2, 75),
        (signal.SIGTERM, True, 2, 75),  # as a scheduler sends it
        (signal.SIGHUP, True, 2, 75),  # as a terminal does that is closed
        (signal.SIGINT, True, 1, 130),
    ],
)
def test_a_signal_stops_a_build_in_good_order(tmp_path, number, group, workers, code):
    """Complete shards are kept, temporary files go, no process is left, and the same command goes on."""
    (tmp_path / "a.jpg").write_bytes(picture(0, size=(1200, 900)))
    source = save_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg", "raw": f"text {i}"} for i in range(600)])
    prefix = tmp_path / "out" / "t"
    command = [sys.executable, str(ROOT / "data2rec.py"), source, str(prefix), "--shard-size", "5"]
    command += ["--workers", str(workers)]
    build = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/*.idx")) and time.monotonic() < deadline and build.poll() is None:
        time.sleep(0.02)
    others = children(build.pid)
    (os.killpg if group else os.kill)(build.pid, number)
    _, said = build.communicate(timeout=60)
    assert build.returncode == code, said
    assert "run the same command again to go on (complete shards are kept)" in said and "Traceback" not in said
    assert len(others) >= workers - (workers == 1) and not wait_until_gone(others)
    names = contents(prefix)
    assert not [name for name in names if not name.endswith((".rec", ".idx", ".json"))]
    done = sum(name.endswith(".idx") for name in names)
    assert 0 < done < 120 and len(names) == 3 * done
    assert json.loads(names["t-00000.json"])["count"] == 5
    if workers == 1:
        report = build_records(source, str(prefix), shard_size=5)
        assert report.kept == done and report.count == 600
