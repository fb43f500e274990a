"""Every script in shell/, run as a user runs it, with a few steps on tiny data."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import make_tiny

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--max-steps", "2", "--workers", "0", "--device", "cpu", "--precision", "fp32", "--batch-size", "4"]

pytestmark = pytest.mark.skipif(
    not list(ROOT.glob(".venv/installed-*")),
    reason="the scripts install into .venv; run `bash shell/run_tests.sh` once",
)


def script(name: str, *arguments: str, expect: int = 0, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("CHECKPOINT", "DATA", "DATA_ROOT", "TRAIN_DATA", "LOGS")}
    done = subprocess.run(
        ["bash", str(ROOT / "shell" / name), *arguments],
        env={**clean, "EXTRAS": "dev,dali", "TORCH_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_recipe_trains_and_both_test_scripts_evaluate(tmp_path, free_port):
    data = make_tiny(tmp_path)
    run = tmp_path / "logs" / "run"
    recipe = {"TRAIN_DATA": data["train_data"], "VAL_DATA": data["val_data"], "OUTPUT": str(run)}
    recipe |= {"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port)}
    arguments = ["--model", data["model"], "--log-every-n-steps", "1", *QUICK]
    out = script("train_RWKV_CLIP_B32_YFCC15M.sh", *arguments, **recipe)
    assert "step 2/2" in out and (run / "training.png").exists()
    again = script("train_RWKV_CLIP_B32_YFCC15M.sh", *arguments, **recipe)
    assert "resumed at step 2" in again

    out = script("test_zero_shot_retrieval.sh", CHECKPOINT=str(run), DATA=data["val_data"])
    assert "mean recall" in out and list(run.glob("eval/*/retrieval.png"))
    classes = tmp_path / "classes"
    for i, name in enumerate(("stripes", "plain")):
        (classes / name).mkdir(parents=True)
        shutil.copy(tmp_path / "images" / f"{i}.jpg", classes / name)
    out = script("test_zero_shot_classificaiton.sh", CHECKPOINT=str(run), DATA_ROOT=str(classes))
    assert "top-1" in out and list(run.glob("eval/*classification*/result.json"))


def test_demo_without_settings(tmp_path):
    """The stranger's command, but for the number of steps and where things go."""
    out = script(
        "train_RWKV_CLIP_B32_YFCC15M.sh",
        *("--max-steps", "2", "--batch-size", "8", "--workers", "0"),
        DEMO_DATA=str(tmp_path / "demo"),
        OUTPUT=str(tmp_path / "demo-run"),
    )
    assert "TRAIN_DATA is not set" in out and "classification/shape" in out and "To train the real thing" in out
    assert (tmp_path / "demo-run" / "training.png").exists() and (tmp_path / "demo-run" / "retrieval.png").exists()


@pytest.mark.parametrize("task, message", [("retrieval", "DATA"), ("classificaiton", "DATA_ROOT")])
def test_evaluation_without_a_run_says_what_to_do(tmp_path, task, message):
    copy = tmp_path / "clone"
    (copy / "shell").mkdir(parents=True)
    for file in (ROOT / "shell").iterdir():
        shutil.copy(file, copy / "shell")
    (copy / "shell" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."\n')
    done = subprocess.run(["bash", str(copy / "shell" / f"test_zero_shot_{task}.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "no demo run yet" in done.stderr and message in done.stderr


def test_recipes_are_short_and_safe():
    for path in (ROOT / "shell").glob("*.sh"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 25, path
        assert path.name == "setup.sh" or "set -euo pipefail" in lines, path
