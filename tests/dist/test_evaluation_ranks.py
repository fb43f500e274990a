"""--eval on several ranks: each encodes its share, the figures are those of one process, a signal to any ends it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.color_model import COLORS, save_color
from helpers.ranks import digest, run_ranks, start_ranks
from helpers.tiny import BATCH, make_smaller, make_tiny, to_arguments
from rwkv_clip.checkpoint import find_best, find_checkpoint
from rwkv_clip.classification import evaluate_classification
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.datasets import load_classification
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.factory import load_for_inference, resolve_spec
from rwkv_clip.features import FeatureExtractor, block_size
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.training import evaluation, main
from rwkv_clip.training.parallel import WholeModel
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.settings.evaluation import METRICS

AT = 4  # the step of the second evaluation


@pytest.fixture(scope="module")
def data(new_folder):
    folder = new_folder("tiny")
    settings = make_smaller(make_tiny(folder))
    for number, name in enumerate(("cat", "dog", "ship")):
        for copy in range(20 + number):  # four blocks
            save_color(folder / "sets" / "cifar10" / "test" / name / f"{copy}.png", list(COLORS)[(copy + number) % 7])
    eval = [f"classification:cifar10@{folder / 'sets'}", f"mine=retrieval:{folder / 'val.jsonl'}"]
    often = {"eval_every_n_steps": 2, "save_every_n_steps": 100, "max_steps": 6, "lr": 1e-3}
    del settings["val_data"]
    return settings | often | {"eval": eval, "keep_best": "mine/mean_recall", "resume": "latest", "max_ranks": 2}


def train(settings: dict) -> None:
    """On a rank: a run that notes which pictures this rank opens, and may be told to stop in an evaluation."""
    rank, told = os.environ["RANK"], settings.pop("told", None)
    encode, patch, calls = FeatureExtractor.encode_images, pytest.MonkeyPatch(), []

    def encoded(self, open_one, count):
        calls.append(count)
        if told == rank and len(calls) == 3:  # the first set of the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        opened = []

        def noted(index):
            opened.append(index)
            return open_one(index)

        found = encode(self, noted, count)
        with open(Path(settings["logs"], f"{settings['name']}.opened.{rank}"), "a") as file:
            file.write(json.dumps([count, sorted(opened)]) + "\n")
        return found

    patch.setattr(FeatureExtractor, "encode_images", encoded)
    patch.setattr(main, "plot_training", lambda folder: None)
    messages = os.open(f"{settings['logs']}/{settings['name']}.messages{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(messages, 2)
    arguments = {key: value for key, value in settings.items() if key != "eval"}
    patch.setattr("sys.argv", ["main", *to_arguments(arguments), "--eval", *settings["eval"]])
    main.main()


def launch(world: int, folder: Path, data: dict, name: str, codes: int = 0, **changes) -> Path:
    settings = data | {"name": name, "batch_size": BATCH // world} | changes
    Path(settings["logs"]).mkdir(exist_ok=True)
    ranks = start_ranks(world, folder, train, settings)
    for process in ranks:
        process.join(120)
    found = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    said = "".join(path.read_text() for path in sorted(Path(settings["logs"]).glob(f"{name}.messages*")))
    assert found == [codes] * world and "Traceback" not in said, said
    return Path(settings["logs"]) / name


def evaluated(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "mine/mean_recall" in record]


@pytest.fixture(scope="module")
def one(data, new_folder) -> Path:
    return launch(1, new_folder("one"), data, "one", deterministic=True)


def test_two_ranks_have_the_figures_and_the_best_of_one(data, one, tmp_path):
    """The same bits of weights, so the same integers; each picture is opened by one rank, and both open some."""
    two = launch(2, tmp_path, data, "two", deterministic=True)
    assert len(evaluated(one)) == 3 and evaluated(two) == evaluated(one)
    assert digest(find_checkpoint(two)) == digest(find_checkpoint(one))
    assert find_best(two / "checkpoints").name == find_best(one / "checkpoints").name
    shares = [list(map(json.loads, two.with_name(f"two.opened.{rank}").read_text().splitlines())) for rank in range(2)]
    for (count, first), (_, second) in zip(*shares):
        assert sorted(first + second) == list(range(count)) and abs(len(first) - len(second)) <= block_size("cpu")
        assert first and second


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_figures_are_those_of_the_checkpoint(data, tmp_path, parallel):
    folder = launch(2, tmp_path, data, f"as {parallel}".replace(" ", "-"), parallel=parallel)
    loaded = load_for_inference(folder)
    extractor = FeatureExtractor(loaded.model, loaded.preprocess, loaded.tokenizer)
    classes = load_classification("cifar10", data["eval"][0].partition("@")[2])
    captions = load_retrieval(data["eval"][1].partition(":")[2])
    expected = {"cifar10": evaluate_classification(extractor, classes).metrics}
    expected["mine"] = evaluate_retrieval(extractor, captions).metrics
    tasks = {"cifar10": "classification", "mine": "retrieval"}
    wanted = {f"{name}/{key}": expected[name][key] for name, task in tasks.items() for key in METRICS[task]}
    assert evaluated(folder)[-1] == {"step": 6} | wanted


@pytest.mark.parametrize("told", ["0", "1"])
def test_a_signal_to_one_rank_ends_the_evaluation_on_all(data, one, tmp_path, told):
    """Saved after the step before it; the run that resumes makes up for it, and does nothing twice."""
    name = f"told{told}"
    folder = launch(2, tmp_path, data, name, 75, told=told, deterministic=True)
    assert find_checkpoint(folder).name == f"step-{AT:08d}" and [r["step"] for r in evaluated(folder)] == [2]
    launch(2, tmp_path, data, name, deterministic=True)
    assert evaluated(folder) == evaluated(one) and digest(find_checkpoint(folder)) == digest(find_checkpoint(one))


class Normed(nn.Module):
    def __init__(self, rank: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("own", torch.tensor([float(rank)]), persistent=False)
        self.norm.running_mean += rank + 1


def look_whole(folder: str) -> None:
    world = join_world("cpu")
    model = Normed(world.rank)
    whole = WholeModel(model, parse(Settings, {}).parallel, world, everywhere=True)
    with whole.gathered() as net:
        inside = net.norm.running_mean.tolist(), net.own.tolist()
    Path(folder, f"seen{world.rank}").write_text(json.dumps([inside, model.norm.running_mean.tolist()]))
    leave_world()


def test_batch_norms_have_the_statistics_of_the_checkpoint(tmp_path):
    """Those of rank 0, on all ranks; afterwards each has its own again."""
    run_ranks(2, tmp_path, look_whole, str(tmp_path))
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}").read_text())
        assert seen == [[[1.0] * 3, [float(rank)]], [rank + 1.0] * 3]


def look_apart(folder: str, data: dict, eval: list[str]) -> None:
    world = join_world("cpu")
    os.chdir(Path(folder, str(world.rank)))
    settings = parse(Settings, data | {"eval": eval, "keep_best": None})
    with pytest.raises(ConfigError) as error:
        evaluation.open_sets(settings, resolve_spec(data["model"])[1], world)
    Path(folder, f"said{world.rank}").write_text(str(error.value))
    leave_world()


def test_ranks_that_see_other_data_are_told_so(data, tmp_path):
    """On disks of their own: one rank lacks a set, and has another class in the other."""
    for rank, color in enumerate(("red", "blue")):
        save_color(tmp_path / str(rank) / "sets" / color / "0.png", "red")
    save_color(tmp_path / "0" / "more" / "red" / "0.png", "red")
    run_ranks(
        2, tmp_path, look_apart, str(tmp_path), data, [f"classification:imagefolder@{x}" for x in ("sets", "more")]
    )
    said = {(tmp_path / f"said{rank}").read_text() for rank in range(2)}
    assert len(said) == 1
    lacking, other = said.pop().splitlines()
    assert "imagefolder@more': data: more holds no class folders" in lacking
    assert "imagefolder@sets': rank 1 sees other data than rank 0" in other
