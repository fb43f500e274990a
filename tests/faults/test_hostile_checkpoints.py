"""Files made to harm: each is refused by name within a second and 200 MB, and nothing in them runs."""

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_clip import serialization
from rwkv_clip.checkpoint import (
    CheckpointError,
    NewerCheckpointError,
    find_checkpoint,
    hash_file,
    read_description,
    read_tensors,
    read_weights,
    save_checkpoint,
)

GROWTH = 200 * 2**20
FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


class Bomb:
    """Unpickled, it makes the file that must not be there."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def safetensors(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def two(**second: object) -> dict:
    return {"a": FLOAT, "b": {**FLOAT, "data_offsets": [8, 16], **second}}


SAFETENSORS = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header of 2^63 bytes": safetensors({"a": FLOAT}, length=2**63),
    "header beyond the file": safetensors({"a": FLOAT}, length=2**20),
    "header of no length": safetensors(b""),
    "shape of 2^40": safetensors({"a": {**FLOAT, "shape": [2**40]}}),
    "shape that overflows": safetensors({"a": {**FLOAT, "shape": [2**32, 2**32]}}),
    "shape of 2^64 - 1": safetensors({"a": {**FLOAT, "shape": [2**64 - 1]}}),
    "negative shape": safetensors({"a": {**FLOAT, "shape": [-2]}}),
    "shape of words": safetensors({"a": {**FLOAT, "shape": ["2"]}}),
    "negative offsets": safetensors({"a": {**FLOAT, "data_offsets": [-8, 0]}}),
    "offsets the wrong way": safetensors({"a": {**FLOAT, "data_offsets": [8, 0]}}),
    "offsets beyond the file": safetensors({"a": {**FLOAT, "data_offsets": [2**40, 2**40 + 8]}}),
    "overlapping tensors": safetensors(two(data_offsets=[4, 12]), bytes(12)),
    "the same bytes twice": safetensors(two(data_offsets=[0, 8])),
    "a hole": safetensors(two(data_offsets=[16, 24]), bytes(24)),
    "data behind the last tensor": safetensors({"a": FLOAT}, bytes(4096)),
    "unknown dtype": safetensors({"a": {**FLOAT, "dtype": "OBJECT"}}),
    "a list": safetensors([1, 2, 3]),
    "nested 100,000 deep": safetensors(b"[" * 100_000),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "10^6 keys": lambda: safetensors(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    ),
    "60,000 keys": lambda: safetensors(
        b"{" + b",".join(b'"%d":{"dtype":"F3","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000)) + b"}"
    ),
}


def pickled(value: object) -> Callable[[Path], bytes]:
    """torch.save's file of it."""

    def make(sentinel: Path) -> bytes:
        file = io.BytesIO()
        torch.save(value(sentinel) if callable(value) else value, file)
        return file.getvalue()

    return make


def rezipped(method: int = zipfile.ZIP_STORED, **more: bytes) -> Callable[[Path], bytes]:
    """A good file of torch.save, packed by `method`, with files of these names added."""

    def make(sentinel: Path) -> bytes:
        source = zipfile.ZipFile(io.BytesIO(pickled({"a": torch.zeros(2)})(sentinel)))
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
            for name, data in more.items():
                target.writestr(name, data)
        return file.getvalue()

    return make


