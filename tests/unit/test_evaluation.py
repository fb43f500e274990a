"""--eval: tasks by name, measured during a run as the evaluation command measures them, resumable with the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from helpers.color_model import COLORS, save_color
from helpers.ranks import digest
from helpers.tiny import make_smaller, make_tiny, to_arguments
from rwkv_clip.checkpoint import find_checkpoint, read_description
from rwkv_clip.config import ConfigError, check, parse
from rwkv_clip.datasets import SETS, class_folders, load_classification
from rwkv_clip.dist import World
from rwkv_clip.eval.main import main as evaluate
from rwkv_clip.factory import resolve_spec
from rwkv_clip.training import evaluation, log, main
from rwkv_clip.training.faults.signals import Preempted
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.settings.evaluation import METRICS, read_task

ONE = World(0, 1, torch.device("cpu"))
STEPS, EVERY, SAVES = 8, 3, 2  # evaluations after steps 3, 6 and 8, checkpoints after each second


@pytest.fixture(scope="module")
def data(new_folder):
    folder = new_folder("tiny")
    settings = make_smaller(make_tiny(folder))
    for number, name in enumerate(("cat", "dog", "ship")):
        for copy in range(6 + number):
            save_color(folder / "sets" / "cifar10" / "test" / name / f"{copy}.png", list(COLORS)[(copy + number) % 7])
    del settings["val_data"]
    eval = [f"classification:cifar10@{folder / 'sets'}", f"mine=retrieval:{folder / 'val.jsonl'}"]
    often = {"eval_every_n_steps": EVERY, "save_every_n_steps": SAVES, "keep_checkpoints": 9}
    return settings | often | {"max_steps": STEPS, "eval": eval, "resume": "latest"}


def train(data: dict, **changes) -> Path:
    return run(parse(Settings, data | changes))


def logged(folder: Path) -> list[dict]:
    """What --eval measured, in order."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if any("/" in key for key in record)]


@pytest.fixture(scope="module")
def whole(data) -> Path:
    return train(data, name="whole")


# ---- names


@pytest.mark.parametrize(
    "text, name, what, place",
    [
        ("retrieval:flickr8k.jsonl", "flickr8k", "", "flickr8k.jsonl"),
        ("retrieval:test@sets/coco.json", "coco", "test", "sets/coco.json"),
        ("retrieval:/home/me@here/x.jsonl", "x", "", "/home/me@here/x.jsonl"),
        ("retrieval:a=b:c.jsonl", "a-b-c", "", "a=b:c.jsonl"),
        ("retrieval:shards/*.rec", "retrieval", "", "shards/*.rec"),
        ("classification:cifar10", "cifar10", "cifar10", "data"),
        ("classification:cifar10@D", "cifar10", "cifar10", "D"),
        ("classification:imagefolder@sets/birds", "birds", "imagefolder", "sets/birds"),
        ("classification:imagefolder@birds/test", "birds-test", "imagefolder", "birds/test"),
        ("b.2=classification:elevater@x=y", "b.2", "elevater", "x=y"),
    ],
)
def test_a_task_says_what_and_where(text, name, what, place):
    task = read_task(text)
    assert (task.name, task.what, task.place) == (name, what, place)
    assert task.metrics == [f"{name}/{metric}" for metric in METRICS[task.task]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval": ["clasification:cifar10"]}, "'clasification' is not a task; did you mean 'classification'?"),
        ({"eval": ["classification:cifar11@x"]}, "'cifar11' is not a set of classes; did you mean 'cifar10'?"),
        ({"eval": ["cifar10@x"]}, "names no task; write classification:cifar10@x"),
        ({"eval": ["flickr8k.jsonl"]}, "'flickr8k.jsonl' is no task with its data; write retrieval:[SPLIT@]FILE or"),
        ({"eval": ["retrieval:"]}, "is no task with its data"),
        ({"eval": ["classification:imagefolder"]}, "says not where the data are"),
        ({"eval": ["a/b=retrieval:x"]}, "'a/b' is no name; use letters, digits"),
        ({"eval": ["=retrieval:x"]}, "'' is no name"),
        ({"eval": ["retrieval:x.json", "retrieval:y/x.json"]}, "are both called 'x'; give one a name: x-2=retrieval:y"),
        ({"eval": ["classification:imagenet@a"], "imagenet_val": "b"}, "are both called 'imagenet'"),
        ({"eval": ["retrieval:\0"]}, "holds a NUL character"),
        ({"eval": ["retrieval:x"], "keep_best": "x/mean"}, "'x/mean' is not measured; did you mean 'x/mean_recall'?"),
        ({"keep_best": "cifar10/top1"}, "'cifar10/top1' is never measured; give --eval or --val-data"),
        ({"val_data": "x", "keep_best": "val_recall"}, "did you mean 'val_mean_recall'?"),
        ({"eval": ["retrieval:x"], "eval_every_n_steps": 0}, "eval_every_n_steps: 0 must be at least 1"),
        ({"eval_every_n_steps": 5}, "eval_every_n_steps: has no effect without eval"),
        ({"zeroshot_frequency": -1}, "zeroshot_frequency: -1 must be at least 0"),
    ],
)
def test_mistakes_are_named_before_any_work(changes, message):
    with pytest.raises(ConfigError) as error:
        parse(Settings, changes)
    assert len(error.value.problems) == 1 and message in error.value.problems[0]


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        parse(Settings, {"eval": ["x:y", "z", "retrieval:a", "retrieval:a"], "batch_size": 0})
    assert len(error.value.problems) == 4


