"""Wrong settings and wrong records end before any work: exit 2, field, value, remedy, no traceback."""

import contextlib
import dataclasses
import io
import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import make_tiny
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.records import Header, RecordSet, RecordWriter, pack
from rwkv_clip.factory import parse_spec, resolve_spec
from rwkv_clip.models.rwkv import ImageTowerConfig, TextTowerConfig
from rwkv_clip.models.two_tower import ModelConfig
from rwkv_clip.training import main as training
from rwkv_clip.training.main import check_records, read_command_line
from rwkv_clip.training.settings import Settings, load_settings, parse_settings

LONG = "9" * 30

# Arguments, then words that the message must hold: the field, the value and what to do.
COMMAND_LINE = [
    ("--lr fast", "lr", "fast", "float"),
    ("--lr -1", "lr", "-1", "more than 0"),
    ("--lr nan", "lr", "nan", "finite"),
    ("--lr 1e999", "lr", "inf", "finite"),
    ("--lr=", "lr", "''", "float"),
    ("--epochs 1.5", "epochs", "1.5", "int"),
    ("--epochs 0", "epochs", "0", "at least 1"),
    (f"--epochs {LONG}", "epochs", "30 digits", "at most"),
    ("--batchsize 3", "batchsize", "3", "--batch-size"),
    ("--batch-size", "batch-size", "Missing", "1 value"),
    ("--batch-size 0", "batch_size", "0", "at least 1"),
    (f"--batch-size {LONG}", "batch_size", "30 digits", "at most"),
    ("--accum-freq 1e3", "accum-freq", "1e3", "int"),
    ("--precision fp8", "precision", "fp8", "bf16"),
    ("--seed -1", "seed", "-1", "at least 0"),
    (f"--seed {LONG}", "seed", "30 digits", "at most"),
    ("--crop-area 0.9 0.7", "crop_area", "(0.9, 0.7)", "increasing"),
    ("--crop-area 0.5 1.5", "crop_area", "1.5", "up to 1"),
    ("--crop-area 0.9", "crop-area", "Missing", "2 values"),
    ("--crop-aspect 0 1", "crop_aspect", "(0.0, 1.0)", "positive"),
    ("--flip 2", "flip", "2", "at most 1"),
    ("--report-to mlflow", "report-to", "mlflow", "wandb"),
    ("--resume latest", "name", "latest", "needs the run's name"),
    ("--preset nothing", "preset", "nothing", "demo"),
    ("--preset", "preset", "needs a value", "demo"),
    ("--preset /nowhere.json", "/nowhere.json", "cannot be read", "No such file"),
    ("--timeout 0", "timeout", "0", "more than 0"),
    ("--max-ranks 3", "max_ranks", "3", "power of two"),
    ("--grad-clip-norm 0", "grad_clip_norm", "0", "more than 0"),
    ("--workers -1", "workers", "-1", "at least 0"),
    ("--max-bad -1", "max_bad", "-1", "at least 0"),
    ("--max-bad-share 1.5", "max_bad_fraction", "1.5", "at most 1"),
    ("--name ../other", "name", "../other", "--logs"),
    ("--text-choice two", "text-choice", "two", "first"),
    ("--text-probs 0.5 0.4", "text_probs", "[0.5, 0.4]", "sum 1"),
    ("--text-probs 1.5 -0.5", "text_probs", "[1.5, -0.5]", "0 or more"),
    ("--text-probs nan 1", "text_probs", "nan", "not a finite"),
    ("--text-probs 0.5 0.5 --text-choice all", "text_probs", "all", "leave it out"),
    ("--text-probs 0.5 0.5 --texts 3", "text_probs", "2 numbers", "one for each"),
    ("--texts 0", "texts", "0", "at least 1"),
    ("--max-steps none", "max-steps", "none", "INT"),
    ("--warmup -1", "warmup", "-1", "at least 0"),
    ("--warmup 0.1", "warmup", "0.1", "--warmup-fraction"),
    ("--warmup-fraction 1", "warmup_fraction", "1", "less than 1"),
    ("--precision bf16", "precision", "bf16", "--precision amp_bf16"),
    ("--drop-path 1", "drop_path", "1", "less than 1"),
    ("--beta1 1", "beta1", "1", "less than 1"),
    ("--eps 0", "eps", "0", "more than 0"),
    ("--keep-checkpoints 1", "keep_checkpoints", "1", "at least 2"),
    ("--save-every-n-steps 0", "save_every_n_steps", "0", "at least 1"),
    ("--allow-change learning", "allow_change", "learning", "not a setting"),
    ("--deterministic --parallel fsdp", "deterministic", "fsdp", "needs parallel ddp"),
    ("--cycle-beta1", "cycle_beta1", "cosine", "needs schedule onecycle"),
]
PRESETS = [
    ('{"batchsize": 3}', "batchsize", "unknown", "batch_size"),
    ('{"lr": "1"}', "lr", "'1'", "float"),
    ('{"lr": true}', "lr", "True", "float"),
    ('{"lr": null}', "lr", "None", "float"),
    ('{"lr": NaN}', "lr", "nan", "finite"),
    ('{"lr": Infinity}', "lr", "inf", "finite"),
    ('{"epochs": 3.0}', "epochs", "3.0", "int"),
    ('{"epochs": true}', "epochs", "True", "int"),
    (f'{{"epochs": 1{"0" * 400}}}', "epochs", "401 digits", "at most"),
    ('{"crop_area": [0.7]}', "crop_area", "[0.7]", "2 values"),
    ('{"crop_area": [0.7, "1"]}', "crop_area", "'1'", "float"),
    ('{"report_to": "wandb"}', "report_to", "'wandb'", "list"),
    ('{"schedule": []}', "schedule", "[]", "cosine"),
    ('{"name": "a\\u0000b"}', "name", "NUL", "leave"),
    ('{"image": {}}', "image", "unknown", "did you mean"),
    ("[1]", "Settings", "[1]", "table of settings"),
    ("", "preset.json", "JSON", "char 0"),
    ('{"lr": 1', "preset.json", "JSON", "char"),
    ("[" * 100_000, "preset.json", "JSON", "nested too deeply"),
    ("\udcff", "preset.json", "not UTF-8", "save it as UTF-8"),
]


