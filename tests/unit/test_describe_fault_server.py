"""The server that goes wrong on purpose: what the other tests rely on."""

import http.client
import json

import pytest

from helpers.fault_server import ANSWERS, FaultServer, honest_text

QUESTION = "Raw caption:<row 7>, synthetic caption:<a dog runs.>, and highly relevant detection tags:<dog, ball, sky>"


def ask(server, content=QUESTION, **body):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    body = {"messages": [{"role": "user", "content": content}], **body}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_honest_answers_are_a_function_of_the_prompt():
    with FaultServer() as server:
        status, body = ask(server)
        schema = ask(server, response_format={"type": "json_schema", "json_schema": {}})[1]
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "a dog runs, with dog and ball."
    assert json.loads(json.loads(schema)["choices"][0]["message"]["content"]) == {
        "text": "a dog runs, with dog and ball."
    }
    assert server.requests == {"row 7": 2} and server.log == [("row 7", ""), ("row 7", "")]
    assert honest_text({"messages": [{"content": "<raw>\nred car\n</raw><caption>\nnone\n</caption>"}]}) == "red car."


@pytest.mark.parametrize("fault", ANSWERS)
def test_every_fault_is_sent(fault):
    with FaultServer(lambda row, before: fault if before == 0 else None) as server:
        status, body = ask(server)
        again, _ = ask(server)
    assert (status, again) == (int(fault[:3]) if fault[:3].isdecimal() else 200, 200)
    assert len(body) > 10_000_000 if fault == "ten_megabytes" else len(body) < 10_000


@pytest.mark.parametrize("fault", ["reset", "cut_body"])
def test_broken_connections(fault):
    with FaultServer(lambda row, before: fault) as server, pytest.raises((http.client.HTTPException, OSError)):
        ask(server)


def test_shares_are_kept_and_do_not_depend_on_the_order():
    server = FaultServer({"500_html": 0.05, "hang": 0.02, "cut_json": 0.03})
    chosen = [server.choose(f"row {i}", 0) for i in range(20_000)]
    assert abs(chosen.count("500_html") / 20_000 - 0.05) < 0.006 and abs(chosen.count("hang") / 20_000 - 0.02) < 0.004
    assert chosen == [server.choose(f"row {i}", 0) for i in range(20_000)]


def test_hangs_end_with_the_server():
    with FaultServer({"hang": 1.0}) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=0.2)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": [{"content": "row 1"}]}))
        with pytest.raises(TimeoutError):
            connection.getresponse()
    assert server.log == [("row 1", "hang")]