def test_the_best_may_be_of_the_validation():
    assert check(parse(Settings, {"val_data": "x", "keep_best": "val_loss"})) == []


def test_the_help_lists_what_can_be_named():
    command = [sys.executable, "-m", "rwkv_clip.training.main", "--help"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("--eval ")[1]
    names = words.split("--imagenet-val")[0]
    assert all(name in names for name in (*SETS, *METRICS, "top1", "mean_recall"))


def test_shorthands_are_tasks():
    settings = read_command_line(["--train-data", "x", "--imagenet-val", "a", "--imagenet-v2", "b"])
    tasks = [(task.name, task.what, task.place) for task in settings.evaluation.tasks()]
    assert tasks == [("imagenet", "imagenet", "a"), ("imagenetv2", "imagenetv2", "b")]


@pytest.mark.parametrize(
    "task, message",
    [
        ("retrieval:nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("classification:cifar10@nowhere", "no folder nowhere; download https://www.cs.toronto.edu"),
        ("classification:imagefolder@nowhere", "nowhere holds no class folders"),
        ("classification:imagenetv2@nowhere", "no class folders 0 .. 999 in nowhere; download imagenetv2-matched"),
        ("retrieval:{train}.jsonl", "no such file"),
        ("retrieval:{broken}", "an evaluation leaves no picture out"),
    ],
)
def test_a_set_that_cannot_be_read_ends_the_command_at_once(data, tmp_path, task, message, capsys, monkeypatch):
    """In one line, and before there is a run folder."""
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    (tmp_path / "broken.jsonl").write_text('{"image": "x.jpg", "caption": "a picture"}\n')
    task = task.format(train=data["train_data"], broken=tmp_path / "broken.jsonl")
    arguments = to_arguments(data | {"logs": str(tmp_path / "logs"), "name": "none"} | {"eval": task})
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert end.value.code == 2 and len(errors) == 1 and message in errors[0] and repr(task) in errors[0]
    assert not (tmp_path / "logs").exists()


def test_records_of_another_context_are_refused(data, tmp_path):
    model = json.loads(Path(data["model"]).read_text())
    model["text"]["context"] = 9
    (tmp_path / "other.json").write_text(json.dumps(model))
    records = data["train_data"]
    settings = parse(Settings, data | {"eval": [f"retrieval:{records}"], "val_prefix": "a photo of "})
    spec = resolve_spec(str(tmp_path / "other.json"))[1]
    with pytest.raises(ConfigError, match=r"eval: 'retrieval:.*prefix: 'a photo of ' cannot be put before the tokens"):
        evaluation.open_sets(settings, spec, ONE)


# ---- measuring


def test_figures_are_those_of_the_evaluation_command(data, whole, tmp_path):
    """Of the checkpoint of the last step, task by task, to the last digit."""
    last, sets = logged(whole)[-1], data["eval"]
    assert [record["step"] for record in logged(whole)] == [3, 6, 8]
    model = ["--checkpoint", str(whole), "--logs", str(tmp_path), "--device", "cpu"]
    classes = ["classification", "--dataset", "cifar10", "--data", sets[0].partition("@")[2], "--name", "classes"]
    captions = ["retrieval", "--data", sets[1].partition(":")[2], "--name", "captions", "--gallery", "0"]
    for name, command in (("cifar10", classes), ("mine", captions)):
        assert evaluate([*command, *model]) == 0
        (found,) = json.loads((tmp_path / command[command.index("--name") + 1] / "result.json").read_text())["results"]
        own = {key: value for key, value in last.items() if key.startswith(f"{name}/")}
        assert len(own) >= 3 and own == {f"{name}/{k}": found["metrics"][k] for k in METRICS[command[0]]}


def test_the_run_learns_the_same(data, whole):
    plain = train(data, name="plain", eval=[], eval_every_n_steps=None)
    assert digest(find_checkpoint(plain)) == digest(find_checkpoint(whole))


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({"eval_every_n_steps": None}, [8]),
        ({"eval_every_n_steps": None, "zeroshot_frequency": 1, "max_steps": 16}, [8, 15, 16]),  # 60 records by 8
        ({"eval_every_n_steps": 3, "zeroshot_frequency": 0}, [3, 6]),
        ({"eval_every_n_steps": None, "zeroshot_frequency": 0}, []),
    ],
)
def test_how_often(data, changes, steps, monkeypatch):
    monkeypatch.setattr(evaluation.EvalSet, "measure", lambda self, *_: {f"{self.task.name}/x": 0.5})
    name = "often" + "".join(map(str, changes.values()))
    assert [record["step"] for record in logged(train(data, name=name, **changes))] == steps


