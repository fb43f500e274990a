"""Checkpoints: written whole or not at all, verified before use, never executable.

A checkpoint is a folder `step-00000100/` with

    model.safetensors   weights           optim.safetensors   optimizer state, keyed by parameter name
    state.json          step, position, settings, model description
    MANIFEST.json       sha256 and size of each of these

and of a run that averages its weights `ema.safetensors`, the averaged model. `PATH@ema` names it, where PATH names a
run or checkpoint folder.

A save removes nothing until a replacement is proven good: it writes a folder under a temporary name, hashing as it
goes, flushes it to disk, renames it, reads it back and compares. Only then are older checkpoints removed, each renamed
before its files are deleted; the one that the link `best` leads to stays. Whenever a process dies, the newest
checkpoint is whole or the previous one exists; from the second save on there are always two. All other names that may
appear beside checkpoints are explained below, at `REPLACED`.

The search for the newest checkpoint verifies every hash and falls back to the one before. A file of tensors that is
read on its own is also verified where a manifest beside it lists it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import Bytes, hash_file, parse_json, read_bytes
from .serialization import CheckpointError, encode_tensors, read_tensors, read_torch

Contents = dict[str, Callable[[], Iterable[Bytes]]]  # name of a file -> the making of what it holds
SCHEMA = 1
FILES = ("model.safetensors", "optim.safetensors", "state.json")
AVERAGE = "ema.safetensors"  # may be there as well
SUFFIX = "@ema"  # after the path of a folder: its averaged weights
MAX_JSON = 2**20  # bytes of state.json or a manifest that are read; real ones have a few thousand
# What is added to the name of a checkpoint, `step-00000100`, that
REPLACED = ".old"  # another save of the same step replaced: still a checkpoint, removed at the end of that save
SET_ASIDE = ".aside"  # belongs to a later step than the one saved now (damaged, or the run went back): never read
UNFINISHED = ".tmp"  # is being written; what a dead process leaves is removed at the next start or save
DELETED = ".gone.tmp"  # is being deleted; likewise
BEST = "best"  # link to the best checkpoint
_STEP = re.compile(r"step-(\d{8})(\.old)?")
_LEFT_OVER = re.compile(r"(step-[0-9]{8}((\.old|\.aside)?\.gone)?|best(\.gone)?)\.tmp")
_FIELDS: dict[str, type] = {  # of state.json: what its readers take for granted
    **dict.fromkeys(("step", "samples_seen", "total_steps", "global_batch", "validated", "evaluated"), int),
    **dict.fromkeys(("spec", "settings", "scaler", "records", "adapters", "best"), dict),
    "model": str,
}
_proven: dict[Path, list] = {}  # what this process wrote and verified: need not be hashed again at each save
log = logging.getLogger(__name__)


class NewerCheckpointError(CheckpointError):
    """An intact checkpoint of a later version of this library: no reason to fall back to an older one."""


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optim: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    average: dict[str, Tensor] | None = None,
    best: bool = False,
) -> Path:
    """Write `folder/step-XXXXXXXX`, verify it, then remove all but the `keep` newest and the best. Returns the
    checkpoint's path. average: averaged weights, if there are any. best: this one is the best from now on.

    OSError or CheckpointError when it cannot be written or does not read back as written; then nothing of it is left
    and older checkpoints are unchanged. An intact checkpoint with the same content is kept as it is.
    """
    assert keep >= 2 and 0 <= step < 10**8
    text = json.dumps({"schema": SCHEMA, "step": step, **state}, indent=1).encode()
    tensors = (functools.partial(encode_tensors, named) for named in (weights, optim))
    contents: Contents = dict(zip(FILES, (*tensors, lambda: [text])))
    if average:
        contents[AVERAGE] = functools.partial(encode_tensors, average)
    _make_folder(folder)
    clean_folder(folder)
    final = folder / f"step-{step:08d}"
    if not (final.exists() and _holds(final, contents)):
        temporary = _add_suffix(final, UNFINISHED)
        try:
            _write_folder(temporary, contents)
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    try:
        if best:
            name_best(folder, final)
        _prune(folder, final, keep)
    except OSError as error:  # the checkpoint exists anyway
        log.warning("%s: older checkpoints could not be removed, or the best not named (%s)", folder, error)
    return final


def clean_folder(folder: Path) -> None:
    """Remove what a process that died during a save left behind. Only the process that writes here may call this."""
    for stale in folder.glob("*.tmp"):
        if _LEFT_OVER.fullmatch(stale.name):
            _remove(stale)


def _add_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush(path.parent)


def _write_folder(folder: Path, contents: Contents) -> None:
    """Write files and their manifest; they are on disk when this returns."""
    os.mkdir(folder)
    files = {name: _write_file(folder / name, make()) for name, make in contents.items()}
    manifest = json.dumps({"schema": SCHEMA, "files": files}, indent=1).encode()
    _write_file(folder / "MANIFEST.json", [manifest])
    _flush(folder)


def _write_file(path: Path, chunks: Iterable[Bytes]) -> dict[str, Any]:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        measured = _measure(chunks, functools.partial(_write_all, handle))
        os.fsync(handle)
    finally:
        os.close(handle)
    return measured


def _write_all(handle: int, chunk: Bytes) -> None:
    view = memoryview(chunk)
    while view:  # a full disk first takes a part
        view = view[os.write(handle, view) :]


def _measure(chunks: Iterable[Bytes], write: Callable[[Bytes], object] = len) -> dict[str, Any]:
    """A manifest's entry for a file of these chunks, each handed to `write` on the way."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        write(chunk)
        size += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _holds(path: Path, contents: Contents) -> bool:
    """Whether this checkpoint is intact and has exactly these contents."""
    try:
        verify_checkpoint(path)
        return _read_json(path / "MANIFEST.json")["files"] == {k: _measure(make()) for k, make in contents.items()}
    except CheckpointError:
        return False


