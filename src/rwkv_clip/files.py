"""Files: written whole or not at all, read within bounds, and owned by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from .errors import DATA, STORAGE

CHUNK = 1 << 20  # bytes that are read at a time: they stay in the cache
Bytes = bytes | bytearray | memoryview
log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file does not hold what its kind should; names it."""

    exit_code = DATA


class InUse(RuntimeError):
    """Another process owns what this one wants to write; names it."""

    exit_code = STORAGE


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of this file to an OSError inside the block that has none, as those of writes."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_whole(path: Path, pieces: Iterable[Bytes]) -> None:
    """Write a file that appears under its name only when all of it is on disk; until then, what was there before stays.

    OSError when it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with naming(path), open(part, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_output(setting: str, path: Path, inputs: Iterable[Path] = ()) -> None:
    """ValueError, before any work is done, where `write_whole` could not write this file or would replace an input."""
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"is to be in {path.parent}, which is no folder"
        raise ValueError(f"{setting}: {path} {wrong}; give the name of a file in a folder that exists")
    if path.exists() and any(path.samefile(file) for file in inputs if file.exists()):
        raise ValueError(f"{setting}: {path} is an input, which would be replaced; give another name")


def write_json(path: Path, content: Any) -> None:
    """`write_whole` of JSON for people: indented, in UTF-8."""
    write_whole(path, [json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"])


def sync_folder(folder: Path) -> None:
    """Flush the names of the files in `folder` to disk, so that they survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)


def new_folder(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, -3, ... where that exists already, and those above it; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, number = path, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, most: int) -> bytes:
    """All bytes of a regular file of at most `most` bytes, sizes checked before anything is read.

    OSError (EFBIG where it is larger) with the file's name.
    """
    with open(path, "rb", opener=_open_regular) as file:
        about = os.fstat(file.fileno())
        content = file.read(about.st_size + 1) if about.st_size <= most else b""  # `most` would be allocated at once
        if len(content) > about.st_size:  # it grows
            content += file.read(most + 1 - len(content))
        if about.st_size > most or len(content) > most:
            raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
        return content


def _open_regular(path: str, flags: int) -> int:
    """Open only regular files: a pipe would block forever, and a device never ends."""
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "not a regular file", path)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def hash_bytes(data: bytes) -> int:
    """63 bits of the BLAKE2b of some bytes, at least 0: the key of an encoded image."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def parse_json(data: bytes | str, where: str) -> Any:
    """The JSON value in `data`. DamagedError that begins with `where` for everything else, deep nesting included."""
    try:
        return json.loads(data)
    except RecursionError:
        raise DamagedError(f"{where}: JSON nested too deeply to be read; flatten it or leave it out") from None
    except UnicodeDecodeError as error:
        raise DamagedError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:  # also a number of thousands of digits
        raise DamagedError(f"{where}: not JSON ({error})") from None


class OutsideError(ValueError):
    """A name leads out of the folder that it should be in."""


def find_below(folder: Path, name: str, outside: bool = False) -> Path | None:
    """The regular file `name` in `folder`; None where there is none.

    OutsideError where the path leads out of the folder (`..`, absolute, a link), unless `outside` allows that;
    ValueError where the name cannot be looked up.
    """
    path = folder / name
    try:
        if not path.is_file():
            return None
        if not outside and not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
            raise OutsideError(f"{name!r} leads out of {folder}")
    except (OSError, RuntimeError) as error:  # too long, no permission, links in a circle
        raise ValueError(f"{name[:80]!r} cannot be looked up ({error})") from None
    return path


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, within what the system allows, so that `count` more can be opened."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256  # libraries, data workers, logs
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


# ---- owning ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold(lock: Path, what: str, remedy: str, keep: bool = False, shared: bool = False) -> Iterator[None]:
    """Own `what` inside the block, through the lock file `lock`. InUse, at once, when another process owns it.

    The lock is the kernel's (`lockf`): it ends with the process, however that ends, and processes forked from its owner
    do not hold it. keep: leave the file there, to name the last owner. shared: allow other owners with `shared`. A file
    system without locks only gives a warning.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    way = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - closed below; closing it gives up the lock
    try:
        while True:
            try:
                fcntl.lockf(file, way | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.seek(0)
                    owner = file.read().strip() or "a process that just started"
                    raise InUse(f"{what}: in use by {owner}; {remedy}") from None
                log.warning("%s: cannot be locked (%s); make sure to start it only once", what, error.strerror)
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
                    with contextlib.suppress(OSError):  # a full disk takes no name, but the lock holds anyway
                        os.ftruncate(file.fileno(), 0)
                        owner = f"{socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%F %T')}\n"
                        os.write(file.fileno(), owner.encode())
                    break
            file.close()  # its owner removed it while this process opened it
            file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            yield
        finally:
            if not keep and not (shared and _is_shared(file)):
                lock.unlink(missing_ok=True)
    finally:
        file.close()


def _is_shared(file: TextIO) -> bool:
    """Whether another process has a lock on it as well; if not, this one's becomes exclusive."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
