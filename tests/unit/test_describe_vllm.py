"""vLLM in this process, with a stand-in for the package that behaves as its `LLM.chat` does: one bad prompt raises for
the whole call. The names are those of vLLM 0.20 and later; the package itself is not needed, and not tried, here."""

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rwkv_clip.describe.composers.openai import Asking
from rwkv_clip.describe.composers.vllm import CHUNK, STRUCTURED, VLLM
from rwkv_clip.describe.prompt import Prompt
from rwkv_clip.describe.sources import Sources


class VLLMValidationError(ValueError):
    """As vLLM's."""


class EngineDeadError(Exception):
    """As vLLM's."""


class Parameters:
    """Keeps what it is given, as SamplingParams and StructuredOutputsParams do; one of json, regex, .. only."""

    def __init__(self, **given):
        self.__dict__.update(given)


class LLM:
    """answer: of (question, sampling, times that this was asked). bad: words of questions that raise."""

    def __init__(self, model="m", max_model_len=4096, **engine):
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self.model, self.engine, self.calls, self.asked = model, engine, [], {}
        self.bad = self.dead = self.answer = None

    def get_tokenizer(self):
        apply = lambda chat, tokenize, add_generation_prompt, **_: " ".join(m["content"] for m in chat)  # noqa: E731
        return SimpleNamespace(apply_chat_template=apply, encode=lambda text, add_special_tokens: text.split())

    def chat(self, chats, sampling, use_tqdm=True, **more):
        assert use_tqdm is False and len(chats) == len(sampling)
        self.calls.append((len(chats), more))
        if self.dead:
            raise EngineDeadError("dead")
        questions = [chat[-1]["content"] for chat in chats]
        for question in questions:
            if self.bad and any(f"<raw>\n{word}\n" in question for word in self.bad):
                raise VLLMValidationError("The prompt is bad.")
            assert len(question.split()) < self.model_config.max_model_len
        return [self._answer(question, one) for question, one in zip(questions, sampling)]

    def _answer(self, question, sampling):
        times = self.asked[question] = self.asked.get(question, 0) + 1
        text, finish = (self.answer or (lambda *_: ('{"text": "A dog runs."}', "stop")))(question, sampling, times)
        output = SimpleNamespace(text=text, finish_reason=finish, token_ids=text.split())
        return SimpleNamespace(prompt_token_ids=question.split(), outputs=[output])


@pytest.fixture
def vllm(monkeypatch):
    module, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams, module.sampling_params = LLM, Parameters, sampling
    sampling.StructuredOutputsParams = Parameters
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)


def make(prompt="grounded", engine=None, **asking):
    return VLLM(Prompt.load(prompt), Asking("m", **asking), engine)


def compose(composer, rows):
    async def work():
        return [item async for item in composer.compose(rows)]

    found = asyncio.run(work())
    assert [place for place, _ in found] == list(range(len(rows)))
    return [composed for _, composed in found]


def rows(count):
    return [Sources(str(number), f"row{number}", "a dog runs") for number in range(count)]


def test_rows_are_asked_in_chunks_with_the_schema(vllm):
    composer = make(engine={"gpu_memory_utilization": 0.8}, revision="abc")
    found = compose(composer, rows(CHUNK + 5))
    assert {composed.text for composed in found} == {"A dog runs."} and {composed.attempts for composed in found} == {1}
    assert [count for count, _ in composer.llm.calls] == [CHUNK, 5]
    assert found[0].prompt_tokens > 5 and found[0].completion_tokens == 4
    assert composer.llm.engine["structured_outputs_config"] == STRUCTURED
    assert composer.llm.engine["gpu_memory_utilization"] == 0.8 and composer.llm.engine["revision"] == "abc"
    assert composer.decides["engine"] == "vllm" and composer.remote


@pytest.mark.parametrize("bad", [{0}, {63}, {5, 6, 40}, set(range(0, 64, 7))])
def test_a_bad_row_never_loses_the_others(vllm, bad):
    composer = make()
    composer.llm.bad = {f"row{number}" for number in bad}
    found = compose(composer, rows(64))
    assert {place for place, composed in enumerate(found) if composed.status == "failed"} == bad
    for place in bad:
        assert found[place].reason == "vllm: VLLMValidationError" and "bad" in found[place].answer
    assert all(composed.text == "A dog runs." for place, composed in enumerate(found) if place not in bad)
    assert len(composer.llm.calls) <= 1 + 2 * 7 * len(bad)


def test_prompts_that_are_too_long_are_not_submitted(vllm):
    some = [*rows(3), Sources("x", "w " * 250, "w " * 250)]
    length = len(" ".join(m["content"] for m in Prompt.load("grounded").messages(some[0])).split())
    composer = make(engine={"max_model_len": length + 200}, max_tokens=100)
    found = compose(composer, some)
    assert [composed.status for composed in found] == ["ok"] * 3 + ["failed"] and found[3].reason == "prompt too long"
    assert [count for count, _ in composer.llm.calls] == [3]


def test_answers_of_no_use_are_asked_for_again_in_plain_text_at_last(vllm):
    composer = make(extra={"chat_template_kwargs": {"enable_thinking": False}})
    seen = []

    def answer(question, sampling, times):
        number = int(question.split("row")[1].split()[0])
        seen.append((number, sampling.structured_outputs is not None, sampling.seed))
        if number == 1 and "too long" in question:
            return '{"text": "A cat."}', "stop"
        if number == 2 and "without JSON" in question:
            return "A bird.", "stop"
        return ('{"text": "A do', "length") if number else ('{"text": "A dog."}', "stop")

    composer.llm.answer = answer
    found = compose(composer, rows(4))
    assert [composed.text for composed in found] == ["A dog.", "A cat.", "A bird.", ""]
    assert [composed.attempts for composed in found] == [1, 2, 3, 4]
    assert (found[3].status, found[3].reason) == ("rejected", "cut at max_tokens")
    assert [count for count, _ in composer.llm.calls] == [4, 3, 2, 1]
    assert all(more == {"chat_template_kwargs": {"enable_thinking": False}} for _, more in composer.llm.calls)
    of_last = [(structured, seed) for number, structured, seed in seen if number == 3]
    assert [structured for structured, _ in of_last] == [True, True, False, False]
    assert len({seed for _, seed in of_last}) == 4


def test_the_paper_prompt_has_no_schema(vllm):
    composer = make("paper")
    composer.llm.answer = lambda question, sampling, times: (json.dumps(str(sampling.structured_outputs)), "stop")
    assert compose(composer, rows(1))[0].text == "None"


def test_a_dead_engine_ends_the_run(vllm):
    composer = make()
    composer.llm.dead = True
    with pytest.raises(EngineDeadError):
        compose(composer, rows(10))
    assert len(composer.llm.calls) == 1


def test_a_chunk_without_one_answer_ends_the_run(vllm):
    composer = make()
    composer.llm.bad = {f"row{number}" for number in range(100)}
    with pytest.raises(ValueError, match=r"vllm: none of 40 rows was answered; the last: vllm: VLLMValidationError"):
        compose(composer, rows(40))


def test_settings_for_servers_are_refused(vllm):
    with pytest.raises(ValueError, match=r"extra_body: top_k is for servers"):
        make(extra={"top_k": 3})


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"\.\[vllm\].*--composer openai"):
        make()
