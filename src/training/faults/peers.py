"""What the ranks publish about themselves, and which of them are lost.

Anyone who can reach the store can write to it. So a sign that does not have exactly this form is ignored, a rank stays
the process that it first claimed to be, and a process is only killed when it is verifiably that rank of this run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from rwkv_clip.config import parse, ranged
from rwkv_clip.files import parse_json

from .process import Process, is_rank
from .signals import SIGNALS

INTERVAL = 1.0  # seconds between signs of life
MISSED = 2.5  # intervals without a sign of life after which a rank is gone, once torch has reported an error
LONGEST = 1000  # characters of a text
START, TRAINING, WAITING, LEFT = "starting", "training", "waiting for data", "left"
STORE_SILENT = "the store on its host, torchrun's or its own, does not answer"


def show(text: str) -> str:
    """A text as one line for a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST])


@dataclass(frozen=True)
class Sign:
    """A sign of life: what a rank publishes about itself."""

    process: Process
    count: int = ranged(minimum=0)  # of its signs
    step: int = ranged(minimum=0)  # finished ones
    state: str
    place: str  # where its main thread is
    in_collective: bool  # whether its main thread waits for other ranks
    signal: int  # that it has received; 0 for none
    failed: bool  # whether a collective failed
    cause: str  # why it must end
    error: str  # that ended it

    def problems(self) -> list[str]:
        texts = (self.process.host, self.state, self.place, self.cause, self.error)
        found = [f"{text!r}: not a line" for text in texts if show(text) != text]
        return found + [f"signal: {self.signal} ends no run"] * (self.signal not in (0, *SIGNALS))


def read_sign(published: bytes) -> Sign | None:
    """A published sign of life; None for anything else."""
    try:
        return parse(Sign, parse_json(published, "sign of life"))
    except (ValueError, TypeError):  # TypeError: one of the fields is missing
        return None


class Peers:
    """The latest sign of every rank and when it came: one thread receives them, another judges."""

    def __init__(self, rank: int, timeout: float, interval: float):
        self.rank, self.timeout, self.interval = rank, timeout, interval
        self.heard: dict[int, tuple[Sign, float]] = {}
        self.answered = time.monotonic()  # when the store last answered
        self._processes = {rank: Process.own()}
        self._progress, self._since = 0, self.answered  # this rank's step, and since when all ranks are inside one

    def hear(self, signs: Iterable[Sign | None]) -> None:
        """Signs of all ranks, in order. None, or a sign from a process other than the rank's first one, does not
        count."""
        now, heard = time.monotonic(), dict(self.heard)
        for rank, sign in enumerate(signs):
            if sign is None or sign.process != self._processes.setdefault(rank, sign.process):
                continue
            if rank not in heard or heard[rank][0].count != sign.count:
                heard[rank] = sign, now
        self.heard, self.answered = heard, now  # replaced as a whole: the other thread may be reading

    def forgive(self, seconds: float) -> None:
        """Discount seconds in which this process itself was stalled, which says nothing about the others."""
        self._since += seconds
        self.answered += seconds
        self.heard = {rank: (sign, when + seconds) for rank, (sign, when) in self.heard.items()}

    def find_lost(self, step: int, state: str, hurry: bool) -> dict[int, str]:
        """Ranks that died, ended with an error or are silent, with the reason; else those that hold up the others.

        step, state: this rank's. hurry: a collective failed here.
        """
        now = time.monotonic()
        return self._find_gone(now, hurry) or self._find_stuck(now, step, state)

    def _find_gone(self, now: float, hurry: bool) -> dict[int, str]:
        hurry = hurry or any(sign.failed for sign, _ in self.heard.values())
        patience = min(self.timeout, MISSED * self.interval) if hurry else self.timeout
        answers = now - self.answered < 2 * self.interval + 0.5  # else it is the store that is silent
        lost = {}
        for rank, (sign, when) in self.heard.items():
            if rank == self.rank:
                continue
            if sign.state == LEFT:
                if sign.error:
                    lost[rank] = sign.error
            elif sign.process.has_ended():
                lost[rank] = "its process is gone (killed, or out of memory?)"
            elif answers and now - when > patience:
                lost[rank] = "no sign of life since"
        return lost or ({0: STORE_SILENT} if now - self.answered > self.timeout else {})

    def _find_stuck(self, now: float, step: int, state: str) -> dict[int, str]:
        """Ranks with the fewest steps; of these, those that are not themselves waiting for others, if any."""
        signs = {rank: sign for rank, (sign, _) in self.heard.items()}
        states = {state, *(sign.state for sign in signs.values() if sign.state != LEFT)}
        if step != self._progress or not states <= {TRAINING, WAITING}:
            self._progress, self._since = step, now
        if now - self._since <= self.timeout + 1:  # a silent rank is found first
            return {}
        fewest = min(sign.step for sign in signs.values())
        last = {rank: sign for rank, sign in signs.items() if sign.step == fewest}
        guilty = {rank: sign for rank, sign in last.items() if not sign.in_collective} or last
        return {rank: f"stuck at {sign.place} for {now - self._since:.0f} s" for rank, sign in guilty.items()}

    def describe(self, rank: int, why: str, step: int) -> str:
        """Describe a lost rank. step: this rank's; a rank that finished a step has seen all others in it."""
        if rank not in self.heard:
            return f"rank {rank} was never seen: {why}"
        sign, when = self.heard[rank]
        step, ago, process = max(sign.step, step), time.monotonic() - when, sign.process
        return f"rank {rank} last seen at step {step}, {ago:.1f} s ago ({process.host}, pid {process.pid}): {why}"

    def may_be_alive(self, rank: int) -> bool:
        """Whether a lost rank is not known to have ended."""
        sign, _ = self.heard.get(rank, (None, 0))
        return sign is None or not (sign.state == LEFT or sign.process.has_ended())

    def find_stopped(self, rank: int) -> int | None:
        """Pid of a rank's process on this host, if it is certainly that rank, alive, and silent for the whole
        timeout."""
        sign, when = self.heard.get(rank, (None, 0))
        if sign is None or rank == self.rank or time.monotonic() - when <= self.timeout:
            return None
        process = sign.process
        return process.pid if process.is_near() and not process.has_ended() and is_rank(process.pid, rank) else None
