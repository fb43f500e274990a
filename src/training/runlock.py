"""One process at a time writes a run folder.

The lock is the kernel's (`lockf`): it ends with the process, however that ends, so nothing is ever left behind to clean
up, and processes forked from its owner do not hold it. The file `run.lock` stays, to say who owns it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rwkv_clip.dist import World

log = logging.getLogger(__name__)


class RunInUse(RuntimeError):
    """Another process trains in this run folder; names it."""


@contextlib.contextmanager
def hold_run(folder: Path, world: World) -> Iterator[None]:
    """Own a run folder while inside; the lead rank does. RunInUse, at once, when another run does.

    A file system without locks is worth a warning, no more.
    """
    if not world.is_lead:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise RunInUse(
                    f"{folder}: in use by {file.read().strip() or 'a process that just started'}; "
                    f"wait for it, end it, or take another --name"
                ) from None
            log.warning("%s: cannot be locked (%s); take care to start it once only", folder, error.strerror)
        else:
            file.truncate(0)
            file.write(f"{socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        yield
