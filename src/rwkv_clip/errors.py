"""How a command ends: an exit code that says why and a line on standard error, the same for every command.

A bug has no code and keeps its traceback. A class of errors that always has the same cause says so by an attribute
`exit_code`; errors of the system and of libraries are distinguished here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SETTING = 2  # a setting, a checkpoint that does not fit, something that is missing or not installed
DATA = 3  # damaged or unusable input
NUMERICS = 4  # numbers that are not finite
PEER = 5  # another rank died, or progress stalled
INTERRUPTED = 130  # Ctrl-C where nothing has to be saved
STOPPED = 75  # by a signal, with everything saved
STORAGE = 76  # output cannot be written, or another process writes it

MEMORY = "use a smaller --batch-size or fewer --workers"
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL)
_CROWDED = "no more processes or threads may be started, or memory ran out; use fewer --workers, or raise ulimit -u"
_REMEDIES = {
    errno.EAGAIN: (SETTING, _CROWDED),
    errno.EMFILE: (SETTING, "raise the limit of open files (ulimit -n 65536), or use fewer, larger shards"),
    errno.ENFILE: (SETTING, "the whole machine has too many files open; use fewer, larger shards"),
    errno.EADDRINUSE: (SETTING, "another process uses this port; use another one (--master-port for torchrun)"),
    errno.ENOSPC: (STORAGE, "free some space; the same command continues"),
    errno.EDQUOT: (STORAGE, "free some of your quota; the same command continues"),
    errno.EROFS: (STORAGE, "name a folder that can be written"),
    errno.EACCES: (STORAGE, "change its permissions, or name a place that you may use"),
    errno.EPERM: (STORAGE, "change its permissions, or name a place that you may use"),
}


def explain(error: BaseException, memory: str = MEMORY) -> tuple[int, str] | None:
    """(exit code, what to tell the user); None for a bug. memory: the remedy where memory ran out."""
    if is_out_of_memory(error):
        return SETTING, f"out of memory ({_first_line(error)}); {memory}"
    if (code := getattr(error, "exit_code", None)) is not None:
        return code, str(error)
    if isinstance(error, OSError):
        return _explain_system(error)
    if isinstance(error, UnicodeEncodeError):
        return SETTING, f"{error.object[:80]!a}: the name is not UTF-8; rename it"
    if isinstance(error, (ValueError, ImportError)):
        return SETTING, str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return SETTING, f"{_first_line(error)}; {_CROWDED}"
    if isinstance(error, RuntimeError) and ("EADDRINUSE" in str(error) or "address already in use" in str(error)):
        return SETTING, f"{_first_line(error)}; {_REMEDIES[errno.EADDRINUSE][1]}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the host's or a device's; torch says it in several ways."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


def _explain_system(error: OSError) -> tuple[int, str]:
    name = f"{error.filename}: " if error.filename is not None else ""
    text = f"{name}{error.strerror or _first_line(error)}"
    if error.errno in _REMEDIES:
        code, remedy = _REMEDIES[error.errno]
        return code, f"{text}; {remedy}"
    if isinstance(error, (ConnectionError, socket.gaierror)) or type(error).__module__.startswith(("urllib", "http")):
        return SETTING, f"{text}; is there a network?"
    return (SETTING if error.errno in (*_MISSING, None) else STORAGE), text


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def run_command(
    work: Callable[[], int | None], program: str = "error", memory: str = MEMORY, one_line: bool = False
) -> int:
    """Run work() and return the exit code: its own, or that of its error, which is printed after `program`.

    one_line: lists of problems, too, are printed in one line. Bugs are raised.
    Standard output and error may be closed meanwhile, see `unbroken_output`.
    """
    with unbroken_output():
        try:
            return work() or 0
        except KeyboardInterrupt:
            print(f"{program}: stopped", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            found = explain(error, memory)
            if found is None:
                raise
            code, text = found
            if one_line:
                text = "; ".join(line.strip(" ;") for line in text.splitlines())
            print(f"{program}: {text}", file=sys.stderr)
            return code


# ---- output ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unbroken_output() -> Iterator[None]:
    """Inside, no write to standard output or error fails: neither because its reader is gone or its disk is full (then
    the rest is dropped), nor because of a character that it cannot encode (then an escape is written).
    """
    before = sys.stdout, sys.stderr
    # Python has None for a stream that was closed before it started.
    sys.stdout, sys.stderr = (_Unbroken(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Unbroken:
    """A text stream whose `write` and `flush` never fail."""

    def __init__(self, stream: Any):  # a TextIO; not every one can be reconfigured
        self._stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # closed
            pass
        except OSError:
            # What is buffered would fail again, at the latest when Python ends, and change the exit code.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
