"""The bench of Chinese towers: its shared sentences, its flags, its table and picture."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def chinese(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("chinese")


@pytest.mark.parametrize(
    "sentences, kind",
    [
        (["在雪地中奔跑的狗。", "雪地里狗。"], "一只狗在雪地上。"),
        (["一个小男孩站在车旁边。"], "一个男孩。"),
        (["小孩子在草坪上玩球。"], "一个小孩在草地上。"),
        (["两个女人和一个男人"], "一个女人。"),
        (["自行车停着"], "有人。"),
    ],
)
def test_shared_sentence_names_who_and_where(chinese, sentences, kind):
    assert chinese.name_kind(sentences) == kind


def test_models_are_models_of_ours(chinese):
    from rwkv_clip.factory import resolve_spec

    for spec in chinese.MODELS.values():
        tokenizer = resolve_spec(spec)[1].tokenizer()
        assert (tokenizer.name, tokenizer.context) == ("bert-chinese", chinese.CONTEXT)


def test_fine_tunings_differ_in_the_positives_only(chinese, tmp_path):
    args = chinese.read_command_line(["--data", str(caption_file(tmp_path)), "--work", str(tmp_path / "work")])
    plain, masked = (chinese.make_flags(args, label, 1) for label in chinese.FINE_TUNINGS)
    assert {key for key in plain if plain[key] != masked[key]} == {"positives"}
    assert plain["pretrained"] == tmp_path / "work/runs/vit-bert-1"


def test_files_without_chinese_sentences_are_refused(chinese, tmp_path, capsys):
    (tmp_path / "english.jsonl").write_text('{"image": "a.jpg", "captions": ["a dog"]}\n')
    with pytest.raises(SystemExit):
        chinese.read_command_line(["--data", str(tmp_path / "english.jsonl")])
    assert "its first line has no captions_zh" in capsys.readouterr().err


def test_table_and_picture_hold_every_run(chinese, tmp_path, monkeypatch):
    def result(label: str, seed: int) -> dict:
        found = {name: 10.0 * (seed + 1) for name in chinese.RECALLS}
        about = {"images": 500, "captions": 2256, "difference": 0.0, "duplicates": [0.4], "kinds": found}
        return {"method": label, "seed": seed, **found, **about, "mean_recall": 10.0 * (seed + 1)}

    labels = [*chinese.MODELS, *chinese.FINE_TUNINGS]
    monkeypatch.setattr(chinese, "run_all", lambda args: [result(label, seed) for label in labels for seed in (0, 1)])
    places = ["--work", str(tmp_path), "--output", str(tmp_path / "out"), "--figures", str(tmp_path / "figure")]
    chinese.main(["--data", str(caption_file(tmp_path)), "--repeats", "2", "--commit", "abc", *places])
    (path,) = (tmp_path / "out").glob("chinese-*.json")
    kept = json.loads(path.read_text())
    assert [row["contender"] for row in kept["rows"]] == labels
    assert all(row["figures"]["mean_recall"] == 15 and row["figures"]["largest"] == 20 for row in kept["rows"])
    assert len(kept["runs"]) == 10 and kept["runs"][0]["text_to_image_R@1"] == 0.1
    assert (tmp_path / "figure" / "flickr8k_chinese.png").stat().st_size > 10_000


def caption_file(folder: Path) -> Path:
    file = folder / "captions.jsonl"
    file.write_text(json.dumps({"image": "a.jpg", "captions_zh": ["狗"], "split": "test"}) + "\n")
    return file


def teardown_module():
    sys.modules.pop("chinese", None)
