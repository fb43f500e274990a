"""Exported features: what is written is what was computed, in three forms, and damage is named."""

import json
import os

import numpy as np
import pytest
import torch

from helpers.color_model import COLORS, save_color, use_color_model
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.eval.main import main
from rwkv_clip.feature_files import Features, read_about, read_features, write_features
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.files import write_whole
from rwkv_clip.retrieval import evaluate_retrieval

FORMS = ("safetensors", "npy", "jsonl")
NAMES = ["a.jpg", "ü/日本.jpg", 'quo"te\n.jpg', 7]  # Chinese-CLIP's ids are numbers


def vectors(count: int, width: int = 6) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(count)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind, key", [("images", "image_id"), ("texts", "text_id")])
def test_every_form_gives_back_the_bits(tmp_path, form, kind, key):
    rows = [{key: name, "more": i} for i, name in enumerate(NAMES)]
    write_features(tmp_path, Features(kind, vectors(4), rows), form)
    found = read_features(tmp_path, kind)
    assert torch.equal(found.vectors, vectors(4)) and found.vectors.dtype == torch.float32
    assert list(found.rows) == rows and found.ids == NAMES
    assert read_features(tmp_path, "texts" if kind == "images" else "images") is None
    assert not list(tmp_path.glob("*.part"))


def test_files_are_what_other_tools_read(tmp_path):
    """numpy, safetensors, and the way in which Chinese-CLIP's make_topk_predictions.py reads its lines."""
    from safetensors.numpy import load_file

    for form in FORMS:
        write_features(tmp_path, Features("images", vectors(3), [{"image_id": i} for i in (5, 6, 9)]), form)
    expected = vectors(3).numpy()
    assert np.array_equal(load_file(tmp_path / "images.safetensors")["features"], expected)
    assert np.array_equal(np.load(tmp_path / "images.npy"), expected)
    ids, features = [], []
    with open(tmp_path / "images.img_feat.jsonl") as lines:
        for line in lines:
            found = json.loads(line.strip())
            ids.append(found["image_id"])
            features.append(found["feature"])
    assert ids == [5, 6, 9] and np.array_equal(np.array(features, dtype=np.float32), expected)


def test_a_folder_of_chinese_clip_is_read(tmp_path):
    lines = "".join(json.dumps({"text_id": 8 + i, "feature": v.tolist()}) + "\n" for i, v in enumerate(vectors(3)))
    (tmp_path / "test_texts.txt_feat.jsonl").write_text(lines)
    found = read_features(tmp_path, "texts")
    assert found.ids == [8, 9, 10] and torch.equal(found.vectors, vectors(3)) and read_about(tmp_path) == {}


def _write(folder, form="safetensors", rows=3, data=None) -> None:
    found = vectors(3) if data is None else data
    write_features(folder, Features("images", found, [{"image_id": i} for i in range(rows)]), form)


def _cut(folder) -> None:
    _write(folder)
    path = folder / "images.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _fewer_ids(folder) -> None:
    _write(folder, rows=2)


def _nan(folder) -> None:
    data = vectors(3)
    data[1, 2] = torch.nan
    _write(folder, data=data)


def _long(folder) -> None:
    _write(folder, data=vectors(3) * torch.tensor([[1.0], [1.0], [1.1]]))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _objects(folder) -> None:
    _write(folder, "npy")
    np.save(folder / "images.npy", np.array([Trap(folder / "it ran")], dtype=object))


def _short_npy(folder) -> None:
    _write(folder, "npy")
    path = folder / "images.npy"
    path.write_bytes(path.read_bytes()[:-4])


def _npy_header(text: bytes):
    """An .npy file whose header is `text`, with the numbers of three vectors behind it."""

    def damage(folder) -> None:
        _write(folder, "npy")
        header = text.ljust(118, b" ") + b"\n"
        content = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(72)
        (folder / "images.npy").write_bytes(content)

    return damage


def _npz(folder) -> None:
    _write(folder, "npy")
    np.savez(folder / "images.npz", vectors(3).numpy())
    os.replace(folder / "images.npz", folder / "images.npy")


def _ragged(folder) -> None:
    (folder / "x.img_feat.jsonl").write_text('{"image_id": 1, "feature": [1, 0]}\n{"image_id": 2, "feature": [1]}\n')


def _words(folder) -> None:
    (folder / "x.img_feat.jsonl").write_text('{"image_id": 1, "feature": [1, "b"]}\n')


def _no_id(folder) -> None:
    _write(folder)
    (folder / "images.jsonl").write_text('{"image_id": 0}\n{"id": 1}\n{"image_id": 2}\n')


