"""The bench beside open_clip's trainer: both commands are understood, both logs are read, both get the same pairs."""

import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

bench = pytest.importorskip("open_clip_run", reason="pip install -e '.[bench]'")
params = pytest.importorskip("open_clip_train.params", reason="open_clip_torch comes with its trainer")
from rwkv_clip.training.main import read_command_line  # noqa: E402


@pytest.fixture
def args(tmp_path) -> Namespace:
    given = ["--data", str(tmp_path / "captions.jsonl"), "--work", str(tmp_path / "work"), "--epochs", "2"]
    (tmp_path / "captions.jsonl").touch()
    found = bench.read_command_line(given)
    found.pairs = 2048
    return found


def test_both_commands_ask_for_the_same(args, capsys):
    job = bench.Job("seed-1", 1, 2)
    ours = read_command_line([str(word) for word in bench.ours(args, job)[3:]])
    theirs = params.parse_args([str(word) for word in bench.theirs(args, job)[4:]])
    assert capsys.readouterr().err == "", "no flag of ours is taken for open_clip's"
    parallel, optimizer = ours.parallel, ours.optimizer
    for name in ("lr", "wd", "beta1", "beta2", "eps", "grad_clip_norm", "warmup", "epochs"):
        assert getattr(optimizer, name) == getattr(theirs, name), name
    assert (parallel.batch_size, parallel.precision) == (theirs.batch_size, theirs.precision)
    assert optimizer.schedule == theirs.lr_scheduler and optimizer.opt == theirs.opt
    assert (ours.run.seed, ours.run.name, ours.run.resume) == (theirs.seed, theirs.name, theirs.resume)
    assert ours.data.train_data == theirs.train_data and ours.model.pretrained == theirs.pretrained


def test_logs_are_read(args):
    line = (
        "2026-11-29,15:04:57 | INFO | Train Epoch: 1 [ 256/2048 (12%)] Data (t): 0.008 Batch (t): 4.116, 14.3900/s, "
        "14.3900/s/gpu LR: 0.000900 Logit Scale: 14.202 Contrastive_loss: 4.4138 (4.6180) Loss: 4.4138 (4.6180)\n"
    )
    ours = [{"step": 10, "loss": 4.5, "samples_per_second": 64.0}, {"step": 10, "val_loss": 1.0}]
    for program, name, text in (
        ("open_clip", "out.log", "Start epoch 1\n" + line),
        ("ours", "log.jsonl", "".join(json.dumps(row) + "\n" for row in ours)),
    ):
        (args.work / program / "seed-0").mkdir(parents=True)
        (args.work / program / "seed-0" / name).write_text(text)
    job = bench.Job("seed-0", 0, 2)
    found = [bench.read_log(args, program, job) for program in ("open_clip", "ours")]
    assert found[0] == [{"step": 16 + 2, "loss": 4.4138, "seconds_per_step": 4.116}]
    assert found[1] == [{"step": 10, "loss": 4.5, "seconds_per_step": 2.0}]
    assert [bench.last_step(args, program, job) for program in ("open_clip", "ours")] == [18, 10]


def test_pairs_fill_their_batches(args, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LARGE", 4)
    rows = []
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.jpg")
        split = "train" if i < 3 else "test"
        rows.append({"image": f"{i}.jpg", "captions": ["a\tb", "c  d", "e", "f"], "split": split})
    args.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench.write_data(args) == 8  # of three pictures with three captions each
    header, *lines = (args.work / "data" / "train.csv").read_text().splitlines()
    assert header == "filepath\ttitle" and len(lines) == 8 and lines[0] == "images/0.jpg\ta b"
    assert all((args.work / "data" / line.partition("\t")[0]).exists() for line in lines)
