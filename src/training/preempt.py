"""Being told to stop: a signal ends a run after a step, with everything saved, so that the same command goes on.

A handler only notes the signal. The note travels with the verdict of every step (`numerics.py`), or by `agree` where no
step is under way, so all ranks stop at the same step, whichever of them got it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from rwkv_clip.dist import World, max_over_ranks
from rwkv_clip.errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A cluster may signal every process, and torchrun passes on to its ranks what it gets: that is one signal, not two.
ECHO = 1.0  # seconds


class Preempted(Exception):
    """The run was told to stop by a signal; all steps done are saved."""

    exit_code = STOPPED


class Interrupted(Exception):
    """Work that a signal cut short and that is done again by the resumed run."""


class Preemption:
    """As a context: notes SIGTERM, SIGINT and SIGUSR1 in `signal`; a second one ends the process at once.

    Outside of the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self):
        self.signal = 0  # 0: none
        self._noted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
                signal.siginterrupt(number, False)  # libraries need not expect interrupted system calls
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if not self.signal:
            self.signal, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

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
