"""--keep-best: the best checkpoint by a metric stays as checkpoints/best, whatever its age and whatever happens."""

import contextlib
import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from helpers.ranks import digest
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip import checkpoint
from rwkv_clip.checkpoint import BEST, clean_folder, find_best, find_checkpoint, list_checkpoints, name_best
from rwkv_clip.config import parse
from rwkv_clip.dist import World
from rwkv_clip.eval.main import main as evaluate
from rwkv_clip.factory import load_for_inference
from rwkv_clip.training import best, evaluation, loop, main, saver
from rwkv_clip.training.best import note_best, recall_best
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.state import Progress

ONE = World(0, 1, torch.device("cpu"))
VALUES = [0.1, 0.4, 0.4, 0.3, 0.2, 0.5, 0.1, 0.1]  # of the metric after each step


@pytest.fixture(scope="module")
def data(new_folder):
    folder = new_folder("tiny")
    settings = make_smaller(make_tiny(folder))
    often = {"eval_every_n_steps": 1, "save_every_n_steps": 4, "keep_checkpoints": 2, "max_steps": len(VALUES)}
    keep = {"eval": [f"mine=retrieval:{settings.pop('val_data')}"], "keep_best": "mine/mean_recall"}
    return settings | often | keep | {"resume": "latest"}