def complain(call, *arguments) -> str:
    """What the user reads; anything but ConfigError and an exit with code 2 is a failure of the test."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            call(*arguments)
        except ConfigError as error:
            return str(error)
        except SystemExit as stop:
            assert stop.code == 2
            return said.getvalue()
    pytest.fail(f"{arguments} was taken")


def test_there_are_sixty():
    assert len(COMMAND_LINE) + len(PRESETS) >= 60


@pytest.mark.parametrize("line, field, value, remedy", COMMAND_LINE, ids=[case[0][:40] for case in COMMAND_LINE])
def test_command_line(line, field, value, remedy):
    said = complain(read_command_line, ["--train-data", "x", *line.split()])
    said = " ".join(said.replace("│", " ").split())
    assert field in said and value in said and remedy in said and "Traceback" not in said, said


@pytest.mark.parametrize("text, field, value, remedy", PRESETS, ids=[case[0][:30] for case in PRESETS])
def test_preset(text, field, value, remedy, tmp_path):
    path = tmp_path / "preset.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    said = complain(read_command_line, ["--train-data", "x", "--preset", str(path)])
    assert field in said and value in said and remedy in said and "Traceback" not in said, said


def test_names_that_no_file_can_have():
    for name in ("a\0b.json", "x" * 5000 + ".json", "\ud800.json"):
        complain(load_settings, name)
        complain(resolve_spec, name)


VALUES = [None, True, False, 0, -1, 1, 3, 10**30, -(10**400), 1.5, float("nan"), float("-inf"), "", "x", "latest"]
VALUES += ["\ud800", "a\0", "bf16", [], [1], [0.5, 1], [[]], {}, {"a": 1}, "0" * 1000]


def test_two_thousand_random_documents_give_settings_or_config_errors():
    draw = random.Random(0)
    names = [f.name for f in dataclasses.fields(Settings)]
    parts = [f.name for cls in (ImageTowerConfig, TextTowerConfig) for f in dataclasses.fields(cls)]
    taken = refused = 0
    for trial in range(2000):
        if trial % 2:
            data = {draw.choice([*names, "junk", ""]): draw.choice(VALUES) for _ in range(draw.randrange(6))}
            read, data = partial(parse, Settings), data if trial % 50 else draw.choice(VALUES)
        else:
            inner = [{draw.choice(parts): draw.choice(VALUES) for _ in range(3)}, draw.choice(VALUES)]
            data = {draw.choice(["image", "text", "tokenizer", "junk"]): draw.choice(inner) for _ in range(3)}
            read = ModelConfig.parse
        try:
            read(data)
            taken += 1
        except ConfigError as error:
            assert error.problems and all(problem.strip() for problem in error.problems)
            refused += 1
    assert taken > 50 and refused > 1000


# ---- records that do not fit the model


@pytest.fixture(scope="module")
def data(new_folder):
    return make_tiny(new_folder("tiny"))


def write(prefix: Path, labels: np.ndarray, side: dict | None = None) -> RecordSet:
    with RecordWriter(prefix) as writer:
        for i, row in enumerate(labels):
            writer.write(i, pack(Header(0, row, i, 0), b"picture"))
    if side is not None:
        Path(f"{prefix}.json").write_text(json.dumps({"schema": 1, **side}))
    return RecordSet(prefix)


def model(context=8, vocab=49408) -> ModelConfig:
    return ModelConfig(text=TextTowerConfig(context=context, vocab=vocab))


SMALL_VOCABULARY = parse_spec({"embed_dim": 4, "vision_cfg": {}, "text_cfg": {"context_length": 8, "vocab_size": 99}})
IDS = np.arange(2400, dtype=np.float32).reshape(100, 24)
SIDE = {"views": ["raw", "synthetic", "generated"], "context": 8, "tokenizer": "clip-bpe", "vocab_size": 49408}


@pytest.mark.parametrize(
    "change, spec, words",
    [
        ({"tokenizer": "wordpiece"}, model(), ("'wordpiece'", "'clip-bpe'")),
        ({"vocab_size": 49407}, model(), ("49407", "49408")),
        ({"vocab_size": 49409}, model(), ("49409", "49408")),
        ({}, model(vocab=49407), ("49408", "49407")),
        ({}, model(vocab=49409), ("49408", "49409")),
        ({}, model(context=9), ("8 tokens", "context is 9", "--context 9")),
        ({}, model(context=7), ("8 tokens", "context is 7")),
        ({"vocab_size": None}, model(vocab=2399), ("id 2399", "ends at 2398")),
        ({}, SMALL_VOCABULARY, ("49408", "99")),
    ],
)
def test_records_of_another_model(change, spec, words, tmp_path):
    records = write(tmp_path / "x", IDS, {**SIDE, **change})
    said = complain(check_records, records, spec, "x")
    assert all(word in said for word in words), said
    check_records(write(tmp_path / "y", IDS, SIDE), model(), "y", texts=3)


def test_contexts_of_released_files(tmp_path):
    """No side file: the number of labels tells."""
    records = write(tmp_path / "x", np.ones((3, 154), np.float32))
    said = complain(check_records, records, model(context=52), "x", 3)
    assert "77 tokens" in said and "context is 52" in said
    assert "texts per image: 2 (raw, synthetic), --texts asks for 3" in said
    with pytest.raises(ConfigError, match="--texts asks for 3"):
        check_records(records, model(context=77), "x", load_settings("rwkv-clip-b32-yfcc15m").data.texts)
    check_records(records, model(context=77), "x", None)


def test_a_stray_id_never_reaches_the_embedding(tmp_path):
    labels = np.repeat(IDS, 3, 0)
    labels[111, 5] = 49408  # between those that are looked at
    records = write(tmp_path / "x", labels, {**SIDE, "vocab_size": None})
    check_records(records, model(), "x")
    with pytest.raises(ValueError, match=r"key 111: token ids must be from 0 to 49407, found 49408\.0"):
        records.sample(111)


@pytest.mark.parametrize("change", [{"vocab": 49407}, {"context": 9}])
def test_run_ends_before_the_model_is_built(data, change, tmp_path, monkeypatch):
    description = json.loads(Path(data["model"]).read_text())
    description["text"] |= change
    (tmp_path / "model.json").write_text(json.dumps(description))
    monkeypatch.setattr(training, "create_model", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr(training, "join_world", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ConfigError, match=r"vocabulary|context"):
        training.run(parse(Settings, {**data, "model": str(tmp_path / "model.json"), "name": "no"}))


@pytest.mark.parametrize("line", ["--lr nan", "--device toaster", "--model model.json"])
def test_in_a_real_process(line, data, tmp_path):
    (tmp_path / "model.json").write_text('{"embed_dim": 3}')
    command = [sys.executable, "-m", "rwkv_clip.training.main", "--train-data", data["train_data"], *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert line.split()[1].removesuffix(".json") in done.stderr or "vision_cfg" in done.stderr


@pytest.mark.parametrize(
    "data, message",
    [
        ({"precision": ["bf16"]}, r"precision: \['bf16'\] is not one of 'auto'"),
        ({"precision": {"bf16": 1}}, r"precision: \{'bf16': 1\} is not one of"),
        ({"views": "all", "text_choice": "one"}, "views: is called text_choice since 0.6, which is set, too"),
        ({"max_bad_fraction": 0.1, "max_bad_share": 0.1}, "max_bad_share: is called max_bad_fraction since 0.6"),
    ],
)
def test_old_settings_are_checked_as_new_ones(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(data)