def _publish(temporary: Path, final: Path) -> None:
    """Give the written folder its name and verify it. An intact checkpoint of that name becomes a REPLACED one."""
    old = _add_suffix(final, REPLACED)
    if final.exists():
        if _is_intact(final):
            if old.exists():
                _discard(old)
            os.rename(final, old)
        else:
            _discard(final)
    try:
        os.rename(temporary, final)
        _flush(final.parent)
        verify_checkpoint(final)
        _proven[final] = _fingerprint(final)
    except (OSError, CheckpointError):
        if final.exists():
            _discard(final)
        if old.exists():
            os.rename(old, final)
        raise


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keep `newest`, just verified, and the keep - 1 before it. Nothing is removed unless one of these is intact as
    well."""
    others = [path for path in reversed(list_checkpoints(folder)) if path != newest]
    later = [path for path in others if path.name[:13] > newest.name]
    for path in later:  # the next start would take them for the newest
        aside = _add_suffix(path, SET_ASIDE)
        log.warning("%s: is later than the step saved now; renamed to %s", path, aside.name)
        if aside.exists():
            _discard(aside)
        os.rename(path, aside)
    older = [path for path in others if path not in later]
    spared = [path for path in older if not path.name.endswith(REPLACED)][: keep - 1]
    gone = [path for path in older if path not in spared and path != find_best(folder)]
    if gone and any(_proven.get(path) == _fingerprint(path) or _is_intact(path) for path in spared):
        for path in gone:
            _discard(path)


def name_best(folder: Path, checkpoint: Path) -> None:
    """Let `folder/best` lead to a checkpoint in the folder; at any instant it leads to this one or the one before."""
    link, new = folder / BEST, _add_suffix(folder / BEST, UNFINISHED)
    new.unlink(missing_ok=True)
    os.symlink(checkpoint.name, new)
    if link.is_dir() and not link.is_symlink():  # in a copy of the run folder that followed the link
        _discard(link)
    os.replace(new, link)
    _flush(folder)


def find_best(folder: Path) -> Path | None:
    """The checkpoint that `folder/best` leads to, not verified; None where there is none."""
    link = folder / BEST
    path = folder / os.readlink(link) if link.is_symlink() else link
    return path if path.is_dir() else None


def _discard(path: Path) -> None:
    """Delete a checkpoint, renamed first: a half-deleted one must not look like one."""
    gone = _add_suffix(path, DELETED)
    os.rename(path, gone)
    _proven.pop(path, None)
    _remove(gone)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
    else:
        shutil.rmtree(path)


def _flush(folder: Path) -> None:
    """fsync a folder: only then does a new name in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot fsync folders
            raise
    finally:
        os.close(handle)


# ---- finding and verifying -------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder` (or its `checkpoints/`), oldest first; not verified."""
    inner = folder / "checkpoints"
    folder = inner if inner.is_dir() else folder
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (path.name[:13], not path.suffix))