PICKLED = {
    "empty": lambda sentinel: b"",
    "a bomb": pickled(lambda sentinel: {"a": Bomb(sentinel)}),
    "a bomb for a key": pickled(lambda sentinel: {"state_dict": {"a": torch.zeros(2)}, "x": Bomb(sentinel)}),
    "a bare pickle": lambda sentinel: b"cposix\nmkdir\n(V" + str(sentinel).encode() + b"\ntR.",
    "a bare pickle of protocol 4": lambda sentinel: b"\x80\x04junk",
    "a whole module": pickled(lambda sentinel: torch.nn.Linear(2, 2)),
    "numbers for tensors": pickled({"a": 1}),
    "numbers for names": pickled({1: torch.zeros(2)}),
    "a list": pickled([torch.zeros(2)]),
    "a few bytes, repeated": pickled({"a": torch.zeros(1).expand(2**40)}),
    "name of a parent folder": rezipped(**{"archive/../../outside": b"x"}),
    "absolute name": rezipped(**{"/tmp/outside": b"x"}),
    "a zip bomb": rezipped(zipfile.ZIP_DEFLATED, **{"archive/data/1": bytes(2**26)}),
    "a pickle of 5 MB": pickled({str(i): "x" * 50 for i in range(100_000)}),
    "an empty zip": lambda sentinel: b"PK\x05\x06" + bytes(18),
    "cut in half": lambda sentinel: pickled({"a": torch.zeros(99)})(sentinel)[:700],
}

