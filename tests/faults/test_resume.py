"""Same bits after resume (promise P2): a run of 40 steps that stopped after any of them ends like one that did not; and
what a resumption refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest

from helpers.ranks import digest
from helpers.tiny import make_tiny
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.training import checkpointing
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

STEPS = 40
MODES = {
    "plain": {},
    "fp16 with a scaler": {"precision": "amp"},
    "accumulated, in a fixed order": {"accum_freq": 2, "batch_size": 4, "deterministic": True, "max_ranks": 2},
    "cosine, first view": {"schedule": "cosine", "cycle_beta1": False, "text_choice": "first", "decay": "all"},
}


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_tiny(new_folder("tiny"))
    quiet = {"max_steps": STEPS, "val_data": None, "log_every_n_steps": 20, "save_every_n_steps": 1}
    return settings | quiet | {"keep_checkpoints": 99, "lr": 3e-3}


@pytest.fixture(scope="module")
def whole(data):
    """By mode: the folder of an uninterrupted run with a checkpoint after every step."""
    made = {}

    def get(mode: str) -> Path:
        if mode not in made:
            made[mode] = run(parse(Settings, data | MODES[mode] | {"name": mode}))
        return made[mode]

    return get


def facts(folder: Path) -> tuple:
    """Everything of a run's end that must be the same: bits of weights, optimizer and objective; state; log."""
    last = find_checkpoint(folder)
    assert last.name == f"step-{STEPS:08d}"
    state = json.loads((last / "state.json").read_text())
    state["settings"] = {k: v for k, v in state["settings"].items() if k not in checkpointing.FREE_ON_RESUME}
    timed = {"samples_per_second", "wait_share", "eta_seconds", "seconds", "peak_memory_mb"}
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return digest(last), state, [{k: v for k, v in record.items() if k not in timed} for record in records]


def resume_at(data: dict, mode: str, whole: Path, stop: int, **changes) -> Path:
    """What a run that was killed after step `stop` comes to."""
    folder = whole.with_name(f"{mode} from {stop}")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "log.jsonl", folder)  # with lines of steps that the resumed run does again
    name = f"step-{stop:08d}"
    shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    run(
        parse(
            Settings, data | MODES[mode] | {"name": folder.name, "resume": "latest", "save_every_n_steps": 99} | changes
        )
    )
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_every_stop_point(data, whole, mode, monkeypatch):
    monkeypatch.setattr("rwkv_clip.training.main.plot_training", lambda folder: None)  # half of such a short run's time
    expected = facts(whole(mode))
    some = range(1, STEPS) if mode == "plain" else (1, 14, 27, 39)
    for stop in some:
        folder = resume_at(data, mode, whole(mode), stop)
        assert facts(folder) == expected, f"stopped after step {stop}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("missing", ["scaler", "samples_seen", "settings", "total_steps", "global_batch"])
def test_state_without_a_part_is_refused(data, whole, missing, monkeypatch):
    read = json.loads
    damaged = lambda text: {k: v for k, v in read(text).items() if k != missing}  # noqa: E731
    monkeypatch.setattr(
        "rwkv_clip.training.main.read_description", lambda path: damaged((path / "state.json").read_text())
    )
    with pytest.raises(CheckpointError, match=f"no {missing}"):
        resume_at(data, "plain", whole("plain"), 20)


@pytest.mark.parametrize("part", ["logit_scale/exp_avg", "logit_scale/step"])
def test_optimizer_state_without_a_part_is_refused(data, whole, part, monkeypatch):
    read = checkpointing.read_tensors
    monkeypatch.setattr(checkpointing, "read_tensors", lambda path: {k: v for k, v in read(path).items() if k != part})
    with pytest.raises((CheckpointError, ValueError), match=re.escape(part)):
        resume_at(data, "plain", whole("plain"), 20)


CHANGES = {
    "lr": 0.5,
    "wd": 0.0,
    "seed": 3,
    "beta2": 0.9,
    "eps": 1e-3,
    "schedule": "cosine",
    "warmup_fraction": 0.3,
    "text_choice": "first",
    "drop_path": 0.1,
    "precision": "amp_bf16",
    "flip": 0.0,
    "grad_clip_norm": 2.0,
    "deterministic": True,
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_run_is_refused_unless_allowed(data, whole, key):
    change = {key: CHANGES[key]} | ({"cycle_beta1": False} if key == "schedule" else {})
    with pytest.raises(ConfigError, match="belongs to a run with other settings; --allow-change") as refusal:
        resume_at(data, "plain", whole("plain"), 36, **change)
    then = (data | {"wd": 0.2, "beta2": 0.98}).get(key, "")
    line = next(line for line in refusal.value.problems if line.startswith(f"{key}: "))
    assert str(then) in line and line.endswith(f"-> {CHANGES[key]!r}")
    folder = resume_at(data, "plain", whole("plain"), 36, **change, allow_change=list(change))
    noted = json.loads((find_checkpoint(folder) / "state.json").read_text())["changes"]
    assert {"step": 36, "setting": key, "to": CHANGES[key]}.items() <= next(
        n for n in noted if n["setting"] == key
    ).items()


def test_other_sizes_are_refused(data, whole):
    for change, named in (({"batch_size": 4}, "global_batch: 8 -> 4"), ({"max_steps": 50}, "total_steps: 40 -> 50")):
        with pytest.raises(ConfigError, match=named):
            resume_at(data, "plain", whole("plain"), 36, **change)
    assert (
        facts(resume_at(data, "plain", whole("plain"), 36, batch_size=4, accum_freq=2, workers=1))[1]["step"] == STEPS
    )


def test_an_unknown_name_to_allow_is_refused(data):
    with pytest.raises(ConfigError, match=r"allow_change: 'lrr' is not a setting; did you mean 'lr'"):
        parse(Settings, data | {"allow_change": ["lrr"]})
    parse(Settings, data | {"allow_change": ["lr", "global_batch", "total_steps"]})
