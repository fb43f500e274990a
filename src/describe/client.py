"""Questions to a server with OpenAI's chat interface: bounded, repeated where that may help, and never trusted.

What the network or the server does wrong becomes an `Answer` with a `problem`; what no row can get past (a wrong key, a
wrong address, a server that is gone) ends the run with one message. The key is in the header of requests, nowhere else.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from .answers import Answer, read_envelope
from .gate import TOLD, Gate

if TYPE_CHECKING:
    import aiohttp

Item = TypeVar("Item")
Result = TypeVar("Result")
RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
FATAL = {
    401: "give a valid key, by the name of the environment variable that holds it",
    403: "the key may not use this model or server; give another",
    404: "check the URL (http://host:8000/v1) and the name of the model, which the server lists under /models",
}
MOST_500 = 2  # llama.cpp says 500 where the model's words do not fit its format: the same question brings the same
MOST_429 = 6  # so often a question may be turned away without that counting as one of its tries
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After asks for
ORIGIN = "give the address that it leads to, if you trust it"


class ServerRefused(ValueError):
    """The server cannot be used as it is set up; no row could be finished. Names URL, error and remedy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """concurrency: requests at once at most. Seconds to connect, between two pieces of an answer, and of a request in
    all. most_bytes: of an answer. tries: requests for one question. back_off: seconds before the second, doubled for
    each further one, times a random factor from 0.5 to 1 that `seed` decides. stop_after: rows that fail in a row end
    the run, as do ten times as many whose answers were of no use; 0 for never. environment: whether proxies and .netrc
    of the environment are used."""

    concurrency: int = 64
    connect: float = 10.0
    read: float = 120.0
    total: float = 300.0
    most_bytes: int = 1 << 20
    tries: int = 4
    back_off: float = 1.0
    stop_after: int = 20
    seed: int = 0
    environment: bool = False

    def __post_init__(self) -> None:
        for name in ("connect", "read", "total", "most_bytes", "tries"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")


def complete_url(base_url: str) -> str:
    """http://host:8000, http://host:8000/, .../v1 or .../v1/ -> .../v1; other paths stay.

    ValueError for what is no URL, or has a user, a password, a query."""
    try:
        parts = urllib.parse.urlsplit(base_url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        shown = re.sub(r"//[^/@]*@", "//***@", base_url)  # a password is not shown
        raise ValueError(f"base_url: {shown!r} is no address of a server; use the form http://host:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"base_url: the address of {host} has a user or password in it; give a key instead")
    if parts.query or parts.fragment:
        raise ValueError(f"base_url: {parts.scheme}://{parts.netloc}{parts.path} goes on with ? or #; leave that out")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


class Client:
    """Asks one server; belongs to one event loop at a time, and is closed by `close`.

    base_url: see `complete_url`; nothing is ever sent elsewhere, redirects are errors. api_key: sent as a bearer token.
    `waits`: seconds spent on back-off; `problems`: requests by what was wrong with them. ValueError for an address or
    key that cannot be used.
    """

    def __init__(self, base_url: str, api_key: str | None = None, limits: Limits = Limits()):
        self.url = complete_url(base_url)
        self.limits = limits
        self.gate = Gate(limits.concurrency)
        self.waits = 0.0
        self.problems: Counter[str] = Counter()
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("api_key: it is empty or has blanks or characters outside ASCII in it; check its variable")
        self._key = api_key
        self._random = random.Random(limits.seed)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._not_before = 0.0  # on the clock of the event loop: when a server that asked for time may be asked again
        self._rows = self._failures = 0  # in a row; ten failures for one row

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    async def chat(self, body: dict[str, Any], tries: int | None = None) -> Answer:
        """The answer to a request body of /chat/completions, asked again where that may help, `tries` times at most.

        Where it got none, the answer's `problem` says why and `lost` is True. ServerRefused for what no other row would
        get past.
        """
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        most = self.limits.tries if tries is None else tries
        number = errors = turned_away = 0
        while True:
            await self._wait_for_server()
            status, answer, after = await self._post(data)
            if answer.problem:
                self.problems[answer.problem] += 1
            if status == 429 and turned_away < MOST_429:
                turned_away += 1
                await self._back_off(turned_away, after)
                continue
            number += 1
            errors += status == 500
            again = status in RETRIED or (status == 0 and answer.lost)
            if not again or number >= most or errors == MOST_500:
                break
            await self._back_off(number, after)
        return replace(answer, requests=number)

    async def models(self) -> list[str] | None:
        """Names of the models that the server lists, None where it has no such list."""
        try:
            async with self._open().get(f"{self.url}/models", allow_redirects=False) as reply:
                found = json.loads(await self._read(reply)) if reply.status == 200 else None
            return [str(model["id"]) for model in found["data"]] if found else None
        except _lost_errors():
            return None
        except (ValueError, KeyError, TypeError, RecursionError, _TooLarge):
            return None

    def count_row(self, failure: str = "", rejected: bool = False) -> None:
        """Say how a row ended: "" or why there is no text; rejected: there was an answer of no use, which counts for a
        tenth. ServerRefused after `stop_after` rows, none of which got a text."""
        self._rows, self._failures = (self._rows + 1, self._failures + (1 if rejected else 10)) if failure else (0, 0)
        if self._failures >= 10 * self.limits.stop_after > 0:
            raise ServerRefused(
                f"{self.url}: {self._rows} rows in a row got no text, the last: {failure}; "
                "check the server (doctor tells what it can do) and start again: what is finished is kept"
            )

    async def spread(
        self,
        work: Callable[[Item], Awaitable[Result]],
        items: Sequence[Item],
        enough: Callable[[], bool] = lambda: False,
    ) -> AsyncIterator[tuple[int, Result]]:
        """(place, result of `work`) for all items, as they are finished, `concurrency` at a time. The first error ends
        all that is under way. Where `enough` says so nothing more is begun, and what was begun is finished."""
        finished: asyncio.Queue[tuple[int, Result] | None] = asyncio.Queue()
        places = iter(range(len(items)))

        async def work_on() -> None:
            while not enough() and (place := next(places, None)) is not None:
                finished.put_nowait((place, await work(items[place])))

        async def work_on_all() -> None:
            try:
                await asyncio.gather(*workers)
            finally:
                finished.put_nowait(None)

        workers = [asyncio.create_task(work_on()) for _ in range(min(self.gate.most, len(items)))]
        end = asyncio.create_task(work_on_all())
        try:
            while (result := await finished.get()) is not None:
                yield result
            await end
        finally:
            for task in (*workers, end):
                task.cancel()
            await asyncio.gather(*workers, end, return_exceptions=True)

    async def close(self) -> None:
        """Close all connections; the client may be used again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # ---- one request -------------------------------------------------------------------------------------------------

    async def _post(self, data: bytes) -> tuple[int, Answer, float | None]:
        """Send one request: (status or 0, answer, seconds that the server asks to wait)."""
        era = await self.gate.enter()
        errors: int | None = None
        try:
            async with self._open().post(f"{self.url}/chat/completions", data=data, allow_redirects=False) as reply:
                errors = TOLD if reply.status == 429 else int(reply.status >= 500)
                body = await self._read(reply)
                after = _read_retry_after(reply.headers.get("Retry-After"))
                return reply.status, self._understand(reply, body), after
        except _TooLarge:
            return 200, Answer(problem=f"answer over {self.limits.most_bytes} bytes"), None
        except _lost_errors() as error:
            errors = 1 if isinstance(error, asyncio.TimeoutError) else None
            return 0, Answer(problem=_name(error), content=self.mask(str(error))[:500], lost=True), None
        finally:
            self.gate.leave(era, errors)

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        async for piece in reply.content.iter_any():
            size += len(piece)
            if size > self.limits.most_bytes:
                reply.close()  # the connection with it: the rest is never read
                raise _TooLarge
            pieces.append(piece)
        return b"".join(pieces)

    def _understand(self, reply: aiohttp.ClientResponse, body: bytes) -> Answer:
        status = reply.status
        if status == 200:
            if (coding := reply.headers.get("Content-Encoding", "identity")) != "identity":
                return Answer(problem=f"content encoding {coding[:20]}")
            answer = read_envelope(body, reply.headers.get("Content-Type", ""))
            return replace(answer, content=self.mask(answer.content)) if self._key else answer
        said = self.mask(_read_error(body))
        if status in FATAL:
            raise ServerRefused(f"{self.url}: http {status}{said and f' ({said})'}; {FATAL[status]}")
        if 300 <= status < 400:
            place = self.mask(reply.headers.get("Location", "nowhere"))[:200]
            raise ServerRefused(
                f"{self.url}: it sends on to {place!r} (http {status}), which is not followed; {ORIGIN}"
            )
        long = status in (400, 413, 422) and re.search(r"context|too long|maximum.{0,20}(length|token)", said, re.I)
        return Answer(problem="prompt too long" if long else f"http {status}", content=said, lost=True)

    def mask(self, text: str) -> str:
        """The text without the key, in the spellings that servers echo it in."""
        if self._key:
            for spelling in {self._key, json.dumps(self._key)[1:-1], urllib.parse.quote(self._key, safe="")}:
                text = text.replace(spelling, "***")
        return text

    def _open(self) -> aiohttp.ClientSession:
        """The session of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.closed or self._loop is not loop:
            aiohttp = _import_aiohttp()
            limits = self.limits
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
                timeout=aiohttp.ClientTimeout(total=limits.total, sock_connect=limits.connect, sock_read=limits.read),
                headers=headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=limits.environment,
                auto_decompress=False,
            )
            self._loop, self._not_before = loop, 0.0
        return self._session

    # ---- waiting -----------------------------------------------------------------------------------------------------

    async def _wait_for_server(self) -> None:
        """All questions wait while the server has asked for time, not only the one that it told so."""
        while (rest := self._not_before - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(rest)

    async def _back_off(self, number: int, after: float | None) -> None:
        wait = min(LONGEST_WAIT, self.limits.back_off * 2 ** (number - 1)) * self._random.uniform(0.5, 1)
        if after is not None:
            # Those who were told to wait do not come back all at once.
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + after)
            wait = after + wait * 0.25
        self.waits += wait
        await asyncio.sleep(wait)


class _TooLarge(Exception):
    pass


def _import_aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise ImportError("asking a server needs aiohttp: pip install -e '.[describe]'") from None
    return aiohttp


def _lost_errors() -> tuple[type[BaseException], ...]:
    """What aiohttp raises where the network or the server breaks off."""
    return (_import_aiohttp().ClientError, asyncio.TimeoutError, OSError)


def _name(error: BaseException) -> str:
    aiohttp = _import_aiohttp()
    if isinstance(error, asyncio.TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "cut body"
    return "not HTTP" if isinstance(error, aiohttp.ClientResponseError) else "reset"


def _read_retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (seconds or a date, RFC 9110 10.2.3), capped; None for none."""
    if not value:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return min(LONGEST_WAIT, float(value))
    try:
        date = email.utils.parsedate_to_datetime(value)
        return min(LONGEST_WAIT, max(0.0, date.timestamp() - time.time()))
    except (ValueError, OverflowError, TypeError):
        return None


def _read_error(body: bytes) -> str:
    """What a server says went wrong, in one short line."""
    text = body[:8192].decode("utf-8", "replace")
    try:
        said = json.loads(body)
        for key in ("error", "message", "detail"):
            said = said.get(key, said) if isinstance(said, dict) else said
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, RecursionError):
        text = re.sub(r"<[^<>]{0,200}>", " ", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text[:8192]).split())[:300]
