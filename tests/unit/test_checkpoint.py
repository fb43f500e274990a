import json
import os
from pathlib import Path

import pytest
import torch

from rwkv_clip.checkpoint import (
    CheckpointError,
    clean_folder,
    find_checkpoint,
    list_checkpoints,
    read_tensors,
    read_weights,
    save_checkpoint,
    verify_checkpoint,
)
from rwkv_clip.serialization import CHUNK, encode_tensors


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


def test_only_names_of_ours_are_cleaned_up(tmp_path):
    ours = [f"step-00000002{ending}.tmp" for ending in ("", ".gone", ".old.gone", ".aside.gone")]
    users = ["step-notes.tmp", "step-2.tmp", "step-00000002.txt.tmp", "step-00000002", "step-000000020.tmp", "x.tmp"]
    for name in (*ours, *users):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    clean_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(users)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("way", ["folder", "file", "relative", "link to it", "links to both", "set aside"])
def test_a_bare_file_is_compared_with_its_manifest(tmp_path, way, monkeypatch):
    path = save(tmp_path / "run", 1) / "model.safetensors"
    if way == "set aside":
        path = path.parent.rename(f"{path.parent}.aside") / path.name
    given = {"folder": path.parent, "relative": Path(path.name)}.get(way, path)
    if way == "relative":
        monkeypatch.chdir(path.parent)
    if way == "link to it":
        given = tmp_path / "mine.safetensors"
        given.symlink_to(path)
    if way == "links to both":  # how a hub's cache looks
        blobs = [file.rename(tmp_path / f"blob{i}") for i, file in enumerate((path, path.with_name("MANIFEST.json")))]
        path.symlink_to(blobs[0])
        path.with_name("MANIFEST.json").symlink_to(blobs[1])
        path = blobs[0]
    assert read_weights(given)["a"].unique().tolist() == [1.0]
    flip(path)
    with pytest.raises(CheckpointError, match=r"damaged \(differs from MANIFEST\.json"):
        read_weights(given)
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(given)


def test_a_copy_without_its_manifest_is_taken(tmp_path):
    source = save(tmp_path / "run", 1)
    content = (source / "model.safetensors").read_bytes()
    for other in ("", '{"name": "a web app"}', '{"files": ["model.safetensors"]}', '{"files": {"x": 1}}'):
        copy = tmp_path / f"copy{len(other)}" / "model.safetensors"
        copy.parent.mkdir()
        copy.write_bytes(content)
        if other:
            copy.with_name("MANIFEST.json").write_text(other)
        flip(copy)
        assert read_weights(copy).keys() == {"a", "b"}
    (source / "merged.safetensors").write_bytes(content)  # a user's own, in a checkpoint's folder
    assert read_weights(source / "merged.safetensors").keys() == {"a", "b"}
    (source / "MANIFEST.json").write_text((source / "MANIFEST.json").read_text().replace("model.s", "modem.s"))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: damaged"):
        read_weights(source / "model.safetensors")


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


def test_our_files_are_safetensors_of_every_type(tmp_path):
    """The library opens them: types, no dimension, no element, strides, more than a piece; data is aligned."""
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    types += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"of {kind}": torch.arange(1, 8).to(kind) for kind in types}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "strides": torch.arange(12.0).view(3, 4).T}
    tensors |= {"large é": torch.randn(CHUNK // 2 + 3), "parameter": torch.nn.Parameter(torch.randn(3))}
    pieces = [bytes(piece) for piece in encode_tensors(tensors)]
    (tmp_path / "a.safetensors").write_bytes(b"".join(pieces))
    assert all(len(piece) <= CHUNK for piece in pieces) and len(pieces) >= 3
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        assert (
            read[key]
            .contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(tensor.detach().contiguous().view(-1).view(torch.uint8))
        )
    length = int.from_bytes(pieces[0][:8], "little")
    header = json.loads(pieces[0][8 : 8 + length])
    begins = {key: entry["data_offsets"][0] for key, entry in header.items()}
    assert length % 8 == 0 and all(begins[key] % tensors[key].element_size() == 0 for key in begins)


def test_the_same_step_again_is_not_written_again(tmp_path):
    files = sorted(save(tmp_path, 1).iterdir())
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    save(tmp_path, 1)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files] == before
    save(tmp_path, 1, value=2.0)
    assert read_weights(tmp_path)["a"].unique().tolist() == [2.0]


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path):
    for step in (1, 2):
        path = save(tmp_path, step)
    (path / "state.json").write_text("{}")
    save(tmp_path, 3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002", "step-00000003"]
    save(tmp_path, 4)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_what_was_replaced_counts_until_its_successor_is_proven(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-00000002.old")  # killed between two renames
    assert find_checkpoint(tmp_path).name == "step-00000002.old"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002.old"]
    save(tmp_path, 2, value=5.0)
    assert find_checkpoint(tmp_path).name == "step-00000002"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_an_unreadable_file_is_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = open

    def broken(path, *arguments, **options):
        if str(path).endswith("step-00000002/optim.safetensors"):
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", broken)
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_old_checkpoints_that_cannot_go_do_not_fail_a_save(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save(tmp_path, step)

    def stuck(path, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", stuck)
    assert save(tmp_path, 3).name == "step-00000003"
    assert "older checkpoints could not be removed" in caplog.text
    monkeypatch.undo()
    save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
