"""The scripts of shell/, run as a user runs them."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_installation = pytest.mark.skipif(
    not list(ROOT.glob(".venv/installed-*")),
    reason="the scripts install into .venv; run `bash shell/run_tests.sh` once",
)


def script(name: str, *arguments: str, expect: int = 0, **environment: str) -> str:
    """What a script prints; AssertionError unless it ends with `expect`."""
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
