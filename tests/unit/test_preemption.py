"""Signals: which of them are noted, and by whom."""

import os
import signal
import time

import pytest

from rwkv_clip.training.faults.signals import Preemption


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_signal_unless_it_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert preemption.signal == (0 if ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_hears_a_signal_before_its_handler_runs():
    """The main thread may be in a collective, where no handler runs."""
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        until = time.monotonic() + 10
        while not preemption._received and time.monotonic() < until:
            preemption.listen()
        assert preemption._received == signal.SIGUSR1 == preemption.signal
