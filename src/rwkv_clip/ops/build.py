"""Just-in-time build of the native kernels: plain `extern "C"` functions, compiled by ninja, loaded with ctypes.

No torch headers and no Python headers: a build takes seconds and does not depend on torch's ABI; the functions take raw
pointers. A library's file name contains a hash of everything that it was built from, so any change leads to a new file
and a good one is never overwritten. Any number of processes may build at once: one does, in a folder of its own, under
a file lock that ends with its process, and the finished library appears by an atomic rename. The others wait for up to
a minute.

A library is code that runs as the user: it and its folder must belong to the user or root, nobody else may write them,
and its sha256 must be the one in the file beside it; otherwise it is built again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

import torch

from ..files import read_bytes

CSRC = Path(__file__).parent / "csrc"

LONGEST_WAIT = 60.0  # seconds for another process's build, which takes a few; then the caller does without
SILENT_WAIT = 3.0  # seconds before a message names the process that is waited for
MAX_LIBRARY = 2**28  # bytes; ours have less than 2**21

_HOST_COMPILERS = ("c++", "g++", "clang++")
_REMEDY = {
    "c++": "install a C++ compiler (Debian: apt-get install g++; macOS: xcode-select --install)",
    "nvcc": "install the CUDA toolkit, or put the folder of its nvcc on PATH",
    "ninja": "pip install ninja",
}


class BuildError(RuntimeError):
    """Native code could not be built or loaded. The message names what is missing or wrong, and the remedy."""


def build_library(
    name: str,
    sources: Sequence[Path],
    *,
    flags: Sequence[str],
    compiler: Literal["c++", "nvcc"],
    depends: Sequence[Path] = (),
    cache: Path | None = None,
) -> Path:
    """Compile `sources` into one shared library and return its path; at once if it has been built before.

    depends: the headers that the sources include. cache: folder of the libraries, by default the user's cache folder.
    Position-independent code and, for C++, OpenMP on torch's own runtime are added to `flags`. BuildError.
    """
    path = find_nvcc() if compiler == "nvcc" else find_compiler()
    extra = ["-Xcompiler", "-fPIC"] if compiler == "nvcc" else ["-fPIC", *_openmp(path)[0]]
    link = [] if compiler == "nvcc" else _openmp(path)[1]
    flags = [*flags, *extra]
    folder = cache if cache is not None else _cache_folder()
    _take_folder(folder)
    library = folder / f"{name}-{_fingerprint(path, sources, depends, [*flags, *link])}.so"
    if _is_good(library):
        return library
    ninja = _find_ninja()
    try:
        with open(library.with_suffix(".lock"), "a+", errors="replace", opener=_open_private) as lock:
            _wait_for(lock, library, name)
            if not _is_good(library):  # nobody else was faster
                damaged = " anew: the library there is not as it was built" if library.exists() else ""
                print(f"rwkv_clip: compiling {name}{damaged} (once; kept in {folder})", file=sys.stderr)
                _compile(library, sources, path, flags, link, ninja)
    except OSError as error:
        raise BuildError(f"building in {folder} fails: {error}") from error
    return library


def load_library(path: Path) -> ctypes.CDLL:
    """Load a library of `build_library`. BuildError if the system's loader refuses it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}. Delete it, so that it is built anew.") from error


