"""What is checked before work begins, and how ranks find out that they are not to do the same."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.tiny import make_tiny
from rwkv_clip.config import ConfigError, flat_names, parse
from rwkv_clip.data.records import RecordSet
from rwkv_clip.dist import MainRankFailed, World, _check_kinds, ask_main, judge_all
from rwkv_clip.errors import explain
from rwkv_clip.factory import create_model, resolve_spec
from rwkv_clip.files import InUse
from rwkv_clip.training import checks
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(new_folder):
    return make_tiny(new_folder("tiny"))


def worlds(size: int) -> list[World]:
    store = dist.HashStore()
    return [World(rank, size, CPU, store) for rank in range(size)]


def on_all(size: int, work) -> list:
    """work(world) on ranks in threads: what each returns or raises."""

    def outcome(world):
        try:
            return work(world)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(outcome, worlds(size)))


# ---- batches


@pytest.mark.parametrize(
    "batch, accum, ranks, count, words",
    [
        (4, 1, 1, 1, "train_data: 1 record"),
        (8, 1, 1, 3, "is 8 pairs per step, but there are 3 records"),
        (4, 1, 2, 7, "batch_size: 4 x accum_freq 1 x 2 ranks is 8 pairs"),
        (2, 4, 1, 7, "at most 7 pairs per step"),
        (1, 1, 1, 12, "is one pair per step"),
        (8, 1, 1, 8, None),
        (4, 1, 2, 8, None),
        (1, 2, 1, 8, None),
        (1, 1, 2, 8, None),
    ],
)
def test_batches_without_negatives(batch, accum, ranks, count, words):
    settings = parse(Settings, {"batch_size": batch, "accum_freq": accum})
    if words is None:
        return checks.check_batch(settings.parallel, World(0, ranks, CPU), count)
    with pytest.raises(ConfigError) as caught:
        checks.check_batch(settings.parallel, World(0, ranks, CPU), count)
    assert words in str(caught.value) and len(caught.value.problems) == 1


PUBLISHED = {"published": {"lr": 5e-5, "batch": 1024}}


@pytest.mark.parametrize(
    "settings, ranks, proposed",
    [
        (PUBLISHED | {"lr": 5e-5, "batch_size": 48}, 2, "--lr 4.7e-06"),
        (PUBLISHED | {"lr": 5e-5, "batch_size": 64, "accum_freq": 4}, 1, "--lr 1.3e-05"),
        (PUBLISHED | {"lr": 2e-5, "batch_size": 48}, 2, "--lr 4.7e-06"),
        (PUBLISHED | {"lr": 4e-6, "batch_size": 48}, 2, None),  # lower in proportion
        (PUBLISHED | {"lr": 5e-5, "batch_size": 257}, 1, None),  # more than a quarter
        ({"lr": 5e-5, "batch_size": 2}, 1, None),  # no recipe says anything
    ],
    ids=str,
)
def test_a_rate_for_another_batch_is_warned_of(settings, ranks, proposed, caplog):
    settings = parse(Settings, settings)
    for rank in range(ranks):
        checks.warn_of_rate(settings, World(rank, ranks, CPU))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (proposed is not None), "the main rank says it"
    if proposed:
        assert proposed in said[0] and said[0].startswith("lr: 5e-05 was published for 1024 pairs a step")


def test_float16_on_a_cpu_is_warned_of(caplog):
    for precision in ("amp", "amp_bf16", "fp32", "auto"):
        checks.warn_of_precision(precision, World(0, 1, CPU))
        checks.warn_of_precision(precision, World(1, 2, CPU))
    checks.warn_of_precision("amp", World(0, 1, torch.device("cuda")))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("precision: amp computes in float16, which is for GPUs; on a CPU use --precision fp32")


def test_half_a_publication_is_refused():
    with pytest.raises(ConfigError, match=r"published: lr 0\.001 and batch None; set both or neither"):
        parse(Settings, {"published": {"lr": 1e-3}})


def test_a_run_of_too_few_records_leaves_no_folder(data):
    with pytest.raises(ConfigError, match="is 64 pairs per step, but there are 60 records"):
        run(parse(Settings, data | {"batch_size": 64, "name": "few"}))
    assert not Path(data["logs"], "few").exists()


# ---- plans


def plan(data, **changes) -> dict:
    settings = parse(Settings, data | changes)
    return checks.describe_plan(
        settings, resolve_spec(settings.model.model)[1], RecordSet(settings.data.train_data), World(0, 2, CPU)
    )


def test_every_setting_is_compared_or_known_not_to_matter():
    names = set(flat_names(Settings))
    assert names >= checks.OWN | checks.PLACES and not checks.OWN & checks.PLACES


SAME = [
    {"device": "cpu", "workers": 3, "loader": "auto", "logs": "elsewhere", "report_to": ["tensorboard"]},
    {"val_data": "on another disk"},
]
DIFFERENT = {
    "seed": 1,
    "lr": 0.5,
    "text_choice": "first",
    "max_steps": 99,
    "batch_size": 4,
    "val_data": None,
    "resume": "latest",
    "pretrained": "weights.pt",
    "name": "x",
    "precision": "amp_bf16",
    "deterministic": True,
    "objective": "alip",
    "timeout": 5.0,
}


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_what_may_differ(data, changes):
    checks.compare_plans([{"host": h, **plan(data, **c)} for h, c in (("a", {}), ("b", changes))])


@pytest.mark.parametrize("key", DIFFERENT)
def test_what_must_not_differ(data, key):
    first, other = ({"host": host, **plan(data, **c)} for host, c in (("a", {}), ("b", {key: DIFFERENT[key]})))
    with pytest.raises(ConfigError) as caught:
        checks.compare_plans([first, first | {"host": "c"}, other])
    (line,) = [line for line in caught.value.problems if line.startswith(f"{key}: ")]
    assert line == f"{key}: rank 2 on b has {other[key]!r}, rank 0 on a {first[key]!r}"


def test_the_description_behind_a_name_is_compared(data, tmp_path):
    text = Path(data["model"]).read_text()
    (tmp_path / "model.json").write_text(text)
    assert plan(data, model=str(tmp_path / "model.json")) == plan(data)
    (tmp_path / "model.json").write_text(text.replace('"patch": 16', '"patch": 8'))
    other = plan(data, model=str(tmp_path / "model.json"))
    assert {key for key in other if other[key] != plan(data)[key]} == {"model.image.patch"}


def test_many_differences_are_cut():
    plans = [{"host": "a", **{f"s{i}": rank for i in range(9)}} for rank in range(2)]
    with pytest.raises(ConfigError) as caught:
        checks.compare_plans(plans)
    assert len(caught.value.problems) == checks.NAMED + 2 and caught.value.problems[-1] == ".. and 4 others"


def test_sources_are_hashed_quickly_and_all(tmp_path, monkeypatch):
    began = time.monotonic()
    before = checks.hash_sources()
    assert time.monotonic() - began < 2  # 10 ms on an idle machine
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: seen.append(self.name) or read(self))
    assert checks.hash_sources() == before
    assert {"main.py", "loop.py", "recordio.py", "rwkv.py", "wkv6.cpp", "wkv6.cu"} <= set(seen)
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b" " * (self.name == "tile.cuh"))
    assert checks.hash_sources() != before


def test_weights_are_told_apart(data):
    def hashed(seed=0, **changes):
        torch.manual_seed(seed)
        model = create_model(data["model"])
        with torch.no_grad():
            for name, value in changes.items():
                model.get_parameter(name).view(-1)[0] = value
        return checks.hash_weights(model)

    assert 0 <= hashed() < 1 << 63 and hashed() == hashed()
    assert hashed(1) != hashed() and hashed(logit_scale=2.0) != hashed()


# ---- asking the main rank


def test_the_lead_answers_all():
    def work(world):
        return ask_main(world, "x", lambda: {"rank": world.rank, "name": "a\udcff"})

    assert on_all(3, work) == [{"rank": 0, "name": "a\udcff"}] * 3
    assert ask_main(World(0, 1, CPU), "x", lambda: 7) == 7


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ConfigError(["lr: 1", "wd: 2"]), 2, "lr: 1\nwd: 2"),
        (InUse("logs/a: in use by host, pid 7"), 76, "pid 7"),
        (OSError(30, "Read-only file system", "logs"), 76, "logs: Read-only"),
        (KeyError("a bug"), 5, "rank 0 failed (KeyError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_of_the_lead_is_told_to_all(error, code, words):
    def work(world):
        def fail():
            raise error

        return ask_main(world, "x", fail)

    lead, *others = on_all(3, work)
    assert lead is error
    for other in others:
        assert isinstance(other, MainRankFailed) and explain(other)[0] == code and words in str(other)


def test_facts_reach_the_lead_in_order():
    heard = []
    assert on_all(3, lambda world: judge_all(world, "x", {"rank": world.rank}, heard.append)) == [None] * 3
    assert judge_all(World(0, 1, CPU), "x", {"a": 1}, heard.append) is None
    assert heard == [[{"rank": 0}, {"rank": 1}, {"rank": 2}], [{"a": 1}]]


def test_devices_of_two_kinds_are_refused_on_all_ranks():
    kinds = ["cuda", "cuda", "cpu"]
    found = on_all(3, lambda world: _check_kinds(world.store, world.rank, 3, torch.device(kinds[world.rank])))
    assert all(isinstance(error, ValueError) and "device: rank 2 has cpu on" in str(error) for error in found)
    assert on_all(2, lambda world: _check_kinds(world.store, world.rank, 2, CPU)) == [None, None]
