"""Processes as the kernel shows them: which one a rank is, whether it still runs, where a thread of this one is."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rwkv_clip.config import ranged

LIBRARY = sysconfig.get_path("stdlib")


@dataclass(frozen=True)
class Process:
    """Which process a rank is. Processes of one `namespace` see each other's pids; `began` distinguishes a process from
    a later one with the same pid. Both are None where there is no /proc."""

    host: str
    pid: int = ranged(minimum=0)
    namespace: str | None
    began: str | None

    @classmethod
    def own(cls) -> Process:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), own_namespace(), start_time(os.getpid()))

    def is_near(self) -> bool:
        """Whether it is, or was, on this host and visible from here."""
        return self.namespace is not None and self.namespace == own_namespace()

    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        return self.is_near() and start_time(self.pid) != self.began

    def problems(self) -> list[str]:
        return []


def own_namespace() -> str | None:
    """A name that two processes share exactly when each can see the other's pid; None without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def start_time(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None when it is gone, or where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def is_rank(pid: int, rank: int) -> bool:
    """Whether a process on this machine is verifiably that rank of this process's run: it belongs to the same user, and
    either its environment says so or it was started by the same parent with the same command."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        theirs, ours = (_launch_of(process) for process in (pid, os.getpid()))
        if "RANK" in theirs:
            return theirs == ours | {"RANK": str(rank)}
        command, own = (Path(f"/proc/{process}/cmdline").read_bytes() for process in (pid, "self"))
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return command == own and parent == os.getppid()
    except (OSError, ValueError, IndexError):
        return False


def _launch_of(pid: int) -> dict[str, str]:
    """A process's place in a run, from the environment that it was started with."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    pairs = dict(pair.partition("=")[::2] for pair in environment)
    return {key: pairs[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key in pairs}


def place_of(thread: int | None) -> tuple[str, bool]:
    """Where a thread of this process is (folder, file and line, skipping Python's standard library), and whether that
    is in torch.distributed, where it waits for other ranks."""
    frame = innermost = sys._current_frames().get(thread)
    while frame and frame.f_code.co_filename.startswith(LIBRARY) and "-packages" not in frame.f_code.co_filename:
        frame = frame.f_back
    if not (frame := frame or innermost):
        return "?", False
    place = f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"
    return place, frame.f_globals.get("__name__", "").startswith("torch.distributed")