DEEP = "[" * 100_000
MANIFEST = {
    "no JSON": b"\x00\xff",
    "nested 100,000 deep": DEEP.encode(),
    "100 MB": lambda: b'{"a": "' + bytes(100 * 2**20) + b'"}',
    "a number of a million digits": b'{"schema": ' + b"9" * 10**6 + b"}",
    "a list": b"[]",
    "null": b"null",
    "no files": b'{"schema": 1}',
    "files in a list": b'{"schema": 1, "files": ["model.safetensors"]}',
    "no schema": b'{"files": {}}',
    "schema of words": b'{"schema": "1", "files": {}}',
    "a newer schema that state.json does not confirm": b'{"schema": 2, "files": {}}',
}
STATE = {
    "nested 100,000 deep": DEEP.encode(),
    "a million lists": b"[" + b"[]," * 10**6 + b"[]]",
    "as many lists as fit": b"[" + b"[]," * (2**20 // 3 - 2) + b"[]]",
    "a list": b"[]",
    "no step": b"{}",
    "step of words": b'{"step": "1"}',
    "step below 0": b'{"step": -1}',
    "step of half": b'{"step": 0.5}',
    "step true": b'{"step": true}',
    "settings in a list": b'{"step": 1, "settings": []}',
    "spec of words": b'{"step": 1, "spec": "../../etc"}',
    "samples_seen null": b'{"step": 1, "samples_seen": null}',
}


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def refuse(read: Callable[[], object], name: str, kind: type[Exception] = CheckpointError) -> None:
    """`read` raises the error, which names the file, in less than a second of this process's time and 200 MB."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident("VmRSS"), time.process_time()
    with pytest.raises(kind) as error:
        read()
    assert time.process_time() - began < 1 and resident("VmHWM") - before < GROWTH
    assert name in str(error.value) and len(str(error.value)) < 1000


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What the first call imports is no part of a refusal's second."""
    import safetensors.torch  # noqa: F401


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    tensors = {"a": torch.zeros(2)}
    return save_checkpoint(tmp_path, 1, tensors, tensors, {"samples_seen": 1}, keep=2)


def sign(path: Path, **changes: object) -> None:
    """Make the manifest fit the files, as an attacker would."""
    names = ("model.safetensors", "optim.safetensors", "state.json")
    files = {name: {"sha256": hash_file(path / name), "bytes": (path / name).stat().st_size} for name in names}
    (path / "MANIFEST.json").write_text(json.dumps({"schema": 1, "files": files, **changes}))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(tmp_path, name):
    content = SAFETENSORS[name]
    (tmp_path / "bad.safetensors").write_bytes(content() if callable(content) else content)
    refuse(lambda: read_weights(tmp_path / "bad.safetensors"), "bad.safetensors")


@pytest.mark.parametrize("name", PICKLED)
def test_pickle_bomb(tmp_path, name):
    sentinel = tmp_path / "ran"
    (tmp_path / "bad.pt").write_bytes(PICKLED[name](sentinel))
    refuse(lambda: read_weights(tmp_path / "bad.pt"), "bad.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt"]


@pytest.mark.parametrize("name", MANIFEST)
def test_manifest(checkpoint, name):
    content = MANIFEST[name]
    (checkpoint / "MANIFEST.json").write_bytes(content() if callable(content) else content)
    refuse(lambda: find_checkpoint(checkpoint), "MANIFEST.json")


@pytest.mark.parametrize("name", STATE)
def test_state(checkpoint, name):
    (checkpoint / "state.json").write_bytes(STATE[name])
    sign(checkpoint)
    refuse(lambda: read_description(find_checkpoint(checkpoint)), "state.json")


def test_names_and_links_lead_nowhere(checkpoint, tmp_path):
    """Only the fixed files of a checkpoint are opened, and only regular ones."""
    entry = {"sha256": hash_file(Path("/etc/hostname")), "bytes": os.path.getsize("/etc/hostname")}
    for name in ("../../../../etc/hostname", "/etc/hostname", "more.safetensors"):
        files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
        sign(checkpoint, files={**files, name: entry})
        refuse(lambda: find_checkpoint(checkpoint), "MANIFEST.json")
    for name in ("model.safetensors", "state.json", "MANIFEST.json"):
        sign(checkpoint)
        find_checkpoint(checkpoint)
        real = (checkpoint / name).rename(tmp_path / "real")
        for target in (real, Path("/dev/zero"), tmp_path / "nothing", tmp_path):
            (checkpoint / name).symlink_to(target)
            refuse(lambda: find_checkpoint(checkpoint), name)
            (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)  # would be waited for without an end
        refuse(lambda: find_checkpoint(checkpoint), name)
        (checkpoint / name).unlink()
        real.rename(checkpoint / name)


@pytest.mark.parametrize("entry", [None, 1, "x", [], {}, {"bytes": "8"}, {"bytes": True, "sha256": None}], ids=str)
def test_entries_of_wrong_types(checkpoint, entry):
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    sign(checkpoint, files={**files, "model.safetensors": entry})
    refuse(lambda: find_checkpoint(checkpoint), "model.safetensors")


def test_weights_of_a_signed_checkpoint_are_not_believed(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(SAFETENSORS["shape of 2^40"])
    sign(checkpoint)
    refuse(lambda: read_weights(checkpoint), "model.safetensors")
    (checkpoint / "optim.safetensors").write_bytes(SAFETENSORS["10^6 keys"]())
    sign(checkpoint)
    refuse(lambda: read_tensors(find_checkpoint(checkpoint) / "optim.safetensors"), "optim.safetensors")


def test_a_newer_schema_is_refused_and_not_passed_over(checkpoint, tmp_path):
    tensors = {"a": torch.zeros(2)}
    newer = save_checkpoint(tmp_path, 2, tensors, tensors, {"samples_seen": 1}, keep=2)
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "schema": 2}))
    sign(newer, schema=2)
    with pytest.raises(NewerCheckpointError, match="has schema 2, this version reads 1; update rwkv_clip"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(checkpoint) == checkpoint


@pytest.mark.parametrize("version, safe", [("2.6.0+cpu", False), ("2.9.1", False), ("2.10.0", True), ("3.0.0a1", True)])
def test_old_torch_reads_no_foreign_pickle(tmp_path, checkpoint, monkeypatch, version, safe):
    torch.save({"a": torch.zeros(2)}, tmp_path / "good.pt")
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        assert list(read_weights(tmp_path / "good.pt")) == ["a"]
    else:
        refuse(lambda: read_weights(tmp_path / "good.pt"), "CVE-2026-24747, fixed in 2.10")
    assert list(read_weights(checkpoint)) == list(read_weights(checkpoint / "model.safetensors")) == ["a"]


def test_the_corpus_is_large_enough():
    assert len(SAFETENSORS) + len(PICKLED) + len(MANIFEST) + len(STATE) >= 60
    assert serialization.MAX_HEADER == 4 * 2**20
