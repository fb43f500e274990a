"""The watchdog: a dead, silent or stuck rank ends all ranks within seconds, and each says which rank it was.

About once a second every rank publishes, through the store and not by a collective, what it is doing: its step, its
process, where its main thread is, a signal that it received. Two threads do this: one talks to the store, the other
judges (`peers.py`) and never waits for anything. It costs a step nothing, and the loop knows nothing of it.

    dead     the process is gone: seen in /proc by the ranks of its host, or by silence after torch reported an error
    silent   no sign of life for `timeout` seconds: stopped, or its host is gone
    stuck    alive, but in the same step for `timeout` seconds; waiting for data counts, too

Starting (loading, compiling, the first step), validation and saving may take any time: meanwhile no rank is stuck, but
one may still be dead or silent. So the collectives' own time limit is long (`COLLECTIVES`) and only the last resort.

The peers of a lost rank have `GRACE` to end with an error of their own, then a thread ends the process with code 5: a
collective of NCCL that waits for a dead rank cannot be interrupted. A rank that is saving may finish that first.

A single process has a thread that watches it. A step of more than `timeout` seconds is stuck if the processor is idle
as well; otherwise it is a warning. (While waiting for data, the loop itself watches the clock, and saves.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from rwkv_clip.dist import PeerLost, World, first_line
from rwkv_clip.errors import PEER, explain

from .nonfinite import NumericsError
from .peers import INTERVAL, LEFT, MISSED, START, STORE_SILENT, TRAINING, WAITING, Peers, Sign, read_sign, show
from .process import Process, place_of
from .signals import Preempted, Preemption

COLLECTIVES = timedelta(hours=2)  # of process groups in a watched run: while the main rank validates, the others wait
GRACE = 3.0  # seconds that the main thread has to end by itself, with the error that it was about to raise
IDLE = 0.01  # fraction of a processor's time below which a process computes nothing
log = logging.getLogger(__name__)


class Watchdog:
    """Follows what the main thread of this process does, and ends a single process that is stuck."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.tick = min(0.25, timeout / 8)  # seconds between two checks
        self._step: Callable[[], int] = lambda: 0
        self._first = 0  # step from which this start resumes
        self._busy: list[str] = []
        self._waiting: Callable[[], str] | None = None  # what the main thread waits for, if it does
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start watching."""
        self._run(self._watch_self)

    def _run(self, *works: Callable[[], None]) -> None:
        self._threads = [threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def follow(self, step: Callable[[], int]) -> None:
        """Measure progress by `step()`, the number of finished steps; the first one may take any time."""
        self._step, self._first = step, step()

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Inside (validation, saving) time does not count: neither this rank nor those that wait for it are stuck.

        Also a decorator.
        """
        self._busy.append(what)
        try:
            yield
        finally:
            self._busy.pop()

    @contextlib.contextmanager
    def waiting(self, place: Callable[[], str]) -> Iterator[None]:
        """Inside, the main thread waits for data, and `place()` says from which process."""
        self._waiting = place
        try:
            yield
        finally:
            self._waiting = None

    @property
    def is_starting(self) -> bool:
        """Whether the first step has not finished yet."""
        return self._step() == self._first

    @property
    def state(self) -> str:
        """What the main thread is doing, in a word or two."""
        if self._busy:
            return self._busy[-1]
        if self.is_starting:
            return START
        return WAITING if self._waiting else TRAINING

    @property
    def place(self) -> tuple[str, bool]:
        """Where the main thread is, or what it waits for; and whether it waits for other ranks."""
        waiting = self._waiting
        return (f"the wait for data, for {waiting()}", False) if waiting else place_of(self._main)

    def _ticks(self) -> Iterator[float]:
        """At every tick, until the end: for how many seconds this process itself was stalled."""
        before = time.monotonic()
        while not self._end.wait(self.tick):
            now = time.monotonic()
            passed, before = now - before, now
            yield passed if passed > 1 + self.tick else 0.0

    def _watch_self(self) -> None:
        progress, since, computed, warned = 0, time.monotonic(), time.process_time(), 0
        for stood_still in self._ticks():
            since, now = since + stood_still, time.monotonic()
            if self._step() != progress or self.state != TRAINING:
                progress, since, computed, warned = self._step(), now, time.process_time(), 0
            passed = now - since
            if passed <= self.timeout * (warned + 1):
                continue
            used, computed, warned = time.process_time() - computed, time.process_time(), warned + 1
            where = f"step {progress} has lasted {passed:.0f} s, at {self.place[0]}"
            if used < IDLE * self.timeout:
                end_process(PeerLost(f"{where}, and computes nothing: stuck; --timeout {self.timeout:g} allows more"))
            log.warning("%s; it is computing, so the run continues (--timeout %g)", where, self.timeout)

    def leave(self, error: BaseException | None) -> None:
        """Stop watching. error: what ended the work, if anything."""
        self._end.set()
        for thread in self._threads:  # one that returns from the store while Python shuts down would abort the process
            thread.join(GRACE)


