"""The torch loader: what is in a batch depends on seed and position only; bad records are replaced, counted,
named."""

import errno
import gc
import io
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.loading import make
from helpers.pictures import encode, photo, tokens_of, write_records
from rwkv_clip.data.records import RecordSet
from rwkv_clip.training.data import batch as data_batch
from rwkv_clip.training.data import samples, torch_loader
from rwkv_clip.training.data.augment import crop_windows, draw_flips
from rwkv_clip.training.data.order import Order
from rwkv_clip.training.data.samples import DataError, SampleReader
from rwkv_clip.training.data.workers import WorkerLost, Workers
from rwkv_clip.training.faults.process import start_time
from rwkv_clip.training.settings import DataSettings

COUNT = 50
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # of scripts that import what tests import


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [encode(photo(i, 60 + i, 110 - i), quality=90) for i in range(COUNT)]


@pytest.fixture(scope="module")
def records(images, new_folder) -> RecordSet:
    return write_records(new_folder("records") / "train", images)


def load(records, **settings) -> list:
    return list(make(records, **settings))


def join(batches, field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


def assert_same(left, right) -> None:
    for field in ("image", "text", "ids", "epochs"):
        assert torch.equal(join(left, field), join(right, field)), field


def test_batches_hold_the_order_and_its_texts(records):
    batches = load(records, steps=9)  # 108 samples: two epochs end inside a batch
    assert [batch.position for batch in batches] == list(range(0, 108, 12))
    ids, text = join(batches, "ids"), join(batches, "text")
    assert ids.tolist() == Order(COUNT, 3).at(np.arange(108)).tolist()
    assert join(batches, "epochs").tolist() == (np.arange(108) // COUNT).tolist()
    for epoch in (0, 1):
        assert sorted(ids[epoch * COUNT : (epoch + 1) * COUNT].tolist()) == list(range(COUNT))
    assert text.shape == (108, 3, 77) and text.dtype == torch.int64
    assert torch.equal(text[:, :, 5], ids[:, None] + torch.tensor([0, 1000, 2000]))
    image = join(batches, "image")
    assert image.dtype == torch.uint8 and image.shape == (108, 3, 32, 32) and image.is_contiguous()


def test_pixels_are_the_documented_crop(records, images):
    batch = load(records, global_batch=COUNT, steps=1, image_size=(40, 48))[0]
    ids, epochs = batch.ids.numpy(), batch.epochs.numpy()
    windows = crop_windows(60 + ids, 110 - ids, 3, epochs, ids)
    for row, (x, y, width, height) in enumerate(windows.tolist()):
        picture = Image.open(io.BytesIO(images[ids[row]]))
        cut = picture.crop((x, y, x + width, y + height))  # pixels outside of the crop have no influence
        expected = cut.resize((48, 40), Image.Resampling.BILINEAR)
        expected = np.asarray(expected).transpose(2, 0, 1)
        if draw_flips(3, epochs, ids)[row]:
            expected = expected[..., ::-1]
        assert np.abs(batch.image[row].numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_matter(records, workers):
    assert_same(load(records, global_batch=70, steps=3), load(records, global_batch=70, steps=3, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_world_does_not_matter(records, workers):
    whole = load(records)
    ranks = [load(records, rank=rank, world=2, workers=workers) for rank in (0, 1)]
    both = [batch for pair in zip(*ranks) for batch in pair]
    assert all(len(batch.ids) == 6 for batch in both)
    assert [batch.position for batch in ranks[1]] == [batch.position for batch in whole]
    assert_same(whole, both)


def test_resume_anywhere(records):
    whole = load(records, steps=9)
    for start in (12, 48, 96):
        assert_same(whole[start // 12 :], load(records, start=start, steps=9 - start // 12))
    assert join(load(records, start=7, steps=2), "ids").tolist() == join(whole, "ids")[7:31].tolist()


def test_another_global_batch_sees_the_same_samples(records):
    assert_same(load(records, global_batch=12, steps=6), load(records, global_batch=36, steps=2))


def test_seed_and_epoch_change_the_augmentation(records):
    first, other = load(records, steps=1)[0], load(records, steps=1, seed=4)[0]
    assert first.ids.tolist() != other.ids.tolist()
    batches = load(records, global_batch=COUNT, steps=2)
    order = [batch.ids.argsort() for batch in batches]
    same = [torch.equal(a, b) for a, b in zip(batches[0].image[order[0]], batches[1].image[order[1]], strict=True)]
    assert sum(same) < 5


def damage(images: list[bytes]) -> tuple[list[bytes], dict[int, str]]:
    """Five bad pictures, each bad in its own way -> all pictures, {id: reason}."""
    images = list(images)
    images[4] = images[4][: len(images[4]) // 2]  # cut
    images[11] = b"this is not a picture"
    images[12] = images[12][:-300] + bytes(300)  # end overwritten with zeros
    at = images[30].index(b"\xff\xc4") + 5  # Huffman table: plain by its headers, fails in the decoder
    images[30] = images[30][:at] + b"\xff" * 4 + images[30][at + 4 :]
    images[41] = encode(Image.new("1", (8000, 7000)), "PNG")  # 56 megapixels
    return images, dict.fromkeys((4, 11, 12, 30), "image unreadable") | {41: "image too large"}


def test_bad_pictures_give_their_place_to_the_next(images, tmp_path, caplog):
    bad_images, reasons = damage(images)
    records = write_records(tmp_path / "bad", bad_images)
    ids = Order(COUNT, 3).at(np.arange(3 * COUNT))
    good = [next(i for i in ids[position:] if i not in reasons) for position in range(COUNT)]
    runs = []
    for workers in (0, 2, 2):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            loader = make(records, image_size=32, global_batch=10, steps=5, seed=3, workers=workers)
            runs.append(list(loader))
        assert loader.skipped == {"image unreadable": 4, "image too large": 1}
        assert len(loader.bad) == 5
        for i in reasons:
            assert any(f"bad.rec key {i}:" in name for name in loader.bad), i
        assert sum("replaced" in record.message for record in caplog.records) == 5
    assert join(runs[0], "ids").tolist() == good
    assert torch.equal(join(runs[0], "text")[:, 0, 0], join(runs[0], "ids"))
    assert_same(runs[0], runs[1])
    assert_same(runs[1], runs[2])


def test_damaged_record_counts_by_its_own_reason(images, tmp_path):
    records = write_records(
        tmp_path / "bad", images, lambda i: tokens_of(i) - (1e6 if i == 17 else 0)
    )  # negative token ids
    loader = make(records, image_size=16, global_batch=50, steps=2)
    assert 17 not in join(list(loader), "ids")
    assert loader.skipped == {"record damaged": 2}


def test_too_many_bad_pictures_stop_the_run(images, tmp_path):
    records = write_records(tmp_path / "bad", damage(images)[0])
    settings = {"image_size": 16, "global_batch": 10, "steps": 5, "seed": 3}
    with pytest.raises(DataError, match=r"max_bad=3 and max_bad_fraction=0\.001") as error:
        list(make(records, **settings, workers=2, max_bad=3))
    bad = np.isin(Order(COUNT, 3).at(np.arange(COUNT)), [4, 11, 12, 30, 41]).reshape(5, 10).sum(1).cumsum()
    count, step = bad[bad > 3][0], (bad <= 3).sum()  # the first step that takes it above 3
    assert f"{count} of {10 * step + 10} records" in str(error.value)
    assert str(error.value).count("bad.rec key") == count
    assert len(list(make(records, **settings, workers=0, max_bad=5))) == 5
    assert len(list(make(records, **settings, workers=0, max_bad=0, max_bad_fraction=0.5))) == 5
    with pytest.raises(DataError):  # each of two ranks answers for half of the allowance
        for rank in (0, 1):
            list(make(records, **settings, workers=0, max_bad=3, world=2, rank=rank))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_pictures(tmp_path, workers):
    records = write_records(tmp_path / "bad", [b"nothing"] * 3)
    with pytest.raises(DataError, match="no good record") as error:
        load(records, workers=workers)
    assert "Traceback" not in str(error.value)


def test_other_formats_and_large_pictures(tmp_path):
    pictures = [photo(i, 900, 700) for i in range(6)]
    images = [
        encode(pictures[0], quality=95),
        encode(pictures[1], "PNG"),
        encode(pictures[2].convert("CMYK"), quality=95),
        encode(pictures[3].convert("L"), quality=95),
        encode(pictures[4].convert("RGBA"), "WEBP", lossless=True),
        encode(pictures[5].convert("L"), quality=95, progressive=True),
    ]
    pictures[3], pictures[5] = pictures[3].convert("L"), pictures[5].convert("L")
    records = write_records(tmp_path / "mixed", images)
    for size in (48, 700):  # far smaller (a JPEG is decoded at a fraction), and larger than most crops
        batch = load(records, global_batch=6, steps=1, image_size=size)[0]
        ids, zeros = batch.ids.numpy(), batch.epochs.numpy()
        windows = crop_windows(zeros + 900, zeros + 700, 3, zeros, ids)
        for row, (x, y, width, height) in enumerate(windows.tolist()):
            picture = pictures[ids[row]].convert("RGB")
            box = (x, y, x + width, y + height)
            expected = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
            expected = expected[:, ::-1] if draw_flips(3, zeros, ids)[row] else expected
            actual = batch.image[row].permute(1, 2, 0).numpy().astype(int)
            assert np.abs(actual - expected).mean() <= 2, (ids[row], size)


def test_random_state_of_the_training_is_not_touched(records):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load(records, workers=1, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_iterating_again_starts_again(records):
    loader = make(records, image_size=16, global_batch=10, steps=3, workers=1)
    assert len(loader) == 3
    next(iter(loader))
    assert_same(list(loader), list(loader))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world": 5}, "global_batch: 12 does not divide among 5"),
        ({"rank": 2, "world": 2}, "rank: 2"),
        ({"loader": "tensorflow"}, "loader: 'tensorflow'"),
        ({"workers": -1}, "workers: -1"),
        ({"image_size": (0, 4)}, "image_size"),
        ({"views": 0}, "views: 0"),
        ({"start": -3}, "start: -3"),
        ({"max_bad_fraction": 2}, "max_bad_fraction: 2"),
    ],
)
def test_wrong_settings(records, settings, message):
    with pytest.raises(ValueError, match=message):
        load(records, **settings)


def test_a_thread_that_cannot_be_started_leaves_nothing_to_end(records, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    loader = make(records, image_size=32, global_batch=12, steps=2)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new thread"):
        patch.setattr(threading.Thread, "start", refuse)
        iter(loader)
    loader.close()
    assert len(list(loader)) == len(loader)


def test_missing_dali_names_the_extra(records, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"\.\[dali\]"):
        load(records, loader="dali")


SCRIPT = """
    import multiprocessing, os, signal, sys
    from helpers.loading import make
    from rwkv_clip.data.records import RecordSet

    # More pixels than the pipes hold: no worker is done before the event.
    loader = make(RecordSet(sys.argv[1]), image_size=96, global_batch=8, steps=40, workers=2)
    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        batches = iter(loader)
        next(batches), next(batches)  # both workers are at work
        if sys.argv[2] == "signals":
            os.killpg(0, signal.SIGTERM)
            os.killpg(0, signal.SIGINT)
        elif sys.argv[2] == "death":
            multiprocessing.active_children()[0].kill()
        else:  # all stop, and the main process is killed
            stopped = [child.pid for child in multiprocessing.active_children()]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            print(*stopped, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        print(2 + sum(1 for _, batch in zip(range(37), batches)), "batches", flush=True)
        # and end with the loader still open
"""


def run_script(records, tmp_path, event: str, **output) -> subprocess.CompletedProcess:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(records.files[0].prefix), event]
    output = output or {"capture_output": True}
    return subprocess.run(command, **output, text=True, timeout=600, start_new_session=True, env=ENVIRONMENT)


def test_workers_outlive_signals_and_end_with_the_run(records, tmp_path):
    done = run_script(records, tmp_path, "signals")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "39 batches\n" and "Traceback" not in done.stderr


def test_death_of_a_worker_ends_the_run(records, tmp_path):
    # The traceback keeps the iterator alive until after the exit handlers; the other worker must end all the same.
    done = run_script(records, tmp_path, "death")
    assert done.returncode == 1 and done.stdout == ""
    assert "died with exit code -9; usually a lack of memory: use fewer --workers" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reaches a stopped process")
def test_stopped_workers_end_with_a_killed_run(records, tmp_path):
    with open(tmp_path / "workers", "w+") as told:  # a pipe is read until the workers, too, have gone
        done = run_script(records, tmp_path, "stopped", stdout=told, stderr=subprocess.DEVNULL)
        told.seek(0)
        workers, deadline = list(map(int, told.read().split())), time.monotonic() + 10
    assert done.returncode == -signal.SIGKILL and len(workers) == 2
    while (left := list(filter(is_alive, workers))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped; a zombie is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- several views of an image ---------------------------------------------------------------------------------------


def test_view_0_is_what_a_single_view_shows(records):
    single, several = load(records), load(records, views=3)
    image = join(several, "image")
    assert image.shape == (72, 3, 3, 32, 32) and image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image[:, 0], join(single, "image"))
    for field in ("text", "ids", "epochs"):
        assert torch.equal(join(single, field), join(several, field)), field
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert sum(torch.equal(one, other) for one, other in zip(image[:, left], image[:, right])) < 3


def test_every_view_is_its_documented_crop(records, images):
    batch = load(records, global_batch=COUNT, steps=1, image_size=(40, 48), views=2)[0]
    ids, epochs = batch.ids.numpy(), batch.epochs.numpy()
    for view in range(2):
        windows = crop_windows(60 + ids, 110 - ids, 3, epochs, ids, view=view).tolist()
        flips = draw_flips(3, epochs, ids, view=view)
        for row, ((x, y, width, height), flip) in enumerate(zip(windows, flips)):
            cut = Image.open(io.BytesIO(images[ids[row]])).crop((x, y, x + width, y + height))
            expected = np.asarray(cut.resize((48, 40), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            expected = expected[..., ::-1] if flip else expected
            assert np.abs(batch.image[row, view].numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_matter_for_views(images, tmp_path, workers):
    """Nor do bad images."""
    records = write_records(tmp_path / "bad", damage(images)[0])
    settings = {"global_batch": 70, "steps": 3, "views": 2}
    assert_same(load(records, **settings), load(records, **settings, workers=workers))


def test_an_image_is_decoded_once_for_all_views(tmp_path, monkeypatch):
    """A large JPEG once at each fraction of its size that a view needs; and no view depends on the others."""
    large = photo(0, 900, 700)
    images = [encode(large, quality=95), encode(photo(1, 90, 70), quality=95), encode(photo(2, 90, 70), "PNG")]
    settings = DataSettings(crop_area=(0.05, 1.0))
    reader = SampleReader(write_records(tmp_path / "mixed", images), 3, (64, 64), settings, views=4)
    decoded: list[tuple] = []
    for name in ("to_rgb", "decode_jpeg"):
        original = getattr(samples, name)

        def counted(source, *arguments, original=original):
            decoded.append((id(original), getattr(source, "size", None)))
            return original(source, *arguments)

        monkeypatch.setattr(samples, name, counted)
    for sample in reader.read(np.arange(3)):
        decoded.clear()
        image, alone = (
            torch.empty(reader.shape, dtype=torch.uint8),
            torch.empty(1, *reader.shape[1:], dtype=torch.uint8),
        )
        samples.decode_views(sample, image)
        sizes = len(set(decoded))
        assert len(decoded) == sizes and (sizes > 1) == (sample.id == 0)
        for view, crop in enumerate(sample.crops):
            samples.decode_views(replace(sample, crops=(crop,)), alone)
            assert torch.equal(alone[0], image[view])


@pytest.mark.parametrize("views", [1, 2])
def test_a_blank_batch_has_the_shape_of_the_others(records, views):
    loader = make(records, views=views, steps=1)
    (batch,), blank = loader, loader.blank()
    for field in ("image", "text", "ids", "epochs"):
        one, other = getattr(batch, field), getattr(blank, field)
        assert one.shape == other.shape and one.dtype == other.dtype and not other.any()


# ---- what workers need and how they end ------------------------------------------------------------------------------


def list_shared() -> set[str]:
    """Files in shared memory but semaphores, which any process with workers has there, of other tests as well."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def test_nothing_lies_in_shared_memory(records):
    """Neither a file of ours nor a mapping of one, in this process or a worker, while batches wait to be taken."""
    before = list_shared()
    loader = make(records, image_size=64, global_batch=40, steps=5, workers=2)
    for _ in loader:
        time.sleep(0.05)  # everything that can be ahead is
        for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            assert not [line for line in maps if "/dev/shm/" in line and "/sem." not in line]
    deadline = time.monotonic() + 10  # what other processes have there for a moment goes
    while not list_shared() <= before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list_shared() <= before


SMALL = """
    import sys, time
    from helpers.loading import make
    from rwkv_clip.data.records import RecordSet

    for batch in make(RecordSet(sys.argv[1]), image_size=224, global_batch=128, steps=22, workers=4):
        time.sleep(0.1)  # a training step: what workers have ready piles up
    print(batch.image.shape, flush=True)
"""


@pytest.mark.parametrize("size", ["16m", "1m"])
def test_a_small_shared_memory_is_enough(records, tmp_path, size):
    """In a file system namespace of its own, as in a container, with four workers at batch 128."""
    mount = f"mount -t tmpfs -o size={size} none /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm is not permitted here")
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SMALL))
    command = f'{mount} && exec "$0" "$@"'
    arguments = [sys.executable, str(script), str(records.files[0].prefix)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, *arguments], capture_output=True, text=True, timeout=90, env=ENVIRONMENT
    )
    assert done.stdout == "torch.Size([128, 3, 224, 224])\n", done.stderr


def fail_to_send(self, positions):
    raise AssertionError("an error of ours")


def fail_to_read(self, positions):
    raise OSError(errno.EIO, "Input/output error", "train.rec")


def run_out_of_memory(self, positions):
    raise MemoryError


def end(self, positions):
    os._exit(7)


@pytest.mark.parametrize(
    ("read", "kind", "message"),
    [
        (fail_to_read, OSError, r"\[Errno 5\] Input/output error: 'train.rec'"),
        (run_out_of_memory, MemoryError, None),
        (fail_to_send, RuntimeError, "(?s)in a data worker:.*fail_to_send.*an error of ours"),
        (end, WorkerLost, r"data worker \d+ died with exit code 7; --workers 0 shows why$"),
    ],
)
def test_an_error_in_a_worker_arrives(records, monkeypatch, read, kind, message):
    monkeypatch.setattr(SampleReader, "read", read)
    with pytest.raises(kind, match=message) as error:
        load(records, workers=2)
    assert type(error.value) is kind and not multiprocessing.active_children()


@pytest.mark.parametrize("rest", [(lambda: 0), "x" * 20_000_000], ids=["cannot be pickled", "is large"])
def test_a_message_that_cannot_be_sent_is_an_error(records, monkeypatch, capfd, rest):
    """Or it is sent, however large."""
    fill = torch_loader._Chunks.fill
    monkeypatch.setattr(torch_loader._Chunks, "fill", lambda *arguments: (*fill(*arguments)[:-1], [rest]))
    monkeypatch.setattr(data_batch.Tally, "add", lambda *_: None)
    if isinstance(rest, str):
        assert len(load(records, workers=1, steps=2)) == 2
        return
    with pytest.raises(WorkerLost, match="died with exit code 1"):
        load(records, workers=2)
    assert "pickle" in capfd.readouterr().err


STORM = """
import signal, sys
from rwkv_clip.training.data.batch import Batches, Feed
from types import SimpleNamespace
batches = Batches(SimpleNamespace(interrupt=lambda: None), Feed())
signal.signal(signal.SIGALRM, lambda *_: sum(range(2000)))
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
for _ in range(300):
    assert not batches.wait(0.002)
print("back")
"""


class LateFailure:
    """Items that fail, once the reader has gone."""

    def __init__(self, error: Exception):
        self.error, self.go = error, multiprocessing.Event()

    def __len__(self) -> int:
        return 1

    def shape(self, item: int) -> tuple[int, ...]:
        return 1, 1

    def fill(self, item: int, image: torch.Tensor) -> None:
        assert self.go.wait(60)
        raise self.error


@pytest.mark.parametrize(
    "error", [DataError("bad"), ZeroDivisionError("a bug")], ids=lambda error: type(error).__name__
)
def test_an_error_that_nobody_waits_for_is_not_printed(capfd, error):
    maker = LateFailure(error)
    workers = Workers(maker, 1)
    workers._pipes[0].close()
    maker.go.set()
    (worker,) = workers._processes
    worker.join(60)
    assert worker.exitcode == 0 and "Traceback" not in capfd.readouterr().err
    workers.close()


def test_signals_do_not_lengthen_the_wait_for_data():
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=60)
    assert done.stdout == "back\n", done.stderr


def is_gone(pid: int) -> bool:
    return start_time(pid) is None  # a zombie, which nobody may collect in a container, is gone, too


def wait_until(condition, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


ORPHANS = """
    import multiprocessing, os, signal, sys, time
    from helpers.loading import make
    from rwkv_clip.data.records import RecordSet
    from rwkv_clip.training.data.samples import SampleReader

    if __name__ == "__main__":
        multiprocessing.set_start_method(sys.argv[2])
        if sys.argv[4] == "hang":
            read = SampleReader.read
            SampleReader.read = lambda self, positions: time.sleep(600) if positions[0] > 400 else read(self, positions)
        loader = make(RecordSet(sys.argv[1]), image_size=300, global_batch=100, steps=40, workers=int(sys.argv[3]))
        batches = iter(loader)
        next(batches)
        time.sleep(1)  # the pipes are full
        while sys.argv[4] == "hang" and batches.wait(1):
            next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("method", "count", "what"), [("fork", 3, "write"), ("fork", 2, "hang"), ("forkserver", 1, "write")]
)
def test_workers_end_with_a_killed_run(records, tmp_path, method, count, what):
    """SIGKILL leaves the run no time to end them, and all wait for somebody to read, or hang."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(ORPHANS))
    command = [sys.executable, str(script), str(records.files[0].prefix), method, str(count), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == count and not any(is_gone(pid) for pid in workers)
        process.kill()
    assert wait_until(lambda: all(is_gone(pid) for pid in workers), 10)


def test_a_loader_is_closed_while_its_workers_stand_still(records):
    loader = make(records, image_size=32, global_batch=10, steps=99, workers=2)
    batches = iter(loader)
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    while batches.wait(0.5):  # what was ahead
        next(batches)
    assert re.fullmatch(r"data worker \d+ \(stopped\)", loader.place())
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 4 and not any(worker.is_alive() for worker in workers)
    assert len(load(records)) == 6


def test_a_loader_is_closed_while_this_process_stands_still(records, monkeypatch):
    """One that never comes back is left to itself."""
    read, stands, goes_on = SampleReader.read, threading.Event(), threading.Event()

    def hang(self, positions):
        if positions[0] >= 20:
            stands.set()
            goes_on.wait()
        return read(self, positions)

    monkeypatch.setattr(SampleReader, "read", hang)
    monkeypatch.setattr(data_batch, "PATIENCE", 0.2)
    loader = make(records, image_size=16, global_batch=10, steps=99)
    batches = iter(loader)
    next(batches)
    assert stands.wait(30) and batches.wait(0) and "test_loader.py" in loader.place()
    thread = loader._thread
    loader.close()
    goes_on.set()
    thread.join(30)
    assert not thread.is_alive() and next(batches, None) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_no_more_than_two_batches_are_ahead(records, monkeypatch, workers):
    made, read = multiprocessing.Value("i", 0), SampleReader.read

    def counted(self, positions):
        with made.get_lock():
            made.value += 1
        return read(self, positions)

    monkeypatch.setattr(SampleReader, "read", counted)
    loader = make(records, image_size=300, global_batch=20, steps=50, workers=workers)
    batches = iter(loader)
    next(batches)
    assert wait_until(lambda: made.value >= 3)
    time.sleep(0.5)
    assert made.value <= 3 + workers + 1  # a worker has one more at hand, and one in its pipe
    loader.close()


def test_a_loader_that_is_dropped_leaves_nothing(records):
    for workers in (0, 2):
        batches = iter(make(records, image_size=32, global_batch=10, steps=99, workers=workers))
        next(batches)
        del batches
    gc.collect()
    assert wait_until(lambda: not multiprocessing.active_children())
    assert wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "loader"])
