"""Jobs of descriptions for tests: rows, the command, what a job holds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WHO, THINGS = ("dog", "cat", "man", "girl", "horse"), ("ball", "boat", "tree", "bench", "kite", "car")


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows whose texts name themselves: row 0, row 1, .."""
    rows = []
    for i in range(count):
        who, thing, other = WHO[i % 5], THINGS[i % 6], THINGS[(i // 6) % 6]
        texts = {"raw": f"row {i} IMG_{i}.JPG {who} and {thing}", "synthetic": f"a {who} near a {thing}"}
        rows.append({"id": f"r{i}", "image": f"{i}.jpg", **texts, "tags": [who, other], "tag_scores": [0.9, 0.8]})
    return rows


def write_rows(folder: Path, count: int) -> Path:
    """Those as JSON lines."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count)))
    return file


def describe(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """`python -m rwkv_clip.describe ..` in a process of its own."""
    command = [sys.executable, "-m", "rwkv_clip.describe", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done


FORKED = """
import json, os, sys
import rwkv_clip.describe.commands, rwkv_clip.describe.__main__ as program
import aiohttp, pyarrow.parquet, open_clip
program.main(["status", "--output", "/nowhere"])
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 70
        try:
            code = program.main(json.loads(line))
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """Runs the command in forks of a process that has imported everything, so that a run starts in milliseconds and a
    kill meets the work, not the imports."""

    def __enter__(self) -> Forker:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, "-c", FORKED], env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, arguments: Sequence[object], kill_after: float | None = None) -> int:
        """The exit code of a run; -9 where it was killed after so many seconds."""
        self._process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
        self._process.stdin.flush()
        child = int(self._read())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, 9)
        return int(self._read())

    def _read(self) -> str:
        """The next number; lines that the command prints are passed over."""
        while (line := self._process.stdout.readline()).strip().lstrip("-").isdecimal() is False:
            assert line, "the forker ended"
        return line


def hash_job(job: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the job's files by name."""
    files = sorted(file for pattern in patterns for file in job.glob(pattern))
    return {str(file.relative_to(job)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


RESULTS = ("rows/*.parquet", "compose/*.parquet", "verify/*.parquet", "dedup/*.parquet", "texts.parquet")


def read_texts(job: Path) -> list[dict[str, Any]]:
    """Rows of texts.parquet."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(job / "texts.parquet").to_pylist()
