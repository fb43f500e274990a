"""What the doctor says of servers that do less than they promise."""

import asyncio
import json

import pytest

pytest.importorskip("aiohttp")
from helpers.fault_server import FaultServer
from rwkv_clip.describe.client import Client, Limits
from rwkv_clip.describe.composers.openai import Asking
from rwkv_clip.describe.doctor import BURST, LONG, Finding, diagnose, format_findings
from rwkv_clip.describe.prompt import Prompt

ODD = '{"zq": "k7"}'
LIMITS = Limits(back_off=0.01)


class Served(FaultServer):
    """Keeps to schemas, and takes prompts of `context` words, which are counted as tokens."""

    context, keeps, refuses, usage_told = 1 << 20, True, True, True

    def choose(self, row, before):
        return self.faults(self.bodies[-1] if self.bodies else None) if callable(self.faults) else None

    def wrap(self, body, content, finish):
        if "'zq'" in str(body.get("response_format")) and self.keeps:
            content = ODD
        reply = json.loads(super().wrap(body, content, finish))
        reply["usage"]["prompt_tokens"] = min(self.context, reply["usage"]["prompt_tokens"])
        if not self.usage_told:
            del reply["usage"]
        return json.dumps(reply).encode()


def examine(server, model="tiny", key=None, limits=LIMITS, **asking):
    async def work():
        client = Client(getattr(server, "url", server), key, limits)
        try:
            return await diagnose(client, Prompt.load("grounded"), Asking(model, **asking))
        finally:
            await client.close()

    return {finding.name: finding for finding in asyncio.run(work())}


def bad(found):
    return {name for name, finding in found.items() if not finding.ok}


def test_a_good_server():
    with Served() as server:
        found = examine(server)
    assert not bad(found) and not any(finding.remedy for finding in found.values())
    assert found["answers"].detail == f"{BURST} of {BURST} usable" and "rows/s" in found["burst"].detail


def test_a_server_that_ignores_schemas():
    with Served() as server:
        server.keeps = False
        found = examine(server)
    assert bad(found) == {"schema"} and found["schema"].detail.startswith("schema ignored")


def test_a_server_that_fills_answers_with_blanks():
    with Served() as server:
        server.wrap = lambda body, content, finish: FaultServer.wrap(server, body, " \n" * 100, "length")
        found = examine(server)
    assert {"schema", "answers"} <= bad(found) and "blanks" in found["schema"].detail
    assert "disable_any_whitespace" in found["schema"].remedy and "16 cut at max_tokens" in found["answers"].detail


def test_a_server_that_cuts_prompts():
    with Served() as server:
        server.context = 2048
        found = examine(server)
    assert bad(found) == {"long prompt"} and f"2,048 tokens of {LONG:,} words" in found["long prompt"].detail


@pytest.mark.parametrize("fault, ok", [("400", True), ("500_json", False), ("hang", False), ("reset", False)])
def test_a_prompt_that_is_too_long(fault, ok):
    class Choosing(Served):
        async def _complete(self, writer, body):
            self.faults = lambda _: fault if len(str(body["messages"])) > 3 * LONG else None
            return await super()._complete(writer, body)

    with Choosing() as server:
        found = examine(server, limits=Limits(read=1, back_off=0.01) if fault == "hang" else LIMITS)
    assert ("refused" in found["long prompt"].detail) is ok
    assert found["long prompt"].ok is ok and bad(found) == (set() if ok else {"long prompt"})


def test_no_usage_and_thoughts():
    with Served(answer=lambda body: "A dog.") as server:
        server.usage_told = False
        plain = server.wrap
        server.wrap = lambda body, content, finish: plain(body, f"<think>hm</think>{content}", finish)
        found = examine(server)
    assert bad(found) == {"usage", "thinking", "long prompt"} and found["long prompt"].ok is None
    assert "enable_thinking" in found["thinking"].remedy


def test_a_model_of_another_name():
    with Served() as server:
        found = examine(server, "big")
    assert bad(found) == {"model"} and "big is not listed, but tiny" in found["model"].detail


def test_servers_that_cannot_be_asked():
    with FaultServer(key="right") as server:
        found = examine(server, key="sk-secret")
    assert list(found) == ["server"] and "http 401" in found["server"].detail and "sk-secret" not in str(found)
    found = examine("http://127.0.0.1:9")
    assert list(found) == ["server"] and "no connection" in found["server"].detail


@pytest.mark.parametrize(
    "fault", ["500_html", "500_json", "429", "html_200", "empty_object", "cut_json", "cut_envelope", "reset"]
)
def test_whatever_a_server_does_the_doctor_ends(fault):
    with FaultServer(lambda row, before: fault) as server:
        found = examine(server)
    assert bad(found)


def test_the_table():
    text = format_findings(
        [Finding("schema", False, "ignored", "do this"), Finding("usage", None, "?"), Finding("x", True, "y")]
    )
    assert text.splitlines() == [
        "BAD schema        ignored",
        "                  -> do this",
        "?   usage         ?",
        "ok  x             y",
    ]