def _half_a_line(folder) -> None:
    _write(folder)
    (folder / "images.jsonl").write_text('{"image_id": 0}\n{"image_')


def _two(folder) -> None:
    _ragged(folder)
    (folder / "y.img_feat.jsonl").write_text("")


DAMAGES = [
    (_cut, "images.safetensors: is not a readable"),
    (_fewer_ids, "3 vectors and 2 ids"),
    (_nan, "row 1 (of 1 such rows) is not a vector of length 1"),
    (_long, "row 2 (of 1 such rows)"),
    (_objects, "images.npy: is not a readable"),
    (_short_npy, "images.npy: is not a readable"),
    (_npz, "images.npy: is not a readable"),
    (_npy_header(b"(" * 9000), "images.npy: is not a readable"),
    (
        _npy_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000, 6)}"),
        "images.npy: is not a readable",
    ),
    (_npy_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 6)}"), "images.npy"),
    (_npy_header(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}"), "images.npy: is not a readable"),
    (_ragged, "x.img_feat.jsonl:2: `feature` holds 1 numbers"),
    (_words, "x.img_feat.jsonl:1: `feature` must be a list of numbers"),
    (_no_id, "images.jsonl:2: has no `image_id`"),
    (_half_a_line, "images.jsonl:2: not JSON"),
    (_two, "holds x.img_feat.jsonl and y.img_feat.jsonl"),
]


@pytest.mark.parametrize("make, message", DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_damage_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError) as raised:
        read_features(tmp_path, "images")
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)
    assert not (tmp_path / "it ran").exists()


def test_names_and_texts_that_are_not_utf_8_are_read_back(tmp_path):
    rows = [{"image_id": name} for name in ("a\udcff.jpg", "\ud800", "ü")]
    write_features(tmp_path, Features("images", vectors(3), rows), "jsonl")
    assert (tmp_path / "images.jsonl").read_bytes().decode("utf-8") and read_features(tmp_path, "images").rows == rows


def test_a_file_is_whole_or_not_there(tmp_path):
    def pieces():
        yield b"half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "file", pieces())
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"old"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch):
    return use_color_model(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    for color in COLORS:
        save_color(tmp_path / "classes" / color / "0.png", color)
    rows = [{"image": f"classes/{c}/0.png", "captions": [c, f"more {c}"]} for c in COLORS]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def export(folder, *more) -> int:
    places = ["--logs", str(folder / "logs"), "--name", "run", "--device", "cpu"]
    return main(["features", "--checkpoint", "run", *places, *more])


@pytest.mark.parametrize("form", FORMS)
def test_command_writes_a_retrieval_set(folder, model, form, capsys):
    assert export(folder, "--data", str(folder / "set.jsonl"), "--form", form, "--prefix", "a photo of ") == 0
    run = folder / "logs" / "run"
    assert capsys.readouterr().out == f"features: {run}\n"
    data = load_retrieval(folder / "set.jsonl")
    expected = evaluate_retrieval(FeatureExtractor.of(model, "cpu"), data, "a photo of ")
    images, texts = read_features(run, "images"), read_features(run, "texts")
    assert torch.equal(images.vectors, expected.image_features) and torch.equal(texts.vectors, expected.text_features)
    assert images.ids == [f"classes/{c}/0.png" for c in COLORS]
    assert texts.rows[3] == {"text_id": 3, "text": "more green", "image_ids": ["classes/green/0.png"]}
    about = read_about(run)
    assert (about["images"], about["texts"], about["width"]) == (len(COLORS), 2 * len(COLORS), 3)
    assert about["prefix"] == "a photo of " and about["checkpoint_sha256"] == "0" * 64
    # Again: another folder, and pictures come from the cache.
    calls = len(model.model.calls)
    assert export(folder, "--data", str(folder / "set.jsonl")) == 0
    again = read_features(folder / "logs" / "run-2", "images")
    assert torch.equal(again.vectors, images.vectors) and len(model.model.calls) == calls + 1  # the texts


def test_command_writes_a_classification_set(folder, model):
    assert export(folder, "--data", str(folder / "classes"), "--dataset", "imagefolder") == 0
    found = read_features(folder / "logs" / "run", "images")
    names = sorted(COLORS)
    assert [row["class"] for row in found.rows] == names and [row["label"] for row in found.rows] == list(range(7))
    assert read_features(folder / "logs" / "run", "texts") is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data", "x", "--dataset", "cifar1"], "dataset: 'cifar1' is not known"),
        (["--data", "x", "--dataset", "food101"], "food-101.tar.gz"),
        (["--data", "x", "--dataset", "imagefolder", "--split", "test"], "split: not allowed with dataset imagefolder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, model, capsys, more, message):
    assert export(folder, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (folder / "logs").exists()
