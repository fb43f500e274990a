"""Texts by a server and by recorded answers: the steps of a row, what is counted, what ends a run, and that nothing is
lost whatever goes wrong."""

import asyncio
import json
from collections import Counter

import pytest

pytest.importorskip("aiohttp")
from helpers.describe_hostile import hostile_texts
from helpers.fault_server import FaultServer
from rwkv_clip.describe.client import MOST_429, Client, Limits, ServerRefused
from rwkv_clip.describe.composers.openai import Asking, CostReached, OpenAI
from rwkv_clip.describe.composers.replay import Replay
from rwkv_clip.describe.prompt import Prompt
from rwkv_clip.describe.sources import Sources, Tag
from rwkv_clip.describe.tokens import fits
from rwkv_clip.files import DamagedError

GROUNDED, PAPER = Prompt.load("grounded"), Prompt.load("paper")
QUICK = Limits(back_off=0.01, stop_after=0)
IMPATIENT = Limits(read=1, back_off=0.01, stop_after=0)  # where servers hang
# The mix of the acceptance table.
MIX = {"500_html": 0.05, "500_json": 0.03, "429": 0.02, "hang": 0.02, "cut_json": 0.03, "reset": 0.01}
MIX |= {"empty": 0.01, "wrong_schema": 0.01}


def row(number, **more):
    values = {
        "raw": f"row {number} of Brighton",
        "caption": "a dog runs on the sand",
        "tags": (Tag("dog"), Tag("ball")),
    }
    return Sources(str(number), **(values | more))


def compose(composer, rows):
    async def work():
        try:
            return {place: composed async for place, composed in composer.compose(rows)}
        finally:
            await composer.close()

    return asyncio.run(work())


def openai(server, prompt=GROUNDED, limits=QUICK, **asking):
    return OpenAI(Client(server.url, "sk-secret", limits), prompt, Asking("tiny", **asking))


def one(faults, prompt=GROUNDED, answer=None, **asking):
    """(what becomes of one row, the questions that were asked)."""
    more = {"answer": answer} if answer else {}
    with FaultServer(faults, **more) as server:
        composed = compose(openai(server, prompt, **asking), [row(1)])[0]
    return composed, server.bodies


def in_turn(*faults):
    return lambda _, before: faults[before] if before < len(faults) else None


def test_an_honest_answer():
    composed, (body,) = one(None)
    assert composed.text == "a dog runs on the sand, with dog and ball." and composed.status == "ok"
    assert (composed.attempts, composed.finish, composed.reason) == (1, "stop", "")
    assert composed.prompt_tokens > 100 and composed.completion_tokens > 5
    assert json.loads(composed.answer) == {"text": composed.text}
    assert body["response_format"]["json_schema"]["schema"] == GROUNDED.schema
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 160)


@pytest.mark.parametrize(
    "fault",
    [
        "cut_json",
        "wrong_schema",
        "wrong_type",
        "empty",
        "blanks",
        "length",
        "thinking_cut",
        "null_content",
        "empty_object",
        "html_200",
        "ten_megabytes",
        "cut_envelope",
    ],
)
def test_an_answer_of_no_use_is_asked_for_again_with_a_hint_then_in_plain_text(fault):
    composed, bodies = one(in_turn(fault, fault))
    assert composed.status == "ok" and composed.attempts == 3
    assert ["response_format" in body for body in bodies] == [True, True, False]
    assert len({body["seed"] for body in bodies}) == 3
    assert [body["temperature"] for body in bodies] == [0.0, 0.7, 0.7]
    said = [body["messages"][-1]["content"] for body in bodies]
    assert said[1].startswith(said[0]) and ("could not be used" in said[1] or "too long" in said[1])
    assert "without JSON" in said[2]


@pytest.mark.parametrize("fault", ["fenced", "thinking", "chatter"])
def test_dressed_answers_are_taken(fault):
    composed, bodies = one(in_turn(fault))
    assert composed.text == "a dog runs on the sand, with dog and ball." and len(bodies) == 1


@pytest.mark.parametrize(
    "fault, status, reason, attempts",
    [
        ("wrong_schema", "rejected", "empty", 4),
        ("length", "rejected", "cut at max_tokens", 4),
        ("content_filter", "rejected", "refusal", 4),
        ("500_html", "failed", "http 500", 4),
        ("502_html", "failed", "http 502", 4),
        ("429", "failed", "http 429", 4),
        ("reset", "failed", "reset", 4),
        ("empty_object", "failed", "envelope: no choices", 4),
        ("html_200", "failed", "content type text/html", 4),
        ("400", "failed", "prompt too long", 1),
    ],
)
def test_rows_without_a_usable_answer_keep_the_reason(fault, status, reason, attempts):
    composed, bodies = one(lambda *_: fault)
    if fault == "wrong_schema":  # on the last tries it is plain text, and no text
        reason = "not JSON"
    assert (composed.status, composed.reason, composed.attempts) == (status, reason, attempts)
    assert composed.text == "" and len(bodies) == attempts + MOST_429 * (fault == "429")


