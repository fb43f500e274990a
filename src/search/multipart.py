"""The parts of a multipart/form-data body, as browsers and curl send them (RFC 7578).

The body is in memory already and bounded by its reader; nothing is written to disk, and file names are dropped: what a
client calls its file says nothing about its content.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .query import RequestError

MAX_PARTS = 100
MAX_HEADER = 8_192  # bytes of one part's header
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.IGNORECASE)
_FILE = re.compile(rb"[;\s]filename\*?=", re.IGNORECASE)


class Part(NamedTuple):
    """A field or a file of a form."""

    name: str
    data: bytes
    is_file: bool


def read_parts(content_type: str, body: bytes) -> list[Part]:
    """All parts, in order. RequestError (400) where the body is not what `content_type` says."""
    found = _BOUNDARY.search(content_type)
    if not found:
        raise RequestError("multipart: the content type names no boundary")
    mark = re.escape(b"--" + (found[1] or found[2]).encode("latin-1", "replace"))
    # A mark stands at the start of a line, which may be the body's first, and has its line for itself.
    whole = b"\r\n" + body
    marks = re.finditer(rb"\r\n" + mark + rb"(--|[ \t]*(?=\r\n))", whole)
    parts: list[Part] = []
    start = None
    for place in marks:
        if start is not None:
            parts.append(_read_part(whole[start : place.start()]))
        if place[1] == b"--":
            return parts
        if len(parts) == MAX_PARTS:
            raise RequestError(f"multipart: more than {MAX_PARTS} parts")
        start = place.end()
    raise RequestError("multipart: the body ends before its last boundary")


def _read_part(piece: bytes) -> Part:
    """A part of what stands between two marks; it begins with the end of the first one's line."""
    end = piece.find(b"\r\n\r\n", 0, MAX_HEADER + 4)
    if end < 0:
        raise RequestError("multipart: a part without a header")
    for line in piece[2:end].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition" and (name := _NAME.search(b";" + value)):
            text = (name[1] if name[1] is not None else name[2]).decode("utf-8", "replace")
            return Part(text, piece[end + 4 :], bool(_FILE.search(value)))
    raise RequestError("multipart: a part without a name")
