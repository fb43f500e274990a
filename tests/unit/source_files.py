"""Input files for the tests of the readers, and what reading them gives and costs."""

import io
import subprocess
import sys
import tarfile

import pytest

from rwkv_clip.data.rows import Problem
from rwkv_clip.data.sources import Source

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) + b"\xff\xd9"  # nothing is decoded here
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(255, 0, -1))
DEEP = "[" * 100_000 + "]" * 100_000
BOM = b"\xef\xbb\xbf"


def read(path, **options) -> list:
    return list(Source(path, **options).rows())


def save(folder, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def outcome(row) -> str | bytes | None:
    """The picture of a row, or the reason in its place."""
    return str(row.image) if isinstance(row.image, Problem) else row.image


def pack(members, **options) -> bytes:
    """A tar of (name, content) or ready TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member in members:
            name, content = (member, b"") if isinstance(member, tarfile.TarInfo) else member
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# Reads everything that each of argv names, and prints the megabytes that this took beyond what the imports took.
MEASURE = """
import resource, sys
from rwkv_clip.data.sources import Source
import pyarrow.parquet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[2:]:
    try:
        print(sum(1 for _ in Source(path, sys.argv[1]).rows()), "rows")
    except ValueError as error:
        print(type(error).__name__, error)
print(peak() - before)
"""


def measure(folder, names) -> tuple[dict[str, str], int]:
    """What reading each file came to, and the memory of the largest."""
    pytest.importorskip("pyarrow")
    save(folder, {"list.txt": "a\nb\n"})
    command = [sys.executable, "-c", MEASURE, folder / "list.txt", *(folder / name for name in names)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, grown = done.stdout.splitlines()
    return dict(zip(names, said, strict=True)), int(grown)
