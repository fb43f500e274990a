"""Kill it anywhere: at every file-system call of a save, and at random moments of a real training process."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.crashes import KILLED, UNTIL, crash_everywhere, final_digest, kill_at_random, resume_snapshots
from helpers.ranks import CONTEXT
from helpers.smallrun import SmallRun
from helpers.syscalls import NAMES, READS
from helpers.tiny import make_tiny

KILLS = 100


def drive(tmp_path: Path, function, *arguments):
    """Run it in a process forked from one that has imported everything; what it writes down."""
    seen = tmp_path / "seen.json"
    process = CONTEXT.Process(target=function, args=(*arguments, str(seen)))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(seen.read_text())


@pytest.fixture(scope="module")
def settings(new_folder):
    """A run of 0.4 seconds that saves after each of its steps."""
    data = make_tiny(new_folder("tiny"))
    tower = {"width": 8, "depth": 1, "heads": 1, "ffn_width": 16}
    model = {"image": {"image_size": [32, 32], "patch": 16, **tower}, "text": {"context": 8, **tower}}
    Path(data["model"]).write_text(json.dumps(model))
    data.pop("val_data")
    return data | {"max_steps": 5, "save_every_n_steps": 1, "resume": "latest"}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def prepare(folder: Path, scenario: str) -> None:
    """Checkpoints of two steps and, by scenario, one of the third, which is to be saved again."""
    if scenario == "another step 3":  # of another run; the one to be saved replaces it
        SmallRun(folder, seed=1).run(3)
        shutil.rmtree(folder / "step-00000002")
        SmallRun(folder.with_name("first")).run(2)
        shutil.copytree(folder.with_name("first") / "step-00000002", folder / "step-00000002")
        return
    SmallRun(folder).run(2)
    if scenario != "next step":
        SmallRun(folder.with_name("later")).run(3)
        shutil.copytree(folder.with_name("later") / "step-00000003", folder / "step-00000003")
    if scenario == "damaged step 3":
        damage(folder / "step-00000003" / "model.safetensors")


@pytest.mark.parametrize("scenario", ["next step", "damaged step 3", "another step 3"])
def test_every_syscall(tmp_path, scenario):
    """Killed before, after and, when it writes, in the middle of each call of a save."""
    base = tmp_path / "base"
    prepare(base, scenario)
    reference = SmallRun(tmp_path / "whole").run(UNTIL).digest()
    go_back = scenario == "another step 3"
    names = NAMES + READS if scenario == "next step" else NAMES
    rows = drive(tmp_path, crash_everywhere, str(base), go_back, names)
    killed = [row for row in rows if row["code"] == KILLED]
    assert len(killed) >= 70, "there were calls to die at"
    assert {row["code"] for row in rows if row not in killed} == {0}
    for row in rows:
        assert len(row["intact"]) >= 2, row
        assert row["resumed"] in ((2,) if go_back else (2, 3)) and row["cleaned"], row
        assert row["digest"] == reference, row
        assert row["names"] == ["step-00000004", "step-00000005"], row


def test_every_syscall_of_a_real_run(settings, tmp_path):
    """The same of `rwkv_clip.training.main`: what a kill at each call would leave is resumed."""
    logs, snapshots = tmp_path / "logs", tmp_path / "snapshots"
    own = settings | {"logs": str(logs), "max_steps": 4, "name": "watched"}
    rows, different = drive(tmp_path, resume_snapshots, own, 3, str(snapshots))
    reference = final_digest(logs / "watched")
    assert len(rows) >= 100 and different >= 15 and list(reference) == ["step-00000004"]
    for row in rows:
        assert len(row["intact"]) >= 2 and row["code"] == 0, row
        assert row["final"] == reference and row["left"] == [], row


def test_random_sigkill(settings, tmp_path):
    rows, runs = drive(tmp_path, kill_at_random, settings | {"logs": str(tmp_path / "logs")}, KILLS, 7)
    assert len(rows) == KILLS and all(run == run | {"code": 0, "same": True, "left": []} for run in runs), runs
    assert sum(run["starts"] for run in runs) == KILLS + len(runs)
    assert sum(row["saving"] for row in rows) >= KILLS // 20, "some kills fell into a save"
    newest = [max(row["intact"], default="") for row in rows]
    assert len(set(newest)) >= 4 and "" in newest, "kills fell before the first save and after several others"
    assert sum(map(bool, newest)) >= KILLS // 4
