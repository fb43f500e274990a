"""How many questions a server gets at once: as many as it bears."""

from __future__ import annotations

import asyncio
import collections

BURST = 0.4  # share of errors from which on fewer are asked; scattered ones are no sign of overload
TOLD = 2  # errors that an answer 429 counts for, which says so and cannot mean anything else
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

    def leave(self, era: int, errors: int | None) -> None:
        """Give the place back. errors: 0 for a good answer, 1 for an error, TOLD for 429, None for no sign."""
        self.inside -= 1
        if errors is not None and era == self._era:
            self._judge(errors)
        self._admit()

    def _judge(self, errors: int) -> None:
        self._seen += 1
        self._bad += errors
        if not errors:
            self.limit = min(self.most, self.limit + 1 / self.limit)
        window = max(LEAST_SEEN, int(self.limit))
        if errors and self._seen >= LEAST_SEEN and self._bad > BURST * self._seen:
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
