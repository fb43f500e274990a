"""The DALI loader gives the batches of the torch loader: same texts, ids and bad records, pixels within
2/255."""

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import loading
from helpers.pictures import encode, photo, write_records
from rwkv_clip.training.data.augment import crop_windows
from rwkv_clip.training.data.samples import DataError

pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed (pip install -e '.[dali]')")

COUNT = 30


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """JPEGs of many sizes, among them some of other kinds."""
    images = [encode(photo(i, 70 + 9 * i, 400 - 8 * i), quality=85 + i % 10) for i in range(COUNT)]
    images[3] = encode(photo(3, 300, 200).convert("L"))
    images[5] = encode(photo(5, 300, 200), "PNG")
    images[8] = encode(photo(8, 300, 200).convert("CMYK"))
    images[13] = encode(photo(13, 301, 203), progressive=True, quality=90)
    images[21] = encode(photo(21, 1500, 1100), quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored sideways, shown upright
    images[22] = encode(photo(22, 301, 203), quality=90, exif=exif)
    return images


def make(records, kind: str, **settings):
    defaults = {"image_size": 96, "global_batch": 10, "steps": 6, "seed": 2, "workers": 2, "loader": kind}
    return loading.make(records, **{**defaults, **settings})


def compare(left, right) -> torch.Tensor:
    """Everything but the pixels must be equal -> the pictures' mean differences, in steps of 1/255."""
    differences = []
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right):
        assert one.position == other.position
        assert torch.equal(one.ids, other.ids) and torch.equal(one.epochs, other.epochs)
        assert torch.equal(one.text, other.text)
        assert one.image.dtype == other.image.dtype and one.image.shape == other.image.shape
        assert other.image.is_contiguous()
        differences.append((one.image.float() - other.image.float()).abs().mean(dim=(-3, -2, -1)).flatten())
    return torch.cat(differences)


@pytest.mark.parametrize("size", [96, (64, 128), 300])
def test_same_batches(images, tmp_path, size):
    records = write_records(tmp_path / "train", images)
    difference = compare(make(records, "torch", image_size=size), make(records, "dali", image_size=size))
    assert difference.max() <= 2 and difference.mean() <= 0.5


@pytest.mark.parametrize("bad", [False, True])
def test_same_views(images, tmp_path, bad):
    records = write_records(tmp_path / "train", damage(images) if bad else images)
    difference = compare(make(records, "torch", views=3), make(records, "dali", views=3))
    assert len(difference) == 3 * 60 and difference.max() <= 2
    single, several = make(records, "dali"), list(make(records, "dali", views=3))
    for one, many in zip(single, several, strict=True):
        assert torch.equal(one.image, many.image[:, 0]) and not torch.equal(many.image[:, 0], many.image[:, 1])


def test_same_batches_on_flickr8k(shared, tmp_path):
    files = sorted((shared / "data" / "flickr8k" / "images").glob("*.jpg"))[:60]
    records = write_records(tmp_path / "train", [file.read_bytes() for file in files])
    difference = compare(make(records, "torch", image_size=224), make(records, "dali", image_size=224))
    assert difference.max() <= 1


def test_ranks_and_resume(images, tmp_path):
    records = write_records(tmp_path / "train", images)
    for settings in ({"world": 2, "rank": 1}, {"start": 25, "steps": 2}, {"workers": 0, "global_batch": 33}):
        compare(make(records, "torch", **settings), make(records, "dali", **settings))


