"""Every script in shell/, run as a user runs it, with a few steps on tiny data."""

import os
import shutil
import signal
import subprocess
import time
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
    for part in ("train", "test"):
        shutil.copytree(classes, tmp_path / "probe" / part)
    out = script("test_linear_probe.sh", "--strength", "1", CHECKPOINT=str(run), DATA_ROOT=str(tmp_path / "probe"))
    assert "penalty" in out and list(run.glob("eval/*linear_probe*/result.json")) and list(run.glob("eval/cache/*/*"))


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


SLURM = {
    # Every node is this machine: one task per node, told its number, as srun starts them; scancel signals the tasks.
    "srun": """shift; for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >> "$FAKE/tasks"; done
code=0; for task in $(cat "$FAKE/tasks"); do wait "$task" || code=$?; done; exit $code""",
    "scancel": """[ "$*" = "--signal=TERM 4711" ]; kill -TERM $(cat "$FAKE/tasks")""",
    "scontrol": """echo "$*" >> "$FAKE/calls"; printf '127.0.0.1\\nnode1\\n'""",
}


def test_slurm_trains_on_two_nodes_saves_when_told_and_goes_on(tmp_path, free_port):
    data = make_tiny(tmp_path)
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "4711",
    }
    job |= {
        "FAKE": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "EXTRAS": "dev,dali",
        "NPROC_PER_NODE": "1",
    }
    job |= {"TRAIN_DATA": data["train_data"], "OUTPUT": str(tmp_path / "logs" / "run")}
    settings = ["--model", data["model"], "--log-every-n-steps", "1", *QUICK, "--max-steps", "100000"]
    with open(tmp_path / "out", "w") as out:
        command = ["bash", str(ROOT / "shell" / "slurm_train.sh"), *settings]
        batch = subprocess.Popen(command, env=os.environ | job, stdout=out, stderr=out)
    log = tmp_path / "logs" / "run" / "log.jsonl"
    until = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.1)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(60) == 0, (tmp_path / "out").read_text()[-3000:]
    steps = log.read_text().count("\n")
    said = (tmp_path / "out").read_text()
    assert "on 2 x cpu" in said and f"stopped by SIGTERM after step {steps}" in said
    assert (tmp_path / "logs" / "run" / "checkpoints" / f"step-{steps:08}").is_dir()
    assert (tmp_path / "calls").read_text() == "show hostnames node[0-1]\nrequeue 4711\n"


def test_recipes_are_short_and_safe():
    for path in (ROOT / "shell").glob("*.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)
        lines = path.read_text().splitlines()
        assert len(lines) <= 25, path
        assert path.name == "setup.sh" or "set -euo pipefail" in lines, path
