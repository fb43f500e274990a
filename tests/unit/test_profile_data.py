"""profile_data: every stage gets a number, and the sentence names the stage that the numbers say."""

import sys

import numpy as np
import pytest
from PIL import Image

from helpers.tiny import make_tiny
from rwkv_clip.data.records import Header, RecordWriter, pack
from rwkv_clip.training import profile_data
from rwkv_clip.training.profile_data import ProfileSettings, Rates, find_limit, run


def rates(**changes) -> Rates:
    usual = {"read": 10_000, "decode": 1000, "resize": 4000, "collate": 5000, "loader": 1400, "step": None}
    return Rates(**{**usual, "workers": 2, "cores": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": 700}, ["training step limits", "700 images/s", "gives 1,400, 2.0 times"]),
        ({"step": 3000}, ["data limit this run", "takes 3,000", "decoding", "--max-side"]),
        ({}, ["data limit the loader", "1,400 images/s", "decoding"]),
        ({"cores": 8}, ["decoding", "raise --workers, 2 of 8"]),
        ({"read": 300}, ["reading records", "faster disk"]),
        ({"resize": 500}, ["crop and resize", "--max-side"]),
        ({"collate": 900, "cores": 8}, ["collating", "more workers do not help"]),
        ({"workers": 0, "collate": 900}, ["decoding"]),  # one process decodes 740/s, it copies faster than that
        ({"dali": True, "cores": 8}, ["DALI (decoding and resizing)", "raise --workers"]),
    ],
)
def test_the_sentence_follows_from_the_numbers(changes, says):
    sentence = find_limit(rates(**changes))
    assert all(part in sentence for part in says), sentence


@pytest.fixture(scope="module")
def tiny(new_folder) -> dict[str, str]:
    return make_tiny(new_folder("tiny"))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_stage_is_measured(tiny, workers):
    settings = {"batch_size": 8, "workers": workers, "seconds": 0.02, "loader": "torch", "device": "cpu"}
    lines = []
    found = run(ProfileSettings(tiny["train_data"], tiny["model"], precision="fp32", **settings), lines.append)
    assert min(found.read, found.decode, found.resize, found.collate, found.loader, found.step) > 0
    assert lines[0].startswith("60 records, 32 x 32 px") and len(lines) == 8
    assert lines[-1] == find_limit(found)


def test_data_are_read_as_in_training(tmp_path, monkeypatch, capsys):
    """A table with names of its own: refused until they are said."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for i in range(4):
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg")
    lines = "\n".join(f"{i}.jpg|a dog" for i in range(4))
    (tmp_path / "table.csv").write_text(f"place|words\n{lines}\n")
    few = ["--train-data", str(tmp_path / "table.csv"), "--device", "cpu", "--seconds", "0.02", "--image-size", "32"]
    few += ["--workers", "0", "--batch-size", "2", "--csv-separator", "|"]
    assert end_of_main(monkeypatch, few) == 2 and "--csv-img-key" in capsys.readouterr().err
    assert end_of_main(monkeypatch, [*few, "--csv-img-key", "place", "--csv-caption-key", "words"]) == 0
    assert capsys.readouterr().out.startswith("4 records, 32 x 32 px")
    assert end_of_main(monkeypatch, [*few, "--csv-separator", "ab"]) == 2
    assert "csv_separator: 'ab' is not one character" in capsys.readouterr().err


def test_model_and_records_must_fit(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--train-data", tiny["train_data"], "--model", "RWKV-CLIP-Ti-8", "--device", "cpu"]
    monkeypatch.setattr(profile_data, "check_records", lambda *_: (_ for _ in ()).throw(ValueError("not ours")))
    assert end_of_main(monkeypatch, arguments) == 2
    assert "error: not ours" in capsys.readouterr().err


def test_wrong_settings_and_bad_data_end_with_their_codes(tiny, tmp_path, monkeypatch, capsys):
    assert end_of_main(monkeypatch, ["--train-data", str(tmp_path / "none")]) == 2
    assert "names no .rec file" in capsys.readouterr().err
    assert end_of_main(monkeypatch, ["--train-data", tiny["train_data"], "--workers", "-1"]) == 2
    assert "workers: -1 must be at least 0" in capsys.readouterr().err
    with RecordWriter(tmp_path / "bad") as writer:
        for i in range(3):
            writer.write(i, pack(Header(0, np.zeros(77, np.float32), i, 0), b"not a picture"))
    assert end_of_main(monkeypatch, ["--train-data", str(tmp_path / "bad"), "--device", "cpu"]) == 3
    assert "no good record" in capsys.readouterr().err


def end_of_main(monkeypatch, arguments: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["profile_data", *arguments])
    with pytest.raises(SystemExit) as ended:
        profile_data.main()
    return ended.value.code
