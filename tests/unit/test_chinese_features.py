"""Features of Chinese-CLIP's data as its files; and from these files the same recall as in the process."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.chinese_clip import RELEASED, write_files, write_split
from helpers.color_model import COLORS, preprocess, use_color_model
from rwkv_clip.eval.main import main
from rwkv_clip.metrics import recall_at_k

IMAGES = dict(zip([9, 10, 100, 2, 30], COLORS))
TEXTS = [(7, "red", [9]), (5, "blue", [100, 9]), (30, "green", []), (31, "red", [2])]


def picture(color: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), COLORS[color]).save(content, "png")
    return content.getvalue()


def encoded(color: str) -> str:
    return base64.b64encode(picture(color)).decode()


@pytest.fixture
def model(monkeypatch):
    return use_color_model(monkeypatch)


@pytest.fixture
def folder(tmp_path, model):
    write_files(tmp_path, "test", {i: picture(c) for i, c in IMAGES.items()}, TEXTS)
    return tmp_path


def features(folder, *more: str, data: str = "test_texts.jsonl") -> int:
    logs = ["--logs", str(folder / "logs"), "--device", "cpu", "--to", "chinese-clip"]
    return main(["features", "--checkpoint", "run", "--data", str(folder / data), *logs, *more])


def read(path, key: str) -> tuple[list[int], np.ndarray]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(row) == [key, "feature"] for row in rows)
    return [row[key] for row in rows], np.array([row["feature"] for row in rows])


def color_feature(color: str) -> np.ndarray:
    value = torch.tensor(COLORS[color]).float() / 127.5 - 1
    return torch.nn.functional.normalize(value, dim=0).numpy()


def build_lmdb(folder) -> None:
    pairs = [(image, text, words) for text, words, images in TEXTS for image in images]
    write_split(folder / "lmdb" / "test", {i: encoded(c) for i, c in IMAGES.items()}, pairs)


@pytest.mark.parametrize("source", ["tsv", "lmdb"])
def test_files_are_the_released_ones(folder, capsys, source):
    if source == "lmdb":
        build_lmdb(folder)
    assert features(folder) == 0
    assert "test_texts.txt_feat.jsonl" in capsys.readouterr().out
    ids, vectors = read(folder / "test_texts.txt_feat.jsonl", "text_id")
    assert ids == [7, 5, 30, 31]  # as in the file; one has no image
    np.testing.assert_allclose(vectors, [color_feature(text) for _, text, _ in TEXTS], atol=1e-6)
    ids, vectors = read(folder / "test_imgs.img_feat.jsonl", "image_id")
    assert ids == ([9, 10, 100, 2, 30] if source == "tsv" else [10, 100, 2, 30, 9])  # LMDB: the order of bytes
    np.testing.assert_allclose(vectors, [color_feature(IMAGES[i]) for i in ids], atol=0.02)
    assert (vectors == vectors.astype(np.float32)).all()  # every digit of a float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "sides, written", [("texts", "test_texts.txt_feat.jsonl"), ("images", "test_imgs.img_feat.jsonl")]
)
def test_one_side(folder, sides, written):
    if sides == "texts":
        (folder / "test_imgs.tsv").unlink()  # not needed
    assert features(folder, "--sides", sides) == 0
    assert [path.name for path in folder.glob("*_feat.jsonl")] == [written]


def test_other_places(folder):
    build_lmdb(folder)
    (folder / "elsewhere").mkdir()
    (folder / "lmdb").rename(folder / "elsewhere" / "lmdb")
    (folder / "test_imgs.tsv").unlink()
    names = ["--image-feat-output-path", str(folder / "a"), "--text-feat-output-path", str(folder / "b")]
    assert features(folder, "--image-data", str(folder / "elsewhere/lmdb/test/imgs"), *names) == 0
    assert read(folder / "a", "image_id")[0] == [10, 100, 2, 30, 9] and read(folder / "b", "text_id")[0][0] == 7


def test_an_lmdb_alone(folder):
    build_lmdb(folder)
    assert features(folder, data="lmdb/test") == 0
    assert read(folder / "lmdb" / "test_texts.txt_feat.jsonl", "text_id")[0] == [7, 5, 31]
    assert read(folder / "lmdb" / "test_imgs.img_feat.jsonl", "image_id")[0] == [10, 100, 2, 30, 9]


def test_released_lmdb(tmp_path, model):
    model.preprocess = lambda image: preprocess(image.resize((8, 8)))
    image, text = tmp_path / "i", tmp_path / "t"
    names = ["--image-feat-output-path", str(image), "--text-feat-output-path", str(text)]
    assert features(RELEASED, "--logs", str(tmp_path), *names, data="train_texts.jsonl") == 0
    expected = sorted(line.split("\t")[0] for line in (RELEASED / "train_imgs.tsv").read_text().splitlines())
    assert [str(i) for i in read(image, "image_id")[0]] == expected
    assert len(read(text, "text_id")[0]) == len((RELEASED / "train_texts.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "more, code, problem",
    [
        (["--split", "test"], 2, "split: not allowed with to chinese-clip"),
        (["--image-data", "nowhere"], 2, "nowhere"),
        (["--data", "nowhere_texts.jsonl"], 2, "nowhere_texts.jsonl: no such file"),
        (["--to", "folder", "--sides", "texts"], 2, "sides: not allowed with to folder"),
    ],
)
def test_wrong_settings(folder, capsys, more, code, problem):
    assert features(folder, *more) == code
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text_id": "1", "text": "x"}', '{"text_id": 1}', '{"text_id": 1, "text": 2}', ""]
)
def test_wrong_texts(folder, capsys, line):
    with open(folder / "test_texts.jsonl", "a") as file:
        file.write(line + "\n")
    assert features(folder) == 3
    assert "test_texts.jsonl:5: " in capsys.readouterr().err and not list(folder.glob("*_feat.jsonl"))


def test_image_ids_must_be_numbers(folder, capsys):
    (folder / "test_imgs.tsv").write_text(f"a.jpg\t{encoded('red')}\n")
    assert features(folder) == 3 and "'a.jpg' is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_recall_of_files_is_that_of_the_process(tmp_path, seed):
    """Where no similarities tie. Ties count against the model in the process; the released files take the first."""
    g = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(60, 8, generator=g), dim=-1)
    owner = torch.cat([torch.arange(60), torch.randint(0, 60, (90,), generator=g)])
    text = torch.nn.functional.normalize(image[owner] + 0.6 * torch.randn(150, 8, generator=g), dim=-1)
    files = {"image": tmp_path / "i.jsonl", "text": tmp_path / "t.jsonl"}
    for kind, rows in (("image", image), ("text", text)):
        lines = (json.dumps({f"{kind}_id": i, "feature": row}) + "\n" for i, row in enumerate(rows.tolist()))
        files[kind].write_text("".join(lines))
    gold = tmp_path / "gold.jsonl"
    lines = (json.dumps({"text_id": i, "image_ids": [image]}) + "\n" for i, image in enumerate(owner.tolist()))
    gold.write_text("".join(lines))
    assert main(["invert", "--input", str(gold)]) == 0
    metrics = recall_at_k(image, text, owner)
    for way, name, annotated in (("t2i", "text_to_image", gold), ("i2t", "image_to_text", tmp_path / "gold.tr.jsonl")):
        found, out = str(tmp_path / f"{way}.jsonl"), tmp_path / "out.json"
        feats = ["--image-feats", str(files["image"]), "--text-feats", str(files["text"])]
        assert main(["knn", *feats, "--direction", way, "--output", found]) == 0
        assert main(["recall", str(annotated), found, str(out), "--strict"]) == 0
        scores = json.loads(out.read_text())["scoreJson"]
        assert {k: scores[f"r{k}"] for k in (1, 5, 10)} == {k: metrics[f"{name}_R@{k}"] * 100 for k in (1, 5, 10)}
        assert 0 < scores["r1"] < scores["r10"]


@pytest.mark.parametrize("source", ["tsv", "lmdb"])
def test_commands_on_files_find_what_the_retrieval_command_finds(tmp_path, model, source):
    """Texts with one image, with two and with none; images without text; no ties."""
    rng = np.random.default_rng(0)
    images = {}
    for number in rng.permutation(40).tolist():
        content = io.BytesIO()
        Image.new("RGB", (8, 8), tuple(rng.integers(0, 256, 3).tolist())).save(content, "png")
        images[number] = content.getvalue()
    words = [*COLORS, *(f"{a} {b}" for i, a in enumerate(COLORS) for b in list(COLORS)[i + 1 :])]
    texts = [(100 + i, text, rng.choice(40, i % 3, replace=False).tolist()) for i, text in enumerate(words)]
    write_files(tmp_path, "test", images, texts)
    if source == "lmdb":
        texts = [row for row in texts if row[2]]  # those without images are not in an LMDB
        write_files(tmp_path, "test", images, texts)
        pairs = [(image, number, text) for number, text, ids in texts for image in ids]
        encoded_images = {i: base64.b64encode(content).decode() for i, content in images.items()}
        write_split(tmp_path / "lmdb" / "test", encoded_images, pairs)
    data = "test_texts.jsonl" if source == "tsv" else "lmdb/test"
    logs = ["--logs", str(tmp_path / "logs"), "--name", "run", "--device", "cpu", "--gallery", "0"]
    assert main(["retrieval", "--checkpoint", "run", "--data", str(tmp_path / data), *logs]) == 0
    metrics = json.loads((tmp_path / "logs" / "run" / "result.json").read_text())["results"][0]["metrics"]
    assert features(tmp_path) == 0
    feats = ["--image-feats", str(tmp_path / "test_imgs.img_feat.jsonl")]
    feats += ["--text-feats", str(tmp_path / "test_texts.txt_feat.jsonl")]
    gold = tmp_path / "test_texts.jsonl"  # a text without image is a miss
    assert main(["invert", "--input", str(gold)]) == 0
    for way, name, annotated in (
        ("t2i", "text_to_image", gold),
        ("i2t", "image_to_text", tmp_path / "test_texts.tr.jsonl"),
    ):
        found, out = str(tmp_path / f"{way}.jsonl"), tmp_path / "out.json"
        assert main(["knn", *feats, "--direction", way, "--output", found]) == 0
        assert main(["recall", str(annotated), found, str(out), "--strict"]) == 0
        scores = json.loads(out.read_text())["scoreJson"]
        assert {k: scores[f"r{k}"] for k in (1, 5, 10)} == {k: metrics[f"{name}_R@{k}"] * 100 for k in (1, 5, 10)}
        assert scores["r10"] > 0