def _take_folder(folder: Path) -> None:
    """Make the cache folder, or find that it is the user's alone. BuildError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder, os.stat(folder))
    except OSError as error:
        raise BuildError(f"{folder} cannot be used for compiled kernels: {error}; make it writable") from error


def _check_owner(path: Path, about: os.stat_result) -> None:
    """BuildError unless a folder or library belongs to this user, or root, and nobody else may write it."""
    if about.st_uid not in (os.getuid(), 0):
        raise BuildError(f"{path} belongs to another user (uid {about.st_uid}), whose code would run; remove it")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} can be written by other users, whose code would run; chmod go-w {path}, or remove it")


def _is_good(library: Path) -> bool:
    """Whether a library is there and is what was built. BuildError where it may be somebody else's."""
    record = library.with_suffix(".sha256")
    try:
        for path in (library, record):
            about = os.lstat(path)
            if not stat.S_ISREG(about.st_mode):
                return False
            _check_owner(path, about)
        digest = hashlib.sha256(read_bytes(library, MAX_LIBRARY)).hexdigest()
        return read_bytes(record, 100).decode("ascii", "replace").strip() == digest
    except OSError:  # missing, too large, or no file
        return False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _wait_for(lock: IO[str], library: Path, name: str) -> None:
    """Own the lock, and write into it who does; or find the library, finished by who owns it.

    BuildError when another process holds it for LONGEST_WAIT seconds: a stopped one would be waited for for ever."""
    begin, announced = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if _is_good(library):
                return
            lock.seek(0)
            owner = lock.read(200).strip() or "another process"
        waited = time.monotonic() - begin
        if waited > LONGEST_WAIT:
            raise BuildError(
                f"{owner} has been compiling {name} for more than {LONGEST_WAIT:.0f} s; if it hangs or is stopped, end "
                f"it, and start this again"
            )
        if waited > SILENT_WAIT and not announced:
            print(f"rwkv_clip: waiting for {owner}, which compiles {name}", file=sys.stderr)
            announced = True
        time.sleep(0.05)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%F %T')})")
    lock.flush()


def find_compiler() -> Path:
    """The C++ compiler of the machine. BuildError without one."""
    for name in _HOST_COMPILERS:
        if found := shutil.which(name):
            return Path(found)
    raise BuildError(f"no C++ compiler on PATH (looked for {', '.join(_HOST_COMPILERS)}): {_REMEDY['c++']}")


def find_nvcc() -> Path:
    """NVIDIA's compiler: on PATH, where torch guesses CUDA to be, or in /usr/local/cuda. BuildError without one."""
    if found := shutil.which("nvcc"):
        return Path(found)
    try:
        from torch.utils.cpp_extension import CUDA_HOME  # slow to import, and needs setuptools
    except ImportError:
        CUDA_HOME = None
    homes = [Path(home) for home in (CUDA_HOME, "/usr/local/cuda") if home]
    for home in homes:
        if os.access(home / "bin" / "nvcc", os.X_OK):
            return home / "bin" / "nvcc"
    raise BuildError(f"no nvcc on PATH, nor in {', '.join(str(home / 'bin') for home in homes)}: {_REMEDY['nvcc']}")


def architecture_flags(capabilities: Sequence[tuple[int, int]], nvcc: Path) -> list[str]:
    """-gencode flags: machine code per compute capability, and PTX of the highest for all later GPUs.

    A capability that this nvcc does not know gets the PTX of the nearest lower one, which the driver compiles.
    BuildError if a GPU is older than all that nvcc knows.
    """
    listed = _run([str(nvcc), "--list-gpu-arch"], "nvcc").split()
    known = sorted({_capability(name.removeprefix("compute_")) for name in listed if name.startswith("compute_")})
    real, virtual = set(), set()
    for capability in capabilities:
        lower = [other for other in known if other <= capability]
        if not lower:
            raise BuildError(
                f"{nvcc} has no code for compute capability {capability[0]}.{capability[1]} "
                f"(its oldest is {known[0][0]}.{known[0][1]}): use a CUDA toolkit of that GPU's age"
            )
        (real if lower[-1] == capability else virtual).add(lower[-1])
    virtual.add(max(real | virtual))
    wanted = [(c, "sm") for c in sorted(real)] + [(c, "compute") for c in sorted(virtual)]
    return [f"-gencode=arch=compute_{major}{minor},code={kind}_{major}{minor}" for (major, minor), kind in wanted]


def host_flags() -> list[str]:
    """Flags of a C++ kernel: optimised for this very processor where the compiler can, portable where it cannot."""
    compiler = find_compiler()
    native = [flag for flag in ("-march=native", "-mcpu=native") if _accepts(compiler, flag)]
    return ["-std=c++17", "-O3", "-fno-math-errno", *native[:1]]


def _capability(digits: str) -> tuple[int, int]:
    return int(digits[:-1]), int(digits[-1])


def _find_ninja() -> Path:
    # The pip package puts its program beside the interpreter, which an unactivated environment has not on PATH.
    if found := shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts")):
        return Path(found)
    raise BuildError(f"ninja is missing: {_REMEDY['ninja']}")


