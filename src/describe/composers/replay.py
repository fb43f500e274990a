"""Recorded answers instead of a model: the same parsing, no network, the same result every time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_clip.files import DamagedError, parse_json

from ..answers import Answer, BadAnswer, judge_finish
from ..prompt import Prompt
from ..sources import Sources
from .composer import Composed
from .openai import PLAIN, VERSION, Tally, finish

NONE = "no recorded answer"
MOST_LINE = 1 << 22  # bytes


class Replay:
    """Composer over records: dicts with id, answer or content, finish or finish_reason, prompt_tokens,
    completion_tokens, attempts. Several of one id are the answers to successive attempts; a single one with `attempts`
    is the last of that many, as a compose stage keeps it.

    records: those, or a JSONL file of them. Answers are held in memory. ValueError or DamagedError with file, line and
    key for what is no record.
    """

    remote = True  # rows go the way of a server's, through journals

    def __init__(
        self,
        records: str | Path | Iterable[Mapping[str, Any]],
        prompt: Prompt,
        attempts: int = 4,
        context: int = 77,
        schema: bool = True,
        name: str = "replay",
    ):
        if isinstance(records, (str, Path)):
            records = _read_lines(Path(records))
        self.prompt, self.attempts, self.context, self.schema, self.name = prompt, attempts, context, schema, name
        self.decides = {"prompt": prompt.sha256, "attempts": attempts, "context": context, "version": VERSION}
        self.decides["schema"] = schema
        self._answers: dict[str, list[tuple[int, Answer]]] = {}
        for record in records:
            row, attempt, answer = _read_record(record)
            kept = self._answers.setdefault(row, [])
            kept.append((attempt or len(kept) + 1, answer))

    async def compose(self, rows: Sequence[Sources]) -> AsyncIterator[tuple[int, Composed]]:
        """(place, text) of every row, in order."""
        for place, row in enumerate(rows):
            yield place, self._replay(row.id)

    async def close(self) -> None:
        """Nothing to close."""

    def _replay(self, row: str) -> Composed:
        answers = [item for item in self._answers.get(row, ()) if item[0] <= self.attempts]
        if not answers:
            return Composed(status="failed", reason=NONE, attempts=0)
        tally, reason, attempt, answer = Tally(), "", 0, Answer()
        for attempt, answer in answers:
            tally.add(answer)
            try:
                text = self.prompt.read(answer, not self.schema or attempt > PLAIN, self.context)
                return finish(answer, tally, attempt, text)
            except BadAnswer as bad:
                reason = bad.reason
        return finish(answer, tally, attempt, reason=reason)


def _read_record(record: Mapping[str, Any]) -> tuple[str, int | None, Answer]:
    """(id, number of its attempt where that is told, answer) of a record."""
    row = record.get("id")
    if not isinstance(row, str) or not row:
        raise ValueError(f"answers: a record has no id that is a text ({json.dumps(row)[:40]})")
    content = record.get("content", record.get("answer"))
    finished = record.get("finish_reason", record.get("finish"))
    status, why = record.get("compose_status"), record.get("compose_reason")
    lost = status == "failed" or content is None
    finished = finished if isinstance(finished, str) else ""
    problem = str(why or NONE) if lost else judge_finish(finished)
    prompt, completion = (
        value if isinstance(value := record.get(key), int) else None for key in ("prompt_tokens", "completion_tokens")
    )
    attempts = record.get("attempts")
    text = content if isinstance(content, str) else ""
    answer = Answer(text, finished, problem, prompt, completion, lost=lost, spoke=not lost)
    return row, attempts if isinstance(attempts, int) and attempts > 0 else None, answer


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MOST_LINE):
            number += 1
            if not line.strip():
                continue
            if len(line) == MOST_LINE:
                raise DamagedError(f"{path}: line {number} is over {MOST_LINE:,} bytes; leave it out")
            record = parse_json(line, f"{path}: line {number}")
            if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                raise DamagedError(f'{path}: line {number} is no record; write {{"id": .., "content": ..}}')
            yield record
