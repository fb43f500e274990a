"""Signals: each ends a run after a step, with everything saved, so that the same command resumes it.

A handler only records the signal. It travels with the verdict of every step (`nonfinite.py`), or by `agree` between
steps, so all ranks stop at the same step, whichever of them received it. Python runs no handler while the main thread
waits in a collective; then a thread picks up the signal (`listen`), and the watchdog (`watchdog.py`) passes it on to
the rank that the others wait for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from rwkv_clip.dist import World, max_over_ranks
from rwkv_clip.errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A cluster may signal every process, and torchrun forwards what it receives to its ranks: that is one signal, not two.
ECHO = 1.0  # seconds


class Preempted(Exception):
    """A signal stopped the run; all finished steps are saved."""

    exit_code = STOPPED


class Interrupted(Exception):
    """A signal interrupted work that the resumed run will repeat."""


class Preemption:
    """As a context: records `SIGNALS`; a second one ends the process at once.

    Outside the main thread, where Python allows no handlers, nothing is recorded. A SIGHUP that is ignored (nohup)
    stays ignored.
    """

    def __init__(self):
        self._noted = self._received = 0  # by the handler; from another thread
        self._noted_at = self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[int, int, int] | None = None  # both ends of a pipe, and the previous descriptor

    @property
    def signal(self) -> int:
        """The number of a signal that this rank knows of, 0 for none."""
        return self._noted or self._received

    @property
    def since(self) -> float:
        """When it learned of the signal, on the monotonic clock."""
        return min(at for at in (self._noted_at, self._received_at) if at) if self.signal else 0.0

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
                signal.siginterrupt(number, False)  # libraries may not expect interrupted system calls
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            os.set_blocking(theirs, False)
            self._wakeup = ours, theirs, signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup:
            ours, theirs, before = self._wakeup
            self._wakeup = None
            signal.set_wakeup_fd(before)
            os.close(ours)
            os.close(theirs)

    def _note(self, number: int, _frame: object) -> None:
        if not self._noted:
            self._noted_at, self._noted = time.monotonic(), number  # the time first: other threads read both
        elif time.monotonic() - self._noted_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def receive(self, number: int) -> None:
        """Learn of a signal from another rank or thread. From any thread."""
        if not self._received:
            self._received_at, self._received = time.monotonic(), number

    def listen(self) -> None:
        """Learn of a signal whose handler has not run yet. Call regularly, from any one thread."""
        if self._wakeup:
            with contextlib.suppress(OSError):  # nothing there
                for number in os.read(self._wakeup[0], 512):
                    if number in SIGNALS:
                        self.receive(number)

    def agree(self, world: World) -> int:
        """A signal that some rank has received, else 0. All ranks wait for each other here."""
        return int(max_over_ranks(torch.tensor(float(self.signal), device=world.device)).item())

    def interrupts(self, function: Callable) -> Callable:
        """`function`, but once a signal is recorded it raises Interrupted."""

        def call(*arguments: Any) -> Any:
            if self.signal:
                raise Interrupted
            return function(*arguments)

        return call


def ignore_signals() -> None:
    """From here on the process only exits; a signal, such as torchrun's once the first rank has exited, would only
    change its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