def test_a_500_that_comes_twice_is_asked_for_without_the_schema():
    composed, bodies = one(in_turn("500_json", "500_json"))
    assert composed.status == "ok" and ["response_format" in body for body in bodies] == [True, True, False]
    composed, bodies = one(in_turn("500_json"))
    assert bodies[0] == bodies[1] and composed.attempts == 2


def test_a_text_too_long_for_the_context_is_asked_for_again_with_a_hint():
    long = lambda body: "dog " * 80 if "too long" not in body["messages"][-1]["content"] else "a dog"  # noqa: E731
    composed, _ = one(None, answer=long)
    assert composed.text == "a dog" and composed.attempts == 2
    assert one(None, answer=lambda body: "dog " * 80)[0].reason == "over the context"


def test_settings_reach_the_server():
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": None, "max_completion_tokens": 50}
    _, (body,) = one(None, schema=False, temperature=0.7, extra=extra)
    assert "response_format" not in body and "max_tokens" not in body and body["max_completion_tokens"] == 50
    assert body["temperature"] == 0.7 and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "response_format" not in one(None, PAPER)[1][0]
    with pytest.raises(ValueError, match="extra_body: messages"):
        Asking("m", extra={"messages": []})


def test_what_decides_a_text():
    with FaultServer() as server:
        base = openai(server).decides
        assert openai(server, limits=Limits(concurrency=3)).decides == base  # neither the address nor how it is asked
        changes = {
            "temperature": 1.0,
            "max_tokens": 50,
            "seed": 1,
            "schema": False,
            "extra": {"top_k": 1},
            "revision": "x",
        }
        for name, value in changes.items():
            different = openai(server, **{name: value}).decides
            key = {"extra": "extra_body"}.get(name, name)
            assert [k for k in base if base[k] != different[k]] == [key]
        assert openai(server, PAPER).decides["prompt"] != base["prompt"]
        assert openai(server, GROUNDED.ascii()).decides["schema"] != base["schema"]
    json.dumps(base)


def test_seeds_follow_run_row_and_variant():
    seeds = {
        Asking("m", seed=s, variant=v).find_seed(r, step)
        for s in (0, 1)
        for v in ("", "b")
        for r in "12"
        for step in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**31 for seed in seeds)
    assert Asking("m").find_seed("1", 0) == Asking("other", temperature=1).find_seed("1", 0)


# ---- many rows -------------------------------------------------------------------------------------------------------


def test_a_server_of_many_faults_loses_no_row_and_every_token_is_counted():
    """A2 and A11 of the acceptance table, in small."""
    rows = [row(number) for number in range(400)]
    with FaultServer(MIX) as server:
        composer = openai(server, limits=IMPATIENT)
        found = compose(composer, rows)
    assert sorted(found) == list(range(400))
    statuses = Counter(composed.status for composed in found.values())
    assert statuses["ok"] >= 0.99 * 400 and max(composed.attempts for composed in found.values()) <= 4
    assert all(composed.reason for composed in found.values() if composed.status != "ok")
    turned_away = sum(fault == "429" for _, fault in server.log)
    assert sum(server.requests.values()) == sum(composed.attempts for composed in found.values()) + turned_away
    for name, total in zip(("prompt_tokens", "completion_tokens"), server.usage):
        assert getattr(composer, name) == total == sum(getattr(c, name) or 0 for c in found.values())
    assert len({fault for _, fault in server.log}) == len(MIX) + 1


def test_hostile_rows_are_answered_like_all():
    """A12: a question for each, valid, whatever the row holds; each gets a status."""
    texts = list(hostile_texts())
    rows = [Sources(str(i), text, "a dog", (Tag(text[:200]), Tag("dog")), text) for i, text in enumerate(texts)]
    for prompt in (GROUNDED, PAPER):
        with FaultServer(answer=lambda body: "a dog runs") as server:
            found = compose(openai(server, prompt), rows)
        assert len(found) == len(texts) >= 300
        assert all(composed.text == "a dog runs" and composed.attempts == 1 for composed in found.values())
        with FaultServer() as server:  # whose answers repeat what the rows hold
            found = compose(openai(server, prompt), rows)
        assert len(found) == len(texts) and {composed.status for composed in found.values()} <= {"ok", "rejected"}
        for composed in found.values():
            assert fits(composed.text) and composed.text.encode() is not None and composed.text.isprintable()


def test_a_wrong_key_ends_the_run_at_once():
    with FaultServer(key="right") as server, pytest.raises(ServerRefused, match="http 401") as error:
        compose(openai(server), [row(number) for number in range(1000)])
    assert "sk-secret" not in str(error.value) and not server.log


def test_rows_that_fail_in_a_row_end_the_run_and_scattered_ones_do_not():
    limits = Limits(concurrency=4, back_off=0.01, stop_after=5)
    with (
        FaultServer({"502_html": 1.0}) as server,
        pytest.raises(ServerRefused, match=r"5 rows in a row got no text.*http 502"),
    ):
        compose(openai(server, limits=limits), [row(number) for number in range(200)])
    assert sum(server.requests.values()) < 60
    third = lambda name, before: "502_html" if int(name.split()[1]) % 3 else None  # noqa: E731
    with FaultServer(third) as server:
        limits = Limits(concurrency=1, back_off=0.001, stop_after=5)  # in order: rows that fail take longer
        found = compose(openai(server, limits=limits), [row(number) for number in range(60)])
    assert Counter(composed.status for composed in found.values()) == {"failed": 40, "ok": 20}


