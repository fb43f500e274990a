"""The evaluation's command line from arguments to files, with a stand-in for the model."""

import csv
import errno
import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from PIL import Image

import rwkv_clip
from helpers.color_model import COLORS, ColorModel, loaded, save_color
from rwkv_clip.errors import DATA
from rwkv_clip.eval.main import main
from rwkv_clip.eval.report import tables


@pytest.fixture
def model(monkeypatch):
    """The model that the command line loads; `asked` keeps its arguments."""
    found = loaded()
    found.asked = []

    def load_for_inference(checkpoint, **arguments):
        found.asked.append((checkpoint, arguments))
        if checkpoint == "none":
            raise ValueError("checkpoint: none does not exist;\nname a run folder")
        return found

    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", SimpleNamespace(load_for_inference=load_for_inference))
    return found


@pytest.fixture
def folder(tmp_path):
    for color in COLORS:
        save_color(tmp_path / "classes" / color / "0.png", color)
    rows = [{"image": f"classes/{c}/0.png", "caption": f"{c} costs $5 or $6 \ud83d"} for c in COLORS]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def retrieve(folder, *more) -> int:
    places = ["--data", str(folder / "set.jsonl"), "--logs", str(folder / "logs"), "--device", "cpu"]
    return main(["retrieval", "--checkpoint", "run", *places, *more])


def classify(folder, *more) -> int:
    return main(["classification", "--checkpoint", "run", "--logs", str(folder / "logs"), "--device", "cpu", *more])


def only_result(folder) -> tuple:
    (path,) = (path for path in (folder / "logs").iterdir() if path.name != "cache")
    return path, json.loads((path / "result.json").read_text())


def test_retrieval_writes_result_table_and_gallery(folder, model, capsys):
    assert retrieve(folder, "--batch-size", "3", "--prefix", "a photo of ") == 0
    path, result = only_result(folder)
    assert result["model"] == "colors" and result["checkpoint_sha256"] == "0" * 64 and result["task"] == "retrieval"
    assert result["settings"]["batch_size"] == 3 and result["seconds"] > 0
    (entry,) = result["results"]
    assert entry["dataset"] == f"{folder.name}/set"
    assert (entry["images"], entry["captions"]) == (len(COLORS), len(COLORS))
    assert entry["metrics"]["text_to_image_R@1"] == 1.0 and entry["prefix"] == "a photo of "
    with Image.open(path / "retrieval.png") as picture:
        assert picture.width > 800
    shown = capsys.readouterr().out
    assert "| colors | " in shown and str(path) in shown
    assert (path / "table.md").read_text() in shown
    rows = list(csv.reader((path / "table.csv").open()))
    assert rows[1][0] == "colors" and rows[1][5:] == ["100.0"] * 7
    assert model.asked == [("run", {"model": None, "device": "cpu", "precision": "fp32"})]