def damage(images: list[bytes]) -> list[bytes]:
    images = list(images)
    images[4] = images[4][: len(images[4]) // 2]
    images[11] = b"this is not a picture"
    images[12] = images[12][:-300] + bytes(300)
    for i in (1, 29):  # Huffman table: plain by its headers, so DALI meets it and fails
        at = images[i].index(b"\xff\xc4") + 5
        images[i] = images[i][:at] + b"\xff" * 4 + images[i][at + 4 :]
    return images


def test_bad_pictures_are_replaced_alike(images, tmp_path):
    records = write_records(tmp_path / "train", damage(images))
    loaders = [make(records, kind) for kind in ("torch", "dali", "dali")]
    first = compare(loaders[0], loaders[1])
    assert torch.equal(compare(loaders[0], loaders[2]), first)
    assert first.max() <= 2
    for loader in loaders:
        assert loader.skipped == {"image unreadable": 10}  # five bad ones in each of two epochs
        assert loader.bad == loaders[0].bad
    with pytest.raises(DataError, match="max_bad=3"):
        list(make(records, "dali", max_bad=3))
    with pytest.raises(DataError, match="no good record"):
        list(make(write_records(tmp_path / "bad", [b"nothing"] * 3), "dali"))


def test_picture_that_only_dali_would_take(images, tmp_path):
    images, middle = list(images), len(images[14]) // 2
    images[14] = images[14][:middle] + b"\xff\xd8" + images[14][middle:]
    records = write_records(tmp_path / "train", images)
    loaders = make(records, "torch"), make(records, "dali")
    compare(*loaders)
    assert loaders[0].skipped == loaders[1].skipped == {"image unreadable": 2}


def test_pipeline_that_fails_on_good_pictures(images, tmp_path, monkeypatch):
    from rwkv_clip.training.data.dali_loader import DaliLoader

    records = write_records(tmp_path / "train", images)
    take, calls = DaliLoader._take, []

    def fail_sometimes(self, step):
        calls.append(step.number)
        if step.number in (0, 1, 3):
            raise RuntimeError("broken device")
        return take(self, step)

    monkeypatch.setattr(DaliLoader, "_take", fail_sometimes)
    compare(make(records, "torch"), make(records, "dali"))
    assert calls == list(range(6))
    monkeypatch.setattr(DaliLoader, "_take", lambda *_: (_ for _ in ()).throw(RuntimeError("broken device")))
    with pytest.raises(RuntimeError, match="broken device"):
        list(make(records, "dali"))


def test_pipelines_end_in_their_thread(images, tmp_path, monkeypatch):
    from rwkv_clip.training.data import dali_loader

    records, build, alive = write_records(tmp_path / "train", damage(images)), dali_loader.build_pipeline, []

    def build_watched(*settings):
        pipeline = build(*settings)
        alive.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali_loader, "build_pipeline", build_watched)
    gc.disable()  # a pipeline that only the garbage collector ends would end anywhere, in a forked worker too
    try:
        list(make(records, "dali"))
        with pytest.raises(DataError) as kept:
            list(make(records, "dali", max_bad=0))
        with pytest.raises(DataError):
            list(make(write_records(tmp_path / "bad", [b"nothing"] * 3), "dali"))
        assert kept and len(alive) > 3 and not any(pipeline() for pipeline in alive)
    finally:
        gc.enable()


def test_leaving_early_ends_the_thread(images, tmp_path):
    loader = make(write_records(tmp_path / "train", images), "dali", steps=50)
    for _ in range(2):
        batches = iter(loader)
        first = next(batches)
        thread = loader._thread
        batches.close()
        assert not thread.is_alive() and first.position == 0


@pytest.mark.parametrize(("width", "height"), [(500, 375), (224, 224), (1000, 300), (200, 900)])
def test_crops_are_distributed_like_those_of_dali(width, height):
    from nvidia.dali import Pipeline, fn

    many = 20_000
    pipeline = Pipeline(many, 1, None, seed=1, prefetch_queue_depth=1)
    with pipeline:
        shape = fn.external_source(name="shape", device="cpu")
        pipeline.set_outputs(*fn.random_crop_generator(shape, random_area=[0.7, 1.0], random_aspect_ratio=[0.8, 1.25]))
    pipeline.build()
    pipeline.feed_input("shape", np.tile(np.array([height, width], np.int32), (many, 1)))
    place, size = (output.as_array()[:, ::-1] for output in pipeline.run())
    theirs = np.concatenate([place, size], 1)
    sizes = np.full(many, width), np.full(many, height)
    ours = crop_windows(*sizes, 0, np.zeros(many, np.int64), np.arange(many))
    for column in range(4):
        grid = np.linspace(0.02, 0.98, 25)
        left, right = np.quantile(theirs[:, column], grid), np.quantile(ours[:, column], grid)
        assert np.abs(left - right).max() <= 1 + 0.01 * max(width, height)
        assert abs(theirs[:, column].mean() - ours[:, column].mean()) <= 0.005 * max(width, height)
