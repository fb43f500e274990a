"""Training on several sources: what a run says of them, how it resumes, and what it refuses by name."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from helpers.chinese_clip import write_split
from helpers.mixtures import beside, make_mixture
from helpers.ranks import digest
from helpers.tiny import to_arguments
from rwkv_clip.checkpoint import find_checkpoint
from rwkv_clip.config import ConfigError, load_json, parse
from rwkv_clip.data.mixture import open_mixture
from rwkv_clip.data.records import RecordSet, open_records
from rwkv_clip.dist import World
from rwkv_clip.errors import run_command
from rwkv_clip.factory import resolve_spec
from rwkv_clip.training import checks, main, profile_data
from rwkv_clip.training.checkpointing import _compare_records
from rwkv_clip.training.settings import Settings


@pytest.fixture(scope="module")
def data(new_folder) -> dict:
    return make_mixture(new_folder("tiny"))


@pytest.fixture(scope="module")
def whole(data) -> Path:
    """Its run folder, with a checkpoint after every fourth step."""
    return main.run(parse(Settings, data | {"name": "whole"}))


def cut(whole: Path, name: str, step: int) -> Path:
    """A copy of the run that was killed after a step."""
    folder = whole.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", folder / "checkpoints" / f"step-{step:08d}")
    return folder


def end_of(folder: Path) -> tuple[str, dict]:
    path = find_checkpoint(folder)
    return digest(path), json.loads((path / "state.json").read_text())


def test_what_a_run_says_and_stores(data, capsys):
    folder = main.run(parse(Settings, data | {"name": "said", "save_every_n_steps": 99}))
    said = capsys.readouterr().out
    few, train = beside(data, "few"), beside(data, "train")
    assert "80 records, 14 steps of 8" in said
    assert f"source {train}: 60 records x 1 = 60 samples an epoch, 54.55%\n" in said
    assert f"source {few}: 20 records x 2.5 = 50 samples an epoch, 45.45%\n" in said
    facts = end_of(folder)[1]["records"]
    one, two = facts["sources"]
    assert (one["name"], one["count"], one["digest"]) == (train, 60, RecordSet(train).digest)
    assert (two["name"], two["count"], two["factor"], two["samples"]) == (few, 20, 2.5, 50)
    assert load_json(folder / "settings.json")["train_data_upsampling_factors"] == "1::2.5"


def test_every_fourth_stop_point_ends_with_the_same_bits(data, whole, monkeypatch):
    monkeypatch.setattr(main, "plot_training", lambda folder: None)
    expected = end_of(whole)[0]
    for step in (4, 8, 12):
        folder = cut(whole, "again", step)
        moved = {"train_data_upsampling_factors": "1.0::25e-1"} if step == 8 else {"workers": 1}
        assert end_of(main.run(parse(Settings, data | {"name": "again", "resume": "latest"} | moved)))[0] == expected
        shutil.rmtree(folder)


def test_sources_that_have_moved_are_the_same(data, whole, tmp_path):
    cut(whole, "moved", 12)
    for path in Path(data["model"]).parent.glob("few.*"):
        shutil.copy(path, tmp_path / path.name)
    moved = {"train_data": f"{beside(data, 'train')}::{tmp_path}/few", "name": "moved", "resume": "latest"}
    found, facts = end_of(main.run(parse(Settings, data | moved)))
    assert found == end_of(whole)[0] and facts["changes"] == []
    assert facts["records"]["sources"][1]["name"] == f"{tmp_path}/few"


SHORT, FACTORS = r"\w{12}", "train_data_upsampling_factors: "


@pytest.mark.parametrize(
    "names, factors, refused",
    [
        ("train::other", "1::2.5", [rf"train_data: '\S+/few 20 records \({SHORT}\)' -> '\S+/other 20 records"]),
        ("train::few", "1::2", ["train_data_upsampling_factors: '1::2.5' -> '1::2'"]),
        ("train::few", None, ["train_data_upsampling_factors: '1::2.5' -> '1::1'"]),
        ("train::few::other", "1::2.5::1", [r"train_data: '\S+/train 60 .*/few 20 .*' -> '.*, \S+/other 20 records"]),
        ("train", None, [r"train_data: '\S+/train 60 .*/few 20 .*' -> '60 records"]),
        ("few::train", "2.5::1", [r"train_data: '\S+/train 60 .*/few 20 .*' -> '\S+/few 20 .*/train 60 ", FACTORS]),
        ("train::other", "1::1", [r"train_data: '\S+/few 20 .*' -> '\S+/other 20 ", FACTORS]),
    ],
)
def test_other_sources_are_refused_by_name_unless_allowed(data, whole, names, factors, refused, monkeypatch):
    monkeypatch.setattr(main, "plot_training", lambda folder: None)
    cut(whole, "changed", 8)
    changes = {
        "name": "changed",
        "resume": "latest",
        "train_data": "::".join(beside(data, name) for name in names.split("::")),
        "train_data_upsampling_factors": factors,
        "max_steps": 14,  # else their number would differ, too
    }
    with pytest.raises(ConfigError) as caught:
        main.run(parse(Settings, data | changes))
    lines = [line for line in caught.value.problems[1:] if not line.startswith("max_steps: ")]
    assert len(lines) == len(refused) and all(map(re.match, refused, lines)), lines
    allowed = [line.partition(":")[0] for line in caught.value.problems[1:]]
    _, facts = end_of(main.run(parse(Settings, data | changes | {"allow_change": allowed})))
    assert facts["step"] == 14 and {note["setting"] for note in facts["changes"]} == set(allowed)


@pytest.mark.parametrize("sources", [7, [3], [{}], [{}, {}], [{"factor": "x"}, {"samples": []}]], ids=str)
def test_stored_sources_that_make_no_sense_are_no_crash(data, sources):
    state = type("State", (), {})()
    state.progress = type("Progress", (), {"records": checks.identify(open_two(data))})
    changes = _compare_records(state, {"records": {"count": 80, "digest": "x", "sources": sources}})
    assert changes and {name for name, *_ in changes} <= {"train_data", "train_data_upsampling_factors"}


def open_two(data: dict, factors: str = "1::2.5"):
    return open_mixture(data["train_data"], factors, None, RecordSet)


def test_a_checkpoint_that_does_not_say_its_records_had_one_source(data):
    state = type("State", (), {})()
    state.progress = type("Progress", (), {"records": checks.identify(open_two(data))})
    ((name, _, now),) = _compare_records(state, {})
    assert name == "train_data" and "few 20 records" in now


# ---- what does not fit


FLAG = "train_data_upsampling_factors"


@pytest.mark.parametrize(
    "names, more, words",
    [
        (
            "train::few",
            {"train_data_upsampling_factors": "1::2::3"},
            "3 in '1::2::3' is for a source that is not there",
        ),
        ("train::few", {"train_data_upsampling_factors": "1::zwei"}, "'zwei' of '1::zwei' is not a number"),
        ("train::few", {"train_data_upsampling_factors": "0::1"}, "leave the source out"),
        ("train::few", {"train_data_upsampling_factors": "0.001::1"}, "0.001 of 60 records in"),
        ("train::nowhere", {}, "nowhere' names no .rec file"),
        ("train::", {}, "has an empty source"),
        ("train::raw", {}, "use --texts 1"),
        ("train::raw", {"texts": 3}, "and --texts asks for 3; use --texts 1"),
        ("train::wide", {}, "sources differ in tokens per text: 8 in"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(data, names, more, words, capsys):
    source = "::".join(name and beside(data, name) for name in names.split("::"))
    settings = {**data, "train_data": source, "train_data_upsampling_factors": None, "name": "wrong"} | more
    arguments = to_arguments({key: value for key, value in settings.items() if value is not None})
    assert run_command(lambda: main.run(main.read_command_line(arguments)) and 0) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and len(said.splitlines()) == 1 and not Path(data["logs"], "wrong").exists()


def test_each_source_is_held_against_the_model(data, tmp_path):
    spec = json.loads(Path(data["model"]).read_text())
    spec["text"]["context"] = 9
    mixture = open_two(data)
    with pytest.raises(ConfigError) as caught:
        checks.check_records(mixture, resolve_spec(spec)[1], data["train_data"], 4)
    train, few = beside(data, "train"), beside(data, "few")
    names = [line.partition(": ")[0] for line in caught.value.problems]
    assert names == [train, train, few, few], caught.value.problems


def test_texts_that_all_sources_have(data):
    names = f"{beside(data, 'train')}::{beside(data, 'raw')}"
    more = {"train_data": names, "texts": 1, "name": "texts", "max_steps": 2}
    assert main.run(parse(Settings, data | more)).is_dir()


def test_sources_of_two_kinds(data, tmp_path):
    pytest.importorskip("lmdb", reason="pip install -e '.[chinese]'")
    source = Path(data["model"]).parent
    images = {i: base64.b64encode((source / f"images/{i}.jpg").read_bytes()) for i in range(7)}
    split = write_split(tmp_path / "lmdb", images, [(i, i, f"picture {i}") for i in range(7)])
    factors = {"train_data_upsampling_factors": "0.5::2"}
    more = {"train_data": f"{beside(data, 'raw')}::{split}", "name": "kinds", **factors, "workers": 2}
    facts = end_of(main.run(parse(Settings, data | more)))[1]
    assert [one["samples"] for one in facts["records"]["sources"]] == [10, 14] and facts["step"] == 3


# ---- ranks


def test_a_rank_with_another_source_is_named(data):
    spec, world = resolve_spec(data["model"])[1], World(0, 2, torch.device("cpu"))

    def plan(host: str, names: str, factors: str) -> dict:
        sources = "::".join(beside(data, name) for name in names.split("::"))
        settings = parse(Settings, data | {"train_data": sources, "train_data_upsampling_factors": factors})
        records = open_mixture(sources, factors, None, lambda name: open_records(name, spec.tokenizer()))
        return {"host": host, **checks.describe_plan(settings, spec, records, world)}

    first = plan("a", "train::few", "1::2.5")
    checks.compare_plans([first, plan("b", "train::few", "1::2.5")])
    with pytest.raises(ConfigError, match=r"train_data source 2: rank 1 on b has '20 records \(\w{12}\)', rank 0 on a"):
        checks.compare_plans([first, plan("b", "train::other", "1::2.5")])
    with pytest.raises(ConfigError, match=r"train_data_upsampling_factors: rank 1 on b has '1::2'"):
        checks.compare_plans([first, plan("b", "train::few", "1::2")])


# ---- profile


def test_profile_data_says_the_shares(data):
    lines = []
    shares = {"train_data_upsampling_factors": "1::2.5"}
    small = {"image_size": 16, "batch_size": 8, "workers": 0, "seconds": 0.02, "device": "cpu", "loader": "torch"}
    profile_data.run(profile_data.ProfileSettings(data["train_data"], **shares, **small), lines.append)
    assert lines[0].startswith("80 records")
    assert [line.rpartition(", ")[2] for line in lines[1:3]] == ["54.55%", "45.45%"]
