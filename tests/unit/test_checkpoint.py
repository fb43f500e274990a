import json
import os

import pytest
import torch

from rwkv_clip.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    read_weights,
    save_checkpoint,
    verify_checkpoint,
)


def save(folder, step, keep=2, value=1.0):
    tensors = {"a": torch.full((4, 3), value), "b": torch.zeros((), dtype=torch.bfloat16)}
    return save_checkpoint(folder, step, tensors, {"a/step": torch.tensor(float(step))}, {"samples_seen": step}, keep)


def test_round_trip_and_pruning(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints", step, value=step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]
    found = find_checkpoint(tmp_path)
    assert found.name == "step-00000030"
    assert read_weights(tmp_path)["a"].unique().tolist() == [30.0]
    assert json.loads((found / "state.json").read_text())["samples_seen"] == 30


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(tmp_path / "step-00000002")
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_every_bit_of_the_weights_is_covered(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "model.safetensors"
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="damaged"):
            verify_checkpoint(tmp_path / "step-00000001")


def test_a_failed_save_leaves_the_old_ones_and_no_rest(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "step-00000001").iterdir()}
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "step-00000001").iterdir()} == before


def test_rest_of_a_killed_save_is_ignored_and_removed(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "step-00000002.tmp"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 3)
    assert not stale.exists()


def test_foreign_files_never_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"state_dict": {"a": Bomb()}}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="not a readable file of plain tensors"):
        read_weights(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, content", [("a.pt", b""), ("a.pt", b"\x80\x04junk"), ("a.safetensors", b"\xff" * 64)])
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_weights(tmp_path / name)


def test_absent_and_empty_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no intact checkpoint"):
        find_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="expected a dict of tensors"):
        read_weights(tmp_path / "list.pt")
