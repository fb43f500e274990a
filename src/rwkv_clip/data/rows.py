"""Rows: what every reader of a source yields, and what they share.

A reader takes a file and a `Skip`, and yields a `Row` for each entry, in the file's order. Whether a picture or text is
of use is judged later: here a row is complete, or holds a `Problem` in place of a value, or SourceError names the
place.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import DATA
from ..files import parse_json
from .image import MAX_BYTES

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
MAX_TEXT_BYTES = 1 << 20
MAX_LINE = 48 << 20  # the largest picture in base64, and some text
MAX_DEPTH = 100  # of lists in lists; what is nested deeper cannot be handed to a worker process
SHORT = 200  # bytes that hold neither a picture nor anything so deep

# How pictures begin in base64: JPEG, PNG, GIF, RIFF (WebP), BMP, TIFF (both byte orders), AVIF.
_BASE64 = re.compile(
    r"(?:data:image/[\w.+-]+;base64,)?(?=[/_]9j[/_]|iVBORw0KGg|R0lGOD|UklGR|Qk[0-3]|SUkq|TU0AK|AAAA..Z0eXBhdml)"
)
IMAGE_NAME = r"\.(?:" + "|".join(IMAGE_ENDINGS) + ")"  # how the name of a picture ends
PICTURE_PATH = re.compile(IMAGE_NAME + r"\s*$", re.IGNORECASE)


class SourceError(ValueError):
    """An input file is missing, damaged or of an unknown kind; names file and place."""

    exit_code = DATA


class Problem(str):
    """Takes the place of a value that is missing: the reason under which the row is counted as skipped."""


MISSING = Problem("missing image")
UNLISTED = Problem("captions of a picture that is not listed")


class Row(NamedTuple):
    """One image with its texts, as found: `fields` by name.

    folder: the one that file names in the fields are relative to; None where they name no files here.
    image: the picture that came with the row, which no field replaces; None where a field names or holds it.
    """

    name: str
    fields: dict[str, Any]
    folder: Path | None
    image: bytes | Problem | None = None


def make_row(file: Path, place: str, fields: Any) -> Row:
    """The row at `place` of a manifest. SourceError if the fields are no object."""
    if not isinstance(fields, dict):
        raise SourceError(f"{file}: {place} is a {type(fields).__name__}, not an object with named fields")
    return Row(f"{file.name} {place}", fields, file.parent)


class Skip:
    """Counts down the rows to pass over, across files."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def pass_over(self, rows: int) -> bool:
        """Whether all of the next `rows` are to be passed over; if so, they are counted."""
        if self.left < rows:
            return False
        self.left -= rows
        return True


def load_json(data: bytes, file: Path, place: str) -> Any:
    """The JSON value in `data`. SourceError names file and place."""
    try:
        value = parse_json(data, f"{file}: {place}")
    except ValueError as error:
        raise SourceError(str(error)) from None
    if len(data) > SHORT and data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise SourceError(f"{file}: {place}: JSON nested more than {MAX_DEPTH} deep; flatten it or leave it out")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def iterate_lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of a file. SourceError for a line beyond MAX_LINE, before it is read whole."""
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise SourceError(f"{file}: line {number} has more than {MAX_LINE:,} bytes; is it a text file?")
        yield number, line


# ---- pictures in base64 ----------------------------------------------------------------------------------------------


def decode_picture(text: str) -> bytes | Problem | None:
    """The picture that `text` holds in base64, with or without `data:image/...;base64,`; None if it holds none."""
    start = _BASE64.match(text)
    if not start:
        return None
    text = text[start.end() :].strip()
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        return Problem("image too large")
    try:
        return base64.b64decode(text, altchars=b"-_" if "-" in text or "_" in text else None, validate=True)
    except (binascii.Error, ValueError):
        return Problem("image is not complete base64")


def take_pictures(row: Row) -> Row:
    """`row` with its base64 decoded. The only picture is the row's own, unless a field names a file of a picture."""
    long = [field for field, value in row.fields.items() if type(value) is str and len(value) > SHORT // 2]
    found = {field: picture for field in long if (picture := decode_picture(row.fields[field])) is not None}
    if not found:
        return row
    named = any(
        type(value) is str and len(value) < 4096 and PICTURE_PATH.search(value) for value in row.fields.values()
    )
    own = next(iter(found.values())) if len(found) == 1 and not named else None
    return row._replace(fields={**row.fields, **found}, image=own)


def first_line(error: Exception) -> str:
    """What a library says, without the lines that follow."""
    return str(error).partition("\n")[0]
