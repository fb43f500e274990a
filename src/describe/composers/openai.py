"""Texts by a language model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, ollama, a cloud.

An answer that cannot be used is asked for again: with another seed and a word on what was wrong, then without the
schema and in plain text, since servers fail on schemas in their own ways. Requests are counted over all of that.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..answers import Answer, BadAnswer
from ..client import Client
from ..prompt import Prompt
from ..sources import Sources
from .composer import MOST_ANSWER, Composed

VERSION = 1  # raise when the code changes what is asked or taken
WARMER = 0.7  # least temperature of questions after the first
PLAIN = 2  # from this step on no schema is asked for
OURS = ("messages", "model", "stream", "n", "response_format")  # keys of a request that no setting may replace


class CostReached(ValueError):
    """The tokens cost as much as was allowed; all rows that were begun are finished and kept."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked. revision: only noted. schema: ask for the prompt's JSON schema. extra: more keys of the
    request's body; null takes one of ours out. attempts: requests for a row, those turned away (429) left out.
    context: CLIP tokens that a text may have. price_in, price_out: of a million tokens; with max_cost, in
    the same money, they end the run.
    """

    model: str
    revision: str = ""
    temperature: float = 0.0
    max_tokens: int = 160
    seed: int = 0
    variant: str = ""
    schema: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 4
    context: int = 77
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if taken := sorted(set(self.extra) & set(OURS)):
            raise ValueError(f"extra_body: {taken[0]} is set by the composer; leave it out")
        if self.max_cost is not None and None in (self.price_in, self.price_out):
            raise ValueError("max_cost: needs --price-in and --price-out, prices of a million tokens")

    def decides(self, prompt: Prompt) -> dict[str, Any]:
        """Every setting that decides a text."""
        schema = json.dumps(prompt.schema, sort_keys=True) if self.schema and prompt.schema else None
        return {
            "model": self.model,
            "revision": self.revision,
            "prompt": prompt.sha256,
            "schema": schema and hashlib.sha256(schema.encode()).hexdigest(),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "variant": self.variant,
            "context": self.context,
            "extra_body": json.dumps(dict(self.extra), sort_keys=True),
            "version": VERSION,
        }

    def find_seed(self, row: str, step: int) -> int:
        """The seed of a row's question, by the run's seed, the row and the variant: 0 to 2^31 - 1."""
        what = json.dumps([self.seed, row, self.variant, step]).encode()
        return int.from_bytes(hashlib.sha256(what).digest()[:4], "big") >> 1

    def find_temperature(self, step: int) -> float:
        """The setting; higher where a row is asked again, since at 0 another seed draws the same words."""
        return max(self.temperature, WARMER) if step else self.temperature

    def messages(self, prompt: Prompt, row: Sources, step: int, reason: str) -> list[dict[str, str]]:
        """What is said at a step: 0 first, 1 after an answer of no use, PLAIN without the schema."""
        return prompt.messages(row, prompt.hint(reason, step >= PLAIN) if step else None)

    def is_plain(self, step: int) -> bool:
        """Whether plain text is taken at a step."""
        return step >= PLAIN or not self.schema

    def body(self, prompt: Prompt, row: Sources, step: int = 0, reason: str = "") -> dict[str, Any]:
        """The body of a row's request. reason: why the last answer was of no use."""
        body = self.frame(self.messages(prompt, row, step, reason), row.id, step)
        if prompt.schema is not None and not self.is_plain(step):
            named = {"name": "description", "strict": True, "schema": prompt.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body

    def frame(self, messages: list[Any], row: str, step: int) -> dict[str, Any]:
        """The body of a request around its messages, without a schema."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": self.find_temperature(step),
            "max_tokens": self.max_tokens,
            "seed": self.find_seed(row, step),
        }
        body.update(self.extra)
        return {key: value for key, value in body.items() if value is not None}


class Tally:
    """Tokens of a row over its answers; None where the server never counted."""

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None

    def add(self, answer: Answer) -> None:
        """Count an answer's."""
        for name in ("prompt_tokens", "completion_tokens"):
            if (count := getattr(answer, name)) is not None:
                setattr(self, name, (getattr(self, name) or 0) + count)


def finish(
    answer: Answer, tally: Tally, attempts: int, text: str = "", reason: str = "", seconds: float = 0
) -> Composed:
    """What became of a row whose last answer this is."""
    return Composed(
        text=text,
        status="ok" if text else "rejected" if answer.spoke else "failed",
        reason=reason,
        answer=answer.content[-MOST_ANSWER:] if text else answer.content[:MOST_ANSWER],  # a usable one ends in its text
        finish=answer.finish,
        attempts=attempts,
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        milliseconds=round(1000 * seconds),
    )


class OpenAI:
    """Composer. prompt_tokens, completion_tokens, uncounted: of all answers so far, and answers that came without.

    Raises ServerRefused where the server is of no use, CostReached when `max_cost` is reached: rows that were under way
    are finished before, so that the cost may be above it by those.
    """

    remote = True

    def __init__(self, client: Client, prompt: Prompt, asking: Asking):
        self.client, self.prompt, self.asking = client, prompt, asking
        self.name = f"openai:{asking.model}"
        self.decides = asking.decides(prompt)
        self.prompt_tokens = self.completion_tokens = self.uncounted = 0

    @property
    def cost(self) -> float | None:
        """Of all answers so far, None without prices."""
        asking = self.asking
        if asking.price_in is None or asking.price_out is None:
            return None
        return (self.prompt_tokens * asking.price_in + self.completion_tokens * asking.price_out) / 1e6

    async def compose(self, rows: Sequence[Sources]) -> AsyncIterator[tuple[int, Composed]]:
        """(place, text) of every row, as they are finished."""
        async for place, composed in self.client.spread(self._write, rows, self._is_spent):
            yield place, composed
        self._check_cost()

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    async def _write(self, row: Sources) -> Composed:
        composed, detail = await self._ask(row)
        self.client.count_row(f"{composed.reason}{detail}", rejected=composed.status == "rejected")
        return composed

    async def _ask(self, row: Sources) -> tuple[Composed, str]:
        """What becomes of a row, and what the server said where it did not answer."""
        start, tally, asking = time.perf_counter(), Tally(), self.asking
        used, step, reason, answer = 0, 0, "", Answer()
        while used < asking.attempts:
            answer = await self.client.chat(asking.body(self.prompt, row, step, reason), asking.attempts - used)
            used += answer.requests
            self._count(answer)
            tally.add(answer)
            try:
                text = self.prompt.read(answer, asking.is_plain(step), asking.context)
                return finish(answer, tally, used, text, seconds=time.perf_counter() - start), ""
            except BadAnswer as bad:
                reason = bad.reason
            if not answer.lost:
                step += 1
            elif reason == "http 500" and step < PLAIN:  # perhaps of the schema
                step = PLAIN
            else:
                break
        detail = f" ({answer.content[:200]})" if answer.lost and answer.content else ""
        return finish(answer, tally, used, reason=reason, seconds=time.perf_counter() - start), detail

    def _count(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0
        self.uncounted += answer.spoke and None in (answer.prompt_tokens, answer.completion_tokens)

    def _is_spent(self) -> bool:
        most, cost = self.asking.max_cost, self.cost
        return most is not None and cost is not None and (cost >= most or self.uncounted > 0)

    def _check_cost(self) -> None:
        if not self._is_spent():
            return
        if self.uncounted:
            raise CostReached("max_cost: the server does not say how many tokens it used; run without --max-cost")
        raise CostReached(
            f"max_cost: {self.cost:.4g} of {self.asking.max_cost:g} are spent ({self.prompt_tokens:,} prompt and "
            f"{self.completion_tokens:,} completion tokens); what is finished is kept, a larger --max-cost goes on"
        )
