"""Texts by a model that vLLM runs in this process, without a server.

A prompt that is too long, or anything else that vLLM refuses, raises for the whole call: prompts are counted before,
and a chunk that fails is halved until the row is alone that it fails for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..answers import Answer, BadAnswer, judge_finish
from ..prompt import Prompt
from ..sources import Sources
from .composer import Composed
from .openai import VERSION, Asking, Tally, finish

log = logging.getLogger(__name__)
CHUNK = 2048  # rows of a call: enough to fill a GPU, few enough to lose nothing in a crash
FEW = 20  # rows that may all fail by chance
# Endless blanks are valid JSON. An explicit backend, because `auto` may choose one that allows them.
STRUCTURED = {"backend": "xgrammar", "disable_any_whitespace": True}


class VLLM:
    """Composer. engine: more arguments of vllm.LLM, as max_model_len or gpu_memory_utilization; `llm` takes one that is
    loaded. `asking.extra` is chat_template_kwargs alone. Raises what ends the engine."""

    remote = True

    def __init__(self, prompt: Prompt, asking: Asking, engine: dict[str, Any] | None = None, llm: Any = None):
        self.prompt, self.asking, self.name = prompt, asking, f"vllm:{asking.model}"
        if other := sorted(set(asking.extra) - {"chat_template_kwargs"}):
            raise ValueError(f"extra_body: {other[0]} is for servers; the vllm composer takes chat_template_kwargs")
        self.decides = asking.decides(prompt) | {"engine": "vllm", "version": VERSION}
        self._vllm = _import_vllm()
        revision = {"revision": asking.revision} if asking.revision else {}
        settings = {"structured_outputs_config": STRUCTURED, **revision, **(engine or {})}
        self.llm = llm if llm is not None else self._vllm.LLM(model=asking.model, **settings)

    async def compose(self, rows: Sequence[Sources]) -> AsyncIterator[tuple[int, Composed]]:
        """(place, text) of every row, chunk by chunk; the event loop goes on meanwhile."""
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            texts = await asyncio.to_thread(self._write, chunk)
            if len(texts) > FEW and all(composed.status == "failed" for composed in texts):
                raise ValueError(
                    f"vllm: none of {len(texts)} rows was answered; the last: {texts[-1].reason}, "
                    f"{texts[-1].answer[:200]}; check the model and its settings"
                )
            for place, composed in enumerate(texts):
                yield start + place, composed

    async def close(self) -> None:
        """Let the model go."""
        self.llm = None

    def _write(self, rows: Sequence[Sources]) -> list[Composed]:
        """Texts of rows: all at once, then those again whose answer was of no use."""
        found: list[Composed | None] = [None] * len(rows)
        tallies, reasons = [Tally() for _ in rows], [""] * len(rows)
        open_places = list(range(len(rows)))
        for attempt in range(1, self.asking.attempts + 1):
            if not open_places:
                break
            step, begun = attempt - 1, time.perf_counter()
            answers = self._ask([rows[place] for place in open_places], [reasons[place] for place in open_places], step)
            seconds = (time.perf_counter() - begun) / len(open_places)  # a row's share of the call
            still = []
            for place, answer in zip(open_places, answers):
                tallies[place].add(answer)
                try:
                    text = self.prompt.read(answer, self.asking.is_plain(step), self.asking.context)
                    found[place] = finish(answer, tallies[place], attempt, text, seconds=seconds)
                except BadAnswer as bad:
                    reasons[place] = bad.reason
                    found[place] = finish(answer, tallies[place], attempt, reason=bad.reason, seconds=seconds)
                    if not answer.lost:
                        still.append(place)
            open_places = still
        return [composed for composed in found if composed is not None]

    def _ask(self, rows: Sequence[Sources], reasons: Sequence[str], step: int) -> list[Answer]:
        chats = [self.asking.messages(self.prompt, row, step, reason) for row, reason in zip(rows, reasons)]
        parameters = [self._sampling(row, step) for row in rows]
        answers: list[Answer | None] = [Answer(problem="prompt too long", lost=True)] * len(rows)
        room = (
            self.llm.model_config.max_model_len - self.asking.max_tokens if hasattr(self.llm, "model_config") else None
        )
        places = [place for place, chat in enumerate(chats) if room is None or self._count(chat) <= room]
        outputs = self._generate([(chats[place], parameters[place]) for place in places])
        for place, answer in zip(places, outputs):
            answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def _count(self, chat: list[dict[str, str]]) -> int:
        """Tokens of a prompt as the model gets it."""
        more = self.asking.extra.get("chat_template_kwargs", {})
        tokenizer = self.llm.get_tokenizer()
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **more)
        return len(tokenizer.encode(text, add_special_tokens=False))

    def _sampling(self, row: Sources, step: int) -> Any:
        asking = self.asking
        structured = None
        if self.prompt.schema is not None and not asking.is_plain(step):
            structured = self._vllm.sampling_params.StructuredOutputsParams(json=self.prompt.schema)
        return self._vllm.SamplingParams(
            temperature=asking.find_temperature(step),
            max_tokens=asking.max_tokens,
            seed=asking.find_seed(row.id, step),
            structured_outputs=structured,
        )

    def _generate(self, asked: list[tuple[list[dict[str, str]], Any]]) -> list[Answer]:
        """Answers to (messages, sampling), each; where a call fails, of its halves."""
        if not asked:
            return []
        more = self.asking.extra.get("chat_template_kwargs")
        options = {"chat_template_kwargs": more} if more else {}
        try:
            outputs = self.llm.chat(
                [chat for chat, _ in asked], [sampling for _, sampling in asked], use_tqdm=False, **options
            )
        except Exception as error:
            if "EngineDead" in type(error).__name__:
                raise
            if len(asked) == 1:
                log.debug("vllm: a row failed: %s", error)
                return [Answer(str(error)[:500], problem=f"vllm: {type(error).__name__}", lost=True)]
            half = len(asked) // 2
            return self._generate(asked[:half]) + self._generate(asked[half:])
        return [_read_output(output) for output in outputs]


def _read_output(output: Any) -> Answer:
    said = output.outputs[0]
    finished = str(said.finish_reason or "")
    counts = len(output.prompt_token_ids or ()), len(said.token_ids or ())
    return Answer(said.text, finished, judge_finish(finished), *counts, spoke=True)


def _import_vllm() -> Any:
    try:
        import vllm
        import vllm.sampling_params
    except ImportError:
        raise ImportError(
            "composer vllm needs vLLM, in an environment of its own: pip install -e '.[vllm]'; "
            "or start `vllm serve MODEL` anywhere and use --composer openai"
        ) from None
    return vllm
