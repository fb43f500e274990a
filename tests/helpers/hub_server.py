"""A small hub on this machine: what huggingface_hub asks for to fetch and to upload files, kept in a dict.

A client takes it by HF_ENDPOINT, which is read when huggingface_hub is imported: use it from another process.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def number(*parts: object) -> str:
    """A commit or a tag of a file: 40 digits."""
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()


@dataclass
class HubServer:
    """Files by (repository, revision, name), and what is done to clients."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # method and path, in order
    cut_at: int | None = None  # bytes after which the next answer ends, once for each file
    broken: set[str] = field(default_factory=set)  # files that were cut
    refuse: int | None = None  # status of every write
    endpoint: str = ""

    def names(self, repository: str, revision: str = "main") -> set[str]:
        return {name for owner, at, name in self.files if (owner, at) == (repository, revision)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer_json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        repository, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/")
            there = any(owner == name for owner, _, _ in self.hub.files)
            return self._answer_json({"id": name}) if there else self._answer(404, X_Error_Code="RepoNotFound")
        if not rest:
            return self._answer(200, b"{}", Content_Type="application/json")
        content = self.hub.files.get((repository, revision, name))
        if content is None:
            there = any(owner == repository for owner, _, _ in self.hub.files)
            return self._answer(404 if there else 401, X_Error_Code="EntryNotFound" if there else "RepoNotFound")
        tags = {"X_Repo_Commit": number(repository, revision), "ETag": f'"{number(name, content)}"'}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.command == "HEAD":
            return self._answer(200, content, **tags)
        if self.hub.cut_at is not None and name not in self.hub.broken:
            self.hub.broken.add(name)
            self.send_response(200)
            for key, value in {"Content-Length": str(len(content)), **tags}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[: self.hub.cut_at])
            self.close_connection = True
            return None
        if start:
            tags["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._answer(206 if start else 200, content[start:], **tags)

    do_GET = do_HEAD

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.refuse:
            return self._answer_json({"error": "Invalid username or password."}, self.hub.refuse)
        if path == "/api/repos/create":
            name = json.loads(body)
            return self._answer_json({"url": f"{self.hub.endpoint}/{name.get('organization', 'me')}/{name['name']}"})
        parts = path.removeprefix("/api/models/").split("/")
        repository, action, revision = "/".join(parts[:2]), parts[2], parts[3] if len(parts) > 3 else "main"
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._answer_json({"files": [{**file, "shouldIgnore": False} for file in files]})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.hub.files[repository, revision, value["path"]] = base64.b64decode(value["content"])
            url = f"{self.hub.endpoint}/{repository}/commit/{number(repository, revision)}"
            return self._answer_json(
                {"commitUrl": url, "commitOid": number(repository, revision), "pullRequestUrl": None}
            )
        return self._answer_json({})


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A hub that runs while the block does."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
