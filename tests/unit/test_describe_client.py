"""Questions over real connections to a server that goes wrong: what is repeated, waited for, and ends the run."""

import asyncio
import email.utils
import json
import logging
import socket
import time
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("aiohttp")
from helpers.fault_server import FaultServer
from rwkv_clip.describe.client import MOST_429, Client, Limits, ServerRefused, _read_retry_after, complete_url
from rwkv_clip.describe.gate import LEAST_SEEN, TOLD, Gate

QUICK = Limits(back_off=0.01, stop_after=0)
IMPATIENT = Limits(read=0.3, total=1.0, back_off=0.01, stop_after=0)  # where nothing comes
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "row 1 of dogs"}]}


@asynccontextmanager
async def opened(server, limits=QUICK, key=None):
    client = Client(getattr(server, "url", server), key, limits)
    try:
        yield client
    finally:
        await client.close()


def ask(server, limits=QUICK, key=None, body=BODY, tries=None):
    async def work():
        async with opened(server, limits, key) as client:
            return await client.chat(body, tries)

    return asyncio.run(work())


def first(fault, times=1):
    """That fault for the first questions of every row."""
    return lambda row, before: fault if before < times else None


@pytest.mark.parametrize(
    "given, url",
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("http://host:8000/v1", "http://host:8000/v1"),
        (" http://host:8000/v1/ ", "http://host:8000/v1"),
        ("https://host/api/v2", "https://host/api/v2"),
        ("http://host/v1/chat/completions", "http://host/v1"),
        ("http://[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_addresses(given, url):
    assert complete_url(given) == url


@pytest.mark.parametrize(
    "given",
    ["", "host:8000", "ftp://host", "http://", "http://host:99999", "http://u:secret@host", "http://host?k=secret"],
)
def test_what_is_no_address_is_refused_without_its_password(given):
    with pytest.raises(ValueError, match="base_url") as error:
        Client(given)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("fault", ["500_html", "500_json", "502_html", "429", "reset", "cut_body", "hang", "slow_body"])
def test_what_may_pass_is_asked_again(fault):
    with FaultServer(first(fault)) as server:
        answer = ask(server, IMPATIENT if fault in ("hang", "slow_body") else QUICK)
    tries = 1 if fault == "429" else 2  # to be turned away is none
    assert (answer.problem, answer.requests, server.requests["row 1"]) == ("", tries, 2)


@pytest.mark.parametrize(
    "fault, problem, requests",
    [
        ("502_html", "http 502", 4),
        ("500_json", "http 500", 2),
        ("429", "http 429", 4),
        ("reset", "reset", 4),
        ("cut_body", "cut body", 4),
        ("hang", "timeout", 4),
        ("400", "prompt too long", 1),
    ],
)
def test_what_does_not_pass_is_given_up_with_a_reason(fault, problem, requests):
    with FaultServer(first(fault, 99)) as server:
        answer = ask(server, IMPATIENT if fault == "hang" else QUICK)
    assert (answer.problem, answer.lost, answer.requests) == (problem, True, requests)
    assert server.requests["row 1"] == requests + MOST_429 * (fault == "429")


@pytest.mark.parametrize(
    "fault", ["ten_megabytes", "html_200", "empty_object", "null_content", "cut_envelope", "length"]
)
def test_answers_of_no_use_are_not_asked_for_again_here(fault):
    """Another question may help, which is the composer's to ask."""
    with FaultServer(first(fault, 99)) as server:
        answer = ask(server)
    assert answer.problem and not answer.lost and server.requests["row 1"] == 1


def test_ten_megabytes_are_not_read():
    with FaultServer(first("ten_megabytes", 9)) as server:
        answer = ask(server, Limits(most_bytes=10_000))
    assert answer.problem == "answer over 10000 bytes" and answer.content == ""


def test_deadline_of_the_whole_answer():
    with FaultServer(first("slow_body", 9)) as server:
        assert ask(server, Limits(read=0.5, total=0.4, back_off=0.01), tries=1).problem == "timeout"


def test_deadline_between_two_pieces_of_an_answer():
    async def work():
        async with opened(server, Limits(read=0.3, total=600)) as client:
            return await asyncio.wait_for(client.chat(BODY, 1), 60)

    with FaultServer(first("hang")) as server:
        assert asyncio.run(work()).problem == "timeout"


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    answer = ask(address)
    assert (answer.problem, answer.lost, answer.requests) == ("no connection", True, 4)


@pytest.mark.parametrize(
    "value, seconds", [("7", 7), ("0", 0), ("1.5", 1.5), ("99999", 60), ("", None), ("soon", None), ("-3", None)]
)
def test_retry_after_in_seconds(value, seconds):
    assert _read_retry_after(value) == seconds


@pytest.mark.parametrize("ahead, least, most", [(20, 18, 20), (-100, 0, 0), (5000, 60, 60)])
def test_retry_after_as_a_date(ahead, least, most):
    date = email.utils.formatdate(time.time() + ahead, usegmt=True)
    assert least <= _read_retry_after(date) <= most
    assert _read_retry_after("Sun, 99 Nov 2026 99:00:00 GMT") is None


def test_all_wait_for_a_server_that_asks_for_time():
    """One question is told to wait; another one that begins meanwhile waits, too."""

    async def work(server):
        async with opened(server) as client:
            told = asyncio.create_task(client.chat(BODY))
            while not server.log:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            begun = asyncio.get_running_loop().time()
            await client.chat({"messages": [{"content": "row 2"}]})
            waited = asyncio.get_running_loop().time() - begun
            await told
            return waited

    with FaultServer(lambda row, before: "429" if (row, before) == ("row 1", 0) else None, retry_after="1") as server:
        assert asyncio.run(work(server)) > 0.6


def test_back_off_follows_the_seed():
    def waits(seed):
        async def work():
            async with opened(server, Limits(back_off=0.01, seed=seed)) as client:
                await client.chat(BODY)
                return client.waits

        with FaultServer(first("502_html", 9)) as server:
            return asyncio.run(work())

    assert waits(1) == waits(1) != waits(2)


@pytest.mark.parametrize("fault, words", [("404", "does not exist"), (None, "wrong key")])
def test_what_no_row_gets_past_ends_the_run(fault, words):
    other = "other" if fault is None else None
    with FaultServer(first(fault, 9), key=other) as server, pytest.raises(ServerRefused) as error:
        ask(server, key="sk-very-secret")
    message = str(error.value)
    assert server.url in message and words in message and "secret" not in message and "\n" not in message


@pytest.mark.parametrize("key", ["sk-very-secret", 'sk/very"secret\\key+='])
def test_the_key_is_sent_and_never_shown(key, caplog):
    caplog.set_level(logging.DEBUG)
    leak = lambda body: f"your key is {key}"  # noqa: E731
    with FaultServer(answer=leak, key=key) as server:
        answer = ask(server, key=key)
        assert server.authorizations == {f"Bearer {key}"}
        client = Client(server.url, key)
    assert answer.content == "your key is ***"
    for shown in (repr(client), str(client), caplog.text, repr(answer), repr(Limits())):
        assert "secret" not in shown


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "kl\u00fcssel"])
def test_keys_that_no_header_holds_are_refused_unshown(key):
    with pytest.raises(ValueError, match="api_key") as error:
        Client("http://host", key)
    assert not key or key not in str(error.value)


