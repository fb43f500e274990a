"""The stages that make one row after the other: what each reads, adds and depends on, built from the settings.

A worker process or another machine builds the same task from the same settings.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from functools import partial

from .composers import make_composer
from .composers.composer import Composed, Composer
from .composers.rules import Rules
from .job import ROWS, Stage
from .prompt import Prompt
from .settings import ComposeSettings, VerifySettings
from .sources import find_sources
from .tokens import count_tokens
from .verify import choose, judge
from .work import Row, Task

CHECKS = 2  # version of the checks: a change makes earlier verdicts others
COMPOSE = {
    "composed": "str",
    "composer": "str",
    "compose_status": "str",
    "compose_reason": "str",
    "answer": "str",
    "finish": "str",
    "attempts": "int",
    "prompt_tokens": "int",
    "completion_tokens": "int",
    "milliseconds": "int",
}
SOURCE_COLUMNS = ("id", "clean", "caption", "tags", "tag_scores", "tag_source", "ocr")
VERIFY = {
    "generated": "str",
    "engine": "str",
    "rejects": "str list",
    "unsupported": "str list",
    "unsupported_rate": "float",
    "new_numbers": "str list",
    "new_names": "str list",
    "lost_facts": "str list",
    "tokens_raw": "int",
    "tokens_caption": "int",
    "tokens_generated": "int",
    "language": "str",
}


def make_compose_task(settings: ComposeSettings) -> Task:
    """The third text of every row."""
    composer = make_composer(settings)
    reads = (ROWS, "caption", "tags")
    stage = Stage("compose", COMPOSE, reads, SOURCE_COLUMNS, composer.decides, "compose_status", composer.remote)
    if composer.remote:
        return Task(stage, ask=partial(_ask, composer), close=composer.close)
    assert isinstance(composer, Rules), "the only composer that is a function"
    return Task(stage, make=partial(_compose, composer))


async def _ask(composer: Composer, rows: Sequence[Row]) -> AsyncIterator[tuple[int, Row]]:
    async for place, composed in composer.compose([find_sources(row) for row in rows]):
        yield place, _columns(composer.name, composed)


def _compose(composer: Rules, row: Row) -> Row:
    text = composer.write(find_sources(row))
    nothing = Composed(status="rejected", reason="no source has a text")
    return _columns(composer.name, Composed(text) if text else nothing)


def _columns(name: str, composed: Composed) -> Row:
    found = asdict(composed)
    named = {"text": "composed", "status": "compose_status", "reason": "compose_reason"}
    return {"composer": name, **{named.get(key, key): value for key, value in found.items()}}


def make_verify_task(settings: VerifySettings) -> Task:
    """What is wrong with each text, and the text that is taken in the end."""
    rules, prompt = Rules(seed=settings.seed, context=settings.context), Prompt.load(settings.prompt)
    chosen = {name: getattr(settings, name) for name in ("language", "max_unsupported", "context")}
    decides = {**chosen, "prompt": prompt.sha256, "fallback": rules.decides, "checks": CHECKS}
    stage = Stage("verify", VERIFY, (ROWS, "caption", "tags", "compose"), (), decides, needs=("compose",))
    return Task(stage, make=partial(_verify, rules, settings, f"{prompt.system}\n{prompt.user}"))


def _verify(rules: Rules, settings: VerifySettings, prompt: str, row: Row) -> Row:
    sources, composed = find_sources(row), row.get("composed") or ""
    ruled, context = row["composer"] == rules.name, settings.context
    limits = context, settings.language, settings.max_unsupported, "" if ruled else prompt
    verdict = judge(sources, composed, *limits) if composed else None
    accepted = verdict is not None and not verdict.rejects
    fallback = "" if ruled or accepted else rules.write(sources)
    text, engine = choose(composed or None, row["composer"], verdict, sources, fallback, context)
    return {
        "generated": text,
        "engine": engine,
        "rejects": list(verdict.rejects) if verdict else [row.get("compose_reason") or "no text"],
        "unsupported": list(verdict.unsupported) if verdict else [],
        "unsupported_rate": verdict.unsupported_rate if verdict else None,
        "new_numbers": list(verdict.new_numbers) if verdict else [],
        "new_names": list(verdict.new_names) if verdict else [],
        "lost_facts": list(verdict.lost_facts) if verdict else [],
        "tokens_raw": count_tokens(sources.raw),
        "tokens_caption": count_tokens(sources.caption),
        "tokens_generated": count_tokens(text),
        "language": verdict.language if verdict else "",
    }
