"""Commands that write Chinese-CLIP's files say before they begin that an output cannot be written, and replace no
input."""

import json

import pytest

from rwkv_clip.errors import SETTING
from rwkv_clip.eval import main as evaluation

FEATURES = {"image": "images.jsonl", "text": "texts.jsonl"}
PLACES = [("absent/out", "is to be in absent, which is no folder"), (".", "is a folder"), (None, "is an input")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, name in FEATURES.items():
        (tmp_path / name).write_text(json.dumps({f"{kind}_id": 1, "feature": [0.6, 0.8]}) + "\n")
    (tmp_path / "gold.jsonl").write_text('{"text_id": 1, "text": "x", "image_ids": [1]}\n')
    return tmp_path


@pytest.mark.parametrize(("place", "words"), PLACES)
@pytest.mark.parametrize("command", ["knn", "recall", "features"])
def test_outputs(folder, capsys, command, place, words):
    arguments = {
        "knn": ["--image-feats", FEATURES["image"], "--text-feats", FEATURES["text"], "--output"],
        "recall": ["gold.jsonl", FEATURES["text"]],
        "features": ["--data", "gold.jsonl", "--checkpoint", "absent", "--to", "chinese-clip", "--sides", "texts"],
    }[command]
    arguments += ["--text-feat-output-path"] if command == "features" else []
    output = place or {"knn": FEATURES["image"]}.get(command, "gold.jsonl")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert evaluation.main([command, *arguments, output]) == SETTING
    assert words in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
