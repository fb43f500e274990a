"""Being told to stop: a signal ends a run after a step, with everything saved, so that the same command goes on.

A handler only notes the signal. The note travels with the verdict of every step (`numerics.py`), or by `agree` where no
step is under way, so all ranks stop at the same step, whichever of them got it. Python runs no handler while the main
thread waits in a collective; there a thread hears of the signal (`listen`), and the signs of life (`heartbeat.py`) tell
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
# A cluster may signal every process, and torchrun passes on to its ranks what it gets: that is one signal, not two.
ECHO = 1.0  # seconds


class Preempted(Exception):
    """The run was told to stop by a signal; all steps done are saved."""

    exit_code = STOPPED


class Interrupted(Exception):
    """Work that a signal cut short and that is done again by the resumed run."""


class Preemption:
    """As a context: notes `SIGNALS`; a second one ends the process at once.

    Outside of the main thread, where Python allows no handlers, nothing is noted. A SIGHUP that is ignored (nohup)
    stays so.
    """

    def __init__(self):
        self._noted = self._told = 0  # by the handler; by another thread
        self._noted_at = self._told_at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[int, int, int] | None = None  # both ends of a pipe, and whom Python woke before

    @property
    def signal(self) -> int:
        """What this rank knows of signals: the number of one, 0 for none."""
        return self._noted or self._told

    @property
    def since(self) -> float:
        """When it learnt of it, on the monotonic clock."""
        return min(at for at in (self._noted_at, self._told_at) if at) if self.signal else 0.0

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
                signal.siginterrupt(number, False)  # libraries need not expect interrupted system calls
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
            self._noted_at, self._noted = time.monotonic(), number  # the time first: other threads look, too
        elif time.monotonic() - self._noted_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def tell(self, number: int) -> None:
        """Another rank, or another thread of this one, has heard of a signal. From any thread."""
        if not self._told:
            self._told_at, self._told = time.monotonic(), number

    def listen(self) -> None:
        """Hear of a signal whose handler has not run yet. From any one thread, now and then."""
        if self._wakeup:
            with contextlib.suppress(OSError):  # nothing there
                for number in os.read(self._wakeup[0], 512):
                    if number in SIGNALS:
                        self.tell(number)

    def agree(self, world: World) -> int:
        """A signal that some rank has got, else 0. All ranks wait for each other here."""
        return int(max_over_ranks(torch.tensor(float(self.signal), device=world.device)).item())

    def interrupts(self, function: Callable) -> Callable:
        """`function`, but once a signal is noted it raises Interrupted."""

        def call(*arguments: Any) -> Any:
            if self.signal:
                raise Interrupted
            return function(*arguments)

        return call


def ignore_signals() -> None:
    """From here on the process only ends; a signal, such as torchrun's when the first rank has gone, would no more than
    change its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
