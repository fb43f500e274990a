"""Faults at file-system calls: every function of `os` that a save uses (and `open`) tells a hook before and after.

    with watch_calls(hook):        # hook(number, name, arguments, when), when: "before" or "after"
        saver.save(..)

Only calls of the thread that makes `step-<N>.tmp` count, from that call to the next such one. A hook raises, waits or
ends the process.
"""

import builtins
import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator

NAMES = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")
READS = ("lstat", "stat", "scandir")
BEGIN = re.compile(r"step-\d{8}\.tmp")
Hook = Callable[[int, str, tuple, str], None]


@contextlib.contextmanager
def watch_calls(hook: Hook, names: tuple[str, ...] = NAMES + READS, begin: re.Pattern = BEGIN) -> Iterator[None]:
    """Number the calls of `names` 1, 2, .. and tell the hook of each, in the thread that makes it."""
    counted: dict[str, int] = {}

    def wrap(name: str, real: Callable) -> Callable:
        def call(*arguments, **options):
            if name == "mkdir" and str(arguments[0]).endswith(".tmp"):
                ours = begin.fullmatch(os.path.basename(arguments[0]))
                counted["thread"] = threading.get_ident() if ours else None
            ours = name in names and counted.get("thread") == threading.get_ident()
            if not ours or counted.get("inside"):
                return real(*arguments, **options)
            number = counted["calls"] = counted.get("calls", 0) + 1
            counted["inside"] = 1  # what the hook itself calls is not counted
            try:
                hook(number, name, arguments, "before")
                result = real(*arguments, **options)
                hook(number, name, arguments, "after")
            finally:
                counted["inside"] = 0
            return result

        return call

    real = {name: getattr(os, name) for name in NAMES + READS if hasattr(os, name)}
    opened = builtins.open
    try:
        for name, function in real.items():
            setattr(os, name, wrap(name, function))
        builtins.open = wrap("open", opened)
        yield
    finally:
        builtins.open = opened
        for name, function in real.items():
            setattr(os, name, function)


def exit_at(number: int, when: str) -> Hook:
    """End the process as SIGKILL does, before or after call `number`, or (of writes) when half of it is written."""

    def hook(at: int, name: str, arguments: tuple, now: str) -> None:
        if at == number and when == "half":
            os.write(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))
        if at == number and when in (now, "half"):
            os._exit(137)

    return hook
