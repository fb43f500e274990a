"""Just-in-time build of the native kernels: plain `extern "C"` functions, compiled by ninja, loaded with ctypes.

No torch headers and no Python headers: a build takes seconds and does not care for torch's ABI; the functions take raw
pointers. A library's file name carries a hash of everything that went into it, so a change builds anew and nothing is
ever overwritten. Any number of processes may ask at once: one builds under a file lock (which dies with its process),
in a folder of its own, and the finished library appears by an atomic rename.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

CSRC = Path(__file__).parent / "csrc"

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
    library = folder / f"{name}-{_fingerprint(path, sources, depends, [*flags, *link])}.so"
    if library.exists():
        return library
    ninja = _find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # nobody else was faster
            print(f"rwkv_clip: compiling {name} (once; kept in {folder})", file=sys.stderr)
            _compile(library, sources, path, flags, link, ninja)
    return library


def load_library(path: Path) -> ctypes.CDLL:
    """Load a library of `build_library`. BuildError if the system's loader refuses it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}. Delete it, so that it is built anew.") from error


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
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        pass
    folder = Path(tempfile.gettempdir()) / f"rwkv_clip-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # code is loaded from there: it must not be somebody else's
        raise BuildError(f"{folder} belongs to another user: remove it, or make ~/.cache writable")
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
        with open(build / library.name, "rb") as file:
            os.fsync(file.fileno())  # not an empty file under a final name after a power cut
        os.replace(build / library.name, library)
    except OSError as error:
        raise BuildError(f"building in {build} fails: {error}") from error
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