def is_run(path: Path) -> bool:
    """Whether a path is a checkpoint folder, or a run folder that holds one; not verified."""
    return os.path.isdir(path) and (os.path.isfile(path / "MANIFEST.json") or bool(list_checkpoints(path)))


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest; CheckpointError names the first that differs."""
    manifest = _read_json(path / "MANIFEST.json")
    schema, files = manifest.get("schema"), manifest.get("files")
    if schema != SCHEMA:
        # A newer version's state.json has the same schema; a flipped bit in the manifest does not change that.
        if isinstance(schema, int) and schema > SCHEMA and _read_json(path / "state.json").get("schema") == schema:
            raise NewerCheckpointError(f"{path}: has schema {schema}, this version reads {SCHEMA}; update rwkv_clip")
        raise CheckpointError(f"{path / 'MANIFEST.json'}: damaged (schema {str(schema)[:40]})")
    if not isinstance(files, dict) or files.keys() - {AVERAGE} != set(FILES):
        raise CheckpointError(f"{path / 'MANIFEST.json'}: damaged; it has to list {', '.join(FILES)}")
    for name in files:
        _compare(path / name, files[name])


def _verify_file(path: Path) -> None:
    """Compare one file with the manifest beside it (and beside what it links to) where that lists it; CheckpointError
    as above."""
    real = path.resolve()
    for place in {path.absolute(), real}:
        manifest = place.with_name("MANIFEST.json")
        if not manifest.exists():
            continue
        files = _read_json(manifest.resolve()).get("files")
        if isinstance(files, dict) and place.name in files:
            _compare(real, files[place.name])
        elif place.name in (*FILES, AVERAGE) and _STEP.match(place.parent.name):
            raise CheckpointError(f"{manifest}: damaged; it has to list {', '.join(FILES)}")


def _compare(file: Path, entry: Any) -> None:
    """CheckpointError unless the file matches its entry in the manifest."""
    try:
        good = isinstance(entry, dict) and _size(file) == entry.get("bytes")
        good = good and hash_file(file) == entry.get("sha256")
    except OSError as error:
        raise CheckpointError(f"{file}: missing or not readable ({error.strerror})") from None
    if not good:
        raise CheckpointError(f"{file}: damaged (differs from MANIFEST.json)")


def _is_intact(path: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        verify_checkpoint(path)
        return True
    return False


def _fingerprint(path: Path) -> list[tuple[int, int, int]]:
    """What changes when a checkpoint's files do."""
    about = [os.stat(path / name) for name in (*FILES, AVERAGE, "MANIFEST.json") if (path / name).exists()]
    return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in about]


def _size(path: Path) -> int:
    """Bytes of a regular file; OSError for links, pipes and devices, which no checkpoint holds."""
    about = os.lstat(path)
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return about.st_size


def _read_json(path: Path) -> dict[str, Any]:
    try:
        _size(path)
        content = parse_json(read_bytes(path, MAX_JSON), path.name)
        if not isinstance(content, dict):
            raise ValueError(f"a JSON object is expected, not a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing, damaged or not readable ({error})") from None
    return content


def find_checkpoint(path: str | Path) -> Path:
    """A weights file or checkpoint folder itself, compared with its manifest, or a run folder's newest intact one; with
    SUFFIX the file of averaged weights in it.

    A damaged checkpoint in a run folder is named in a warning and skipped; CheckpointError when none is left. A weights
    file without a manifest, such as a copy, is not verified.
    """
    path = Path(path)
    if path.name.endswith(SUFFIX) and not path.exists():
        return _find_average(path.with_name(path.name.removesuffix(SUFFIX)))
    if path.is_file():
        _verify_file(path)
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if (path / "MANIFEST.json").exists() or _STEP.fullmatch(path.name):
        verify_checkpoint(path)
        return path
    for candidate in reversed(list_checkpoints(path)):
        try:
            verify_checkpoint(candidate)
            return candidate
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            log.warning("%s; trying the previous checkpoint", error)
    raise CheckpointError(f"{path}: holds no intact checkpoint (folders named step-00000000)")


def _find_average(path: Path) -> Path:
    found = find_checkpoint(path)
    if not (found / AVERAGE).is_file():
        raise CheckpointError(f"{found}: holds no averaged weights ({AVERAGE}), which a run has with --ema-decay")
    return found / AVERAGE


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_description(path: Path) -> dict[str, Any] | None:
    """state.json of a checkpoint folder, or of the one that averaged weights are in; None for a bare weights file."""
    if path.name == AVERAGE and (path.parent / "MANIFEST.json").exists():
        path = path.parent
    if not path.is_dir():
        return None
    state = _read_json(path / "state.json")
    for key, kind in _FIELDS.items():
        value = state.get(key, kind())
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{path / 'state.json'}: {key} is {str(value)[:40]!r}, expected {kind.__name__}")
    if "step" not in state:
        raise CheckpointError(f"{path / 'state.json'}: has no step")
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint or run folder, .safetensors or .pt file (plain, or under the key `state_dict`)."""
    path = find_checkpoint(path)
    if path.is_dir():
        return read_tensors(path / "model.safetensors")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    return read_torch(path)
