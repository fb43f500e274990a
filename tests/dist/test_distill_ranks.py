"""A teacher, a model or stored features, on ranks: one process, DDP and FSDP do the same, --deterministic keeps its
bits, and ranks with different teachers do not begin."""

import shutil
import subprocess
import sys

import pytest

from helpers.ranks import digest, run_ranks, train_logging_ids
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import parse
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings


@pytest.fixture(scope="module")
def begun(new_folder):
    folder = new_folder("distill")
    base = make_smaller(make_tiny(folder)) | {"val_data": None, "lr": 1e-3, "max_steps": 3}
    teacher = run(parse(Settings, base | {"name": "teacher", "batch_size": 12, "lr": 1e-2}))
    command = [sys.executable, "-m", "rwkv_clip.eval.main", "features", "--checkpoint", str(teacher)]
    more = ["--data", base["train_data"], "--name", "stored", "--logs", str(folder)]
    subprocess.run([*command, *more], check=True, capture_output=True)
    return (
        folder,
        base,
        {"model": {"distill_model": str(teacher)}, "stored": {"distill_features": str(folder / "stored")}},
    )


@pytest.fixture(scope="module")
def runs(begun):
    """Checkpoint of a run by its ranks, teacher and settings."""
    folder, base, teachers = begun

    def start(ranks: int, teacher: str, **changes):
        name = f"{ranks} {teacher} {sorted(changes.items())}"
        if not (folder / name).exists():
            (folder / name).mkdir()
            settings = {**base, **teachers[teacher], "batch_size": 8 // ranks, "name": name, **changes}
            run_ranks(ranks, folder / name, train_logging_ids, settings)
        return find_checkpoint(folder / "logs" / name)

    return start


@pytest.mark.parametrize(
    "teacher, changes",
    [("model", {}), ("model", {"parallel": "fsdp"}), ("stored", {"accum_freq": 2, "batch_size": 2})],
    ids=str,
)
def test_two_ranks_do_what_one_does(runs, teacher, changes):
    found, expected = (
        read_tensors(path / "model.safetensors") | read_tensors(path / "optim.safetensors")
        for path in (runs(2, teacher, **changes), runs(1, teacher))
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "exp_avg" in name or name.startswith("logit"):
            assert float((found[name] - value).abs().max() / max(float(value.abs().max()), 1e-3)) < 1e-3, name


@pytest.mark.parametrize("teacher", ["model", "stored"])
def test_deterministic_bits(runs, teacher):
    same = {"deterministic": True, "max_ranks": 2, "objective": "siglip"}
    assert digest(runs(1, teacher, **same)) == digest(runs(2, teacher, **same))


def train_with_own_teacher(settings: dict, teachers: list[str]) -> None:
    import os

    train_logging_ids(settings | {"distill_model": teachers[int(os.environ["RANK"])]})


def test_ranks_have_one_teacher(begun, tmp_path):
    _, base, teachers = begun
    first = teachers["model"]["distill_model"]
    other = run(parse(Settings, base | {"name": "other", "batch_size": 12}))
    shutil.copytree(first, tmp_path / "copy")
    settings = base | {"batch_size": 4, "logs": str(tmp_path)}
    run_ranks(2, tmp_path, train_with_own_teacher, settings | {"name": "a"}, [first, str(tmp_path / "copy")])
    with pytest.raises(AssertionError, match=r"distill_model: rank 1 .* has '[0-9a-f]{16}', rank 0"):
        run_ranks(2, tmp_path, train_with_own_teacher, settings | {"name": "b"}, [first, str(other)])
