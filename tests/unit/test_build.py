"""Native code: built once, cached by all that went into it, safe with several processes, clear when it cannot be."""

import fcntl
import os
import re
import shutil
import signal
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


SLOW = """
import sys
from pathlib import Path
from rwkv_clip.ops import build
source, cache, ninja = map(Path, sys.argv[1:])
build._find_ninja = lambda: ninja
depends = [source.with_suffix(".h")]
build.build_library("answer", [source], flags=["-O0"], compiler="c++", depends=depends, cache=cache)
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
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock", ".sha256"}  # nothing else is left behind
    assert all(path.stat().st_mode & 0o022 == 0 for path in (cache, *cache.iterdir()))
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
def test_a_killed_build_leaves_no_trap(source, tmp_path):
    """A compiler that never ends is killed with its process; the next process finds the lock free and builds."""
    cache = tmp_path / "cache"
    process = hold(source, cache)
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
    build._take_folder(folder)
    assert folder.parent == tmp_path and folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(BuildError, match=r"is a link: remove it, or make ~/\.cache writable"):
        build._cache_folder()


def damage(how: str):
    def change(library: Path) -> None:
        content = bytearray(library.read_bytes())
        content[len(content) // 2] ^= 4
        record = library.with_suffix(".sha256")
        if how == "flipped":
            library.write_bytes(content)
        elif how in ("cut", "empty"):
            os.truncate(library, len(content) // 2 if how == "cut" else 0)
        elif how == "other code":
            library.write_bytes(b"\x7fELF, but foreign")
        elif how == "a link":
            library.rename(library.with_suffix(".other"))
            library.symlink_to(library.with_suffix(".other"))
        elif how == "no record":
            record.unlink()
        else:
            record.write_bytes({"empty record": b"", "long record": b"0" * 10_000, "binary record": b"\xff" * 64}[how])

    return change


DAMAGE = [
    "flipped",
    "cut",
    "empty",
    "other code",
    "a link",
    "no record",
    "empty record",
    "long record",
    "binary record",
]


@needs_compiler
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_library_is_built_anew(how, source, tmp_path, capfd):
    library = make(source, tmp_path / "cache")
    good = library.read_bytes()
    damage(how)(library)
    inode = library.lstat().st_ino
    assert make(source, tmp_path / "cache") == library and library.lstat().st_ino != inode
    assert library.read_bytes() == good and load_library(library).answer() == 42
    assert "compiling answer anew: the library there is not as it was built" in capfd.readouterr().err
    make(source, tmp_path / "cache")
    assert capfd.readouterr().err == ""


LOOSE = {
    "the folder, group": (lambda library: library.parent.chmod(0o770), "can be written by other users"),
    "the folder, all": (lambda library: library.parent.chmod(0o707), "can be written by other users"),
    "the library": (lambda library: library.chmod(0o775), r"\.so can be written by other users.*chmod go-w"),
    "its record": (lambda library: library.with_suffix(".sha256").chmod(0o666), r"\.sha256 can be written by other"),
}


@needs_compiler
@pytest.mark.parametrize("what", LOOSE)
def test_what_others_can_write_is_not_loaded(what, source, tmp_path):
    library, (loosen, message) = make(source, tmp_path / "cache"), LOOSE[what]
    loosen(library)
    with pytest.raises(BuildError, match=message):
        make(source, tmp_path / "cache")


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "linked folder", "library"])
def test_what_belongs_to_another_user_is_not_loaded(what, source, tmp_path, monkeypatch):
    library = make(source, tmp_path / "cache")
    cache = library.parent
    if what == "linked folder":
        cache = cache.rename(tmp_path / "elsewhere")
        (tmp_path / "cache").symlink_to(cache)
    foreign = cache if "folder" in what else library
    if os.getuid() == 0:
        os.chown(foreign, 12, -1)
    else:  # who is not root can but pretend
        monkeypatch.setattr(build.os, "getuid", lambda: os.stat(foreign).st_uid + 12)
    with pytest.raises(BuildError, match=r"belongs to another user \(uid \d+\)"):
        make(source, tmp_path / "cache")


def test_a_cache_that_is_no_folder_is_named(source, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(BuildError, match="cannot be used for compiled kernels"):
        make(source, tmp_path / "cache")


def hold(source, cache) -> subprocess.Popen:
    """A process whose compiler never ends, once it has begun."""
    tools = cache.parent / "tools"
    tools.mkdir()
    slow = tools / "ninja"
    slow.write_text("#!/bin/sh\necho half > answer.so\nexec sleep 20\n")
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(cache), str(slow)])
    deadline = time.monotonic() + 300
    while not list(cache.glob("*.build/answer*.so")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(cache.glob("*.build/answer*.so"))
    return process


@needs_compiler
def test_a_stopped_build_is_not_waited_for_without_end(source, tmp_path, monkeypatch, capfd):
    cache = tmp_path / "cache"
    process = hold(source, cache)
    try:
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(build, "SILENT_WAIT", 0.1)
        monkeypatch.setattr(build, "LONGEST_WAIT", 0.5)
        owner = rf"process {process.pid} on \S+ \(since \d{{4}}-\d\d-\d\d [\d:]+\)"
        for _ in range(2):  # and who comes later knows as much
            with pytest.raises(
                BuildError, match=rf"{owner} has been compiling answer for more than .* end it, and start"
            ):
                make(source, cache)
        assert re.search(rf"waiting for {owner}, which compiles answer", capfd.readouterr().err)
    finally:
        process.kill()
        process.wait()
    assert load_library(make(source, cache)).answer() == 42


@needs_compiler
def test_a_library_that_appears_ends_the_wait(source, tmp_path, monkeypatch):
    """Its builder may be stopped after the last rename, before it lets go of the lock."""
    library = make(source, tmp_path / "cache")
    monkeypatch.setattr(build, "LONGEST_WAIT", 5)
    seen = iter([False])  # there only after the first look
    real = build._is_good
    monkeypatch.setattr(build, "_is_good", lambda path: next(seen, True) and real(path))
    with open(library.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert make(source, tmp_path / "cache") == library


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
