"""Parts of a stage are made: row by row by a function, or together by something that is waited for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .job import Job, Journal, Stage

Row = dict[str, Any]
AHEAD = 2  # parts that are asked about at once: the slowest rows of one do not hold up the next


@dataclass(frozen=True)
class Task:
    """A stage and how its rows are made.

    make: a row -> its columns, a pure function. ask, in its place for a journaled stage: rows -> (place, columns) as
    they are finished. close: lets go of what `ask` holds. tell: what there is to say when all is made, "" for nothing.
    """

    stage: Stage
    make: Callable[[Row], Row] | None = None
    ask: Callable[[Sequence[Row]], AsyncIterator[tuple[int, Row]]] | None = None
    close: Callable[[], Any] | None = None
    tell: Callable[[], str] | None = None


def make_parts(
    job: Job,
    task: Task,
    numbers: Iterable[int],
    retry_failed: bool = True,
    progress: Callable[[int], Any] = lambda rows: None,
) -> Counter[str]:
    """Make those of the parts that are not made yet. Returns {"rows": of all parts, "made": rows made now, "failed"}.

    progress is told of rows as they are finished. InUse where another process makes one of the parts; whatever `ask`
    raises.
    """
    counts = Counter(rows=0, made=0, failed=0)
    if task.ask is not None:
        asyncio.run(_ask_parts(job, task, list(numbers), retry_failed, lambda found: _count(counts, found, progress)))
    else:
        for number in numbers:
            _count(counts, _make_part(job, task, number, retry_failed), progress)
    return counts


def _count(counts: Counter[str], found: Counter[str], progress: Callable[[int], Any]) -> None:
    counts.update(found)
    progress(found["rows"])


def _make_part(job: Job, task: Task, number: int, retry_failed: bool) -> Counter[str]:
    stage, make = task.stage, task.make
    assert make is not None, "a stage has make or ask"
    with job.own_part(stage, number):
        if job.is_made(stage, number, retry_failed):
            return Counter(rows=_size(job, number))
        rows = job.read_part(number, stage.reads)
        results = [make(row) for row in rows]
        job.write_part(stage, number, rows, results)
    return Counter(rows=len(rows), made=len(rows), failed=sum(map(stage.has_failed, results)))


def _size(job: Job, number: int) -> int:
    return min(job.part_rows, job.count_rows() - number * job.part_rows)


async def _ask_parts(
    job: Job, task: Task, numbers: list[int], retry_failed: bool, count: Callable[[Counter[str]], None]
) -> None:
    lanes = asyncio.Semaphore(AHEAD)

    async def ask(number: int) -> None:
        async with lanes:
            await _ask_part(job, task, number, retry_failed, count)

    asked = [asyncio.ensure_future(ask(number)) for number in numbers]
    try:
        await asyncio.gather(*asked)
    finally:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        if task.close is not None:
            await task.close()


async def _ask_part(
    job: Job, task: Task, number: int, retry_failed: bool, count: Callable[[Counter[str]], None]
) -> None:
    stage, ask = task.stage, task.ask
    assert ask is not None, "only stages that ask come here"
    with job.own_part(stage, number):
        if job.is_made(stage, number, retry_failed):
            count(Counter(rows=_size(job, number)))
            return
        rows = job.read_part(number, stage.reads)
        keys = [(row["id"], stage.key(row)) for row in rows]
        found = job.find_results(stage, number, retry_failed)
        places = [place for place, key in enumerate(keys) if key not in found]
        count(Counter(rows=len(rows) - len(places)))
        journal = Journal(job.part(stage.name, number).with_suffix(".journal"))
        try:
            async for place, result in ask([rows[place] for place in places]):
                key = keys[places[place]]
                journal.note(*key, result)
                found[key] = result
                count(Counter(rows=1, made=1, failed=int(stage.has_failed(result))))
        finally:
            journal.close()
        job.write_part(stage, number, rows, [found[key] for key in keys])