def test_validation_and_evaluation_are_apart(data, monkeypatch):
    """Each has its own metrics, its own time and its own memory of what was done."""
    monkeypatch.setattr(evaluation.EvalSet, "measure", lambda self, *_: {f"{self.task.name}/x": 0.5})
    path = data["eval"][1].partition(":")[2]
    folder = train(data, name="both", val_data=path, val_every_n_steps=4, max_steps=4)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(r["step"], "val_mean_recall" in r, "mine/x" in r) for r in records if "loss" not in r]
    assert found == [(3, False, True), (4, True, False), (4, False, True)]
    facts = read_description(find_checkpoint(folder))
    assert (facts["validated"], facts["evaluated"]) == (4, 4)


@pytest.mark.parametrize("at", [3, 6, 8])
def test_what_a_kill_interrupts_is_done_again_and_the_rest_is_not(data, whole, at, monkeypatch):
    """Killed in the second set of the evaluation after a step: log and bits are those of a run that was not."""
    folder, measure, seen = Path(data["logs"]) / f"killed{at}", evaluation.EvalSet.measure, []
    monkeypatch.setattr(main, "plot_training", lambda folder: None)

    def killing(self, extractor, prefix):
        seen.append(self.task.name)
        if seen == ["cifar10", "mine"] * ((at + 2) // 3):
            raise KeyboardInterrupt
        return measure(self, extractor, prefix)

    monkeypatch.setattr(evaluation.EvalSet, "measure", killing)
    with pytest.raises(KeyboardInterrupt):
        train(data, name=folder.name)
    seen[:] = ["from here on"]
    train(data, name=folder.name)
    assert logged(folder) == logged(whole) and digest(find_checkpoint(folder)) == digest(find_checkpoint(whole))
    saved = (at - 1) // SAVES * SAVES
    assert len(seen) == 1 + 2 * len([step for step in (3, 6, 8) if step > saved])
    train(data, name=folder.name)
    assert logged(folder) == logged(whole) and len(seen) == 1 + 2 * len([s for s in (3, 6, 8) if s > saved])


@pytest.mark.parametrize("at", [3, 8])
def test_a_signal_ends_an_evaluation_at_the_next_block(data, whole, at, monkeypatch):
    """Everything is saved at once; the run that resumes evaluates first, and one that is done has nothing to do."""
    encode, calls = evaluation.FeatureExtractor.encode_images, []

    def telling(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * ((at + 2) // 3) - 1:
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr(self.model, "encode_image", None)  # not one more block
        return encode(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.FeatureExtractor, "encode_images", telling)
        with pytest.raises(Preempted, match=f"SIGTERM after step {at}: all saved"):
            train(data, name=f"told{at}")
    monkeypatch.undo()
    folder = Path(data["logs"]) / f"told{at}"
    facts = read_description(find_checkpoint(folder))
    assert (facts["step"], facts["evaluated"]) == (at, at - 3 if at == 3 else 6)
    for _ in range(2):
        train(data, name=folder.name)
        assert logged(folder) == logged(whole) and digest(find_checkpoint(folder)) == digest(find_checkpoint(whole))


def test_a_set_that_is_lost_ends_no_run(data, whole, tmp_path, caplog, monkeypatch):
    """Its metrics are missing, which is said; those of the others are there."""
    sets = Path(shutil.copytree(data["eval"][0].partition("@")[2], tmp_path / "sets"))
    settings = parse(Settings, data | {"name": "lost", "eval": [f"classification:cifar10@{sets}", data["eval"][1]]})
    work = main.prepare(settings)
    (sets / "cifar10" / "test" / "dog" / "1.png").unlink()
    monkeypatch.setattr(main, "prepare", lambda settings: work)
    folder = run(settings)
    left = {"step", *(f"mine/{metric}" for metric in METRICS["retrieval"])}
    assert [record.keys() for record in logged(folder)] == [left] * 3
    assert caplog.text.count("cifar10@") >= 3 and "not evaluated this time" in caplog.text and "1.png" in caplog.text
    assert digest(find_checkpoint(folder)) == digest(find_checkpoint(whole))


def test_the_plot_has_what_was_evaluated(whole, data, monkeypatch):
    import matplotlib.pyplot as plt

    titles = []
    monkeypatch.setattr(plt, "close", lambda figure: titles.append([axes.get_title() for axes in figure.axes]))
    main.plot_training(whole)
    main.plot_training(Path(data["logs"]) / "plain")
    assert "--eval, %" in titles[0] and "--eval, %" not in titles[1] and len(titles[1]) == 4


# ---- ImageNet-V2


def test_imagenet_v2_is_in_the_order_of_the_classes(tmp_path, monkeypatch):
    names = [f"class {number}" for number in range(12)]
    monkeypatch.setattr(class_folders, "imagenet_prompts", lambda language: (names, ("a {}.",)))
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    for number in range(12):
        save_color(folder / str(number) / "0.png", "red")
    found = load_classification("imagenetv2", tmp_path)
    assert found.labels.tolist() == list(range(12)) and list(found.class_names) == names
    assert [path.parent.name for path in found.files] == [str(number) for number in range(12)]
    shutil.rmtree(folder / "7")
    with pytest.raises(ValueError, match="holds 11 class folders"):
        load_classification("imagenetv2", tmp_path)
    with pytest.raises(ValueError, match="leave names and split out"):
        load_classification("imagenetv2", tmp_path, split="train")


# ---- reports


class Reported:
    """A stand-in for wandb and trackio: what `init` was told, and all records."""

    def __init__(self, **about):
        self.about, self.records, self.finished = about, [], False
        Reported.last = self

    def log(self, values, step):
        self.records.append((step, values))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("package", ["wandb", "trackio"])
@pytest.mark.parametrize("project, variable", [(None, None), ("mine", None), (None, "theirs"), ("mine", "theirs")])
def test_reports_know_project_notes_and_tags(tmp_path, package, project, variable, monkeypatch):
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(init=Reported))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    told = {"report_to": [package], "wandb_project_name": project, "wandb_notes": "why", "wandb_tags": ["a", "b"]}
    found = log.RunLog(tmp_path, parse(Settings, told), 0, 9)
    found.write(3, {"cifar10/top1": 0.5, "text": "no number"})
    found.close()
    about, expected = Reported.last.about, project or variable or "rwkv-clip"
    # wandb itself reads the variable, and what it is told would hide it
    assert about["project"] == (None if package == "wandb" and not project and variable else expected)
    assert about["name"] == tmp_path.name and about["resume"] == "allow" and about["config"]["wandb_notes"] == "why"
    if package == "wandb":
        assert (about["id"], about["notes"], about["tags"]) == (tmp_path.name, "why", ("a", "b"))
    assert Reported.last.records == [(3, {"cifar10/top1": 0.5})] and Reported.last.finished


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_report_that_is_not_installed_is_named(tmp_path, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package} is not installed; pip install -e \.\[{package}\]"):
        log.RunLog(tmp_path, parse(Settings, {"report_to": [package]}), 0, 9)


REAL = """
import sys
from pathlib import Path
import {package}
from rwkv_clip.config import parse
from rwkv_clip.training.log import RunLog
from rwkv_clip.training.settings import Settings

init = {package}.init
def noted(**about):
    run = init(**about)
    print("project", run.project)
    return run

{package}.init = noted
for _ in range(2):  # the second one goes on
    log = RunLog(Path(sys.argv[1]), parse(Settings, {{"report_to": ["{package}"], "wandb_tags": ["a"]}}), 0, 9)
    log.write(1, {{"cifar10/top1": 0.5}})
    print("writes", *log._writers)
    log.close()
"""


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_the_packages_take_what_they_are_told(tmp_path, package):
    """Without a network; the project is that of the environment."""
    pytest.importorskip(package, reason=f"pip install -e '.[{package}]'")
    where = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    environment = os.environ | where | {"WANDB_PROJECT": "theirs", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REAL.format(package=package), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("project theirs") == 2 and lines.count(f"writes {package}") == 2, done.stdout + done.stderr
