"""Worker processes that decode: each makes every n-th of a sequence of items and sends it through its own pipe.

Pixels are plain bytes in the pipe, read directly into the batch. So nothing is put in /dev/shm, which containers limit
to 64 MB; nothing is shared that a dying worker could hold; and the death of a worker breaks its pipe, which is an error
here and not an endless wait for a chunk.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import traceback
from multiprocessing import process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkv_clip.errors import DATA, SETTING
from rwkv_clip.processes import follow_parent, is_main_thread

from ..faults.signals import SIGNALS
from .samples import DataError

PIPE = 1 << 20  # capacity of a pipe in bytes, where the system allows it: fewer switches between reader and writer
PATIENCE = 5.0  # seconds to wait for a killed worker; one that hangs in the kernel may never end
PASSED_ON = (DataError, OSError, MemoryError)  # raised here unchanged; anything else is a bug
CAUSES = {
    -signal.SIGKILL: "usually a lack of memory: use fewer --workers",
    -signal.SIGBUS: "was a record file truncated, or its disk lost?",
}


class WorkerLost(RuntimeError):
    """A data worker ended before its work was done; names it. If it was killed (-9), memory usually ran out; otherwise
    its data are to blame."""

    def __init__(self, pid: int | None, code: int | None):
        super().__init__(f"data worker {pid} died with exit code {code}; {CAUSES.get(code, '--workers 0 shows why')}")
        self.exit_code = SETTING if code == -signal.SIGKILL else DATA


class Maker(Protocol):
    """What workers do. It can be pickled, for workers that are not forked."""

    def __len__(self) -> int:
        """How many items there are."""

    def shape(self, item: int) -> tuple[int, ...]:
        """Shape of the item's pixels; no item has more of them than the first."""

    def fill(self, item: int, image: Tensor) -> Any:
        """Make the item: its pixels into `image`, uint8; what is returned is sent along."""


class Workers:
    """`count` processes that make the items of `maker`; started by the thread that creates this object."""

    def __init__(self, maker: Maker, count: int):
        self._processes: list[process.BaseProcess] = []
        self._pipes: list[Connection] = []
        try:
            for first in range(count):
                self._start(maker, range(first, len(maker), count))
        except BaseException:  # no more processes or open files
            self.kill()
            self.close()
            raise

    def _start(self, maker: Maker, items: range) -> None:
        context = multiprocessing.get_context()
        ours, theirs = context.Pipe(duplex=False)
        self._pipes.append(ours)
        with theirs:  # closed before the next is forked: only the worker keeps its pipe open
            with contextlib.suppress(AttributeError, OSError):
                fcntl.fcntl(ours.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
            inherited = self._pipes if context.get_start_method() == "fork" else []
            arguments = maker, items, theirs, inherited, is_main_thread()
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
        self._processes.append(worker)

    def receive(self, item: int, image: Tensor) -> Any:
        """What `fill` returned for an item, its pixels in `image`. Items are asked for in order.

        WorkerLost; a DataError, OSError or MemoryError of `fill` unchanged.
        """
        pipe = self._pipes[item % len(self._pipes)]
        try:
            found = pipe.recv()
            if not isinstance(found, BaseException):
                view = memoryview(image.numpy().reshape(-1))
                while view:
                    count = os.readv(pipe.fileno(), [view])
                    if not count:
                        raise EOFError
                    view = view[count:]
                return found
        except (EOFError, OSError):
            raise self._describe_loss(item) from None
        raise found

    def _describe_loss(self, item: int) -> WorkerLost:
        worker = self._processes[item % len(self._processes)]
        wait([worker.sentinel], timeout=1)
        worker.join(1)  # a dying process closes its pipes a moment before it can be waited for
        return WorkerLost(worker.pid, worker.exitcode)

    def place(self, item: int) -> str:
        """The worker that `receive` waits for, for messages."""
        processes = self._processes
        if not processes:  # closed by another thread
            return "data workers that are gone"
        worker = processes[item % len(processes)]
        return f"data worker {worker.pid} ({_state(worker.pid)})"

    def kill(self) -> None:
        """End them all; a thread in `receive` gets WorkerLost. They have nothing to save."""
        for worker in self._processes:
            worker.kill()

    def close(self) -> None:
        """After `kill`: forget them. No thread may be in `receive`."""
        for worker in self._processes:
            worker.join(PATIENCE)
            if worker.exitcode is None:
                # Hanging in the kernel, on storage that is gone. Python would wait for it forever when it exits.
                process._children.discard(worker)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _state(pid: int) -> str:
    """What a process is doing, according to the kernel."""
    names = {"D": "waiting for storage", "S": "asleep", "R": "running", "T": "stopped", "t": "traced", "Z": "gone"}
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "unknown"
    return names.get(letter, letter)


# ---- in a worker -----------------------------------------------------------------------------------------------------


def _work(maker: Maker, items: range, pipe: Connection, inherited: list[Connection], by_main_thread: bool) -> None:
    """The main program of a worker."""
    if by_main_thread:
        follow_parent(signal.SIGKILL)
    # A signal to the process group must let the main process save before it ends; it ends its workers itself.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    for end in inherited:  # readers that would keep a pipe from breaking
        end.close()
    torch.set_num_threads(1)
    buffer = torch.empty(maker.shape(0), dtype=torch.uint8)
    with contextlib.suppress(BrokenPipeError):  # the reader is gone, and needs nothing more
        for item in items:
            image = buffer[: maker.shape(item)[0]]
            try:
                found = maker.fill(item, image)
            except PASSED_ON as error:
                pipe.send(error.with_traceback(None))
                return
            except Exception:
                pipe.send(RuntimeError(f"in a data worker:\n{traceback.format_exc()}"))
                return
            pipe.send(found)
            view = memoryview(image.numpy().reshape(-1))
            while view:
                view = view[os.write(pipe.fileno(), view) :]


def _end_with_parent() -> None:
    """A thread: end this process when the one that started it has gone, also while a pipe is full."""
    parent, started_by = multiprocessing.parent_process(), os.getppid()
    # Siblings forked later hold the sentinel open, and a fork server is a parent that stays: so check both.
    while not wait([parent.sentinel], timeout=1) and os.getppid() == started_by:
        pass
    os._exit(1)
