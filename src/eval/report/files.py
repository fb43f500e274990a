"""The folder of a run and its files: each is written whole or not at all, and reported if it cannot be written."""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rwkv_clip.files import write_whole

from ..settings import EvalSettings


def check_place(logs: str) -> None:
    """Make the folder of all runs and try to write into it, before any work. OSError if that fails."""
    Path(logs).mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=logs) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(error.errno, error.strerror, logs) from None


def place_of(settings: EvalSettings, task: str, model: str) -> Path:
    """The folder of a run: LOGS/NAME, or LOGS/TIME-TASK-MODEL."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Path(settings.logs) / (settings.name or f"{stamp}-{task}-{safe_name(model)}")


def new_file(folder: Path, stem: str, suffix: str) -> Path:
    """A file that does not exist yet: STEM, STEM-2, STEM-3 .."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}{suffix}").exists())


def safe_name(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def keep(path: Path, make: Callable[[], bytes | str]) -> bool:
    """Write make() into a file. False, and a line on standard error, if it cannot be written."""
    try:
        write(path, make())
        return True
    except OSError as error:
        say_missing(path, error)
        return False


def say_missing(path: Path, error: OSError) -> None:
    """Tell the user what was not written."""
    print(f"missing: {path}: {error.strerror or error}", file=sys.stderr)


def write(path: Path, content: bytes | str) -> None:
    """`write_whole`; what is not UTF-8 (a part of a path) becomes an escape, which JSON reads back."""
    write_whole(path, [content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")])
