"""Native code: built once, cached by all that went into it, safe with several processes, clear when it cannot be."""

import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_clip.ops import build
from rwkv_clip.ops.build import BuildError, architecture_flags, build_library, find_compiler, load_library

try:
    find_compiler()
    build._find_ninja()
    MISSING = ""
except BuildError as error:
    MISSING = str(error)
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=MISSING)

CODE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'

COUNT_RUNTIMES = """
import ctypes, sys
from pathlib import Path
from rwkv_clip.ops.build import load_library
print(load_library(Path(sys.argv[1])).threads(ctypes.c_int(3)))
mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
print(*(path.name for path in mapped if path.name.startswith(("libgomp", "libiomp", "libomp"))))
"""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "with space $x"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text(CODE)
    return folder / "answer.cpp"


def make(source, cache, flags=("-O0",)):
    return build_library(
        "answer", [source], flags=flags, compiler="c++", depends=[source.with_suffix(".h")], cache=cache
    )


@needs_compiler
def test_a_library_is_built_once_and_anew_after_every_change(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = make(source, cache)
    assert load_library(first).answer() == 42
    assert [path.suffix for path in cache.iterdir() if path != first] == [".lock"]  # nothing else is left behind
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built twice"))
    assert make(source, cache) == first
    monkeypatch.undo()
    source.with_suffix(".h").write_text("#define ANSWER 43\n")
    second = make(source, cache)
    assert load_library(second).answer() == 43 and first.exists()
    assert make(source, cache, flags=("-O1",)) not in (first, second)
    monkeypatch.setattr(build.torch, "__version__", "0.0")
    assert make(source, cache) not in (first, second)


@needs_compiler
def test_native_code_is_bound_to_its_processor(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(build, "_accepts", lambda compiler, flag: flag == "-march=native")
    assert "-march=native" in build.host_flags()
    names = []
    for processor in ("one", "other"):
        monkeypatch.setattr(build, "_processor", lambda processor=processor: processor)
        names += [build._fingerprint(find_compiler(), [source], [], flags) for flags in (["-march=native"], ["-O2"])]
    assert names[0] != names[2] and names[1] == names[3]
    monkeypatch.setattr(build, "_accepts", lambda compiler, flag: False)
    assert not [flag for flag in build.host_flags() if "native" in flag]
    assert load_library(make(source, cache, build.host_flags())).answer() == 42


@needs_compiler
def test_processes_that_start_at_once_build_once(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from rwkv_clip.ops.build import build_library, load_library; "
        "s = Path(sys.argv[1]); print(load_library(build_library('answer', [s], flags=['-O0'], compiler='c++', "
        "depends=[s.with_suffix('.h')], cache=Path(sys.argv[2]))).answer())"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in started]
    assert [out for out, _ in outputs] == ["42\n", "42\n"], outputs
    assert sum("compiling answer" in err for _, err in outputs) == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1


@needs_compiler
def test_a_killed_build_leaves_no_trap(source, tmp_path, monkeypatch):
    """A compiler that never ends is killed with its process; the next process finds the lock free and builds."""
    cache, tools = tmp_path / "cache", tmp_path / "tools"
    tools.mkdir()
    slow = tools / "ninja"
    slow.write_text("#!/bin/sh\necho half > answer.so\nexec sleep 20\n")
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    code = (
        "import sys; from pathlib import Path; from rwkv_clip.ops import build; "
        "build._find_ninja = lambda: Path(sys.argv[3]); s = Path(sys.argv[1]); "
        "build.build_library('answer', [s], flags=['-O0'], compiler='c++', depends=[s.with_suffix('.h')], "
        "cache=Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(cache), str(slow)])
    deadline = time.monotonic() + 300
    while not list(cache.glob("*.build/answer.so")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(cache.glob("*.build/answer.so"))
    process.kill()
    process.wait()
    assert load_library(make(source, cache)).answer() == 42
    assert not list(cache.glob("*.build"))


@needs_compiler
def test_compiler_errors_are_shown(source, tmp_path):
    source.write_text(CODE + "int broken( { }\n")
    with pytest.raises(BuildError, match=r"(?s)cannot build answer:.*answer\.cpp:3.*error.*this one is"):
        make(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_missing_tools_are_named_with_their_remedy(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_find_ninja", lambda: pytest.fail("the compiler comes first"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler on PATH.*apt-get install g\+\+"):
        make(source, tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(BuildError, match="ninja is missing: pip install ninja"):
        build._find_ninja()
    monkeypatch.setattr(build.os, "access", lambda *_: False)
    with pytest.raises(BuildError, match=r"no nvcc on PATH, nor in .*install the CUDA toolkit"):
        build.find_nvcc()


def test_a_file_that_is_no_library_is_named(tmp_path):
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(BuildError, match=r"x\.so does not load: .*Delete it"):
        load_library(tmp_path / "x.so")


def test_cache_falls_back_when_home_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = build._cache_folder()
    assert folder.parent == tmp_path and folder.is_dir() and folder.stat().st_mode & 0o077 == 0


def test_architectures(monkeypatch):
    monkeypatch.setattr(build, "_run", lambda *_: "compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_100\n")
    flag = "-gencode=arch=compute_{},code={}".format
    nvcc = Path("nvcc")
    assert architecture_flags([(9, 0), (8, 0), (9, 0)], nvcc) == [
        flag(80, "sm_80"),
        flag(90, "sm_90"),
        flag(90, "compute_90"),
    ]
    assert architecture_flags([(12, 1)], nvcc) == [flag(100, "compute_100")]
    assert architecture_flags([(8, 9), (10, 0)], nvcc) == [
        flag(100, "sm_100"),
        flag(86, "compute_86"),
        flag(100, "compute_100"),
    ]
    with pytest.raises(BuildError, match=r"compute capability 7\.0 \(its oldest is 7\.5\)"):
        architecture_flags([(7, 0)], nvcc)


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_torch_and_native_code_share_one_openmp(source, tmp_path):
    """Two runtimes would mean two sets of threads that fight for the cores."""
    source.write_text(
        '#include <omp.h>\n#include "answer.h"\n'
        'extern "C" int threads(int n) { int c = 0;\n#pragma omp parallel num_threads(n) reduction(+ : c)\nc++;\n'
        "return c; }\n"
    )
    path = make(source, tmp_path / "cache")
    if not build._openmp(find_compiler())[0]:
        pytest.skip("this compiler has no OpenMP for torch's runtime: kernels are serial")
    # in a process of its own: libraries that other tests import bring runtimes of theirs
    command = [sys.executable, "-c", COUNT_RUNTIMES, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    threads, *runtimes = done.stdout.split()
    assert threads == "3" and len(runtimes) == 1, done.stdout