@pytest.fixture
def scripted(monkeypatch):
    """The metric has the values above; the step after which a run is killed, if any, is `scripted["kill"]`."""
    script = {"kill": None, "values": VALUES}
    take = loop.Trainer.step

    def step(self, batch):
        script["step"] = self.state.progress.step + 1
        if script["step"] - 1 == script["kill"]:
            raise KeyboardInterrupt
        return take(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", step)
    value = lambda self, *_: {"mine/mean_recall": script["values"][script["step"] - 1]}  # noqa: E731
    monkeypatch.setattr(evaluation.EvalSet, "measure", value)
    monkeypatch.setattr(main, "plot_training", lambda folder: None)
    return script


def train(data: dict, **changes) -> Path:
    return run(parse(Settings, data | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def best_step(folder: Path) -> int | None:
    found = find_best(folder / "checkpoints")
    return found and json.loads((found / "state.json").read_text())["step"]


# ---- in a run


@pytest.mark.parametrize(
    "stop, best, kept",
    [
        (1, 1, [1]),
        (2, 2, [1, 2]),
        (4, 2, [2, 4]),
        (5, 2, [2, 4, 5]),  # not one of the two newest
        (8, 6, [6, 8]),
    ],
)
def test_the_best_stays(data, scripted, stop, best, kept):
    """The first of equal ones; a better one takes its place; a run that was stopped goes on from the newest."""
    scripted["values"] = VALUES[:stop]
    folder = train(data, name=f"stays{stop}", max_steps=8 if stop == 8 else stop, epochs=1)
    assert names(folder) == [BEST, *(f"step-{step:08d}" for step in kept)]
    assert best_step(folder) == best and find_checkpoint(folder).name == f"step-{stop:08d}"


def test_commands_open_it_by_its_name(data, scripted, tmp_path):
    folder = train(data, name="named")
    place = folder / "checkpoints" / BEST
    assert digest(find_checkpoint(place)) == digest(folder / "checkpoints" / "step-00000006")
    assert (
        load_for_inference(place).digest == load_for_inference(place / "model.safetensors", model=data["model"]).digest
    )
    command = ["retrieval", "--checkpoint", str(place), "--data", data["eval"][0].partition(":")[2], "--gallery", "0"]
    assert evaluate([*command, "--logs", str(tmp_path), "--device", "cpu"]) == 0
    again = train(data, name="again", resume=str(place))  # into another folder, where there is no best one yet
    assert best_step(again) in (7, 8)


@pytest.mark.parametrize("kill", [3, 5, 6, 7])
def test_a_killed_run_goes_on_with_its_best(data, scripted, kill):
    """From the newest checkpoint, with the value to beat: the same files in the end."""
    scripted["kill"] = kill
    with pytest.raises(KeyboardInterrupt):
        train(data, name=f"killed{kill}")
    folder = Path(data["logs"]) / f"killed{kill}"
    assert best_step(folder) == (6 if kill >= 6 else 2)
    scripted["kill"] = None
    train(data, name=folder.name)
    assert best_step(folder) == 6 and names(folder) == [BEST, "step-00000006", "step-00000008"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "mine/mean_recall" in line] == list(range(1, 9))


def test_a_run_that_is_killed_before_the_best_is_named(data, scripted, monkeypatch):
    """The checkpoint knows that it is the best, and is named by the run that goes on."""
    name_it = checkpoint.name_best

    def dying(folder, path):
        if path.name == "step-00000006":
            raise KeyboardInterrupt
        name_it(folder, path)

    with monkeypatch.context() as patch:
        for module in (checkpoint, best):
            patch.setattr(module, "name_best", dying)
        with pytest.raises(KeyboardInterrupt):
            train(data, name="unnamed")
    folder = Path(data["logs"]) / "unnamed"
    assert best_step(folder) == 2 and find_checkpoint(folder).name == "step-00000006"
    assert best_step(train(data, name="unnamed")) == 6


def test_a_save_that_fails_is_tried_by_the_next_better_one(data, scripted, monkeypatch):
    """Step 2 cannot be written: the best is step 1 until step 3, which is no better than 2 was, but better than 1."""
    write = saver.save_checkpoint

    def failing(folder, step, *rest):
        if step == 2:
            raise OSError(errno.ENOSPC, "no space")
        return write(folder, step, *rest)

    monkeypatch.setattr(saver, "save_checkpoint", failing)
    folder = train(data, name="full", max_steps=4)
    assert best_step(folder) == 3


def test_the_best_of_the_validation_by_loss_is_the_lowest(data, tmp_path):
    path = data["eval"][0].partition(":")[2]
    changes = {"eval": [], "eval_every_n_steps": None, "val_data": path, "val_every_n_steps": 1}
    changes |= {"keep_best": "val_loss", "keep_checkpoints": 9}
    folder = train(data, name="loss", **changes)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert len(losses) == 8 and best_step(folder) == min(losses, key=losses.get)


def test_another_metric_begins_anew(data, scripted):
    folder = train(data, name="other", max_steps=4)
    assert best_step(folder) == 2
    scripted["values"] = [0.01] * 8
    train(data, name="other", keep_best="mine/image_to_text_R@1", allow_change=["max_steps", "total_steps"])
    assert best_step(folder) == 2, "the metric that is asked for was never measured, and nothing is lost"


# ---- its link


def make(folder: Path, step: int, value: float = 0.5) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    best = {"metric": "m", "value": value, "step": step}
    (path / "state.json").write_text(json.dumps({"step": step, "best": best}))
    return path


CALLS = ("unlink", "symlink", "replace", "rename", "open")


@pytest.mark.parametrize("before", ["a link", "a copy"])
def test_there_is_a_best_one_at_any_instant(tmp_path, before, monkeypatch):
    """Ended before and after each call that changes something: `best` is the old one or the new one, and is repaired.
    Where a copy of the run folder made a folder of the link, there may be none, but its checkpoint is there."""
    for number in range(1, 12):
        for when in ("before", "after"):
            folder = tmp_path / f"{number}{when}"
            old, new = make(folder, 1), make(folder, 2)
            shutil.copytree(old, folder / BEST) if before == "a copy" else name_best(folder, old)
            calls = []

            def wrap(real, number=number, when=when, calls=calls):
                def call(*arguments, **options):
                    calls.append(1)
                    if len(calls) == number and when == "before":
                        raise KeyboardInterrupt
                    result = real(*arguments, **options)
                    if len(calls) == number:
                        raise KeyboardInterrupt
                    return result

                return call

            with monkeypatch.context() as patch:
                for name in CALLS:
                    patch.setattr(os, name, wrap(getattr(os, name)))
                with contextlib.suppress(KeyboardInterrupt):
                    name_best(folder, new)
            if before == "a link":
                assert find_best(folder) in (old, new), (number, when)
            clean_folder(folder)
            name_best(folder, new)
            assert find_best(folder) == new and sorted(os.listdir(folder)) == [BEST, old.name, new.name]
    assert len(calls) < number, "all calls had their turn"


def test_links_that_lead_nowhere_are_none(tmp_path):
    assert find_best(tmp_path) is None
    os.symlink("step-00000009", tmp_path / BEST)
    assert find_best(tmp_path) is None
    (tmp_path / BEST).unlink()
    (tmp_path / BEST).write_text("a file")
    assert find_best(tmp_path) is None and list_checkpoints(tmp_path) == []


# ---- what is known of it


def recalled(folder: Path, progress: Progress, metric: str | None = "m") -> dict:
    recall_best(folder, metric, progress)
    return progress.best


def progress_of(step: int, best: int | None, value: float = 0.5) -> Progress:
    return Progress(step=step, best={} if best is None else {"metric": "m", "value": value, "step": best})


def test_what_is_recalled(tmp_path, caplog):
    """The state, where its checkpoint is there; else what the link leads to, unless it is of the future."""
    make(tmp_path, 1, 0.1), make(tmp_path, 5, 0.5), make(tmp_path, 9, 0.9)
    assert recalled(tmp_path, progress_of(5, 5))["step"] == 5 and find_best(tmp_path).name == "step-00000005"
    name_best(tmp_path, tmp_path / "step-00000001")  # killed between save and link
    assert recalled(tmp_path, progress_of(5, 5))["step"] == 5 and find_best(tmp_path).name == "step-00000005"
    assert recalled(tmp_path, progress_of(7, 6, 0.6)) == {"metric": "m", "value": 0.5, "step": 5}  # 6 was not written
    name_best(tmp_path, tmp_path / "step-00000009")
    assert recalled(tmp_path, progress_of(7, 6, 0.6)) == {} and "step-6, the best so far, is not there" in caplog.text
    assert recalled(tmp_path, progress_of(5, 5), "another") == {} and recalled(tmp_path, progress_of(5, 5), None) == {}
    assert recalled(tmp_path / "none", progress_of(5, 5)) == {}


@pytest.mark.parametrize(
    "best",
    [{"metric": "m", "value": "0.5", "step": 5}, {"metric": "m", "value": float("nan"), "step": 5}]
    + [{"metric": "m", "value": 0.5, "step": step} for step in ("5", -1, 5.0, None, [5], 10**30, "../../x")]
    + [{"metric": ["m"], "value": 0.5, "step": 5}, {"step": 5}],
)
def test_hostile_states_are_not_believed(tmp_path, best):
    make(tmp_path, 5)
    assert recalled(tmp_path, Progress(step=5, best=best)) == {} and find_best(tmp_path) is None


@pytest.mark.parametrize("values, best", [([0.1, 0.3, 0.2], 2), ([0.3, 0.3, 0.3], 1), ([float("nan"), 0.1, 0.05], 2)])
@pytest.mark.parametrize("metric, sign", [("a/top1", 1), ("val_loss", -1)])
def test_better_is_higher_and_of_losses_lower(values, best, metric, sign):
    progress = Progress()
    for progress.step, value in enumerate(values, 1):
        better = note_best(metric, {metric: sign * value}, progress, ONE)
        assert better == (progress.best.get("step") == progress.step)
    assert progress.best["step"] == best
    assert not note_best(metric, {"other": 1.0}, progress, ONE) and not note_best(None, {metric: 9.0}, progress, ONE)


def test_a_copied_run_folder_goes_on(data, scripted, tmp_path, caplog):
    """cp -rL makes a folder of the link."""
    folder = train(data, name="moved", max_steps=4)
    copy = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert not (copy / "checkpoints" / BEST).is_symlink()
    with caplog.at_level(logging.WARNING):
        train(data, name="moved", logs=str(tmp_path), allow_change=["max_steps", "total_steps"])
    assert best_step(copy) == 6 and (copy / "checkpoints" / BEST).is_symlink()


def test_a_run_that_goes_back_leaves_no_link_to_its_future(data, scripted):
    folder = train(data, name="back", keep_checkpoints=9)
    back = folder / "checkpoints" / "step-00000004"
    scripted["values"] = [0.0] * 8
    train(data, name="back", resume=str(back), keep_checkpoints=9)
    assert best_step(folder) == 2 and find_checkpoint(folder).name == "step-00000008"
