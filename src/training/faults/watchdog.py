"""Signs of life: a dead, silent or stuck rank ends all ranks within seconds, and each says which rank it was.

About once a second every rank publishes, through the store and not by a collective, what it is doing: its step, its
process, where its main thread stands, a signal that it got. Two threads do it: one talks to the store, one judges and
never waits for anything. A step costs nothing, and the loop knows nothing of it.

    dead     the process is gone: seen in /proc by the ranks of its host, or by silence after torch reported an error
    silent   no sign of life for `timeout` seconds: stopped, or its host is gone
    stuck    alive, but in the same step for `timeout` seconds; waiting for data counts, too

Starting (loading, compiling, the first step), validation and saving may take any time: then nobody is stuck, but a rank
may still be dead or silent. So the collectives' own time limit is long (`COLLECTIVES`) and only the last resort.

The peers of a lost rank have `GRACE` to end by an error of their own, then a thread ends the process with code 5: a
collective of NCCL that waits for a dead rank cannot be interrupted. Who saves may finish that first.

One process alone has a thread that watches itself. A step of more than `timeout` seconds is stuck when the processor
stands still, too; else it is a warning. (Where it waits for data the loop itself looks at the clock, and saves.)

Everybody who reaches the store can write there. So a sign that is not of this form is none; who a rank is, is what it
said first; and a process is only killed when it can be seen to be that rank of this run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from rwkv_clip.dist import PeerLost, World, first_line
from rwkv_clip.errors import PEER, explain
from rwkv_clip.files import parse_json

from .nonfinite import NumericsError
from .signals import SIGNALS, Preempted, Preemption

COLLECTIVES = timedelta(hours=2)  # of process groups in a watched run: while the main rank validates, the others wait
BEAT = 1.0  # seconds between signs of life
MISSED = 2.5  # beats without a sign of life after which a rank is gone, once torch has reported an error
GRACE = 3.0  # seconds that the main thread has to end by itself, with what it was about to say
IDLE = 0.01  # share of a processor below which a process computes nothing
START, TRAINING, WAITING, LEFT = "starting", "training", "waiting for data", "left"
SILENT, STUCK = "no sign of life since", "stuck"
NO_STORE = "the store on its host, torchrun's or its own, does not answer"

# What a sign of life consists of. The first four say who a rank is.
IDENTITY = {"host": (str,), "pid": (int,), "where": (str, type(None)), "began": (str, type(None))}
SIGN = {"count": (int,), "step": (int,), "state": (str,), "place": (str,), "signal": (int,)}
SIGN |= IDENTITY | {"failed": (bool,), "cause": (str,), "error": (str,)}
LONGEST, LARGEST = 1000, 1 << 62  # characters of a text, and a number
LIBRARY = sysconfig.get_path("stdlib")
log = logging.getLogger(__name__)


def read_sign(published: bytes) -> dict[str, Any] | None:
    """A sign of life, its texts fit to be shown; None for anything else."""
    try:
        sign = parse_json(published, "sign of life")
    except ValueError:
        return None
    if not isinstance(sign, dict) or any(type(sign.get(key, ...)) not in kinds for key, kinds in SIGN.items()):
        return None
    if any(not 0 <= sign[key] <= LARGEST for key in ("count", "step", "pid", "signal")):
        return None
    if sign["signal"] and sign["signal"] not in SIGNALS:
        return None
    return {key: _plain(sign[key]) if isinstance(sign[key], str) else sign[key] for key in SIGN}


def _plain(text: str) -> str:
    """One line for a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST])


def is_rank(pid: int, rank: int) -> bool:
    """Whether a process of this machine can be seen to be that rank of this process's run: it is the same user's, and
    either its environment says so or it was started by the same parent with the same command."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        theirs, ours = (_launch_of(process) for process in (pid, os.getpid()))
        if "RANK" in theirs:
            return theirs == ours | {"RANK": str(rank)}
        command, own = (Path(f"/proc/{process}/cmdline").read_bytes() for process in (pid, "self"))
        return command == own and _parent_of(pid) == os.getppid()
    except (OSError, ValueError, IndexError):
        return False


def _launch_of(pid: int) -> dict[str, str]:
    """What a process was told about its place in a run when it began."""
    told = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    pairs = dict(pair.partition("=")[::2] for pair in told)
    return {key: pairs[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key in pairs}


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def start_time(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None when it is gone, or where there is no /proc to ask."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def own_host() -> str | None:
    """A name that two processes share exactly when each can see the other by its process number; None without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def place_of(thread: int | None) -> str:
    """Where a thread stands: file and line of its innermost frame, but not how Python's own library waits."""
    frame = innermost = sys._current_frames().get(thread)
    while frame and frame.f_code.co_filename.startswith(LIBRARY) and "-packages" not in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or innermost
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}" if frame else "?"


