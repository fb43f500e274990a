"""Checkpoints: written whole or not at all, verified before use, never executable.

A checkpoint is a folder `step-00000100/` with

    model.safetensors   weights           optim.safetensors   optimizer state, keyed by parameter name
    state.json          step, position, settings, model description
    MANIFEST.json       sha256 and size of each of these

It is written under a temporary name, flushed to the disk and renamed; the scan for the newest one verifies every hash
and falls back to the one before. Foreign `.pt` files are read as plain tensors (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = 1
FILES = ("model.safetensors", "optim.safetensors", "state.json")
_STEP = re.compile(r"^step-(\d{8})$")
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is absent, incomplete, damaged or of another kind; names the file."""


def hash_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file)


def _hash(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder` (or its `checkpoints/`), oldest first; not verified."""
    inner = folder / "checkpoints"
    folder = inner if inner.is_dir() else folder
    return sorted(path for path in folder.iterdir() if _STEP.match(path.name) and path.is_dir())


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optim: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-XXXXXXXX` atomically, then remove all but the `keep` newest. Returns the checkpoint's path.

    When anything fails, the temporary folder is removed, older checkpoints stay, and the error is raised.
    """
    from safetensors.torch import save_file  # here and below: the library and its benches need only torch and numpy

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    for stale in folder.glob("step-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir()
    try:
        save_file(_plain(weights), temporary / "model.safetensors")
        save_file(_plain(optim), temporary / "optim.safetensors")
        (temporary / "state.json").write_text(json.dumps({"schema": SCHEMA, "step": step, **state}, indent=1))
        files = {
            name: {"sha256": hash_file(temporary / name), "bytes": (temporary / name).stat().st_size} for name in FILES
        }
        (temporary / "MANIFEST.json").write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=1))
        for name in (*FILES, "MANIFEST.json"):
            _flush(temporary / name)
        _flush(temporary)
        if final.exists():  # the same step again, after a resume: same content
            shutil.rmtree(final)
        os.rename(temporary, final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _flush(path: Path) -> None:
    """fsync a file or folder: only then does a rename survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest; CheckpointError names the first that differs."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        files = manifest["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'MANIFEST.json'}: missing or not readable ({error})") from None
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {manifest.get('schema')}, this version reads {SCHEMA}; update rwkv_clip")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or hash_file(file) != digest:
            raise CheckpointError(f"{file}: missing or damaged (differs from MANIFEST.json)")


def find_checkpoint(path: str | Path) -> Path:
    """A weights file or checkpoint folder itself, or the newest intact checkpoint of a run folder.

    A damaged checkpoint in a run folder is named in a warning and passed over; CheckpointError when none is left.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if (path / "MANIFEST.json").exists() or _STEP.match(path.name):
        verify_checkpoint(path)
        return path
    for candidate in reversed(list_checkpoints(path)):
        try:
            verify_checkpoint(candidate)
            return candidate
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
    raise CheckpointError(f"{path}: holds no intact checkpoint (folders named step-00000000)")


def read_description(path: Path) -> dict[str, Any] | None:
    """state.json of a checkpoint folder; None for a bare weights file."""
    if not path.is_dir():
        return None
    return json.loads((path / "state.json").read_text())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint or run folder, .safetensors or .pt file (plain, or under the key `state_dict`)."""
    path = find_checkpoint(path)
    if path.is_dir():
        return read_tensors(path / "model.safetensors")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here; each means: not a file of plain tensors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: is not a readable file of plain tensors ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, with or without a `state_dict` key")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a readable safetensors file ({error})") from None