def _run(command: list[str], tool: str) -> str:
    """Output of a compiler's query. BuildError if it does not run."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{shlex.join(command)} fails ({error}): {_REMEDY[tool]}") from error


@lru_cache
def _version(compiler: Path) -> str:
    return _run([str(compiler), "--version"], "nvcc" if compiler.name == "nvcc" else "c++")


@lru_cache
def _accepts(compiler: Path, flag: str) -> bool:
    command = [str(compiler), flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


@lru_cache
def _openmp(compiler: Path) -> tuple[list[str], list[str]]:
    """Compile and link flags of OpenMP on the very runtime that torch has loaded: a second one in the process would
    bring a second set of threads. None, and a serial kernel, where compiler and runtime do not speak to each other."""
    runtime = _openmp_runtime()
    clang = "clang" in _version(compiler)
    if runtime is None or (clang and "gomp" in runtime.name):
        return [], []
    return (["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]), [str(runtime)]


def _openmp_runtime() -> Path | None:
    names = ("libgomp", "libiomp5", "libomp")
    maps = Path("/proc/self/maps")
    mapped = (
        [Path(line.split(maxsplit=5)[-1]) for line in maps.read_text(errors="surrogateescape").splitlines()]
        if maps.exists()
        else []
    )
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    return next((path for path in [*mapped, *shipped] if path.name.startswith(names) and path.exists()), None)


@lru_cache
def _processor() -> str:
    """What `native` means here: model and feature flags of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) or platform.processor()


def _fingerprint(compiler: Path, sources: Sequence[Path], depends: Sequence[Path], flags: Sequence[str]) -> str:
    parts = [str(compiler.resolve()), _version(compiler), torch.__version__, platform.machine(), *flags]
    if any(flag.endswith("=native") for flag in flags):
        parts.append(_processor())
    digest = hashlib.sha256(repr(parts).encode())
    for path in [*sources, *depends]:
        digest.update(repr((path.name, path.read_bytes())).encode())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    """~/.cache/rwkv_clip, or where that cannot be written (a read-only home) a folder of the user's own in /tmp."""
    try:
        folder = Path.home() / ".cache" / "rwkv_clip"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        pass
    folder = Path(tempfile.gettempdir()) / f"rwkv_clip-{os.getuid()}"
    if folder.is_symlink():  # anybody can make one there
        raise BuildError(f"{folder} is a link: remove it, or make ~/.cache writable")
    return folder


def _compile(
    library: Path, sources: Sequence[Path], compiler: Path, flags: list[str], link: list[str], ninja: Path
) -> None:
    """One object per source, in parallel, then one shared library; `library` appears whole or not at all."""
    build = library.with_suffix(".build")
    shutil.rmtree(build, ignore_errors=True)  # what a killed build has left
    build.mkdir()
    try:
        objects = [f"{i}_{source.stem}.o" for i, source in enumerate(sources)]
        (build / "build.ninja").write_text(_ninja_file(library.name, sources, objects, compiler, flags, link))
        done = subprocess.run([str(ninja)], cwd=build, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower() or "undefined" in line] or lines
            raise BuildError(
                f"{compiler} cannot build {library.name.split('-')[0]}:\n  "
                + "\n  ".join(errors[:5])
                + f"\nTry another version of the compiler; this one is {_version(compiler).splitlines()[0]}."
            )
        built, record = build / library.name, build / "sha256"
        record.write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n")
        for path, mode, final in ((record, 0o644, library.with_suffix(".sha256")), (built, 0o755, library)):
            os.chmod(path, mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # not an empty file under a final name after a power cut
            os.replace(path, final)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _ninja_file(
    target: str, sources: Sequence[Path], objects: list[str], compiler: Path, flags: list[str], link: list[str]
) -> str:
    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def escape(path: str) -> str:
        return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        f"  command = {command([str(compiler), *flags])} -c $in -o $out",
        "rule link",
        f"  command = {command([str(compiler), '-shared'])} $in -o $out {command(link)}",
        *(f"build {out}: compile {escape(str(source.resolve()))}" for out, source in zip(objects, sources)),
        f"build {escape(target)}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"
