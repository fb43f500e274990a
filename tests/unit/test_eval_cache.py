"""A changed input is never answered from a cache: whatever changes, a second run has the features and labels of now."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.color_model import ColorModel, loaded
from rwkv_clip.data.records import Header, RecordWriter, pack
from rwkv_clip.datasets import labelled, load_classification
from rwkv_clip.eval import cache
from rwkv_clip.eval.encoder import Encoder
from rwkv_clip.eval.main import main
from rwkv_clip.feature_files import read_features

COUNT, CHANGED = 40, 8  # of 40 pictures the 16 that a key decodes are not these: 0, 2, 5, 7, 10 ..


@pytest.fixture(autouse=True)
def model(monkeypatch):
    found = loaded()
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", SimpleNamespace(load_for_inference=lambda *a, **n: found))
    return found


def shade(number: int) -> bytes:
    """A picture of its own for each number, all of one size in bytes, as those of a camera or of a test may be."""
    pixels = np.full((4, 4, 3), (5 * number % 251, 255 - 3 * number % 251, number), np.uint8)
    return b"P6 4 4 255\n" + pixels.tobytes()


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shade(number))


# ---- sets of every kind: how each is made, where its pictures lie, and how `features` is told of it ------------------


class Captions:
    options = ("--data", "set.jsonl")

    def make(self, folder: Path) -> None:
        for i in range(COUNT):
            save(folder / f"{i:03}.ppm", i)
        rows = [json.dumps({"image": f"{i:03}.ppm", "caption": f"red {i}"}) for i in range(COUNT)]
        (folder / "set.jsonl").write_text("\n".join(rows))

    def file(self, folder: Path, i: int) -> Path:
        return folder / f"{i:03}.ppm"


class Classes(Captions):
    options = ("--data", "set", "--dataset", "imagefolder")

    def make(self, folder: Path) -> None:
        for i in range(COUNT):
            save(self.file(folder, i), i)

    def file(self, folder: Path, i: int) -> Path:
        return folder / "set" / ("cat" if i < COUNT // 2 else "dog") / f"{i:03}.ppm"


class Sun(Captions):
    options = ("--data", ".", "--dataset", "sun397")

    def make(self, folder: Path) -> None:
        root = folder / "SUN397"
        for i in range(COUNT):
            save(self.file(folder, i), i)
        (root / "ClassName.txt").write_text("/a/abbey\n/z/zoo\n")
        (root / "Testing_01.txt").write_text("".join(f"/a/abbey/sun_{i:03}.jpg\n" for i in range(COUNT)))

    def file(self, folder: Path, i: int) -> Path:
        return folder / "SUN397" / "a" / "abbey" / f"sun_{i:03}.jpg"


class Records:
    options = ("--data", "train.rec")

    def make(self, folder: Path, changed: int | None = None) -> None:
        with RecordWriter(folder / "train") as writer:
            for i in range(COUNT):
                label = np.full(77, 1, np.float32)
                writer.write(i, pack(Header(77, label, i, 0), shade(99 if i == changed else i)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def features(kind, *more: str) -> torch.Tensor:
    """The picture features that the command writes now."""
    before = set(Path("logs").glob("*"))
    assert main(["features", "--checkpoint", "x", "--logs", "logs", "--device", "cpu", *kind.options, *more]) == 0
    (made,) = (path for path in set(Path("logs").glob("*")) - before if path.name != "cache")
    return read_features(made, "images").vectors


def replace(path: Path) -> None:
    save(path, 99)


def replace_with_its_time(path: Path) -> None:
    """As `cp -p` or tar does: size and time of change of content are those of before."""
    state = path.stat()
    save(path, 99)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def exchange(path: Path) -> None:
    """Two files change names: size and time of change of content are those of before in every place."""
    other = path.with_name(path.name.replace("008", "009"))
    for old, new in ((path, "x"), (other, path), (path.with_name("x"), other)):
        old.rename(path.with_name(new) if new == "x" else new)


@pytest.mark.parametrize("change", [replace, replace_with_its_time, exchange])
@pytest.mark.parametrize("kind", [Captions(), Classes(), Sun()], ids=lambda kind: type(kind).__name__)
def test_a_changed_picture_has_new_features(folder, kind, change):
    kind.make(folder)
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    before = features(kind)
    change(kind.file(folder, CHANGED))
    after, right = features(kind), features(kind, "--cache", "empty")
    assert torch.equal(after, right) and not torch.equal(after[CHANGED], before[CHANGED])


def test_records_that_were_built_again_have_new_features(folder, model):
    model.tokenizer.context = 77
    model.tokenizer.name = None
    kind = Records()
    kind.make(folder)
    before = features(kind)
    kind.make(folder, changed=CHANGED)
    after = features(kind)
    assert not torch.equal(after[CHANGED], before[CHANGED]) and torch.equal(after, features(kind, "--cache", "empty"))


class Torchvision:
    """A set as torchvision has them: files below its folder, labels in a list."""

    decoded = 0

    def __init__(self, root, **arguments):
        self.files = sorted((Path(root) / "food-101").glob("*.ppm"))
        self._labels = json.loads((Path(root) / "food-101" / "labels.json").read_text())
        self.classes = ["red", "blue"]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        Torchvision.decoded += 1
        return Image.open(self.files[index]), self._labels[index]


def test_sets_of_torchvision_are_seen_file_by_file_and_labels_cost_no_picture(folder, monkeypatch):
    fake = SimpleNamespace(datasets=SimpleNamespace(Food101=Torchvision))
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    place = folder / "food-101"
    for i in range(COUNT):
        save(place / f"{i:03}.ppm", i)
    (place / "labels.json").write_text(json.dumps([i % 2 for i in range(COUNT)]))

    def encode():
        Torchvision.decoded, data = 0, load_classification("food101", folder)
        encoder = Encoder.of(loaded(), torch.device("cpu"), workers=0, cache=folder / "cache")
        return cache.encode_labelled(encoder, data), data.labels, Torchvision.decoded

    first, labels, decoded = encode()
    assert labels.tolist() == [i % 2 for i in range(COUNT)] and decoded == COUNT + 16
    again, _, decoded = encode()
    assert torch.equal(again, first) and decoded == 16
    replace(place / f"{CHANGED:03}.ppm")
    after, _, decoded = encode()
    assert not torch.equal(after[CHANGED], first[CHANGED]) and decoded == COUNT + 16


def test_a_torchvision_that_keeps_other_labels_than_it_gives_is_refused(folder, monkeypatch):
    class Other(Torchvision):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], 1 - self._labels[index]

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(Food101=Other)))
    save(folder / "food-101" / "0.ppm", 0)
    (folder / "food-101" / "labels.json").write_text("[0]")
    with pytest.raises(ValueError, match="has label 1, but had 0 before"):
        cache.encode_labelled(Encoder.of(loaded(), torch.device("cpu")), load_classification("food101", folder))


def hits(*more: str) -> tuple[int, int]:
    before = set(Path("logs").glob("*"))
    task = ["linear-probe", "--checkpoint", "x", "--data", "set", "--split-test", "0.5", "--l2", "1"]
    assert main([*task, "--logs", "logs", "--device", "cpu", *more]) == 0
    (made,) = (path for path in set(Path("logs").glob("*")) - before if path.name != "cache")
    metrics = json.loads((made / "result.json").read_text())["results"][0]["metrics"]
    return metrics["hits1"], metrics["samples"]


def _correct_a_label(folder: Path) -> None:
    for i in range(0, COUNT // 2, 3):
        shutil.move(Classes().file(folder, i), folder / "set" / "dog" / f"a{i:03}.ppm")


def _exchange_classes(folder: Path) -> None:
    """Folders change names, no file changes."""
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (folder / "set" / old).rename(folder / "set" / new)


def _other_order_of_classes(folder: Path) -> None:
    """No file of a picture changes, and both classes have one name: labels alone differ."""
    (folder / "set" / "names.json").write_text(json.dumps({"names": {"dog": "pet", "cat": "pet"}}))


@pytest.mark.parametrize("change", [_correct_a_label, _exchange_classes, _other_order_of_classes])
def test_labels_are_those_of_now(folder, change):
    Classes().make(folder)
    (folder / "set" / "names.json").write_text(json.dumps({"names": {"cat": "pet", "dog": "pet"}}))
    hits()
    change(folder)
    found = []
    for name in ("logs", "fresh"):
        assert main(["features", "--checkpoint", "x", *Classes.options, "--logs", name, "--name", "out"]) == 0
        found.append(read_features(Path(name, "out"), "images"))
    assert found[0].rows == found[1].rows and torch.equal(found[0].vectors, found[1].vectors)
    assert hits() == hits("--cache", "empty")


def test_an_unchanged_set_is_read_from_the_cache(folder, model, monkeypatch):
    """The second run decodes the few pictures that the key looks at, and encodes none."""
    Classes().make(folder)
    first, calls = features(Classes()), len(model.model.calls)
    opened, open_picture = [], labelled.open_picture
    monkeypatch.setattr(labelled, "open_picture", lambda path: opened.append(path) or open_picture(path))
    assert torch.equal(features(Classes()), first) and len(model.model.calls) == calls and len(opened) == 16


def test_one_file_of_weights_read_as_two_models(folder, model):
    """The same digest and the same weights, but another function: --model ViT-B-32 and ViT-B-32-quickgelu."""
    Classes().make(folder)
    model.model.spec = {"open_clip": "ViT-B-32"}
    first = features(Classes())

    class Quick(ColorModel):
        spec = {"open_clip": "ViT-B-32-quickgelu"}  # noqa: RUF012

        def encode_image(self, x, normalize=False):
            return torch.nn.functional.normalize(super().encode_image(x) ** 3, dim=-1)

    model.model = Quick()
    assert not torch.equal(features(Classes()), first)


def test_a_cache_that_cannot_be_written_ends_nothing(folder, caplog):
    Classes().make(folder)
    Path("file").write_text("no folder")
    found = features(Classes(), "--cache", "file/cache")
    assert torch.equal(found, features(Classes())) and "the run continues without it" in caplog.text


def test_ranks_that_see_other_files_have_a_folder_of_their_own_and_find_it_again(folder, monkeypatch):
    device, key = torch.device("cpu"), {"set": "a"}
    alone = cache._folder_of(folder, key, device)
    for other, same in ((0, True), (1, False)):
        monkeypatch.setattr(cache, "gather", lambda x, other=other: torch.cat([x, x + other]))
        found = cache._folder_of(folder, key, device)
        assert (found == alone) == same and found == cache._folder_of(folder, key, device)