def test_redirects_are_not_followed():
    async def lead_on(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            f"HTTP/1.1 307 X\r\nLocation: {other.url}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n".encode()
        )
        await writer.drain()

    async def work():
        server = await asyncio.start_server(lead_on, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, opened(address, key="sk-secret") as client:
            with pytest.raises(ServerRefused, match="sends on to"):
                await client.chat(BODY)

    with FaultServer() as other:
        asyncio.run(work())
    assert not other.log and not other.authorizations


def test_proxies_of_the_environment_are_used_only_when_asked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with FaultServer() as server:
        assert ask(server).problem == ""
        assert ask(server, Limits(environment=True, back_off=0.01)).problem == "no connection"


class Serving(FaultServer):
    """Answers everything with one body."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    async def _answer(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        return await self._send(writer, 200, "application/json", self.body)


def test_a_server_with_less_room_gets_fewer_questions_and_answers_all():
    class Small(FaultServer):
        def choose(self, row, before):
            return "429" if self._now > 6 else None

    async def work():
        async with opened(server, Limits(concurrency=40, back_off=0.02)) as client:
            bodies = [{"messages": [{"content": f"row {i}"}]} for i in range(400)]
            answers = [answer async for _, answer in client.spread(client.chat, bodies)]
            return answers, client

    with Small(delay=0.005) as server:
        answers, client = asyncio.run(work())
    assert len(answers) == 400 and not any(answer.problem for answer in answers)
    assert client.gate.halved > 1 and client.gate.limit < 30


def test_models_are_listed():
    async def work(address):
        async with opened(address) as client:
            return await client.models()

    with FaultServer() as server:
        assert asyncio.run(work(server)) == ["tiny"]
    assert asyncio.run(work("http://127.0.0.1:9")) is None
    for body in (b"{", b"[]", b'{"data": [7]}', b'{"data": {"id": 1}}', b"[" * 100_000, b" " * (2 << 20)):
        with Serving(body) as server:
            assert asyncio.run(work(server.url)) is None


def test_rows_that_fail_in_a_row_end_the_run():
    client = Client("http://host", limits=Limits(stop_after=3))
    for failure in ("http 500", "http 500", "", "timeout", "timeout"):
        client.count_row(failure)
    with pytest.raises(ServerRefused, match=r"http://host/v1: 3 rows in a row got no text, the last: reset; .*doctor"):
        client.count_row("reset")
    client = Client("http://host", limits=Limits(stop_after=3))
    for _ in range(29):
        client.count_row("not JSON", rejected=True)
    with pytest.raises(ServerRefused, match=r"30 rows in a row got no text, the last: not JSON"):
        client.count_row("not JSON", rejected=True)
    endless = Client("http://host", limits=Limits(stop_after=0))
    for failure in ("", *["reset"] * 100):
        endless.count_row(failure)


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_never_more_than_the_limit_at_once():
    async def work():
        async with opened(server, Limits(concurrency=5)) as client:
            bodies = [{"messages": [{"content": f"row {i}"}]} for i in range(40)]
            return [place async for place, answer in client.spread(client.chat, bodies) if not answer.problem]

    with FaultServer(delay=0.02) as server:
        assert sorted(asyncio.run(work())) == list(range(40))
    assert server.most_at_once == 5


def test_an_error_ends_all_that_is_under_way():
    begun, ended = [], []

    async def work(item):
        begun.append(item)
        try:
            await asyncio.sleep(0.01 if item == 3 else 30)
            raise ServerRefused("no")
        finally:
            ended.append(item)

    async def run():
        async with opened("http://host", Limits(concurrency=8)) as client:
            with pytest.raises(ServerRefused):
                async for _ in client.spread(work, range(100)):
                    pass

    asyncio.run(run())
    assert sorted(begun) == sorted(ended) == list(range(8))


def test_enough_begins_nothing_more_and_finishes_the_rest():
    begun = []

    async def work(item):
        begun.append(item)
        await asyncio.sleep(0.01)
        return item

    async def run():
        async with opened("http://host", Limits(concurrency=4)) as client:
            return [place async for place, _ in client.spread(work, range(100), lambda: len(begun) >= 10)]

    assert sorted(asyncio.run(run())) == begun and 10 <= len(begun) <= 13


def outcomes(gate, count, bad):
    """Answers one after the other; bad: of each number whether it says overload."""

    async def work():
        for number in range(count):
            gate.leave(await gate.enter(), bad(number))

    asyncio.run(work())
    return gate


def test_the_limit_is_halved_on_bursts_and_grows_back():
    gate = outcomes(Gate(64), LEAST_SEEN, lambda number: True)
    assert gate.limit == 32 and gate.halved == 1
    outcomes(gate, 10 * LEAST_SEEN, lambda number: True)
    assert gate.limit == 1
    assert outcomes(Gate(64), 30, lambda number: TOLD * (number % 4 == 0)).halved >= 1  # 429 says it plainly
    outcomes(gate, 5000, lambda number: False)
    assert gate.limit == 64


def test_scattered_errors_are_no_overload():
    assert outcomes(Gate(64), 5000, lambda number: number % 8 == 0).limit == 64


def test_what_began_before_a_halving_says_nothing_about_it():
    async def work():
        gate = Gate(64)
        eras = [await gate.enter() for _ in range(64)]
        for era in eras:
            gate.leave(era, True)
        return gate

    gate = asyncio.run(work())
    assert gate.limit == 32 and gate.inside == 0


def test_places_are_given_in_order_and_not_lost_by_those_who_give_up():
    async def work():
        gate, order = Gate(1), []
        held = await gate.enter()

        async def wait(name):
            era = await gate.enter()
            order.append(name)
            gate.leave(era, False)

        tasks = [asyncio.create_task(wait(name)) for name in "abcd"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        gate.leave(held, False)
        tasks[0].cancel()  # already let in
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.inside == 0 and not gate._waiting
        return order

    assert asyncio.run(work()) == ["c", "d"]


def test_limits_and_concurrency_are_checked():
    for wrong in ({"read": 0}, {"tries": 0}, {"most_bytes": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
    with pytest.raises(ValueError, match="concurrency"):
        Client("http://host", limits=Limits(concurrency=0))


def test_a_client_outlives_an_event_loop():
    with FaultServer() as server:
        client = Client(server.url, limits=QUICK)

        async def work():
            answer = await client.chat(BODY)
            await client.close()
            return json.dumps(answer.content)

        assert asyncio.run(work()) == asyncio.run(work())


def test_without_aiohttp_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(ImportError, match=r"describe"):
        ask("http://host")
