"""Top-10 predictions, recall and inverted annotations are the released scripts', byte for byte."""

import json
import shutil
from pathlib import Path

import pytest

from rwkv_clip.eval.main import main

FOLDER = Path(__file__).parent / "cn_clip" / "eval"
WAYS = {
    "t2i": ("test_texts.jsonl", "test_predictions.jsonl", "expected.json"),
    "i2t": ("test_texts.tr.jsonl", "test_tr_predictions.jsonl", "expected_tr.json"),
}


@pytest.mark.parametrize("way", WAYS)
def test_predictions_are_the_released_bytes(tmp_path, way):
    files = ["--image-feats", FOLDER / "test_imgs.img_feat.jsonl", "--text-feats", FOLDER / "test_texts.txt_feat.jsonl"]
    assert main(["knn", *map(str, files), "--direction", way, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (FOLDER / WAYS[way][1]).read_bytes()


def test_the_released_files_hold_a_tie():
    """Otherwise the comparison would say nothing about ties."""
    lines = [json.loads(line) for line in (FOLDER / "test_imgs.img_feat.jsonl").read_text().splitlines()]
    assert len({tuple(line["feature"]) for line in lines}) < len(lines)


@pytest.mark.parametrize("way", WAYS)
def test_recall_is_the_released_json(tmp_path, capsys, way):
    gold, predictions, expected = (str(FOLDER / name) for name in WAYS[way])
    assert main(["recall", gold, predictions, str(tmp_path / "out.json"), "--strict"]) == 0
    assert (tmp_path / "out.json").read_bytes() == Path(expected).read_bytes()
    printed = [f"Read standard from {gold}", f"Read user submit file from {predictions}"]
    assert capsys.readouterr().out.splitlines() == [*printed, "The evaluation finished successfully."]


def test_annotations_are_inverted_to_the_released_bytes(tmp_path):
    shutil.copy(FOLDER / "test_texts.jsonl", tmp_path)
    assert main(["invert", "--input", str(tmp_path / "test_texts.jsonl")]) == 0
    assert (tmp_path / "test_texts.tr.jsonl").read_bytes() == (FOLDER / "test_texts.tr.jsonl").read_bytes()