def test_rejected_rows_end_a_run_only_after_ten_times_as_many():
    with FaultServer({"length": 1.0}) as server:
        found = compose(openai(server, limits=Limits(stop_after=2)), [row(number) for number in range(10)])
        assert {composed.status for composed in found.values()} == {"rejected"}
        with pytest.raises(ServerRefused, match="20 rows in a row got no text, the last: cut at max_tokens"):
            compose(openai(server, limits=Limits(stop_after=2)), [row(number) for number in range(40)])


def test_the_key_is_in_no_result():
    with FaultServer(answer=lambda body: "the key is sk-secret") as server:
        composed = compose(openai(server), [row(1)])[0]
    assert "sk-secret" not in repr(composed) and composed.text == "the key is ***"


def test_cost_ends_the_run_with_everything_kept():
    limits, prices = Limits(concurrency=4), {"price_in": 1e6, "price_out": 0.0}
    rows = [row(number) for number in range(100)]
    with FaultServer() as server:
        tokens = compose(openai(server), rows[:1])[0].prompt_tokens
        composer, found = openai(server, limits=limits, **prices, max_cost=10.0 * tokens), {}

        async def work():
            async for place, composed in composer.compose(rows):
                found[place] = composed

        with pytest.raises(CostReached, match=r"max_cost: .* are spent \(.* prompt"):
            asyncio.run(work())
        assert 10 <= len(found) <= 13 and all(composed.status == "ok" for composed in found.values())
        with pytest.raises(CostReached):  # it stays spent
            compose(composer, rows)
        assert composer.cost == tokens * len(found)
    with pytest.raises(ValueError, match="max_cost: needs"):
        Asking("m", max_cost=1.0)


# ---- recorded answers ------------------------------------------------------------------------------------------------


def said(text):
    return json.dumps({"text": text})


RECORDS = [
    {"id": "1", "content": said("A dog runs."), "finish_reason": "stop", "prompt_tokens": 10, "completion_tokens": 5},
    {"id": "2", "content": '{"text": "A d', "finish_reason": "stop", "prompt_tokens": 10, "completion_tokens": 5},
    {"id": "2", "content": said("A cat sits."), "finish_reason": "stop", "prompt_tokens": 11, "completion_tokens": 6},
    {"id": "3", "content": "A bird.", "finish_reason": "stop"},
    {"id": "4", "content": "x", "finish_reason": "stop"},
    {"id": "4", "content": "x", "finish_reason": "stop"},
    {"id": "4", "content": "A bird.", "finish_reason": "stop"},
    {"id": "5", "content": said("A dog runs."), "finish_reason": "length"},
]


def test_recorded_answers_are_read_as_a_servers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
    rows = [Sources(str(number)) for number in range(1, 7)]
    found = compose(Replay(path, GROUNDED), rows)
    assert found == compose(Replay(iter(RECORDS), GROUNDED), rows)
    what = [(found[place].text, found[place].status, found[place].reason, found[place].attempts) for place in range(6)]
    assert what == [
        ("A dog runs.", "ok", "", 1),
        ("A cat sits.", "ok", "", 2),
        ("", "rejected", "not JSON", 1),
        ("A bird.", "ok", "", 3),
        ("", "rejected", "cut at max_tokens", 1),
        ("", "failed", "no recorded answer", 0),
    ]
    assert (found[1].prompt_tokens, found[1].completion_tokens) == (21, 11)
    assert all(composed.milliseconds == 0 for composed in found.values())


def test_the_compose_stage_of_a_job_gives_the_same_texts_again():
    rows = [row(number) for number in range(200)]
    with FaultServer({"cut_json": 0.3, "length": 0.2, "500_json": 0.2, "thinking": 0.1, "chatter": 0.1}) as server:
        found = compose(openai(server), rows)
    columns = ("answer", "finish", "attempts", "prompt_tokens", "completion_tokens")
    stored = [
        {name: getattr(composed, name) for name in columns}
        | {"id": rows[place].id, "compose_status": composed.status, "compose_reason": composed.reason}
        for place, composed in found.items()
    ]
    again = compose(Replay(stored, GROUNDED), rows)
    for place, composed in found.items():
        for name in ("text", "status", "reason", "answer", "finish", "attempts", "prompt_tokens", "completion_tokens"):
            assert getattr(again[place], name) == getattr(composed, name), (name, composed)
    assert {composed.status for composed in found.values()} >= {"ok", "rejected"}


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": 7, "content": "x"}'])
def test_damaged_recordings_are_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{json.dumps(RECORDS[0])}\n{line}\n")
    with pytest.raises(DamagedError, match=r"answers.jsonl: line 2"):
        Replay(path, GROUNDED)
    with pytest.raises(ValueError, match="no id"):
        Replay([{"id": None}], GROUNDED)
