"""What is asked: the parameters of a request, checked, and the errors that a client is answered with.

All limits of a request stand here; those of a picture's pixels are in `rwkv_clip.data.image`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

MAX_LETTERS = 8_000  # of a text; the model reads the beginning, as long as its context is
MAX_RESULTS = 200  # of one answer
MAX_DEPTH = 5_000  # the last place that can be asked for: offset + k
MAX_UPLOAD = 32_000_000  # bytes of a picture, the library's own limit
MAX_FILTERS = 64  # values in one request
DEFAULT_RESULTS = 40
DEFAULT_WEIGHT = 0.5
OWN_NAMES = ("q", "k", "row", "weight", "offset")


class RequestError(ValueError):
    """A request that cannot be answered. `status`: of HTTP; the message is one line."""

    def __init__(self, message: str, status: int = 400, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question: a text, a picture, a row of the collection, a vector, or a text with one of the others.

    weight: the picture's (or the row's) share where a text is mixed with it, 0 to 1. filters: field -> values, one of
    which a row has.
    """

    text: str = ""
    picture: bytes | None = field(default=None, repr=False)
    row: int | None = None
    vector: tuple[float, ...] | None = field(default=None, repr=False)
    weight: float = DEFAULT_WEIGHT
    k: int = DEFAULT_RESULTS
    offset: int = 0
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """What was understood, for the answer; an uploaded picture is only named."""
        shown: dict[str, object] = {"k": self.k, "offset": self.offset}
        if self.text:
            shown["text"] = self.text
        if self.row is not None:
            shown["row"] = self.row
        if self.picture is not None:
            shown["picture"] = True
        if self.text and (self.row is not None or self.picture is not None):
            shown["weight"] = self.weight
        if self.filters:
            shown["filters"] = {name: list(values) for name, values in self.filters.items()}
        return shown


def read_query(
    pairs: Iterable[tuple[str, str]], rows: int, fields: Collection[str], picture: bytes | None = None
) -> Query:
    """A query of the parameters `pairs`. rows: of the collection; fields: those by which it may be filtered.
    RequestError."""
    given: dict[str, str] = {}
    filters: dict[str, list[str]] = {}
    for name, value in pairs:
        if name in OWN_NAMES:
            if name in given:
                raise RequestError(f"{name}: given twice; give it once")
            given[name] = value
        elif name in fields:
            filters.setdefault(name, []).append(value)
        else:
            known = ", ".join([*OWN_NAMES, *fields])
            raise RequestError(f"{shorten(name)}: no such parameter; there are {known}")
    if sum(map(len, filters.values())) > MAX_FILTERS:
        raise RequestError(f"more than {MAX_FILTERS} values to filter by; give fewer")
    row = _whole("row", given["row"], 0, rows - 1) if given.get("row") else None
    if row is not None and picture is not None:
        raise RequestError("row: a picture was sent, too; give one of the two")
    k = _whole("k", given.get("k") or DEFAULT_RESULTS, 1, MAX_RESULTS)
    return Query(
        text=check_text("q", given.get("q", "")),
        picture=picture,
        row=row,
        weight=_share("weight", given.get("weight") or DEFAULT_WEIGHT),
        k=k,
        offset=_whole("offset", given.get("offset") or 0, 0, MAX_DEPTH - k),
        filters={name: tuple(dict.fromkeys(values)) for name, values in sorted(filters.items())},
    )


def check_text(name: str, text: str) -> str:
    """The text without blanks around it. RequestError beyond MAX_LETTERS."""
    text = text.strip()
    if len(text) > MAX_LETTERS:
        raise RequestError(f"{name}: {len(text):,} letters, more than {MAX_LETTERS:,}; shorten it")
    return text


def shorten(value: object, length: int = 60) -> str:
    """A client's own words in an error: one line, printable, short."""
    text = "".join(letter if letter.isprintable() else "�" for letter in str(value)[: length + 1])
    return text if len(text) <= length else text[: length - 1] + "…"


def _whole(name: str, value: str | int, least: int, most: int) -> int:
    """A whole number between `least` and `most`."""
    text = str(value)
    # int() takes blanks, underscores and other scripts' digits, too
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and least <= int(text) <= most):
        raise RequestError(f"{name}: {shorten(text)!r} is not a whole number from {least} to {most}")
    return int(text)


def _share(name: str, value: str | float) -> float:
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise RequestError(f"{name}: {shorten(value)!r} is not a number from 0 to 1")
    return share
