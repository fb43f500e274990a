"""What every composer gives: a text for each row, or why there is none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..sources import Sources

MOST_ANSWER = 4096  # characters of an answer that are kept


@dataclass(frozen=True, slots=True)
class Composed:
    """One row's text.

    status: `ok`; `rejected`, where the composer answered and no answer was usable; `failed`, where it did not answer,
    which is tried again by the next run. text is "" unless ok. answer: the last one as it came, cut to MOST_ANSWER.
    Tokens are those of all attempts as the server counted them, None where it did not.
    """

    text: str = ""
    status: Literal["ok", "rejected", "failed"] = "ok"
    reason: str = ""
    answer: str = ""
    finish: str = ""
    attempts: int = 1
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    milliseconds: int = 0


class Composer(Protocol):
    """Writes texts. name: as it is shown, `rules` or `openai:MODEL`. decides: every setting that decides a text, by
    its name on the command line: prompt, model, sampling, version. remote: waits for others, so that rows are worked
    on together and journaled; else it is a pure function that worker processes may run."""

    @property
    def name(self) -> str: ...

    @property
    def decides(self) -> dict[str, Any]: ...

    @property
    def remote(self) -> bool: ...

    def compose(self, rows: Sequence[Sources]) -> AsyncIterator[tuple[int, Composed]]:
        """(place in `rows`, text) for every row, as they are finished. Raises only what ends the whole run."""

    async def close(self) -> None:
        """Let go of connections."""
