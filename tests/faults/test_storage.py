"""Storage that is full, slow, broken or lying: what exists stays, training goes on, three failures in a row end it."""

import contextlib
import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers.crashes import intact, leftovers
from helpers.smallrun import SmallRun, digest_folder
from helpers.syscalls import NAMES, watch_calls
from helpers.tiny import make_tiny, to_arguments
from rwkv_clip import serialization
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint, list_checkpoints, save_checkpoint, verify_checkpoint
from rwkv_clip.training import saver as saver_module
from rwkv_clip.training.saver import StorageError


@pytest.fixture
def run(tmp_path) -> SmallRun:
    """Two checkpoints, and a step that is to be saved."""
    return SmallRun(tmp_path / "checkpoints").run(2)


def step_and_save(run: SmallRun) -> None:
    """An interval's save, to its end."""
    run.step()
    run.save()
    run.saver._join(60)


def errors(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def fail_at(numbers: set[int], code: int):
    def hook(number, name, arguments, when):
        if when == "before" and number in numbers:
            raise OSError(code, os.strerror(code), str(arguments[0]))

    return hook


# ---- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int):
    """Quota: no file can grow beyond this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_three_failures(run: SmallRun, caplog) -> None:
    """Exactly three attempts, a line for each; what exists is as it was; the run is ended at the third."""
    before = digest_folder(run.saver.folder)
    for attempt in range(3):
        run.saver.check()
        step_and_save(run)
        assert len(errors(caplog)) == attempt + 1 and digest_folder(run.saver.folder) == before
    with pytest.raises(StorageError, match=r"3 saves in a row failed, the last one of step 5 \("):
        run.saver.check()
    with pytest.raises(StorageError):
        run.save()
    assert len(errors(caplog)) == 3, "no fourth attempt"


@pytest.mark.parametrize("share", [0.10, 0.50, 0.99])
def test_enospc_by_quota(run, caplog, share):
    size = (run.saver.folder / "step-00000002" / "optim.safetensors").stat().st_size
    with largest_file(int(share * size)):
        check_three_failures(run, caplog)
    assert "step 3 failed ([Errno 27]" in errors(caplog)[0]


def test_enospc(run, tmp_path, caplog, monkeypatch):
    """No space at each write in turn: the save fails whole, the next one succeeds; at every write: the run ends."""
    monkeypatch.setattr(serialization, "CHUNK", 1024)
    failed = number = 0
    while failed == number:
        number += 1
        fresh = SmallRun(shutil.copytree(run.saver.folder, tmp_path / f"write {number}"))
        before = digest_folder(fresh.saver.folder)
        with watch_calls(fail_at({number}, errno.ENOSPC), names=("write",)):
            step_and_save(fresh)
        if len(errors(caplog)) > failed:
            failed += 1
            assert digest_folder(fresh.saver.folder) == before and "No space left" in errors(caplog)[-1]
            with pytest.raises(StorageError, match="saving failed at step 3"):
                fresh.saver.wait()
        step_and_save(fresh)
        fresh.saver.wait()
        assert intact(fresh.saver.folder)[-1] == "step-00000004"
    assert failed >= 8, "writes were seen"
    caplog.clear()
    with watch_calls(fail_at(set(range(1000)), errno.ENOSPC), names=("write",)):
        check_three_failures(run, caplog)


def test_an_error_at_any_call_leaves_two_good_checkpoints_and_no_rests(run, tmp_path, caplog):
    number = 0
    while True:
        number += 1
        fresh = SmallRun(shutil.copytree(run.saver.folder, tmp_path / f"call {number}"))
        seen = []

        def hook(at, name, arguments, when, number=number, seen=seen):
            seen.append(at)
            fail_at({number}, errno.EIO)(at, name, arguments, when)

        with watch_calls(hook, names=NAMES):
            step_and_save(fresh)
        assert len(intact(fresh.saver.folder)) >= 2, number
        step_and_save(fresh)
        fresh.saver.wait()
        assert intact(fresh.saver.folder)[-1] == "step-00000004" and not leftovers(fresh.saver.folder), number
        if max(seen) < number:
            break
    assert number > 30


def test_the_last_save_and_the_end_raise_at_the_first_failure(run, caplog):
    run.step()
    with watch_calls(fail_at({3}, errno.EDQUOT), names=("write",)):
        with pytest.raises(StorageError, match=r"saving failed at step 3 \(.*Disk quota exceeded"):
            run.save(last=True)
        run.save(last=True)
    assert run.saver._failures == 0, "in a row"
    run.step()
    failing = watch_calls(fail_at({1}, errno.EIO), names=("fsync",))
    with pytest.raises(StorageError, match="saving failed at step 4"), failing, run.saver:
        run.save()
    with pytest.raises(ZeroDivisionError), run.saver:  # an error on its way is not hidden by one of the storage
        1 / 0  # noqa: B018


def test_other_errors_of_the_thread_do_not_vanish(run):
    run.saver.save(3, {"a": torch.zeros(2, dtype=torch.complex64)}, {}, {})  # a type that no file of ours has
    run.saver._join(60)
    with pytest.raises(KeyError, match="complex64"):
        run.step() or run.save()
    run.save(last=True)
    assert intact(run.saver.folder)[-1] == "step-00000003"


def test_a_write_that_does_not_read_back_is_a_failure(run, monkeypatch, caplog):
    """A disk that acknowledges what it does not store: seen before an older checkpoint goes."""
    before, fsync = digest_folder(run.saver.folder), os.fsync

    def lie(handle):
        fsync(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith("model.safetensors"):
            Path(name).write_bytes(bytes(os.path.getsize(name)))

    monkeypatch.setattr(os, "fsync", lie)
    step_and_save(run)
    assert "model.safetensors: damaged" in errors(caplog)[0] and digest_folder(run.saver.folder) == before


def test_everything_is_flushed_before_it_is_relied_on(run):
    """What a power cut could take: files before their folder, both before the name, the name before an older one."""
    seen, folder = [], run.saver.folder

    def note(number, name, arguments, when):
        if name == "fsync" and when == "after":
            seen.append(os.path.relpath(os.readlink(f"/proc/self/fd/{arguments[0]}"), folder))
        elif name == "rename" and when == "before":
            seen.append(f"rename {os.path.basename(arguments[0])}")

    run.step()
    with watch_calls(note, names=("fsync", "rename")):
        run.save(last=True)
    files = ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"]
    new = "step-00000003.tmp"
    assert seen == [*(f"{new}/{file}" for file in files), new, f"rename {new}", ".", "rename step-00000001"]


# ---- slow storage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stalled(monkeypatch):
    """Storage that does nothing until the event is set."""
    event, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: event.wait(60) and fsync(handle))
    monkeypatch.setattr(saver_module, "LONGEST_WAIT", 0.02)
    yield event
    event.set()


def test_slow_storage_costs_a_checkpoint_and_no_time(run, stalled, caplog):
    """The storage stalls; 50 steps and 5 saves go by; when it works again, so does saving."""
    began = time.monotonic()
    for _interval in range(5):
        for _ in range(10):
            run.step()
            run.saver.check()
        run.save()
    assert time.monotonic() - began < 5 and run.progress == 52
    left_out = [record.getMessage() for record in caplog.records]
    assert left_out == [f"saving step {step} is skipped: step 12 is still being written" for step in (22, 32, 42, 52)]
    assert intact(run.saver.folder) == ["step-00000001", "step-00000002"]
    stalled.set()
    run.step()
    run.save(last=True)
    assert intact(run.saver.folder) == ["step-00000012", "step-00000053"]


def test_storage_that_never_answers_ends_the_run(run, stalled, monkeypatch):
    run.step()
    run.save()
    monkeypatch.setattr(saver_module, "DEADLINE", 0.05)
    with pytest.raises(StorageError, match="step 3 is still being written after"):
        run.saver.wait()
    with pytest.raises(StorageError, match="step 3 is still being written after"):
        run.save()
    with pytest.raises(StorageError, match="step 3 is still being written after"):
        run.save(last=True)
    with pytest.raises(ZeroDivisionError), run.saver:  # leaves within LONGEST_WAIT
        1 / 0  # noqa: B018


def test_what_is_written_is_the_moment_of_the_save(run, stalled):
    """Training goes on while the writer waits; it has a copy, and the copy did not change training."""
    run.step()
    optim = {key: value.clone() for key, value in run.optim_tensors().items()}  # written last
    expected = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.save()
    for _ in range(5):
        run.step()
    stalled.set()
    run.saver.wait()
    path = find_checkpoint(run.saver.folder)
    written = serialization.read_tensors(path / "model.safetensors")
    assert path.name == "step-00000003" and all(torch.equal(written[key], expected[key]) for key in expected)
    written = serialization.read_tensors(path / "optim.safetensors")
    assert all(torch.equal(written[key], optim[key]) for key in optim)
    unsaved = SmallRun(run.saver.folder.parent / "none")
    for _ in range(8):
        unsaved.step()
    assert unsaved.digest() == run.digest()
    buffers = {key: value.data_ptr() for key, value in run.saver._weights.items()}
    run.save(last=True)
    assert {key: value.data_ptr() for key, value in run.saver._weights.items()} == buffers, "copies are used again"


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_bitflip(run):
    """256 bits, evenly among the four files, and 32 lengths: each is seen, and the checkpoint before is used."""
    path, rng = run.saver.folder / "step-00000002", random.Random(3)
    seen = 0
    files = sorted(path.iterdir())
    assert len(files) == 4
    for file in files:
        good = file.read_bytes()
        for _ in range(64):
            bad = bytearray(good)
            bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            seen += find_checkpoint(run.saver.folder).name == "step-00000001"
        for length in [0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(6))]:
            file.write_bytes(good[:length])
            seen += find_checkpoint(run.saver.folder).name == "step-00000001"
        file.write_bytes(good)
    assert seen == 256 + 32
    assert find_checkpoint(run.saver.folder).name == "step-00000002"


# ---- at every instant ------------------------------------------------------------------------------------------------


class Died(BaseException):
    pass


class Instants:
    """Counts the good checkpoints whenever a name changes; may let the process die at a call: it does nothing more."""

    def __init__(self, folder: Path, need: int, die_at: int | None):
        self.folder, self.need, self.die_at, self.fewest, self.dead = folder, need, die_at, 99, False

    def __call__(self, number: int, name: str, arguments: tuple, when: str) -> None:
        if self.dead or number == self.die_at:
            self.dead = True
            raise Died
        if name in ("rename", "rmdir") or (name == "unlink" and not str(arguments[0]).isidentifier()):
            self.fewest = min(self.fewest, len(intact(self.folder)))


def save_small(folder: Path, step: int, content: int, keep: int) -> None:
    tensors = {"a": torch.full((3,), float(content))}
    save_checkpoint(folder, step, tensors, tensors, {"samples_seen": step}, keep)


def play(folder: Path, rng: random.Random) -> tuple[int, int]:
    """A random life of a run folder: saves, deaths, steps back, bit rot in what is not needed. (saves, deaths)"""
    saves = deaths = step = 0
    keep = rng.choice([2, 2, 3])
    for _ in range(rng.randint(2, 6)):
        good = intact(folder)
        if len(good) > 2 and rng.random() < 0.3:  # rot: one may be lost, two good ones stay
            victim = folder / rng.choice(good) / "model.safetensors"
            victim.write_bytes(victim.read_bytes()[:-1])
            good = intact(folder)
        # A resumed run goes on from a good one, most often the newest, and saves the steps behind it (again).
        step = int(rng.choice(good[-2:])[5:13]) + rng.randint(1, 2) if good else 1
        die_at = rng.randint(1, 60) if rng.random() < 0.5 else None
        instants = Instants(folder, len(good), die_at)
        with watch_calls(instants, names=NAMES), contextlib.suppress(Died):
            save_small(folder, step, rng.randint(0, 1), keep)
        saves, deaths = saves + 1, deaths + instants.dead
        assert min(instants.fewest, len(intact(folder))) >= min(len(good), 2), (step, die_at)
        if not instants.dead:
            names = intact(folder)
            assert names[-1] == f"step-{step:08d}" and len(names) >= min(len(good) + 1, 2)
            assert not [name for name in leftovers(folder) if not name.endswith((".aside", ".old"))]
    return saves, deaths


def test_two_good_checkpoints_at_every_instant(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power cut here
    rng, saves, deaths = random.Random(11), 0, 0
    for game in range(500):
        folder = tmp_path / str(game)
        folder.mkdir()
        played = play(folder, rng)
        saves, deaths = saves + played[0], deaths + played[1]
        shutil.rmtree(folder)
    assert saves > 1500 and deaths > 400


def test_rests_of_a_dead_process_go_at_the_start(run):
    folder = run.saver.folder
    for name in ("step-00000003.tmp", "step-00000001.gone.tmp"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / "step-00000004.tmp").symlink_to(folder / "step-00000001")
    again = SmallRun(folder)
    assert again.progress == 2 and sorted(path.name for path in folder.iterdir()) == intact(folder)
    assert intact(folder) == ["step-00000001", "step-00000002"]


def test_a_later_checkpoint_makes_way_without_a_loss(run, caplog):
    """The user went back to step 1: what the run leaves behind is not the newest any more, but is not lost."""
    folder = run.run(4).saver.folder
    back = SmallRun(folder, start=folder / "step-00000003")
    shutil.copytree(folder / "step-00000004", folder / "step-00000009")
    back.run(4)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    verify_checkpoint(folder / "step-00000009.aside")
    assert "step-00000009: is later than the step saved now" in caplog.text
    with pytest.raises(CheckpointError):
        find_checkpoint(folder / "step-00000009")


def test_a_run_without_room_for_its_checkpoints_ends_with_76(tmp_path):
    """The whole way, as a user sees it: three saves in a row fail, one line says so, nothing is left behind."""
    settings = make_tiny(tmp_path) | {"name": "full", "val_data": None, "save_every_n_steps": 1}
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from rwkv_clip.training.main import main; main()"
    )
    command = [sys.executable, "-c", limited, *to_arguments(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 76, done.stderr
    assert done.stderr.count("saving step") == 3 and "3 saves in a row failed" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "logs/full/checkpoints").iterdir())
