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
    mark = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    # Each mark stands at the start of a line. The first one may be the body's first line.
    pieces = (b"\r\n" + body).split(b"\r\n" + mark, MAX_PARTS + 2)
    if len(pieces) > MAX_PARTS + 2:
        raise RequestError(f"multipart: more than {MAX_PARTS} parts")
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise RequestError("multipart: the body ends before its last boundary")
    return [_read_part(piece) for piece in pieces[1:-1]]


def _read_part(piece: bytes) -> Part:
    start = piece.find(b"\r\n")
    end = piece.find(b"\r\n\r\n", start, start + MAX_HEADER + 4)
    if start < 0 or piece[:start].strip(b" \t") or end < 0:
        raise RequestError("multipart: a part without a header")
    for line in piece[start + 2 : end].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition" and (name := _NAME.search(b";" + value)):
            text = (name[1] if name[1] is not None else name[2]).decode("utf-8", "replace")
            return Part(text, piece[end + 4 :], bool(_FILE.search(value)))
    raise RequestError("multipart: a part without a name")
