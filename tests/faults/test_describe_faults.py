"""Several commands on one job of descriptions: whoever comes second is refused before it touches anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.describing import describe, make_rows, read_texts, write_rows

HOLD = """
import sys
from pathlib import Path
from rwkv_clip.files import hold
with hold(Path(sys.argv[1]), "job", "wait", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest):
    """A job that another process works on, alone or as one of several shards."""
    describe("run", "--input", write_rows(tmp_path, 20), "--output", tmp_path / "job", "--part-rows", 5)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "job" / "job.lock"), request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield tmp_path / "job"
        process.stdin.close()


@pytest.mark.parametrize("held", ["alone", "shared"], indirect=True)
@pytest.mark.parametrize("command", ["run", "compose", "verify", "dedup", "report", "export"])
def test_a_second_command_changes_nothing(held: Path, command: str) -> None:
    changed = held.parent / "rows.jsonl"
    changed.write_text("".join(json.dumps({**row, "raw": "other"}) + "\n" for row in make_rows(20)))
    before = {str(file): file.read_bytes() for file in held.rglob("*") if file.is_file() and file.name != "job.lock"}
    done = describe(command, "--input", changed, "--output", held, check=False)
    assert done.returncode == 76 and "in use by" in done.stderr and done.stderr.count("\n") == 1
    after = {str(file): file.read_bytes() for file in held.rglob("*") if file.is_file() and file.name != "job.lock"}
    assert after == before


@pytest.mark.parametrize("held", ["alone", "shared"], indirect=True)
def test_shards_work_beside_shards_only(held: Path, request: pytest.FixtureRequest) -> None:
    done = describe("run", "--input", held.parent / "rows.jsonl", "--output", held, "--shard", "1/4", check=False)
    assert done.returncode == (0 if "shared" in request.node.name else 76)


def test_shards_that_begin_a_job_together_finish_it(tmp_path: Path) -> None:
    file, job = write_rows(tmp_path, 20), tmp_path / "job"
    command = [sys.executable, "-m", "rwkv_clip.describe", "run", "--input", str(file), "--output", str(job)]
    shards = [
        subprocess.Popen([*command, "--part-rows", "5", "--shard", f"{i}/4"], stderr=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    for shard in shards:
        _, told = shard.communicate(timeout=120)
        assert shard.returncode == 0, told
    describe("run", "--input", file, "--output", job)
    assert [row["id"] for row in read_texts(job)] == [f"r{i}" for i in range(20)]
