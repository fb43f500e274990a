"""Evaluation whose results find no room, and mistakes that are seen before any model is loaded."""

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.color_model import COLORS, loaded, save_color
from rwkv_clip.data.records import Header, RecordWriter, pack
from rwkv_clip.eval.main import main
from rwkv_clip.eval.report import files
from rwkv_clip.files import write_whole


@pytest.fixture
def asked(monkeypatch):
    """The model that the command line loads; how often it was asked for."""
    calls = []
    found = SimpleNamespace(load_for_inference=lambda *a, **n: calls.append(a) or loaded())
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", found)
    return calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for color in COLORS:
        save_color(tmp_path / "set" / color / "0.png", color)
    rows = [{"image": f"set/{c}/0.png", "caption": c} for c in COLORS]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(task: str, *more: str) -> int:
    return main([task, "--checkpoint", "x", "--logs", "logs", "--name", "run", "--device", "cpu", *more])


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


PICTURES = ["bars.png", "retrieval.png", "page.html"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_finds_no_room_costs_only_itself(folder, asked, monkeypatch, capsys, name):
    def write(path, pieces):
        full(path) if path.name == name else write_whole(path, pieces)

    monkeypatch.setattr(files, "write_whole", write)
    assert run("retrieval", "--data", "set.jsonl") == 0
    out, err = capsys.readouterr()
    assert "| colors | " in out and f"missing: logs/run/{name}: No space left on device" in err
    left = {path.name for path in Path("logs/run").iterdir()}
    assert left == {"result.json", "table.md", "table.csv", "table.tex", *PICTURES} - {name}
    assert json.loads(Path("logs/run/result.json").read_text())["results"][0]["metrics"]["mean_recall"] == 1.0


@pytest.mark.parametrize("task, data", [("retrieval", "set.jsonl"), ("classification", "set"), ("linear-probe", "set")])
def test_results_that_find_no_room_are_printed_all_the_same(folder, asked, monkeypatch, capsys, task, data):
    def write(path, pieces):
        full(path) if path.parent.name == "run" else write_whole(path, pieces)

    monkeypatch.setattr(files, "write_whole", write)
    for _ in ("a", "b"):
        [save_color(folder / "set" / color / "1.png", color) for color in COLORS]
    more = ["--split-test", "0.5", "--l2", "1"] if task == "linear-probe" else []
    assert run(task, "--data", data, *more) == 76
    out, err = capsys.readouterr()
    assert "100.0" in out and "missing: logs/run/result.json: No space left on device" in err
    assert not Path("logs/run/result.json").exists()


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_said_before_any_model(folder, asked, monkeypatch, capsys, error):
    def fail(dir):
        raise OSError(error, os.strerror(error), str(dir))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fail)
    assert run("retrieval", "--data", "set.jsonl") == 76
    err = capsys.readouterr().err
    assert err.startswith(f"error: logs: {os.strerror(error)}; ") and err.count("\n") == 1 and not asked


def _cut(folder: Path) -> list[str]:
    (folder / "names.json").write_text('{"names": ["a"]}')
    return ["classification", "--data", "set", "--names", "names.json"]


def _label(folder: Path) -> list[str]:
    with RecordWriter(folder / "val") as writer:
        for key, label in enumerate((0.0, 1000.0)):
            writer.write(key, pack(Header(0, label, key, 0), (folder / "set" / "red" / "0.png").read_bytes()))
    return ["classification", "--dataset", "imagenet", "--data", "."]


BEFORE = [
    (_label, "record 1: its label is 1000.0"),
    (lambda folder: ["retrieval", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (lambda folder: ["retrieval", "--data", "set.jsonl", "--split", "test"], "split 'test'"),
    (lambda folder: ["retrieval", "--data", "set.jsonl", "--image-root", "no"], "set image_root"),
    (lambda folder: ["classification", "--data", "nowhere"], "nowhere holds no class folders"),
    (lambda folder: ["classification", "--data", "set", "--dataset", "cifar1"], "'cifar1' is not known"),
    (_cut, "1 names for 7 class folders"),
    (lambda folder: ["linear-probe", "--data", "set"], "no folders train and test"),
    (lambda folder: ["features", "--data", "set", "--dataset", "imagefolder", "--split", "test"], "split: not allowed"),
    (lambda folder: ["features", "--data", "nowhere", "--dataset", "imagefolder"], "nowhere holds no class folders"),
]


@pytest.mark.parametrize("make, message", BEFORE, ids=[message for _, message in BEFORE])
def test_what_is_wrong_with_the_data_is_said_before_the_model_is_loaded(folder, asked, capsys, make, message):
    task, *more = make(folder)
    assert run(task, *more) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not asked and not Path("logs").exists()


def test_names_are_shown_and_not_obeyed(folder, asked, capsys):
    """Names from a set of somebody else: no markup and no control sequence in what is printed and written."""
    save_color(folder / "set" / "<b>\x1b[2J|x" / "0.png", "red")
    (folder / "set" / "notes\x1b[2J<b>.txt").write_text("")
    rows = [{"image": "set/<b>\x1b[2J|x/0.png", "captions": ["red"] * 2}]
    (folder / "set.jsonl").write_text(json.dumps(rows[0]))
    assert run("retrieval", "--data", "set.jsonl", "--dataset", "<b>\x1b[2J") == 0
    out = capsys.readouterr().out
    table, page = Path("logs/run/table.md").read_text(), Path("logs/run/page.html").read_text()
    assert not any("<b>" in text for text in (out, table, page)) and "\x1b" not in out + table
    assert "captions repeat one of the same picture" in out


def test_captions_that_are_cut_are_in_the_result(folder, monkeypatch, capsys):
    from rwkv_clip.tokenizer import make_tokenizer

    found = loaded()
    found.tokenizer = make_tokenizer(context=5)
    found.model.encode_text = lambda tokens, normalize=False: found.model.table[1 + tokens[:, :1] % 7].sum(1) / 9
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", SimpleNamespace(load_for_inference=lambda *a, **n: found))
    rows = [{"image": f"set/{c}/0.png", "caption": f"{c} and blue and red"[: 20 if c < "r" else 3]} for c in COLORS]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("retrieval", "--data", "set.jsonl") == 0
    cut = sum(c < "r" for c in COLORS)
    (entry,) = json.loads(Path("logs/run/result.json").read_text())["results"]
    assert entry["captions_cut"] == cut and f"{cut} of 7 captions are longer than the context of 5" in entry["note"]
    assert entry["note"] in capsys.readouterr().out
