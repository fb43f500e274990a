"""The search page over HTTP: uvicorn, which only this file imports, serves the application until a signal ends it.

Nobody keeps a connection for nothing: within two spans of PATIENCE seconds a client sends the whole head of a request,
and of an answer it takes LEAST_TAKEN bytes in each, or it is cut off. (The application looks after the bodies.)
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .application import LOOPBACK, build_app
from .collection import Collection

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ImportError("the search page needs starlette and uvicorn; pip install -e .[search]") from error

MAX_HEAD = 131_072  # bytes of a request's line and headers: MAX_LETTERS Chinese letters are 72,000
PATIENCE = 15.0  # seconds
LEAST_TAKEN = 15_000  # bytes of an answer
GRACE = 5  # seconds that requests have left once the server is told to end
MOST_CONNECTIONS = 1_000


def serve(
    collection: Collection,
    host: str = LOOPBACK,
    port: int = 8000,
    *,
    allow_host: Sequence[str] = (),
    allow_origin: Sequence[str] = (),
    ready: Callable[[str], object] = print,
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP and return 0; a second signal ends what is still under way. port 0: a free
    one. `ready` is called with the page's address. OSError where the address cannot be used."""
    app = build_app(collection, host=host, allow_host=allow_host, allow_origin=allow_origin)
    with listen(host, port) as listener:
        server = uvicorn.Server(configure(app))
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}/")
        with _ending(server):
            asyncio.run(server.serve(sockets=[listener]))
    return 0


def configure(app: Any) -> uvicorn.Config:
    """How uvicorn serves an application."""
    return uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE,
        limit_concurrency=MOST_CONNECTIONS,
    )


class Connection(H11Protocol):
    """A client's connection, which is looked at every PATIENCE seconds.

    uvicorn itself ends a connection only before the first byte of a further request: a head that comes byte by byte, or
    not at all, and an answer that nobody reads would stay for ever.
    """

    _answered = 0  # requests
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look."""
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        """End looking."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Count."""
        self._answered += 1
        super().on_response_complete()

    def _look_again(self) -> None:
        before = self._answered, self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(PATIENCE, self._look, *before)

    def _look(self, answered: int, unread: int) -> None:
        """answered, unread: requests that were answered, and bytes that the client had not taken, the time before."""
        waiting = self.cycle is None or self.cycle.response_complete  # for the head of a request
        left = self.transport.get_write_buffer_size()
        stands_still = left > max(0, unread - LEAST_TAKEN) if unread else waiting and not left
        if answered == self._answered and stands_still:
            self.transport.abort()
        else:
            self._look_again()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. OSError, which names the address.

    Its protocol is named: asyncio sends small pieces at once only on sockets that say TCP, and else an answer on a
    connection that is used again waits for the client's delayed acknowledgement, 40 ms.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return listener


@contextlib.contextmanager
def _ending(server: uvicorn.Server) -> Iterator[None]:
    """A signal ends the server and nothing else: uvicorn raises those that it caught again afterwards."""

    def stop(number: int, _: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
