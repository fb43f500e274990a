"""A chat server that goes wrong on purpose, in a thread of its own: by the row and by how often it was asked.

    with FaultServer(faults={"500_html": 0.05, "hang": 0.02}) as server:
        ...                     # server.url: http://127.0.0.1:PORT
    server.requests["row 17"]   # how often that row was asked

faults: name -> share of the questions, or a function (row, times asked before) -> name or None. Honest answers are a
function of the prompt: the caption of the row with its first two tags, as JSON where a schema is asked for.
Rows are found in prompts by `row` (a pattern), else they are the hash of the question.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Body = dict[str, Any]
BIG = 10 << 20


def _talk(content: Any, finish: str | None = "stop") -> Callable[[FaultServer, Body, str], tuple[int, str, bytes]]:
    def make(server: FaultServer, body: Body, honest: str) -> tuple[int, str, bytes]:
        said = content(honest) if callable(content) else content
        return 200, "application/json", server.wrap(body, said, finish)

    return make


def _status(status: int, kind: str, text: str) -> Callable[..., tuple[int, str, bytes]]:
    return lambda server, body, honest: (status, kind, text.encode())


JSON, HTML = "application/json", "text/html"
ANSWERS: dict[str, Callable[..., tuple[int, str, bytes]]] = {
    "500_html": _status(500, HTML, "<html><body>Internal Server Error</body></html>"),
    "500_json": _status(500, JSON, '{"error": {"message": "internal", "type": "server_error"}}'),
    "502_html": _status(502, HTML, "<html>Bad Gateway</html>"),
    "429": _status(429, JSON, '{"error": {"message": "slow down"}}'),
    "400": _status(400, JSON, '{"error": {"message": "this model\'s maximum context length is 512 tokens"}}'),
    "404": _status(404, JSON, '{"error": {"message": "The model does not exist."}}'),
    "html_200": _status(200, HTML, "<html>Please log in</html>"),
    "text_200": _status(200, "text/plain", "ok"),
    "empty_object": _status(200, JSON, "{}"),
    "empty_body": _status(200, JSON, ""),
    "error_200": _status(200, JSON, '{"error": {"message": "overloaded"}}'),
    "no_choices": _status(200, JSON, '{"choices": []}'),
    "cut_envelope": _status(200, JSON, '{"choices": [{"message": {"content": "{\\"text\\": \\"A do'),
    "ten_megabytes": lambda server, body, honest: (200, JSON, server.wrap(body, "A dog. " * (BIG // 7), "stop")),
    "null_content": _talk(None),
    "empty": _talk(""),
    "cut_json": _talk(lambda honest: honest[: max(2, len(honest) * 2 // 3)]),
    "length": _talk(lambda honest: honest[: len(honest) // 2], "length"),
    "length_blanks": _talk(lambda honest: '{"text":' + " \n" * 300, "length"),
    "blanks": _talk('{"text":' + " \n" * 300),
    "wrong_schema": _talk('{"caption": "A dog.", "score": 1}'),
    "wrong_type": _talk('{"text": ["A dog."]}'),
    "content_filter": _talk("", "content_filter"),
    "fenced": _talk(lambda honest: f"```json\n{honest}\n```"),
    "thinking": _talk(lambda honest: f"<think>The caption says {{a dog}}. Merge.</think>\n{honest}"),
    "thinking_cut": _talk("<think>The raw caption says that"),
    "chatter": _talk(lambda honest: f"Sure! Here is the answer:\n\n{honest}\n\nLet me know if it helps."),
}
BREAKS = ("hang", "reset", "cut_body", "slow_body")  # of the connection


def honest_text(body: Body) -> str:
    """The caption (else the raw text) of the row in a prompt, with its first two tags."""
    question = str(body["messages"][-1]["content"])
    found = {}
    for name, label in {
        "caption": "synthetic caption",
        "raw": "Raw caption",
        "tags": "highly relevant detection tags",
    }.items():
        match = re.search(rf"<{name}>\s*(.*?)\s*</{name}>", question, re.DOTALL) or re.search(
            rf"{label}:<(.*?)>", question
        )
        found[name] = match[1] if match and match[1] != "none" else ""
    tags = [tag.strip() for tag in found["tags"].split(",") if tag.strip()][:2]
    text = (found["caption"] or found["raw"] or "a picture").strip().rstrip(".")
    return f"{text}, with {' and '.join(tags)}." if tags else f"{text}."


class FaultServer:
    """One that may be asked by many at a time. `requests`: row -> times asked; `log`: (row, fault or "") in order;
    `authorizations`: headers that came; `usage`: [prompt, completion] tokens of all answers that hold them."""

    def __init__(
        self,
        faults: Mapping[str, float] | Callable[[str, int], str | None] | None = None,
        delay: float = 0.0,
        *,
        answer: Callable[[Body], str] = honest_text,
        row: str = r"\brow[ -]?\d+",
        key: str | None = None,
        retry_after: str = "0",
    ):
        self.faults, self.delay, self.answer, self.key, self.retry_after = faults or {}, delay, answer, key, retry_after
        unknown = set(self.faults if isinstance(self.faults, Mapping) else ()) - set(ANSWERS) - set(BREAKS)
        assert not unknown, f"no such fault: {unknown}"
        self.row = re.compile(row)
        self.requests: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.bodies: list[Body] = []  # the last 10,000 questions
        self.authorizations: set[str | None] = set()
        self.usage, self.most_at_once, self._now = [0, 0], 0, 0
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> FaultServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._converse, "127.0.0.1", 0, limit=1 << 24, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read one request and answer it; whether the connection lives on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        self.authorizations.add(headers.get("authorization"))
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            said = json.dumps({"error": {"message": f"wrong key: {headers.get('authorization')}"}}).encode()
            return await self._send(writer, 401, JSON, said)
        if first.startswith("GET") and first.split()[1].endswith("/models"):
            return await self._send(
                writer, 200, JSON, b'{"object": "list", "data": [{"id": "tiny", "object": "model"}]}'
            )
        if not first.split()[1].endswith("/v1/chat/completions"):
            return await self._send(writer, 404, JSON, b'{"detail": "Not Found"}')
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            return await self._complete(writer, json.loads(data))
        finally:
            self._now -= 1

    async def _complete(self, writer: asyncio.StreamWriter, body: Body) -> bool:
        row = self.find_row(body)
        fault = self.choose(row, self.requests[row])
        self.requests[row] += 1
        self.log.append((row, fault or ""))
        if len(self.bodies) < 10_000:
            self.bodies.append(body)
        if self.delay:
            await asyncio.sleep(self.delay)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            return False
        text = self.answer(body)
        honest = json.dumps({"text": text}) if "json_schema" in str(body.get("response_format")) else text
        if fault in ANSWERS:
            return await self._send(writer, *ANSWERS[fault](self, body, honest))
        reply = self.wrap(body, honest, "stop")
        return await self._send(writer, 200, JSON, reply, cut=fault == "cut_body", slow=fault == "slow_body")

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, kind: str, data: bytes, cut: bool = False, slow: bool = False
    ) -> bool:
        more = f"Retry-After: {self.retry_after}\r\n" if status == 429 else ""
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{more}\r\n".encode()
        )
        if slow:  # a byte now and then
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.write(data[: len(data) // 2] if cut else b"" if slow else data)
        await writer.drain()
        if cut:
            writer.close()
        return not cut

    def wrap(self, body: Body, content: Any, finish: str | None) -> bytes:
        """A chat completion; tokens are words."""
        prompt = sum(len(str(message["content"]).split()) for message in body["messages"])
        completion = len(str(content).split())
        self.usage[0] += prompt
        self.usage[1] += completion
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return json.dumps({"id": "x", "model": body.get("model"), "choices": [choice], "usage": usage}).encode()

    def find_row(self, body: Body) -> str:
        text = str(body["messages"][-1]["content"])
        match = self.row.search(text)
        return match[0] if match else hashlib.sha256(text.encode()).hexdigest()[:16]

    def choose(self, row: str, before: int) -> str | None:
        """The fault of a row's question after `before` others."""
        if callable(self.faults):
            return self.faults(row, before)
        place = int.from_bytes(hashlib.sha256(f"{row}:{before}".encode()).digest()[:6], "big") / 2**48
        for name, share in self.faults.items():
            if place < share:
                return name
            place -= share
        return None
