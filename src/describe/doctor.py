"""What a server really does, found out in a few seconds: servers accept what they do not do."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .answers import Answer, BadAnswer, read_object
from .client import Client, ServerRefused
from .composers.openai import Asking
from .prompt import MOST_TAG, MOST_TEXT, Prompt
from .sources import Sources, Tag

THINKING = (
    """switch it off: --extra-body '{"chat_template_kwargs": {"enable_thinking": false}}'; or more --max-tokens"""
)
BLANKS = "start vLLM with an explicit backend and disable_any_whitespace; see the README"
BURST = 16  # rows at once
LONG = 10_000  # words of a prompt that a small context does not hold; one token each at least
# An answer that no model gives unless it is made to.
ODD = {"type": "object", "properties": {"zq": {"type": "string", "enum": ["k7"]}}, "required": ["zq"]}
ROWS = (
    Sources(
        "1", "my dog Rex at Brighton beach 2014", "a dog runs on the sand", (Tag("dog"), Tag("beach"), Tag("ball"))
    ),
    Sources("2", "IMG_2231 red Vespa in Rome", "a scooter parked on a street", (Tag("scooter"), Tag("wall"))),
    Sources("3", "Grandma's apple pie recipe", "a pie on a wooden table", (Tag("pie"), Tag("table"), Tag("fork"))),
    Sources("4", "", "two people ride bicycles along a river", (Tag("bicycle"), Tag("river"))),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried. ok: None where it could not be told. remedy: what to do about it, "" for nothing."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


async def diagnose(client: Client, prompt: Prompt, asking: Asking) -> list[Finding]:
    """Ask for a schema, with a long prompt, with the longest row, and for 16 rows at once. Asks nothing more of a
    server that cannot be reached or refuses; raises nothing for what a server does."""
    try:
        first = await client.chat(_make_short(asking.body(prompt, ROWS[0])), 2)
    except ServerRefused as error:
        return [Finding("server", False, str(error), "nothing more was tried")]
    if first.lost and not first.problem.startswith("http 5"):
        return [Finding("server", False, f"{client.url}: {_say(first)}", "check address, port and that it is up")]
    findings = [Finding("server", True, client.url), await _check_model(client, asking.model)]
    try:
        findings.append(await _check_schema(client, asking))
        findings.append(await _check_long(client, asking))
        findings.append(await _check_longest_row(client, prompt, asking))
        findings += await _check_burst(client, prompt, asking)
    except ServerRefused as error:
        findings.append(Finding("server", False, str(error), "nothing more was tried"))
    return findings


def format_findings(findings: Iterable[Finding]) -> str:
    """A table for people, a remedy below what needs one."""
    lines = []
    for finding in findings:
        mark = {True: "ok", False: "BAD", None: "?"}[finding.ok]
        lines.append(f"{mark:<4}{finding.name:<14}{finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<18}-> {finding.remedy}")
    return "\n".join(lines)


def _make_short(body: dict[str, Any]) -> dict[str, Any]:
    """The same question for one token, where tokens are limited by the usual key."""
    return body | {"max_tokens": 1} if "max_tokens" in body else body


async def _check_model(client: Client, model: str) -> Finding:
    names = await client.models()
    if names is None:
        return Finding("model", None, "the server lists no models")
    if model in names:
        return Finding("model", True, model)
    listed = ", ".join(names[:5]) + (", .." if len(names) > 5 else "")
    return Finding("model", False, f"{model} is not listed, but {listed or 'nothing'}", "name one of these by --model")


async def _check_schema(client: Client, asking: Asking) -> Finding:
    named = {"name": "odd", "strict": True, "schema": ODD}
    body = asking.frame([{"role": "user", "content": "Say hello in one word."}], "schema", 0)
    body["response_format"] = {"type": "json_schema", "json_schema": named}
    answer = await client.chat(body, 2)
    if answer.lost:
        return Finding("schema", False, f"schema refused: {_say(answer)}", "use --no-schema, or another server")
    begin = answer.content.lstrip()
    if answer.thought or begin.startswith("<think"):
        return Finding("schema", None, "the model thinks first, so that it cannot be told", THINKING)
    if answer.problem == "cut at max_tokens" and (not begin or begin.startswith("{")):
        return Finding("schema", False, "kept to, and filled with blanks up to the last token", BLANKS)
    try:
        read_object(answer.content, ODD)
        return Finding("schema", True, "kept to")
    except BadAnswer as bad:
        plain = "the third try of a row takes plain text; --no-schema saves the first two"
        return Finding("schema", False, f"schema ignored, without an error: {_say(answer) or bad.reason}", plain)


async def _check_long(client: Client, asking: Asking) -> Finding:
    words = " ".join(f"w{number % 100}" for number in range(LONG))
    body = _make_short(asking.frame([{"role": "user", "content": words}], "long", 0))
    answer = await client.chat(body, 1)
    if answer.problem.startswith(("prompt too long", "http 4")):
        return Finding("long prompt", True, f"refused with an error ({LONG:,} words)")
    if answer.lost:
        raise_it = "prompts that are too long look like a broken server; keep its context above that of the longest row"
        return Finding("long prompt", False, f"no clean error: {_say(answer)}", raise_it)
    if answer.prompt_tokens is None:
        return Finding("long prompt", None, "answered, and no usage tells whether it was cut")
    if answer.prompt_tokens < LONG:
        cut = f"cut silently: {answer.prompt_tokens:,} tokens of {LONG:,} words were read"
        return Finding("long prompt", False, cut, "raise the server's context (ollama: num_ctx) above the longest row")
    return Finding("long prompt", True, f"{answer.prompt_tokens:,} tokens are taken")


async def _check_longest_row(client: Client, prompt: Prompt, asking: Asking) -> Finding:
    words = " ".join(f"word{number}" for number in range(MOST_TEXT))
    tags = tuple(Tag(f"{'tag' * (MOST_TAG // 4)}{number}") for number in range(prompt.most_tags))
    answer = await client.chat(asking.body(prompt, Sources("0", words, words, tags, words)), 2)
    if answer.lost:
        room = "raise the server's context, or its context for each slot"
        remedy = room if answer.problem == "prompt too long" else "look into the server's log: it may have crashed"
        return Finding("longest row", False, f"no answer: {_say(answer)}", remedy)
    taken = "an unknown number of" if answer.prompt_tokens is None else f"{answer.prompt_tokens:,}"
    return Finding("longest row", True, f"{taken} prompt tokens")


async def _check_burst(client: Client, prompt: Prompt, asking: Asking) -> list[Finding]:
    rows = [replace(ROWS[number % len(ROWS)], id=str(number)) for number in range(BURST)]
    answers: list[Answer] = []

    async def ask(row: Sources) -> float:
        begun = time.perf_counter()
        answers.append(await client.chat(asking.body(prompt, row)))
        return time.perf_counter() - begun

    begun = time.perf_counter()
    seconds = [taken async for _, taken in client.spread(ask, rows)]
    whole = time.perf_counter() - begun
    problems = Counter(_read(prompt, answer, asking) for answer in answers)
    good = problems.pop("", 0)
    speed = f"{BURST / whole:.1f} rows/s, {statistics.median(seconds):.2f} s a row"
    wrong = ", ".join(f"{count} {reason}" for reason, count in problems.most_common())
    found = [
        Finding("burst", not any(answer.lost for answer in answers), f"{BURST} at once: {speed}"),
        Finding("answers", good == BURST, f"{good} of {BURST} usable{wrong and f'; {wrong}'}", _remedy(problems)),
    ]
    counted = sum(answer.prompt_tokens is not None and answer.completion_tokens is not None for answer in answers)
    spoken = sum(answer.spoke for answer in answers)
    unknown = "" if counted == spoken else "tokens and cost will be unknown"
    found.append(Finding("usage", counted == spoken > 0, f"reported with {counted} of {spoken} answers", unknown))
    thinking = sum(answer.thought or "<think" in answer.content or "</think" in answer.content for answer in answers)
    stop = (
        """--extra-body '{"chat_template_kwargs": {"enable_thinking": false}}', or more --max-tokens"""
        if thinking
        else ""
    )
    found.append(Finding("thinking", not thinking, f"{thinking} of {spoken} answers think aloud", stop))
    return found


def _read(prompt: Prompt, answer: Answer, asking: Asking) -> str:
    try:
        prompt.read(answer, asking.is_plain(0), asking.context)
        return ""
    except BadAnswer as bad:
        return bad.reason


def _remedy(problems: Counter[str]) -> str:
    if not problems:
        return ""
    first = problems.most_common(1)[0][0]
    if first.startswith("cut"):
        return f"raise --max-tokens; where answers are blanks, {BLANKS}"
    if first == "http 500":
        return "use --ascii, as some servers fail on free text in a schema, or --no-schema"
    if first in ("not JSON", "empty", "endless blanks") or first.startswith("schema"):
        return "such rows are asked again, at last in plain text; --no-schema where most are so"
    return "such rows are asked again; try a few hundred rows (--limit) first"


def _say(answer: Answer) -> str:
    said = json.dumps(answer.content[:160], ensure_ascii=False) if answer.content else ""
    return " ".join(filter(None, (answer.problem, said)))