def test_gallery_frames_the_right_picture(folder, model):
    assert retrieve(folder, "--gallery", "1") == 0
    path, _ = only_result(folder)
    with Image.open(path / "retrieval.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert (44, 160, 44) in colors  # tab:green: the frame
    assert (255, 127, 14) not in colors  # tab:orange: right picture outside the best five


def test_gallery_shows_a_right_picture_that_was_not_found(folder, model):
    class Backwards(ColorModel):
        def encode_text(self, tokens, normalize=False):
            return -super().encode_text(tokens, normalize)

    model.model = Backwards()
    assert retrieve(folder) == 0
    path, _ = only_result(folder)
    with Image.open(path / "retrieval.png") as picture:
        assert (255, 127, 14) in {color for _, color in picture.convert("RGB").getcolors(1 << 20)}


def test_no_gallery(folder, model):
    assert retrieve(folder, "--gallery", "0") == 0
    path, _ = only_result(folder)
    assert sorted(file.name for file in path.iterdir()) == [
        "bars.png",
        "page.html",
        "result.json",
        "table.csv",
        "table.md",
        "table.tex",
    ]


def test_runs_never_share_a_folder(folder, model):
    for _ in range(3):
        assert retrieve(folder, "--gallery", "0", "--name", "mine") == 0
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["mine", "mine-2", "mine-3"]


def test_published_rows_stand_below_the_same_set_only():
    metrics = {f"{way}_R@{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    result = {"dataset": "flickr30k", "status": "done", "split": "test", "images": 1000, "captions": 5000}
    result["metrics"] = metrics | {"mean_recall": 0.5}

    def rows(result: dict) -> list[list[str]]:
        return tables.list_sets({"task": "retrieval", "model": "ours", "results": [result]}).rows

    assert [row[0] for row in rows(result)][:2] == ["ours", tables.PUBLISHED_MODEL]
    assert rows(result)[1][5:] == ["76.0", "94.7", "97.6", "57.6", "82.3", "88.7", "82.8"]
    assert len(rows(result | {"images": 999})) == 1
    assert len(rows(result | {"dataset": "flickr8k"})) == 1


def test_classification_goes_on_past_missing_and_failing_sets(folder, model, capsys):
    pytest.importorskip("torchvision")
    for name in ("cat", "dog"):
        save_color(folder / "sets" / name / "0.png", "red")
    (folder / "sets" / "dog" / "1.png").write_bytes(b"broken")
    datasets = ["--dataset", "food101", "cifar10", "--data", str(folder / "sets")]
    assert classify(folder, *datasets) == 2
    path, result = only_result(folder)
    assert [entry["status"] for entry in result["results"]] == ["skipped", "failed"]
    assert "food-101.tar.gz" in result["results"][0]["reason"] and "1.png" in result["results"][1]["reason"]
    captured = capsys.readouterr()
    assert "skipped: food101: " in captured.err and "Traceback" not in captured.err
    assert "skipped: " in (path / "table.md").read_text()


def test_result_of_a_set_survives_a_crash_in_the_next(folder, model, monkeypatch):
    from rwkv_clip.eval.tasks import classification

    done = classification.evaluate_classification

    def crash_later(*arguments, **named):
        monkeypatch.setattr(classification, "evaluate_classification", lambda *a, **n: 1 / 0)
        return done(*arguments, **named)

    monkeypatch.setattr(classification, "evaluate_classification", crash_later)
    classes = ["--dataset", "imagefolder", "imagefolder", "--data", str(folder / "classes")]
    with pytest.raises(ZeroDivisionError):
        classify(folder, *classes)
    _, result = only_result(folder)
    assert result["results"][0]["metrics"]["top1"] == 1.0


def test_classification_result_and_table(folder, model, capsys):
    assert classify(folder, "--data", str(folder / "classes")) == 0
    _, result = only_result(folder)
    (entry,) = result["results"]
    assert (entry["headline"], entry["metrics"]["top1"], entry["metrics"]["samples"]) == (
        "top1",
        1.0,
        len(COLORS),
    )
    assert entry["templates"] == ["a photo of a {}."] and entry["dataset"].endswith("/classes")
    assert "100.0" in capsys.readouterr().out


def test_published_figure_beside_a_subset_is_marked():
    metrics = {"top1": 0.5, "top5": 0.9, "mean_per_class": 0.4, "samples": 2000, "classes": 10}
    metrics["classes_without_samples"] = ["frog"]
    result = {"dataset": "cifar10", "status": "done", "split": "test", "headline": "top1", "note": ""}
    run = {"task": "classification", "model": "ours", "results": [result | {"metrics": metrics}]}
    table = tables.list_sets(run)
    named = dict(zip(table.header, *table.rows))
    assert (named["ours"], named[tables.PUBLISHED_MODEL]) == ("50.0", "79.8")
    assert "2000 of 10000 pictures" in named["note"] and "left out: frog" in named["note"]


def test_a_damaged_picture_is_damaged_data(folder, model, capsys):
    (folder / "classes" / next(iter(COLORS)) / "0.png").write_bytes(b"no picture")
    assert retrieve(folder) == DATA
    assert "0.png: not a picture" in capsys.readouterr().err


MISTAKES = [
    (["--checkpoint", "none"], "checkpoint: none does not exist; name a run folder"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--split", "test"], "split 'test' is not in the file"),
    (["--batch-size", "0"], "batch_size: 0"),
    (["--workers", "-1"], "workers: -1"),
    (["--gallery", "-1"], "gallery: -1"),
    (["--device", "abacus"], "device: 'abacus'"),
    (["--name", "a/b"], "name: 'a/b'"),
    (["--texts", "raw"], "no .rec"),
    (["--views", "raw"], "no .rec"),  # its name until 0.5.0
]


@pytest.mark.parametrize(("more", "message"), MISTAKES)
def test_mistakes_are_one_line_and_code_2(folder, model, capsys, more, message):
    assert retrieve(folder, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (folder / "logs").exists() or not list((folder / "logs").iterdir())


def test_unknown_arguments_exit_with_2(folder, model):
    with pytest.raises(SystemExit) as stopped:
        retrieve(folder, "--batchsize", "3")
    assert stopped.value.code == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_runs(folder, model, precision):
    model.precision = precision
    assert retrieve(folder, "--precision", precision, "--gallery", "0") == 0
    _, result = only_result(folder)
    assert result["environment"]["precision"] == precision


def _raise_inside(*errors: Exception):
    """A function that raises the last of the errors while it handles those before, as libraries do."""

    def create_model(*arguments, **named):
        for inner, outer in pairwise(errors):
            outer.__context__ = inner
        raise errors[-1]

    return create_model


class ConnectError(Exception):
    """As httpx has it: no error of the system."""


ConnectError.__module__ = "httpx._exceptions"
FAILED = RuntimeError("Failed to download weights for tag 'openai': no route")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "errors, code, words",
    [
        ([FileNotFoundError("cannot be found in the cache"), FAILED], 2, "'openai' must be downloaded once"),
        ([ConnectError("no address"), FAILED], 2, "'openai' must be downloaded once"),
        ([OSError(errno.ENETUNREACH, "Network is unreachable"), FAILED], 2, "'openai' must be downloaded once"),
        ([FULL, FAILED], 76, "No space left on device"),
        ([MemoryError(), RuntimeError("no weights")], 2, "out of memory"),
    ],
    ids=["not cached", "httpx", "no route", "disk full", "memory"],
)
def test_a_tag_that_cannot_be_fetched_is_one_line(folder, monkeypatch, capsys, errors, code, words):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", _raise_inside(*errors))
    assert main(["retrieval", "--checkpoint", "open_clip:ViT-B-32:openai", "--data", str(folder / "set.jsonl")]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_an_error_of_ours_in_a_model_is_no_matter_of_networks(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", _raise_inside(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        rwkv_clip.create_model("ViT-B-32", "openai")
