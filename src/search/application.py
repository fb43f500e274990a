"""The search page and its JSON API as an application: Starlette, which only this file imports; server.py serves it.

What a client sends is bounded before it is read or decoded, rows are named by number and never by a path, no address is
fetched, and every answer carries headers that keep other sites' scripts, frames and pages out. A server on loopback
answers only to loopback's own names, so that no web page can reach it through a name of its own (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rwkv_clip.data.image import ImageError

from .contract import describe_api, draw_contract
from .knn_service import check_index, read_ids, read_knn_query, read_object, write_results
from .multipart import read_parts
from .query import MAX_UPLOAD, Query, RequestError, read_query, shorten
from .service import Collection, Room, Service
from .thumbnails import SIDES

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError("the search page needs starlette and uvicorn; pip install -e .[search]") from error

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/words.js": ("words.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
LOOPBACK = "127.0.0.1"
MAX_BODY = MAX_UPLOAD + 65_536  # a picture and the form around it
MAX_JSON = MAX_UPLOAD * 4 // 3 + 65_536  # a picture as base64
MOST_UPLOADS = 16  # bodies that are being read at the same time
PATIENCE = 15.0  # seconds without a byte of a body
WHOLE_PATIENCE = 120.0  # seconds for all of it
DAY = "private, max-age=86400, immutable"
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}
log = logging.getLogger("rwkv_clip.search")
Handler = Callable[[Request], Awaitable[Response]]


def build_app(
    collection: Collection, *, host: str = LOOPBACK, allow_host: Sequence[str] = (), allow_origin: Sequence[str] = ()
) -> Starlette:
    """The application. host: the address that it is served on; allow_host: further names that requests may use on
    loopback; allow_origin: origins (https://example.org) whose pages may call the API. ValueError."""
    for origin in allow_origin:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path):
            raise ValueError(f"allow_origin: {origin!r} is not an origin such as https://example.org")
    hosts = {"localhost", LOOPBACK, "::1", *map(str.lower, allow_host)} if is_loopback(host) else None
    handlers = _Handlers(Service(collection))
    middleware = [Middleware(_Guard, hosts=hosts, origins=allow_origin)]
    if allow_origin:
        middleware.append(Middleware(CORSMiddleware, allow_origins=allow_origin, allow_methods=["GET", "POST"]))

    @contextlib.asynccontextmanager
    async def live(_: Starlette) -> AsyncIterator[None]:
        yield
        handlers.service.close()

    return Starlette(
        routes=[*handlers.routes(), *_page_routes()],
        middleware=middleware,
        lifespan=live,
        exception_handlers={
            RequestError: _explain,
            ImageError: _explain,
            HTTPException: _explain,
            ClientDisconnect: _explain,
        },
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handlers:
    """What answers each route."""

    def __init__(self, service: Service):
        self.service = service
        self.contract = describe_api(service.fields)
        self._uploads = Room(MOST_UPLOADS)

    def routes(self) -> list[Route]:
        return [
            Route("/api/search", self.search, methods=["GET"]),
            Route("/api/search", self.search_picture, methods=["POST"]),
            Route("/api/picture/{row}", self.picture),
            Route("/api/thumbnail/{row}", self.thumbnail),
            Route("/api/about", self.tell),
            Route("/api/openapi.json", self.openapi),
            Route("/api", self.read_contract),
            Route("/knn-service", self.knn_service, methods=["POST"]),
            Route("/metadata", self.metadata, methods=["POST"]),
            Route("/indices-list", self.indices),
        ]

    async def search(self, request: Request) -> Response:
        return write_json(await self.service.answer(self._read(request.query_params.multi_items())))

    async def search_picture(self, request: Request) -> Response:
        """The picture is the body, or a file of a form, whose other fields are parameters."""
        pairs, kind = request.query_params.multi_items(), request.headers.get("content-type", "")
        body = await self._read_body(request, MAX_BODY)
        if kind.lower().startswith("multipart/"):
            parts = read_parts(kind, body)
            files = [part.data for part in parts if part.is_file]
            if len(files) > 1:
                raise RequestError(f"{len(files)} files were sent; send one picture")
            pairs += [(part.name, part.data.decode("utf-8", "replace")) for part in parts if not part.is_file]
            body = files[0] if files else b""
        elif "urlencoded" in kind or "json" in kind:
            raise RequestError("send the picture as the body (image/jpeg) or as a file of a form", 415)
        if not body:
            raise RequestError("the request holds no picture")
        if len(body) > MAX_UPLOAD:
            raise _too_large(MAX_UPLOAD)
        return write_json(await self.service.answer(self._read(pairs, body)))

    async def picture(self, request: Request) -> Response:
        return await self._show(request)

    async def thumbnail(self, request: Request) -> Response:
        side = request.query_params.get("side", "256")
        least, most = SIDES
        if not (side.isascii() and side.isdigit() and len(side) < 6 and least <= int(side) <= most):
            raise RequestError(f"side: {shorten(side)!r} is not a whole number from {least} to {most}")
        return await self._show(request, int(side))

    async def _show(self, request: Request, side: int = 0) -> Response:
        """A row's picture. Browsers keep it where the address names the version: rows may be others after a restart."""
        data, kind = await self.service.picture(self._row(request), side)
        kept = request.query_params.get("v") == self.service.version
        return Response(data, media_type=kind, headers={"Cache-Control": DAY if kept else "no-cache"})

    async def tell(self, request: Request) -> Response:
        return write_json(await self.service.about())

    async def openapi(self, request: Request) -> Response:
        return write_json(self.contract)

    async def read_contract(self, request: Request) -> Response:
        return Response(draw_contract(self.contract), media_type="text/html")

    async def knn_service(self, request: Request) -> Response:
        content = read_object(await self._read_body(request, MAX_JSON))
        query, shown = read_knn_query(content, self.service.collection.name)
        if query.picture is not None and len(query.picture) > MAX_UPLOAD:
            raise _too_large(MAX_UPLOAD)
        rows, scores, _, _ = await self.service.find(query)
        described = await self.service.describe(rows[:shown])
        return write_json(write_results(rows, scores, described, str(request.base_url).rstrip("/")))

    async def metadata(self, request: Request) -> Response:
        content = read_object(await self._read_body(request, 1 << 20))
        check_index(content, self.service.collection.name)
        rows = read_ids(content, len(self.service.collection))
        described = await self.service.describe(rows)
        return write_json([{"id": row, "metadata": about} for row, about in zip(rows, described)])

    async def indices(self, request: Request) -> Response:
        return write_json([self.service.collection.name])

    def _read(self, pairs: list[tuple[str, str]], picture: bytes | None = None) -> Query:
        alike = [("q" if name == "text" and name not in self.service.fields else name, value) for name, value in pairs]
        return read_query(alike, len(self.service.collection), self.service.fields, picture)

    def _row(self, request: Request) -> int:
        row, rows = request.path_params["row"], len(self.service.collection)
        if not (row.isascii() and row.isdigit() and len(row) < 10 and int(row) < rows):
            raise RequestError(f"{shorten(row)!r} is not a row of the collection: 0 to {rows - 1}", 404)
        return int(row)

    async def _read_body(self, request: Request, most: int) -> bytes:
        """The whole body. RequestError (413, 408, 503)."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and (len(declared) > 15 or int(declared) > most):
            raise _too_large(most)
        body, stream = bytearray(), request.stream()
        end = asyncio.get_running_loop().time() + WHOLE_PATIENCE
        with self._uploads:
            while True:
                left = min(PATIENCE, end - asyncio.get_running_loop().time())
                try:
                    body += await asyncio.wait_for(anext(stream), left)
                except StopAsyncIteration:
                    return bytes(body)
                except (asyncio.TimeoutError, TimeoutError):
                    raise RequestError("the request's body came too slowly", 408, {"Connection": "close"}) from None
                if len(body) > most:
                    raise _too_large(most)


def _too_large(most: int) -> RequestError:
    return RequestError(f"more than {most:,} bytes; send a smaller picture", 413, {"Connection": "close"})


class _Guard:
    """Refuses foreign hosts and origins, adds the security headers to every answer, and answers a bug with one line."""

    def __init__(self, app: ASGIApp, hosts: set[str] | None, origins: Sequence[str]):
        self.app, self.hosts, self.origins = app, hosts, origins
        headers = {**SECURITY, "Cross-Origin-Resource-Policy": "cross-origin" if origins else "same-origin"}
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in self.headers if pair[0] not in given)]
            await send(message)

        try:
            if refusal := self._refuse(Request(scope)):
                await refusal(scope, receive, send_guarded)
            else:
                await self.app(scope, receive, send_guarded)
        except Exception:
            log.exception("%s %s", scope["method"], shorten(scope["path"]))
            if not started:
                await write_error("an error of the server; its log says more", 500)(scope, receive, send_guarded)

    def _refuse(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if self.hosts is not None and _name_of(host) not in self.hosts:
            return write_error(f"host: {shorten(host)!r} is not a name of this server; open it as localhost", 421)
        origin = request.headers.get("origin")
        same = origin is None or urlsplit(origin).netloc.lower() == host.lower() or {origin, "*"} & set(self.origins)
        if not same:
            return write_error(f"origin: pages of {shorten(origin)!r} may not call this server", 403)
        return None


def _name_of(host: str) -> str:
    """A Host header without its port, lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if "@" not in host else ""
    except ValueError:
        return ""


def _page_routes() -> list[Route]:
    return [Route(path, _show_file(PAGE / name, kind)) for path, (name, kind) in FILES.items()]


def _show_file(path: Path, kind: str) -> Handler:
    """A file of the page, read once; browsers ask each time whether it changed."""
    data = path.read_bytes()
    headers = {"Cache-Control": "no-cache", "ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}

    async def show(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return show


def write_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Compact JSON, UTF-8; letters that UTF-8 does not have (half of a pair) become question marks."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    shown = {"Cache-Control": "no-store", **(headers or {})}
    return Response(text.encode("utf-8", "replace"), status, shown, "application/json")


def write_error(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """{"error": one line}."""
    return write_json({"error": " ".join(text.split())}, status, headers)


async def _explain(request: Request, error: Exception) -> Response:
    """The answer to a request that cannot be answered."""
    if isinstance(error, ImageError):
        return write_error(str(error), 413 if error.reason == "image too large" else 415)
    if isinstance(error, RequestError):
        return write_error(str(error), error.status, error.headers)
    if isinstance(error, HTTPException):
        what = {404: "no such page; /api says what there is", 405: f"{request.method} is not for this address"}
        return write_error(what.get(error.status_code, error.detail), error.status_code, dict(error.headers or {}))
    return write_error("the connection ended within the request", 400)
