"""Nearest neighbours through faiss, and as a command over exported features."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.color_model import COLORS, save_color, use_color_model
from rwkv_clip.eval.main import main
from rwkv_clip.eval.tasks.search import nearest_by_faiss
from rwkv_clip.metrics import nearest_items


def unit(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,Flat"])
def test_faiss_finds_the_same(factory):
    pytest.importorskip("faiss", reason="needs the extra `faiss`")
    items, queries = unit(400, 16), unit(20, 16, seed=1)
    exact, scores = nearest_items(queries, items, 5)
    places, similarities = nearest_by_faiss(queries, items, 5, factory)
    if factory == "Flat":
        assert torch.equal(places, exact)
        torch.testing.assert_close(similarities.double(), scores, rtol=0, atol=1e-6)
    assert (places[:, :1] == exact).any(1).float().mean() > 0.3  # an approximate index misses some


@pytest.mark.parametrize("factory", ["Nonsense", "IVF900,Flat"])
def test_faiss_says_what_is_wrong(factory):
    pytest.importorskip("faiss", reason="needs the extra `faiss`")
    with pytest.raises(ValueError, match=f"index: faiss cannot make '{factory}' of 400 items .*; try Flat"):
        nearest_by_faiss(unit(3, 4), unit(400, 4), 5, factory)


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install -e .\[faiss\]"):
        nearest_by_faiss(unit(3, 4), unit(9, 4), 5, "Flat")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch):
    return use_color_model(monkeypatch)


@pytest.fixture
def folder(tmp_path, model):
    """Features of a picture of every color with a caption each."""
    for color in COLORS:
        save_color(tmp_path / f"{color}.png", color)
    rows = [{"image": f"{c}.png", "caption": c} for c in COLORS]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data", str(tmp_path / "set.jsonl"), "--logs", str(tmp_path), "--name", "out", "--device", "cpu"]
    assert main(["features", "--checkpoint", "run", *arguments]) == 0
    return tmp_path / "out"


def find(folder, *more) -> int:
    return main(["search", "--features", str(folder), "--device", "cpu", *more])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_command_searches_both_ways(folder, capsys, index):
    if index != "exact":
        pytest.importorskip("faiss", reason="needs the extra `faiss`")
    capsys.readouterr()
    assert find(folder, "--k", "3", "--index", index) == 0
    texts, images = lines(folder / "search" / "text_to_image.jsonl"), lines(folder / "search" / "image_to_text.jsonl")
    names = list(COLORS)
    assert [row["text_id"] for row in texts] == list(range(7)) and [row["image_ids"][0] for row in texts] == [
        f"{name}.png" for name in names
    ]
    assert [row["image_id"] for row in images] == [f"{name}.png" for name in names]
    assert [row["text_ids"][0] for row in images] == list(range(7))
    for row in (*texts, *images):
        assert len(row["scores"]) == 3 and row["scores"] == sorted(row["scores"], reverse=True)
    assert capsys.readouterr().out.count("results: ") == 2
    # Again: another folder.
    assert find(folder, "--direction", "text_to_image", "--index", index) == 0
    (path,) = (folder / "search-2").iterdir()
    assert path.name == "text_to_image.jsonl" and len(lines(path)[0]["image_ids"]) == 7


def test_own_texts_and_pictures(folder, capsys):
    assert find(folder, "--query", "something teal", "red", "--k", "2") == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if ".png" in line]
    first = [(row[1].strip(), row[4].strip()) for row in rows if row[2].strip() == "1"]
    assert first == [("something teal", "teal.png"), ("red", "red.png")] and len(rows) == 4
    assert find(folder, "--picture", str(folder.parent / "blue.png"), "--k", "1") == 0
    assert "blue " in capsys.readouterr().out.splitlines()[-1].split("|")[5]
    assert not (folder / "search").exists()


def test_the_prefix_of_the_features_is_that_of_queries(folder, model, monkeypatch):
    about = json.loads((folder / "about.json").read_text()) | {"prefix": "a photo of "}
    (folder / "about.json").write_text(json.dumps(about))
    asked, read = [], model.tokenizer
    model.tokenizer = lambda texts: asked.extend(texts) or read(texts)
    assert find(folder, "--query", "red") == 0 and find(folder, "--query", "red", "--prefix", "") == 0
    assert asked == ["a photo of red", "red"]


@pytest.mark.parametrize("kind", ["now", "old"])
@pytest.mark.parametrize("place", ["elsewhere", "inside"])
def test_the_model_is_found_from_any_folder(tmp_path, model, monkeypatch, kind, place):
    """about.json names it as it is found from everywhere; older ones as it was called, from a folder above."""
    monkeypatch.chdir(tmp_path)
    save_color(tmp_path / "red.png", "red")
    (tmp_path / "set.jsonl").write_text('{"image": "red.png", "caption": "red"}')
    for name in ("logs/run", "model.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    task = ["features", "--checkpoint", "logs/run", "--model", "model.json", "--data", "set.jsonl", "--name", "out"]
    assert main([*task, "--device", "cpu", "--logs", "logs/eval"]) == 0
    path = tmp_path / "logs" / "eval" / "out" / "about.json"
    about = json.loads(path.read_text())
    run, named = str(tmp_path / "logs" / "run"), str(tmp_path / "model.json")
    assert (about["checkpoint"], about["model_setting"]) == (run, named)
    if kind == "old":
        path.write_text(json.dumps(about | {"checkpoint": "logs/run", "model_setting": "model.json"}))
    asked = []
    found = SimpleNamespace(load_for_inference=lambda *a, **n: asked.append((a, n)) or model)
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", found)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if place == "elsewhere" else path.parent)
    assert find(tmp_path / "logs" / "eval" / "out", "--query", "red") == 0
    ((checkpoint,), more) = asked[0]
    assert Path(checkpoint).samefile(run) and Path(more["model"]).samefile(named)


def test_what_a_search_lacks_is_said_before_the_model_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", SimpleNamespace())
    assert find(folder, "--picture", "none.png") == 2 and "none.png: no such file" in capsys.readouterr().err
    for path in folder.glob("images*"):
        path.unlink()
    assert find(folder, "--query", "red") == 2 and "holds no images" in capsys.readouterr().err


def _deep(folder, model):
    (folder / "about.json").write_text("[" * 100_000)
    return []


def _deep_rows(folder, model):
    (folder / "images.jsonl").write_text("[" * 100_000)
    return []


def _other_model(folder, model):
    model.digest = "1" * 64
    return ["--query", "red"]


def _unfinished(folder, model):
    (folder / "about.json").unlink()
    return []


def _no_texts(folder, model):
    for path in folder.glob("texts*"):
        path.unlink()
    return []


def _one_way_without_texts(folder, model):
    _no_texts(folder, model)
    return ["--direction", "image_to_text"]


def _unknown_origin(folder, model):
    for path in folder.iterdir():
        path.unlink()
    (folder / "a.img_feat.jsonl").write_text('{"image_id": 1, "feature": [1, 0, 0]}\n')
    return ["--query", "red"]


def _other_schema(folder, model):
    (folder / "about.json").write_text('{"schema": 99}')
    return []


MISTAKES = [
    (_deep, "about.json: JSON nested too deeply"),
    (_deep_rows, "images.jsonl:1: JSON nested too deeply"),
    (_other_model, "is not what made"),
    (_unfinished, "holds no about.json, so it is not finished"),
    (_no_texts, "holds no pair of images and texts"),
    (_one_way_without_texts, "holds no texts, which image_to_text needs"),
    (_unknown_origin, "name the model's checkpoint"),
    (_other_schema, "is not of schema 1"),
    (lambda folder, model: ["--k", "0"], "k: 0"),
    (lambda folder, model: ["--features", str(folder / "none")], "no such folder"),
    (lambda folder, model: ["--picture", str(folder / "none.png")], "none.png"),
]


@pytest.mark.parametrize("make, message", MISTAKES, ids=[message.split()[0] for _, message in MISTAKES])
def test_mistakes_are_one_line(folder, model, capsys, make, message):
    assert find(folder, *make(folder, model)) == (3 if "nested" in message else 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (folder / "search").exists()
