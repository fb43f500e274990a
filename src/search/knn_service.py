"""clip-retrieval's requests, so that its clients and pages work with this server: `/knn-service`, `/metadata`.

Names, defaults and the shape of the answers are those of its clip_back.py (rom1504/clip-retrieval). What it fetches
from elsewhere, `image_url`, is refused: this server opens no address that a client names.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from .query import MAX_DEPTH, MAX_RESULTS, Query, RequestError, check_text, shorten

NAMES = ("text", "image", "image_url", "embedding_input")
MAX_WIDTH = 16_384  # numbers of `embedding_input`


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object. RequestError."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is no JSON") from None
    if not isinstance(content, dict):
        raise RequestError("the body is no JSON object")
    return content


def read_knn_query(content: Mapping[str, Any], index: str, fields: Any = ()) -> tuple[Query, int]:
    """The query, and how many of its results come with metadata (`num_images`); `index`: this server's name for its
    collection. RequestError."""
    if content.get("image_url") is not None:
        raise RequestError("image_url: this server fetches no addresses; send the picture itself as `image` (base64)")
    given = [name for name in NAMES if content.get(name) is not None]
    if len(given) != 1:
        raise RequestError(f"give exactly one of text, image and embedding_input, not {len(given)}")
    check_index(content, index)
    if content.get("modality", "image") != "image":
        raise RequestError(f"modality: {shorten(content['modality'])!r}; this server searches pictures: image")
    shown = _count(content, "num_images", 100, MAX_RESULTS)
    wanted = max(shown, _count(content, "num_result_ids", shown, MAX_DEPTH))
    asked: dict[str, Any] = {"k": wanted}
    if given == ["text"]:
        text = content["text"]
        if not isinstance(text, str) or not text.strip():
            raise RequestError("text: is not a text with a letter in it")
        asked["text"] = check_text("text", text)
    elif given == ["image"]:
        asked["picture"] = _read_base64(content["image"])
    else:
        asked["vector"] = _read_vector(content["embedding_input"])
    return Query(**asked), shown


def check_index(content: Mapping[str, Any], index: str) -> None:
    """RequestError of another collection than this server's."""
    name = content.get("indice_name")
    if name not in (None, "", index):
        raise RequestError(f"indice_name: {shorten(name)!r} is not here; there is {index}", 404)


def read_ids(content: Mapping[str, Any], rows: int) -> list[int]:
    """Rows that `/metadata` is asked for. RequestError."""
    ids = content.get("ids")
    if not isinstance(ids, list) or len(ids) > MAX_DEPTH:
        raise RequestError(f"ids: is not a list of at most {MAX_DEPTH} rows")
    for row in ids:
        if type(row) is not int or not 0 <= row < rows:
            raise RequestError(f"ids: {shorten(row)!r} is not a row from 0 to {rows - 1}", 404)
    return ids


def write_results(
    rows: list[int], scores: list[float | None], described: list[dict[str, Any]], base: str
) -> list[dict[str, Any]]:
    """The answer of `/knn-service`, with metadata for the first rows, as many as are `described`.

    base: this server's URL."""
    results: list[dict[str, Any]] = []
    for place, (row, score) in enumerate(zip(rows, scores)):
        result: dict[str, Any] = {}
        if place < len(described):
            about = dict(described[place])
            result = {**about, "caption": about.get("text") or "", "url": f"{base}/api/picture/{row}"}
        results.append({**result, "id": row, "similarity": score})
    return results


def _count(content: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = content.get(name)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise RequestError(f"{name}: {shorten(value)!r} is not a whole number from 1 to {most}")
    return value


def _read_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError("image: is not base64 text")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("image: is not base64 text") from None


def _read_vector(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not 0 < len(values) <= MAX_WIDTH:
        raise RequestError("embedding_input: is not a list of numbers")
    if any(type(value) not in (int, float) for value in values):
        raise RequestError("embedding_input: holds something that is not a number")
    try:
        return tuple(map(float, values))
    except OverflowError:
        raise RequestError("embedding_input: holds a number that is too large") from None
