"""Rows with their pictures: the three texts side by side, what was refused, and why."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from rwkv_clip.data.image import open_image

from .numbers import plain

SIDE, QUALITY = 224, 80  # pixels of a thumbnail's longer side, of its JPEG
OPEN = 10  # rows that are shown at once; the others are folded
Pictures = Callable[[dict[str, Any]], bytes | None]
Thumbnail = tuple[int, int, bytes] | str  # width, height, JPEG; or why there is none
Thumbnails = dict[tuple[Any, Any], Thumbnail]  # by number and id of the row
NAMELESS = "the row names no picture"


def read_thumbnails(rows: Iterable[dict[str, Any]], pictures: Pictures) -> Thumbnails:
    """Thumbnails of rows (of `numbers.cut_row`), read in the order of their source, which is one pass over it."""
    found: Thumbnails = {}
    for row in sorted(rows, key=lambda row: row.get("row") or 0):
        if (key := _key(row)) not in found:
            found[key] = _read_thumbnail(row, pictures)
    return found


def _key(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("row"), row.get("id")


def _read_thumbnail(row: dict[str, Any], pictures: Pictures) -> Thumbnail:
    if not row.get("image") and "row" not in row:
        return NAMELESS
    try:
        data = pictures(row)
        if data is None:
            return "not found" if row.get("image") else NAMELESS
        return shrink(data)
    except (OSError, ValueError) as error:
        return plain(str(error).removeprefix("image: "), 160)


def draw_rows(rows: Sequence[dict[str, Any]], thumbnails: Thumbnails) -> str:
    """HTML of rows (of `numbers.cut_row`), the first OPEN of them unfolded."""
    cards = [_draw_row(row, thumbnails) for row in rows]
    if len(cards) <= OPEN:
        return "".join(cards) or '<div class="empty">None.</div>'
    folded = f"<details><summary>{len(cards) - OPEN} more rows</summary>{''.join(cards[OPEN:])}</details>"
    return "".join(cards[:OPEN]) + folded


def _draw_row(row: dict[str, Any], thumbnails: Thumbnails) -> str:
    refused = row.get("composed") and row.get("composed") != row.get("generated")
    marked = [*row.get("unsupported", ()), *row.get("new_numbers", ()), *row.get("new_names", ())]
    texts = [
        _text("raw", "Raw", row, row.get("clean") or row.get("raw")),
        _text("caption", "Caption", row, row.get("caption")),
        _text("generated", "Generated", row, row.get("generated"), () if refused else marked),
    ]
    parts = [_about(row), f'<div class="texts">{"".join(texts)}</div>']
    if refused:
        who = user(plain(row.get("composer") or "the composer", 80))
        text = _highlight(row["composed"], marked)
        parts.append(f'<div class="refused"><small>Written by {who}, not taken:</small> {text}</div>')
    chips = [("bad", f"rejected: {reason}") for reason in row.get("rejects", ())]
    known = " ".join(row.get("rejects", ()))
    chips += [("bad", f"not in the sources: {word}") for word in row.get("unsupported", ()) if word not in known]
    chips += [("bad", f"lost: {fact}") for fact in row.get("lost_facts", ())]
    if row.get("compose_status", "ok") != "ok":
        chips.append(("bad", f"{row['compose_status']}: {row.get('compose_reason', 'no reason given')}"))
    chips += [("", tag) for tag in row.get("tags", ())]
    if chips:
        parts.append('<div class="tags">' + "".join(_chip(kind, text) for kind, text in chips) + "</div>")
    picture = _draw_thumbnail(row, thumbnails[_key(row)])
    return f'<article class="row"><div>{picture}</div><div>{"".join(parts)}</div></article>'


def _about(row: dict[str, Any]) -> str:
    parts = [f'<span class="id user">{escape(plain(row.get("id"), 80))}</span>']
    if row.get("engine"):
        parts.append(f"<span>text by {user(plain(row['engine'], 80))}</span>")
    if row.get("unsupported_rate") is not None:
        parts.append(f"<span>unsupported nouns {100 * row['unsupported_rate']:.0f} %</span>")
    if row.get("duplicate_of") or row.get("near_duplicate_of"):
        parts.append(f"<span>repeats {user(plain(row.get('duplicate_of') or row.get('near_duplicate_of'), 80))}</span>")
    if row.get("keep") is False:
        parts.append(f"<span>dropped: {user(plain(row.get('drop_reason') or 'no reason given', 80))}</span>")
    return f'<div class="about">{"".join(parts)}</div>'


def _text(kind: str, name: str, row: dict[str, Any], text: str | None, marked: Sequence[str] = ()) -> str:
    facts = []
    if row.get(f"tokens_{kind}") is not None and text:
        facts.append(f"{row[f'tokens_{kind}']} tokens")
    if row.get(f"clip_{kind}") is not None:
        facts.append(f"CLIP {row[f'clip_{kind}']:.3f}")
    about = f" &middot; {', '.join(facts)}" if facts else ""
    shown = _highlight(text, marked) if text else '<span class="soft">none</span>'
    return f'<div class="{kind}"><h4><b>{name}</b>{about}</h4><p>{shown}</p></div>'


def _highlight(text: str, words: Sequence[str]) -> str:
    """The text with words (lemmas: longer forms, too) marked."""
    wanted = [word for word in words if word.strip()]
    if not wanted:
        return user(text)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, wanted))})(?:e?s)?(?!\w)"
    parts, end = [], 0
    for match in re.finditer(pattern, text, re.IGNORECASE):
        parts += [escape(text[end : match.start()]), f"<mark>{escape(match[0])}</mark>"]
        end = match.end()
    return f'<span class="user" dir="auto">{"".join(parts)}{escape(text[end:])}</span>'


def _chip(kind: str, text: str) -> str:
    return f'<span class="chip {kind}" dir="auto">{escape(plain(text, 120))}</span>'


def user(text: object) -> str:
    """A text that came from outside (of `numbers.plain`), as text."""
    return f'<span class="user" dir="auto">{escape(str(text))}</span>'


def _draw_thumbnail(row: dict[str, Any], thumbnail: Thumbnail) -> str:
    """A thumbnail, or a grey box that says why there is none."""
    if isinstance(thumbnail, str):
        name = f"{plain(row['image'], 80)}: " if row.get("image") else ""
        return f'<div class="none"><span dir="auto">{escape(name)}{escape(thumbnail)}</span></div>'
    width, height, encoded = thumbnail
    data = base64.b64encode(encoded).decode("ascii")
    name = escape(plain(row.get("image") or row.get("id"), 80))
    return f'<img width="{width}" height="{height}" loading="lazy" alt="{name}" src="data:image/jpeg;base64,{data}">'


def shrink(data: bytes) -> tuple[int, int, bytes]:
    """(width, height, JPEG) of a picture of at most SIDE pixels on a side. ImageError where it cannot be read."""
    image = open_image(data)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return image.width, image.height, buffer.getvalue()
