"""How commands end: every error of the system has a code and a line; output that is gone ends nothing."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap

import pytest

from rwkv_clip import errors
from rwkv_clip.data.records import RecordError
from rwkv_clip.files import InUse, find_below, hold, parse_json, read_bytes


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("lr: 0 must be more than 0"), 2, "lr: 0"),
        (ImportError("parquet input needs pyarrow"), 2, "pyarrow"),
        (RecordError("a.rec: cut"), 3, "a.rec"),
        (InUse("logs/a: in use by host, pid 7"), 76, "pid 7"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), 2, "a.json: No such file"),
        (OSError(errno.EMFILE, "Too many open files", "a-00901.rec"), 2, "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 2, "ulimit -u"),  # of a fork
        (RuntimeError("can't start new thread"), 2, "fewer --workers"),
        (OSError(errno.ENOSPC, "No space left on device", "logs/a"), 76, "free some space"),
        (OSError(errno.EROFS, "Read-only file system", "logs/a"), 76, "can be written"),
        (PermissionError(errno.EACCES, "Permission denied", "logs/a"), 76, "permissions"),
        (OSError(errno.EADDRINUSE, "Address already in use"), 2, "port"),
        (RuntimeError("The server socket has failed to listen on any address. EADDRINUSE"), 2, "--master-port"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 2, "network"),
        (UnicodeEncodeError("utf-8", "a\udcff.jpg", 1, 2, "surrogates not allowed"), 2, "not UTF-8"),
        (MemoryError(), 2, "--accum-freq"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--accum-freq"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 2, "--accum-freq"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_codes_and_words(error, code, words, capsys):
    def work():
        raise error

    assert errors.run_command(work, memory="use --accum-freq") == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        errors.run_command(lambda: {}["absent"])
    assert errors.explain(RuntimeError("a bug")) is None


PROGRAM = """
    import sys
    from rwkv_clip.errors import run_command
    def work():
        for i in range(2000):
            print(f"line {i} \\udcff", flush=i % 7 == 0)
            print("note", file=sys.stderr)
        open(sys.argv[1], "w").write("done")
    sys.exit(run_command(work))
"""


@pytest.mark.parametrize("way", ["> /dev/full", "2> /dev/full", "| head -1", ">&-", "2>&-"])
def test_output_that_is_gone_ends_nothing(way, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    command = f"{{ {sys.executable} {program} {tmp_path / 'end'}; echo $? > {tmp_path / 'code'}; }} {way}"
    if way.startswith("|"):
        command = f"{sys.executable} {program} {tmp_path / 'end'} {way}; echo ${{PIPESTATUS[0]}} > {tmp_path / 'code'}"
    subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (tmp_path / "end").read_text() == "done"
    assert (tmp_path / "code").read_text().strip() == "0"


def test_bounded_reading(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"12345")
    with open(large, "wb") as file:
        file.truncate(1 << 40)  # sparse
    assert read_bytes(small, 5) == b"12345"
    for path, most in ((small, 4), (large, 1 << 20)):
        with pytest.raises(OSError, match="more than") as caught:
            read_bytes(path, most)
        assert caught.value.errno == errno.EFBIG
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular"):
        read_bytes(tmp_path / "pipe", 5)


@pytest.mark.parametrize("text", [b"{", b"\xff", "[" * 100_000 + "]" * 100_000, "1" * 5000, ""])
def test_json_errors_name_the_place(text):
    with pytest.raises(ValueError, match=r"^a\.jsonl: line 3: "):
        parse_json(text, "a.jsonl: line 3")


def test_names_that_lead_out(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id.jpg").write_bytes(b"1")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"1")
    (photos / "inner.jpg").symlink_to("a.jpg")
    (photos / "link.jpg").symlink_to(tmp_path / "private" / "id.jpg")
    (photos / "circle").symlink_to("circle")
    (tmp_path / "linked").symlink_to("photos")
    assert find_below(photos, "a.jpg") and find_below(photos, "inner.jpg") and find_below(tmp_path / "linked", "a.jpg")
    assert find_below(photos, "none.jpg") is None and find_below(photos, "circle") is None
    for name in ("../private/id.jpg", str(tmp_path / "private" / "id.jpg"), "link.jpg"):
        with pytest.raises(ValueError, match="leads out"):
            find_below(photos, name)
        assert find_below(photos, name, outside=True)
    for name in ("a\0b", "x" * 5000):
        with contextlib.suppress(ValueError):
            assert find_below(photos, name) is None


def test_one_owner(tmp_path):
    lock = tmp_path / "train.lock"
    other = f"import sys; from rwkv_clip.files import hold, Path\nwith hold(Path({str(lock)!r}), 'train', 'wait'): pass"
    with hold(lock, "train", "wait for it"):
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert "InUse: train: in use by" in done.stderr and f"pid {os.getpid()}" in done.stderr
    assert not lock.exists()
    assert subprocess.run([sys.executable, "-c", other]).returncode == 0
