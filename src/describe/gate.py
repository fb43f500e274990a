"""How many questions a server gets at once: as many as it bears."""

from __future__ import annotations

import asyncio
import collections

BURST = 0.4  # share of overloaded answers from which on fewer are asked; scattered errors are no sign of overload
LEAST_SEEN = 10  # answers before a burst can be told


class Gate:
    """Lets at most `limit` through. The limit is halved on a burst of answers that say overload (429, 5xx, timeout) and
    grows by one for every `limit` good ones, up to `most`: additive increase, multiplicative decrease, as in TCP.

    Those who wait enter in the order in which they came. For one event loop.
    """

    def __init__(self, most: int):
        if most < 1:
            raise ValueError(f"concurrency: {most} is no number of requests at once; use 1 or more")
        self.most = most
        self.limit = float(most)
        self.inside = 0
        self.halved = 0  # how often
        self._era = 0  # requests that entered before the limit was halved say nothing about the new one
        self._seen = self._bad = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def enter(self) -> int:
        """Wait for a place; what `leave` wants to know."""
        if self.inside >= int(self.limit) or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # let in and cancelled at once: the place is another's
                    self.inside -= 1
                    self._admit()
                raise
        else:
            self.inside += 1
        return self._era

    def leave(self, era: int, overloaded: bool | None) -> None:
        """Give the place back. overloaded: what the answer said, None where there was none."""
        self.inside -= 1
        if overloaded is not None and era == self._era:
            self._judge(overloaded)
        self._admit()

    def _judge(self, overloaded: bool) -> None:
        self._seen += 1
        self._bad += overloaded
        if not overloaded:
            self.limit = min(self.most, self.limit + 1 / self.limit)
        window = max(LEAST_SEEN, int(self.limit))
        if overloaded and self._seen >= LEAST_SEEN and self._bad > BURST * self._seen:
            self.limit = max(1.0, self.limit / 2)
            self.halved += 1
            self._era += 1
            self._seen = self._bad = 0
        elif self._seen >= window:  # an old burst is no new one
            self._seen = self._bad = 0

    def _admit(self) -> None:
        while self._waiting and self.inside < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():  # else it was cancelled
                self.inside += 1
                turn.set_result(None)