class Heartbeat:
    """This rank's signs of life and its view of the others. Made and ended by `watch_peers`."""

    def __init__(self, world: World, timeout: float, preemption: Preemption | None = None):
        self.world, self.timeout, self._preemption = world, timeout, preemption or Preemption()
        self.interval = min(BEAT, timeout / 4) * max(1, world.size / 256)  # every rank reads every other's
        self.tick = min(0.25, self.interval / 2)  # between two judgements
        self.cause = ""  # why this rank must end
        self._step: Callable[[], int] = lambda: 0
        self._first = 0  # step from which this start goes on
        self._busy: list[str] = []
        self._waiting: Callable[[], str] | None = None  # says what the main thread waits for, if it does
        self._main = threading.get_ident()
        self._count, self._failed, self._left = 0, False, False
        self._error = ""  # by which this rank ended itself
        self._progress, self._since = 0, time.monotonic()
        self._answered = time.monotonic()  # when the store last answered
        self._seen: dict[int, tuple[dict, float]] = {}  # rank -> its newest sign of life and when it came
        self._known: dict[int, dict] = {}  # rank -> who it is
        self._end, self._hurry = threading.Event(), threading.Event()
        self._self = {"host": _plain(socket.gethostname()), "pid": os.getpid()}
        self._self |= {"where": own_host(), "began": start_time(os.getpid())}
        works = (self._watch_alone,)
        if world.store is not None:
            self._publish()
            works = (self._talk, self._judge)
        self._threads = [threading.Thread(target=work, name=f"heartbeat{work.__name__}", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def follow(self, step: Callable[[], int]) -> None:
        """Take `step()`, the number of finished steps, for progress; the first one may take any time."""
        self._step, self._first = step, step()

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Inside (validation, saving) time does not count: neither this rank nor who waits for it is stuck.

        A decorator, too.
        """
        self._busy.append(what)
        try:
            yield
        finally:
            self._busy.pop()

    @contextlib.contextmanager
    def waiting(self, place: Callable[[], str]) -> Iterator[None]:
        """Inside, the main thread waits for data, and `place()` says for whom."""
        self._waiting = place
        try:
            yield
        finally:
            self._waiting = None

    # ---- one thread talks to the store -----------------------------------------------------------------------------

    @property
    def _state(self) -> str:
        if self._left:
            return LEFT
        if self._busy:
            return self._busy[-1]
        if self.is_starting:
            return START
        return WAITING if self._waiting else TRAINING

    @property
    def is_starting(self) -> bool:
        """Whether the first step is not done yet."""
        return self._step() == self._first

    @property
    def _place(self) -> str:
        """Where the main thread stands, or what it waits for."""
        waiting = self._waiting
        return f"the wait for data, for {waiting()}" if waiting else place_of(self._main)

    def _publish(self) -> None:
        self._count += 1
        sign = {"count": self._count, "step": self._step(), "state": self._state, "place": self._place}
        sign |= {"failed": self._failed, "cause": self.cause, "error": self._error, "signal": self._preemption.signal}
        self.world.store.set(f"beat/{self.world.rank}", json.dumps(self._self | sign))

    def _exchange(self) -> None:
        """Tell and hear once."""
        self._publish()
        signs = self.world.store.multi_get([f"beat/{rank}" for rank in range(self.world.size)])
        now = time.monotonic()
        for rank, sign in enumerate(map(read_sign, signs)):
            if sign is None or not self._is_own(rank, sign):
                continue
            if rank not in self._seen or self._seen[rank][0]["count"] != sign["count"]:
                self._seen[rank] = sign, now
            if sign["signal"]:
                self._preemption.tell(sign["signal"])
        self._answered = now

    def _is_own(self, rank: int, sign: dict) -> bool:
        """Whether a sign comes from who that rank said it was at first."""
        identity = {key: sign[key] for key in IDENTITY}
        return identity == (self._self if rank == self.world.rank else self._known.setdefault(rank, identity))

    def _talk(self) -> None:
        while not self._end.is_set():
            self._hurry.wait(0.1 if self._failed or self.cause else self.interval)
            self._hurry.clear()
            try:
                self._exchange()
            except dist.DistError:
                # The store is gone, with rank 0 or with torchrun. That is how some runs end, so give ours the time.
                if not self._end.wait(GRACE):
                    self.cause = self.cause or self._describe(0, NO_STORE)
                return

    # ---- the other judges ------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self.tick):
            now = time.monotonic()
            if now - before > 1 + self.tick:  # this process stood still itself: that says nothing of the others
                self._forgive(now - before)
            before = now
            known = self._preemption.signal
            self._preemption.listen()
            if self._preemption.signal != known:
                self._hurry.set()
            lost = self._find_lost(now) or self._find_stuck(now)
            if lost and not self.cause:
                lost = self._look_again(lost)
            if not self.cause:
                told = [sign["cause"] for sign, _ in self._seen.values() if sign["cause"]]
                self.cause = told[0] if told else "; ".join(self._describe(rank, why) for rank, why in lost.items())
            if self.cause:
                self._hurry.set()
                self._stop({rank: why for rank, why in lost.items() if why.startswith((SILENT, NO_STORE, STUCK))})

    def _look_again(self, lost: dict[int, str]) -> dict[int, str]:
        """What is left of `lost` once the store has told the news: a process that is gone may have said that it is
        done, or why it ends; and ranks that die together are found together."""
        found, until = time.monotonic(), time.monotonic() + GRACE / 2
        self._hurry.set()
        time.sleep(self.tick)
        while self._answered < found and time.monotonic() < until and not self._end.wait(0.02):
            self._hurry.set()
        now = time.monotonic()
        return (self._find_lost(now) or self._find_stuck(now)) if self._answered > found else lost

    def _forgive(self, seconds: float) -> None:
        self._since += seconds
        self._answered += seconds
        self._seen = {rank: (sign, when + seconds) for rank, (sign, when) in self._seen.items()}

    def _find_lost(self, now: float) -> dict[int, str]:
        """Ranks that died, ended by an error or are silent, each with the reason."""
        hurry = any(sign["failed"] for sign, _ in self._seen.values()) or self._failed
        patience = min(self.timeout, MISSED * self.interval) if hurry else self.timeout
        heard = now - self._answered < 2 * self.interval + 0.5  # else it is the store that is silent
        lost = {}
        for rank, (sign, when) in self._seen.items():
            if rank == self.world.rank:
                continue
            if sign["state"] == LEFT:
                if sign["error"]:
                    lost[rank] = sign["error"]
            elif self._is_neighbour(sign) and start_time(sign["pid"]) != sign["began"]:
                lost[rank] = "its process is gone (killed, or out of memory?)"
            elif heard and now - when > patience:
                lost[rank] = SILENT
        return lost or ({0: NO_STORE} if now - self._answered > self.timeout else {})

    def _is_neighbour(self, sign: dict) -> bool:
        """Whether that process is on this host and can be seen from here."""
        return sign["where"] is not None and sign["where"] == self._self["where"]

    def _find_stuck(self, now: float) -> dict[int, str]:
        """Ranks that this one waits for in vain: those behind, or among equals those that do not wait for others."""
        signs = {rank: sign for rank, (sign, _) in self._seen.items()}
        states = [self._state, *(sign["state"] for sign in signs.values() if sign["state"] != LEFT)]
        if self._step() != self._progress or not {TRAINING, WAITING}.issuperset(states):
            self._progress, self._since = self._step(), now
        if now - self._since <= self.timeout + 1:  # a silent rank is found first
            return {}
        behind = [rank for rank, sign in signs.items() if sign["step"] == min(s["step"] for s in signs.values())]
        guilty = [rank for rank in behind if "distributed/" not in signs[rank]["place"]] or behind
        return {rank: f"{STUCK} at {signs[rank]['place']} for {now - self._since:.0f} s" for rank in guilty}

    def _describe(self, rank: int, why: str) -> str:
        if rank not in self._seen:
            return f"rank {rank} was never seen: {why}"
        sign, when = self._seen[rank]
        # All take part in every step: who finished one has seen the others in it.
        step, ago = max(sign["step"], self._step()), time.monotonic() - when
        return f"rank {rank} last seen at step {step}, {ago:.1f} s ago ({sign['host']}, pid {sign['pid']}): {why}"

    # ---- or watches itself ------------------------------------------------------------------------------------------

    def _watch_alone(self) -> None:
        """The thread of a process that is alone."""
        before, computed, warned = time.monotonic(), time.process_time(), 0
        while not self._end.wait(self.tick):
            now = time.monotonic()
            if now - before > 1 + self.tick:  # stopped, or its machine was
                self._since += now - before
            before = now
            if self._step() != self._progress or self._state != TRAINING:
                self._progress, self._since, computed, warned = self._step(), now, time.process_time(), 0
            passed = now - self._since
            if passed <= self.timeout * (warned + 1):
                continue
            share, computed, warned = (time.process_time() - computed) / self.timeout, time.process_time(), warned + 1
            where = f"step {self._progress} has lasted {passed:.0f} s, at {self._place}"
            if share < IDLE:
                end_process(PeerLost(f"{where}, and computes nothing: {STUCK}; --timeout {self.timeout:g} allows more"))
            log.warning("%s; it computes, so the run goes on (--timeout %g)", where, self.timeout)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> str:
        """What is behind a collective that failed; takes some beats when the others must be listened to."""
        self._failed = True
        until = time.monotonic() + (MISSED + 1) * self.interval + 0.5
        while not self.cause and time.monotonic() < until:
            time.sleep(0.05)
        return self.cause or f"a collective failed, although all ranks give signs of life: {first_line(error)}"

    def leave(self, error: BaseException | None) -> None:
        """No more signs of life from here, and none expected. An error is told to the others. Only the first call does
        anything."""
        if self._left:
            return
        if isinstance(error, PeerLost):
            self.cause = str(error)
        elif error is not None:
            known = explain(error)
            self._error = f"{type(error).__name__}: {known[1] if known else first_line(error)}"
        self._left = True
        if self.world.store is not None:
            with contextlib.suppress(dist.DistError):
                self._publish()
        self._end.set()
        self._hurry.set()
        for thread in self._threads:  # one that came back from the store while Python ends would abort the process
            thread.join(GRACE)

    def _stop(self, alive: dict[int, str]) -> None:
        """End this process unless its main thread does within the grace, or still saves.

        alive: lost ranks that have not ended. Nobody waits for these by a call that would fail and end the main thread.
        """
        for rank in [rank for rank, why in alive.items() if why in (SILENT, NO_STORE) and rank in self._seen]:
            sign, when = self._seen[rank]
            # A stopped process keeps its GPU, and torchrun waiting for 30 s. Its start time tells it from a namesake.
            if (
                rank != self.world.rank
                and self._is_neighbour(sign)
                and start_time(sign["pid"]) == sign["began"]
                and is_rank(sign["pid"], rank)
                and time.monotonic() - when > self.timeout
            ):
                with contextlib.suppress(OSError):
                    os.kill(sign["pid"], signal.SIGKILL)
        until = time.monotonic() + (2 * self.tick if alive else GRACE)  # the others have to hear the cause
        while time.monotonic() < until or "saving" in self._busy:
            if self._end.wait(0.05):
                return
        end_process(PeerLost(self.cause))


def end_process(error: PeerLost) -> NoReturn:
    """Say it in one line and end at once, with the data workers: communicators that failed may never be torn down."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(PEER)


def is_of_collective(error: BaseException) -> bool:
    """Whether torch means that other ranks, or the way to them, failed. gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextlib.contextmanager
def watch_peers(world: World, timeout: float, preemption: Preemption | None = None) -> Iterator[Heartbeat]:
    """Inside, ranks watch each other. PeerLost, naming the rank, instead of the error of a collective that failed.

    timeout: seconds without a sign of life, or in one step, after which a rank is lost. preemption: is told of the
    signals that other ranks got.
    """
    heart = Heartbeat(world, timeout, preemption)
    try:
        yield heart
    except (NumericsError, Preempted):  # on all ranks at the same step: nobody is lost, whoever takes longer to end
        heart.leave(None)
        raise
    except BaseException as error:
        if world.store is not None and is_of_collective(error):
            lost = PeerLost(heart.explain(error))
            heart.leave(lost)
            raise lost from error
        heart.leave(error)
        raise
    heart.leave(None)
