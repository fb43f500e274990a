"""Run folders: who owns one, which checkpoint a run goes on from, and what their storage may do to a run."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import rwkv_clip
from helpers.tiny import make_smaller, make_tiny, to_arguments
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint
from rwkv_clip.config import ConfigError, load_json, parse
from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import RecordSet
from rwkv_clip.dist import MainRankFailed, World
from rwkv_clip.errors import explain, run_command
from rwkv_clip.files import InUse, hash_file, hold
from rwkv_clip.training import main
from rwkv_clip.training import run as folders
from rwkv_clip.training.data.workers import WorkerLost
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import RunSettings, Settings

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_smaller(make_tiny(new_folder("tiny")))
    settings |= {"max_steps": 3, "save_every_n_steps": 1, "log_every_n_steps": 3, "keep_checkpoints": 9}
    del settings["val_data"]
    return settings


@pytest.fixture(scope="module")
def done(data) -> Path:
    """A run folder with checkpoints of three steps."""
    return run(parse(Settings, data | {"name": "done"}))


@pytest.fixture
def own(done, tmp_path) -> Path:
    """A copy of it in a folder of this test."""
    return Path(shutil.copytree(done, tmp_path / "logs" / "own"))


def open_run(logs: Path, world: World = ONE, **changes):
    return folders.open_run(parse(RunSettings, {"logs": str(logs), **changes}), world, "tiny")


def command(settings: dict, capsys) -> tuple[int, list[str]]:
    """Exit code and words on standard error of a training command in this process."""
    code = run_command(lambda: run(parse(Settings, settings)) and 0, memory=main.MEMORY)
    return code, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]


# ---- what a run goes on from


def test_the_checkpoint_is_chosen_by_who_owns_the_folder(own, monkeypatch):
    """The owner before saves its last checkpoint when this run has been started already."""
    last = own / "checkpoints" / "step-00000003"
    hidden = last.rename(own / "hidden")

    @contextlib.contextmanager
    def late(*arguments, **options):
        with hold(*arguments, **options):
            hidden.rename(last)
            yield

    monkeypatch.setattr(folders, "hold", late)
    with open_run(own.parent, name="own", resume="latest") as (folder, checkpoint):
        assert folder == own and checkpoint == last


def test_a_new_run_is_refused_by_what_its_owner_left(own, monkeypatch):
    with (
        pytest.raises(ConfigError, match="own already holds a run; resume it by --resume latest"),
        open_run(own.parent, name="own"),
    ):
        pass
    with hold(own / "run.lock", "own", "", keep=True):  # as it is left by a refusal
        pass


def test_a_folder_in_use_is_refused_before_anything_is_read(own, monkeypatch):
    lock = "import sys, time; from rwkv_clip.files import hold, Path\nwith hold(Path(sys.argv[1]), 'own', ''):\n"
    other = subprocess.Popen(
        [sys.executable, "-c", lock + " print('held', flush=True); time.sleep(60)", str(own / "run.lock")],
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.readline()
        monkeypatch.setattr(folders, "find_checkpoint", lambda path: pytest.fail("read"))
        with pytest.raises(InUse, match=f"pid {other.pid}"), open_run(own.parent, name="own", resume="latest"):
            pass
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    "resume, found",
    [
        ("latest", "checkpoints/step-00000003"),
        (".", "checkpoints/step-00000003"),
        ("checkpoints", "checkpoints/step-00000003"),
        ("checkpoints/step-00000002", "checkpoints/step-00000002"),
    ],
)
def test_ways_to_say_what_to_go_on_from(own, resume, found):
    resume = resume if resume == "latest" else str(own / resume)
    with open_run(own.parent, name="own", resume=resume) as (folder, checkpoint):
        assert folder == own and checkpoint == own / found
    with open_run(own.parent, name="new", resume="latest") as (folder, checkpoint):
        assert folder.name == "new" and checkpoint is None
    restarted = World(0, 1, torch.device("cpu"), restarted=True)
    with open_run(own.parent, restarted, name="own") as (folder, checkpoint):
        assert checkpoint == own / "checkpoints/step-00000003"


@pytest.mark.parametrize(
    "resume, error, words",
    [
        (
            "checkpoints/step-00000002/model.safetensors",
            ConfigError,
            "--pretrained .*model.safetensors starts a new run",
        ),
        ("log.jsonl", ConfigError, "is a file of weights"),
        ("nowhere", CheckpointError, "no such file"),
        ("..", CheckpointError, "holds no intact checkpoint"),
    ],
)
def test_what_a_run_cannot_go_on_from(own, resume, error, words, data, capsys):
    with pytest.raises(error, match=words), open_run(own.parent, name="new", resume=str(own / resume)):
        pass
    code, said = command(data | {"logs": str(own.parent), "name": "new", "resume": str(own / resume)}, capsys)
    assert code == 2 and len(said) == 1, said


def test_names_that_are_not_utf8(data, tmp_path):
    odd = tmp_path / os.fsdecode(b"o\xff")
    shutil.copytree(Path(data["train_data"]).parent, odd, ignore=shutil.ignore_patterns("logs"))
    settings = data | {"train_data": str(odd / "train"), "logs": str(tmp_path / "logs"), "name": "plain"}
    folder = run(parse(Settings, settings))
    assert load_json(folder / "settings.json")["train_data"] == str(odd / "train")
    for key, value in (("name", "n\udcfe"), ("logs", str(odd)), ("resume", "\udcff"), ("pretrained", str(odd))):
        with pytest.raises(ConfigError, match=f"{key}: .* is not UTF-8, .* rename it"):
            parse(Settings, settings | {key: value})


# ---- the records of a run


def go_back(folder: Path, change=lambda state: state) -> None:
    """To the second step of three, with another state.json."""
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    path = folder / "checkpoints" / "step-00000002"
    (path / "state.json").write_text(json.dumps(change(json.loads((path / "state.json").read_text()))))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    size = (path / "state.json").stat().st_size
    manifest["files"]["state.json"] = {"sha256": hash_file(path / "state.json"), "bytes": size}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def resume(own: Path, data: dict, **changes) -> dict:
    """state.json of the end of a run that goes on in that folder."""
    folder = run(parse(Settings, data | {"logs": str(own.parent), "name": "own", "resume": "latest"} | changes))
    return json.loads((find_checkpoint(folder) / "state.json").read_text())


def build_others(
    data: dict, prefix: Path, count: int = 60, word: str = "stripes", color: int = 0, exchange: bool = False
) -> str:
    """Records as those of the run, but for their number, a word, the pictures, or the order of two texts."""
    source = Path(data["train_data"]).parent
    rows = [json.loads(line) for line in (source / "all.jsonl").read_text().splitlines()][:count]
    prefix.parent.mkdir()
    for row in rows:
        row["generated"] = row["generated"].replace("stripes", word)
        row["image"] = str(source / row["image"])
    if exchange:
        rows[0]["generated"], rows[1]["generated"] = rows[1]["generated"], rows[0]["generated"]
    if color:
        Image.new("RGB", (40, 36), (color, 0, 0)).save(prefix.parent / "other.jpg")
        rows[7]["image"] = str(prefix.parent / "other.jpg")
    (prefix.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"texts": ("raw", "synthetic", "generated"), "context": 8, "allow_outside": True}
    build_records(str(prefix.parent / "rows.jsonl"), str(prefix), **how)
    return str(prefix)


@pytest.mark.parametrize("other", [{"word": "dots"}, {"color": 200}, {"count": 50}], ids=str)
def test_other_records_are_refused_unless_allowed(own, data, other, tmp_path):
    go_back(own)
    others = build_others(data, tmp_path / "others" / "train", **other)
    count = other.get("count", 60)
    with pytest.raises(ConfigError, match="--allow-change train_data resumes anyway") as caught:
        resume(own, data, train_data=others)
    (line,) = caught.value.problems[1:]
    assert re.fullmatch(rf"train_data: '60 records \(\w{{12}}\)' -> '{count} records \(\w{{12}}\)'", line)
    state = resume(own, data, train_data=others, allow_change=["train_data"])
    assert state["records"] == {"count": count, "digest": RecordSet(others).digest}
    (note,) = state["changes"]
    assert (note["step"], note["setting"]) == (2, "train_data") and note["to"].startswith(f"{count} records (")
    assert resume(own, data, train_data=others)["changes"] == [note], "they are the run's own from now on"
    with pytest.raises(ConfigError, match="train_data"):
        resume(own, data)


def test_other_records_beside_the_old_side_file_are_refused(own, data, tmp_path):
    """Of the same lengths: two texts have changed places."""
    go_back(own)
    others = build_others(data, tmp_path / "others" / "train", exchange=True)
    shutil.copy(f"{data['train_data']}.json", f"{others}.json")
    assert Path(others + ".idx").read_bytes() == Path(data["train_data"] + ".idx").read_bytes()
    with pytest.raises(ConfigError, match="--allow-change train_data resumes anyway"):
        resume(own, data, train_data=others)


def test_the_same_records_elsewhere_are_the_same(own, data, tmp_path, caplog):
    go_back(own)
    for path in Path(data["train_data"]).parent.glob("train.*"):
        shutil.copy(path, tmp_path / path.name.replace("train", "moved"))
    assert resume(own, data, train_data=str(tmp_path / "moved"))["changes"] == [] and not caplog.records


def test_a_checkpoint_without_a_digest_goes_on_and_has_one_then(own, data, tmp_path, caplog):
    """As versions 0.2 to 0.4 wrote them."""
    go_back(own, lambda state: {key: value for key, value in state.items() if key not in ("records", "version")})
    state = resume(own, data, workers=0)
    (warning,) = (record.message for record in caplog.records)
    assert f"step-00000002: written by version 0.4 or before, this is {rwkv_clip.__version__}; it does" in warning
    assert state["records"]["digest"] == RecordSet(data["train_data"]).digest
    assert state["version"] == rwkv_clip.__version__ and [note["setting"] for note in state["changes"]] == ["version"]


def test_another_description_behind_the_same_name_is_refused(own, data):
    """Its weights would fit."""
    go_back(own, lambda state: {**state, "spec": {**state["spec"], "text": {**state["spec"]["text"], "norm_eps": 0.5}}})
    with pytest.raises(ConfigError, match=r"model: \{'text.norm_eps': 0.5\} -> \{'text.norm_eps': 0.00064\}"):
        resume(own, data)
    (note,) = resume(own, data, allow_change=["model"])["changes"]
    assert note["setting"] == "model" and note["from"] == {"text.norm_eps": 0.5}


def test_a_description_without_newer_fields_is_the_same(own, data):
    drop = {"norm_eps", "rwkv_init", "class_token"}
    old = lambda state: {  # noqa: E731
        part: {key: value for key, value in state["spec"][part].items() if key not in drop}
        for part in ("image", "text")
    }
    go_back(own, lambda state: state | {"spec": old(state)})
    assert resume(own, data)["changes"] == []


@pytest.mark.parametrize("records", [7, [], {"count": "many"}, {"digest": 3}], ids=str)
def test_records_that_make_no_sense_are_no_crash(own, data, records):
    go_back(own, lambda state: state | {"records": records})
    with pytest.raises((CheckpointError, ConfigError), match=r"records is|train_data: "):
        resume(own, data)


# ---- several ranks


def on_ranks(logs: list[Path], **changes) -> list:
    """What `open_run` gives to ranks that see the logs at these places, or raises."""
    store = dist.HashStore()

    def open_one(rank: int):
        try:
            world = World(rank, len(logs), torch.device("cpu"), store)
            with open_run(logs[rank], world, **changes) as opened:
                return opened
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(logs)) as pool:
        return list(pool.map(open_one, range(len(logs))))


def test_all_ranks_go_on_from_what_the_lead_chose(own):
    (own.parent.parent / "mount").symlink_to(own.parent)
    logs = [own.parent, own.parent, own.parent.parent / "mount"]
    for resume in ("latest", str(own / "checkpoints" / "step-00000002")):
        opened = on_ranks(logs, name="own", resume=resume)
        assert len({path.name for _, path in opened}) == 1 and all(path.samefile(opened[0][1]) for _, path in opened)
    assert {checkpoint for _, checkpoint in on_ranks(logs, name="fresh")} == {None}
    assert len({folder.name for folder, _ in on_ranks(logs)}) == 1, "a name by the time is the main rank's"


@pytest.mark.parametrize("other", ["nothing", "an older step only", "another step 3"])
def test_a_rank_that_sees_another_folder_is_refused(own, tmp_path, other):
    far = tmp_path / "far"
    if other != "nothing":
        shutil.copytree(own, far / "own")
        last = far / "own" / "checkpoints" / "step-00000003"
        if other == "an older step only":
            shutil.rmtree(last)
        else:
            (last / "MANIFEST.json").write_text("{}")
    errors = on_ranks([own.parent, own.parent, far], name="own", resume="latest")
    assert [type(error) for error in errors] == [ConfigError, MainRankFailed, MainRankFailed]
    assert all("logs: rank 2 on" in str(error) and "share the storage" in str(error) for error in errors)


def test_a_refusal_of_the_lead_is_every_rank_s(own):
    lead, other = on_ranks([own.parent] * 2, name="own")
    assert isinstance(lead, ConfigError) and isinstance(other, MainRankFailed)
    assert str(lead) == str(other) and other.exit_code == 2


# ---- storage


def in_namespace(script: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("more", [{}, {"name": "own", "resume": "latest"}], ids=str)
def test_a_read_only_folder_is_said_in_a_line(own, data, more, tmp_path):
    """The whole command, as a user of a cluster meets it."""
    probe = "mount --bind . . && mount -o remount,ro,bind . && cd . && ! touch x"
    if shutil.which("unshare") is None or in_namespace(probe, own.parent).returncode:
        pytest.skip("needs the right to mount")
    settings = to_arguments(data | {"logs": str(own.parent), "max_steps": 3, **more})
    script = "mount --bind . . && mount -o remount,ro,bind . && exec " + " ".join(
        [sys.executable, "-m", "rwkv_clip.training.main", *settings]
    )
    ended = in_namespace(script, own.parent)
    assert ended.returncode == 76 and "Read-only file system; name a folder that can be written" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [None, "x"])
@pytest.mark.parametrize("where", ["file", "file/below", "gone"])
def test_logs_that_are_no_folder(data, name, where, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    code, said = command(data | {"logs": str(tmp_path / where), "name": name}, capsys)
    assert code == 2 and len(said) == 1 and f"logs: {tmp_path / where} cannot be created" in said[0]


def test_a_name_that_is_a_file(data, tmp_path, capsys):
    (tmp_path / "x").touch()
    code, said = command(data | {"logs": str(tmp_path), "name": "x"}, capsys)
    assert code == 2 and f"name: {tmp_path / 'x'} cannot be created" in said[0]


def fill_disk(monkeypatch, *names: str) -> None:
    """From now on there is no room for files that begin with one of these names."""
    fsync = os.fsync

    def full(handle):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name.startswith(names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write: it names no file
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("file", ["settings.json", "log.jsonl"])
def test_a_full_disk_at_the_start(own, data, file, capsys, monkeypatch):
    before = (own / file).read_bytes()
    fill_disk(monkeypatch, file)
    code, said = command(data | {"logs": str(own.parent), "name": "own", "resume": "latest"}, capsys)
    assert code == 76 and len(said) == 1
    assert f"{own / file}: No space left on device; free some space" in said[0]
    assert (own / file).read_bytes() == before and not list(own.glob("*.part"))


def test_a_full_disk_takes_no_owner_s_name(own, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rwkv_clip.files.os.write", full)
    with hold(own / "run.lock", "own", "wait", keep=True):
        monkeypatch.undo()
        other = (
            f"from rwkv_clip.files import hold, Path\nwith hold(Path({str(own / 'run.lock')!r}), 'own', 'wait'): pass"
        )
        ended = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert "InUse: own: in use by a process that just started; wait" in ended.stderr


@pytest.mark.parametrize("why", ["no room", "no matplotlib", "a log that cannot be read"])
def test_a_picture_that_cannot_be_drawn_ends_no_run(data, why, monkeypatch, caplog):
    if why == "no room":
        fill_disk(monkeypatch, "training.png")
    elif why == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    else:
        monkeypatch.setattr("rwkv_clip.training.plot.json", types.SimpleNamespace(loads=lambda text: 1 / 0))
    folder = run(parse(Settings, data | {"name": f"picture {why}"}))
    assert find_checkpoint(folder).name == "step-00000003" and not (folder / "training.png").exists()
    assert [record.message.split(" (")[0] for record in caplog.records] == ["training.png is not drawn"]


@pytest.mark.parametrize("way", ["> /dev/full 2>&1", ">&- 2>&-"])
def test_output_that_is_gone_ends_no_run(own, data, way):
    """All that a run says, warnings included: the checkpoint is one of an older version."""
    go_back(own, lambda state: state | {"version": "0.0.1"})
    settings = to_arguments(data | {"logs": str(own.parent), "name": "own", "resume": "latest"})
    line = " ".join([sys.executable, "-m", "rwkv_clip.training.main", *settings, way])
    assert subprocess.run(["bash", "-c", line]).returncode == 0
    last = find_checkpoint(own)
    assert last.name == "step-00000003"
    (note,) = json.loads((last / "state.json").read_text())["changes"]
    assert note == {"step": 2, "setting": "version", "from": "0.0.1", "to": rwkv_clip.__version__}


# ---- reports


class Wandb:
    """Fails at one of its calls."""

    def __init__(self, fails: str):
        self.fails, self.steps = fails, []

    def init(self, **_):
        self.fail("init")
        return self

    def log(self, values, step):
        self.steps.append(step)
        self.fail("log")

    def finish(self):
        self.fail("finish")

    def fail(self, call):
        if call == self.fails:
            raise ConnectionError("api.wandb.ai: no route to host")


@pytest.mark.parametrize("fails, steps", [("init", []), ("log", [1]), ("finish", [1, 2, 3])])
def test_a_report_that_fails_is_given_up_in_a_line(data, fails, steps, monkeypatch, caplog):
    stub = Wandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=stub.init))
    settings = data | {"name": f"report {fails}", "report_to": ["wandb"], "log_every_n_steps": 1}
    folder = run(parse(Settings, settings))
    assert stub.steps == steps and find_checkpoint(folder).name == "step-00000003"
    assert [record.message for record in caplog.records] == [
        "report_to: wandb failed (ConnectionError: api.wandb.ai: no route to host) and gets no more records"
    ]
    logged = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3]


def test_a_folder_that_tensorboard_cannot_write(data, monkeypatch, caplog):
    folder = Path(data["logs"], "no board")
    folder.mkdir()
    (folder / "tensorboard").touch()
    run(parse(Settings, data | {"name": "no board", "report_to": ["tensorboard"]}))
    assert "report_to: tensorboard failed (" in caplog.text and find_checkpoint(folder).name == "step-00000003"


# ---- memory


def fail_in(place: str, monkeypatch) -> None:
    """Let memory run out at a place of the second step, in saving, or in validation."""
    from rwkv_clip.training import saver

    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..\nSee documentation")
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")
    calls, forward = [], rwkv_clip.RWKVCLIP.forward

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise host

    def poisoned(self, *inputs, **named):
        calls.append(place)
        features = forward(self, *inputs, **named)
        if len(calls) == 2 and place == "forward":
            raise gpu
        if len(calls) == 2 and place == "backward":
            features["image"] = Backward.apply(features["image"])
        return features

    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(rwkv_clip.RWKVCLIP, "forward", poisoned)
    if place == "saving":
        monkeypatch.setattr(saver, "save_checkpoint", exhausted)
    if place == "validation":
        monkeypatch.setattr(main, "evaluate_retrieval", exhausted)
    if place == "building":
        monkeypatch.setattr(main, "create_model", exhausted)


@pytest.mark.parametrize("place", ["building", "forward", "backward", "saving", "validation"])
def test_memory_that_runs_out_is_said_with_the_ways_out(data, place, monkeypatch, capsys, tmp_path):
    fail_in(place, monkeypatch)
    held_out = str(Path(data["logs"]).with_name("val.jsonl"))
    settings = data | {"name": place, "logs": str(tmp_path), "val_data": held_out, "val_every_n_steps": 1}
    code, said = command(settings, capsys)
    assert code == 2 and len(said) == 1 and said[0].startswith("error: out of memory (")
    for way in ("--batch-size", "--accum-freq", "--grad-checkpointing", "--workers"):
        assert way in said[0]


@pytest.mark.parametrize(
    "code, exit_code, way", [(-9, 2, "fewer --workers"), (-11, 3, "--workers 0"), (1, 3, "--workers 0")]
)
def test_a_lost_data_worker_has_an_exit_code(code, exit_code, way):
    found = explain(WorkerLost(7, code))
    assert found[0] == exit_code and f"worker 7 died with exit code {code}" in found[1] and way in found[1]
