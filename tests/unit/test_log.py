"""log.jsonl: every record once, in order, whatever the disk does."""

import json
import subprocess
import sys

from rwkv_clip.training.log import RunLog
from rwkv_clip.training.settings import Settings


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_that_was_cut_off_is_dropped_on_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = RunLog(tmp_path, Settings(), first_step=2, total_steps=9)
    log.write(3, {"x": 1})
    log.close()
    assert steps(path) == [1, 2, 3] and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


FULL = """
import resource, signal, sys
from pathlib import Path
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.log import RunLog

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = RunLog(Path(sys.argv[1]), Settings(), 0, 99)
for step in range(1, 60):
    size = 150 if 10 <= step < 40 else resource.RLIM_INFINITY  # a file of at most that many bytes: ends within a line
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    log.write(step, {"name": "x" * 20})
log.close()
"""


def test_a_full_disk_ends_no_run_and_loses_no_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not written" in done.stderr and steps(tmp_path / "log.jsonl") == list(range(1, 60))
