"""Files of data that are read at any place: here, or on storage that fsspec reaches (`s3://`, `memory://`, ..).

A `Stored` is small and can be pickled; every process opens its own handle. What it reads was there when it was first
seen: a file that has changed meanwhile is an error that names it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..recordio import RecordError
from ..rows import SourceError, first_line

BUFFER = 1 << 20


def is_url(name: str) -> bool:
    """Whether a name is one for fsspec: s3://bucket/x.tar, file:///data/x.parquet."""
    protocol, there, _ = name.partition("://")
    return bool(there) and protocol.replace("+", "").isalnum()


def import_fsspec() -> Any:
    """The package fsspec, which is optional."""
    try:
        import fsspec
    except ImportError:
        raise ImportError("data under a URL need fsspec: pip install -e '.[fsspec]' (.[s3] for s3://)") from None
    return fsspec


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """SourceError with the name for whatever a file system behind fsspec reports; each has errors of its own."""
    try:
        yield
    except (SourceError, RecordError, ImportError):
        raise
    except FileNotFoundError:
        raise SourceError(f"{name}: no such file") from None
    except Exception as error:
        raise SourceError(f"{name}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def open_system(name: str) -> tuple[Any, str]:
    """(file system of fsspec, path in it) for a URL. SourceError; ImportError that names the extra."""
    fsspec = import_fsspec()
    try:
        with _naming(name):
            return fsspec.core.url_to_fs(name)
    except ImportError as error:  # fsspec names the package of the protocol
        more = "; pip install -e '.[s3]'" if name.startswith("s3") else ""
        raise ImportError(f"{name}: {first_line(error)}{more}") from None


def expand_url(name: str) -> list[str]:
    """The sorted URLs that a URL with a pattern stands for, or one alone. SourceError where there are none."""
    system, path = open_system(name)
    with _naming(name):
        if not any(sign in path for sign in "*?["):
            return [name]
        found = sorted(system.glob(path))
    if not found:
        raise SourceError(f"{name}: names nothing")
    return [system.unstrip_protocol(path) for path in found]


class Stored:
    """A file by its path or URL. `size` in bytes; `changed`: what its storage says of its last change, as text."""

    def __init__(self, name: str):
        self.name = name
        self._handle: Any = None
        self._process = -1
        self.size, self.changed = self._look()

    @property
    def path(self) -> Path | None:
        """None for a URL."""
        return None if is_url(self.name) else Path(self.name)

    @property
    def where(self) -> str:
        """Its absolute path, or its URL."""
        return self.name if is_url(self.name) else os.path.abspath(self.name)

    def _look(self) -> tuple[int, str]:
        if not is_url(self.name):
            try:
                about = os.stat(self.name)
            except OSError as error:
                raise SourceError(f"{self.name}: cannot be read ({error.strerror})") from None
            return about.st_size, f"mtime {about.st_mtime_ns}"
        system, path = open_system(self.name)
        with _naming(self.name):
            about = system.info(path)
            marks = (about.get(key) for key in ("ETag", "etag", "md5", "LastModified", "mtime", "created"))
            return int(about["size"]), str(next((mark for mark in marks if mark), ""))

    def _open(self) -> Any:
        """A file descriptor, or (file system, path), of this process."""
        if self._handle is not None and (self._process == os.getpid() or isinstance(self._handle, int)):
            return self._handle  # a descriptor is good after a fork, a connection is not
        if self._process >= 0 and self._look() != (self.size, self.changed):
            raise RecordError(f"{self.name}: changed since it was opened; start again with the data that are meant")
        if is_url(self.name):
            self._handle = open_system(self.name)
        else:
            try:
                self._handle = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise SourceError(f"{self.name}: cannot be read ({error.strerror})") from None
        self._process = os.getpid()
        return self._handle

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None, "_process": 0}

    def __del__(self):
        if os is None:  # Python is being taken down
            return
        if isinstance(self._handle, int) and self._process == os.getpid():
            os.close(self._handle)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`. RecordError where the file no longer has them."""
        handle = self._open()
        if isinstance(handle, int):
            data = os.pread(handle, end - start, start)
            while 0 < len(data) < end - start and (
                more := os.pread(handle, end - start - len(data), start + len(data))
            ):
                data += more
        else:
            system, path = handle
            with _naming(self.name):
                data = system.cat_file(path, start=start, end=end) if end > start else b""
        if len(data) != end - start:
            raise RecordError(f"{self.name}: cut short, or changed, before byte {end:,}; it had {self.size:,}")
        return data

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """The file from its beginning, to be read once and in order; it can seek."""
        handle = self._open()
        if isinstance(handle, int):
            with open(self.name, "rb", BUFFER) as file:
                yield file
            return
        system, path = handle
        with _naming(self.name):
            file = system.open(path, "rb")
        with file:
            try:
                yield file
            except OSError as error:
                raise SourceError(f"{self.name}: cannot be read ({first_line(error)})") from None


class Span(io.RawIOBase):
    """A part of a file that is read like a file of its own."""

    def __init__(self, stored: Stored, start: int, end: int):
        self._stored, self._start, self._size, self._at = stored, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        begin = self._start + self._at
        buffer[:count] = self._stored.read(begin, begin + count)
        self._at += count
        return count