class PeerWatchdog(Watchdog):
    """One rank's watchdog among others: publishes its signs of life, and ends it when another rank is lost."""

    def __init__(self, world: World, timeout: float, preemption: Preemption):
        super().__init__(timeout)
        interval = min(INTERVAL, timeout / 4) * max(1, world.size / 256)  # every rank reads every other's
        self.tick = min(0.25, interval / 2)
        self.peers = Peers(world.rank, timeout, interval)
        self.cause = ""  # why this rank must end
        self._world, self._preemption, self._process = world, preemption, Process.own()
        self._count, self._failed, self._left = 0, False, False
        self._error = ""  # by which this rank ended itself
        self._hurry = threading.Event()

    def start(self) -> None:
        self._publish()
        self._run(self._talk, self._judge)

    # ---- one thread talks to the store -------------------------------------------------------------------------------

    def _publish(self) -> None:
        self._count += 1
        place, in_collective = self.place
        sign = Sign(
            process=self._process,
            count=self._count,
            step=self._step(),
            state=LEFT if self._left else self.state,
            place=show(place),
            in_collective=in_collective,
            signal=self._preemption.signal,
            failed=self._failed,
            cause=show(self.cause),
            error=show(self._error),
        )
        self._world.store.set(f"watchdog/{self._world.rank}", json.dumps(asdict(sign)))

    def _exchange(self) -> None:
        """Publish and receive once."""
        self._publish()
        keys = [f"watchdog/{rank}" for rank in range(self._world.size)]
        self.peers.hear(map(read_sign, self._world.store.multi_get(keys)))
        for sign, _ in self.peers.heard.values():
            if sign.signal:
                self._preemption.receive(sign.signal)

    def _talk(self) -> None:
        while not self._end.is_set():
            try:
                self._exchange()  # at once: a rank that takes the store with it at its first steps was heard before
            except dist.DistError:
                # The store is gone, with rank 0 or with torchrun. Some runs end this way, so give ours the time.
                if not self._end.wait(GRACE):
                    self.cause = self.cause or self.peers.describe(0, STORE_SILENT, self._step())
                return
            self._hurry.wait(0.1 if self._failed or self.cause else self.peers.interval)
            self._hurry.clear()

    # ---- the other one judges ----------------------------------------------------------------------------------------

    def _judge(self) -> None:
        for stood_still in self._ticks():
            if stood_still:
                self.peers.forgive(stood_still)
            before = self._preemption.signal
            self._preemption.listen()
            if self._preemption.signal != before:
                self._hurry.set()
            lost = self._find_lost()
            if lost and not self.cause:
                lost = self._look_again(lost)
            if not self.cause:
                causes = [sign.cause for sign, _ in self.peers.heard.values() if sign.cause]
                own = [self.peers.describe(rank, why, self._step()) for rank, why in lost.items()]
                self.cause = causes[0] if causes else "; ".join(own)
            if self.cause:
                self._hurry.set()
                self._stop(lost)

    def _find_lost(self) -> dict[int, str]:
        return self.peers.find_lost(self._step(), self.state, self._failed)

    def _look_again(self, lost: dict[int, str]) -> dict[int, str]:
        """What is left of `lost` after another exchange with the store: a process that is gone may have published that
        it is done, or why it ends; and ranks that die together are found together."""
        found, until = time.monotonic(), time.monotonic() + GRACE / 2
        self._hurry.set()
        time.sleep(self.tick)
        while self.peers.answered < found and time.monotonic() < until and not self._end.wait(0.02):
            self._hurry.set()
        return self._find_lost() if self.peers.answered > found else lost

    def _stop(self, lost: Iterable[int]) -> None:
        """End this process unless its main thread does within the grace period, or is still saving."""
        # A collective that waits for a live rank never fails, so it ends no process; but the others must learn why.
        until = time.monotonic() + (2 * self.tick if any(map(self.peers.may_be_alive, lost)) else GRACE)
        for pid in filter(None, map(self.peers.find_stopped, lost)):  # they keep GPUs, and torchrun waiting for 30 s
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        while time.monotonic() < until or "saving" in self._busy:
            if self._end.wait(0.05):
                return
        end_process(PeerLost(self.cause))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> str:
        """Why a collective failed; takes a few intervals if the others must be heard first."""
        self._failed = True
        until = time.monotonic() + (MISSED + 1) * self.peers.interval + 0.5
        while not self.cause and time.monotonic() < until:
            time.sleep(0.05)
        return self.cause or f"a collective failed, although all ranks give signs of life: {first_line(error)}"

    def leave(self, error: BaseException | None) -> None:
        """Publish no more signs of life, and expect none. The others are told of an error. Only the first call has an
        effect."""
        if self._left:
            return
        if isinstance(error, PeerLost):
            self.cause = str(error)
        elif error is not None:
            explained = explain(error)
            self._error = f"{type(error).__name__}: {explained[1] if explained else first_line(error)}"
        self._left = True
        with contextlib.suppress(dist.DistError):
            self._publish()
        self._end.set()
        self._hurry.set()
        super().leave(error)


def end_process(error: PeerLost) -> NoReturn:
    """Print the error in one line and end at once, with the data workers: failed communicators may never shut down."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(PEER)


def is_of_collective(error: BaseException) -> bool:
    """Whether torch reports that other ranks, or the connection to them, failed. gloo's errors have no type of their
    own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextlib.contextmanager
def watch_peers(world: World, timeout: float, preemption: Preemption | None = None) -> Iterator[Watchdog]:
    """Inside, ranks watch each other. PeerLost, naming the rank, instead of the error of a collective that failed.

    timeout: seconds without a sign of life, or in one step, after which a rank is lost. preemption: receives the
    signals of other ranks.
    """
    peers = None if world.store is None else PeerWatchdog(world, timeout, preemption or Preemption())
    watchdog = peers or Watchdog(timeout)
    watchdog.start()
    try:
        yield watchdog
    except (NumericsError, Preempted):  # on all ranks at the same step: no rank is lost, however long one takes to end
        watchdog.leave(None)
        raise
    except BaseException as error:
        if peers and is_of_collective(error):
            lost = PeerLost(peers.explain(error))
            peers.leave(lost)
            raise lost from error
        watchdog.leave(error)
        raise
    watchdog.leave(None)
