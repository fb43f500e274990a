"""Recall of Chinese-CLIP's prediction files, both directions.

Gold lines are {"text_id": 1, "image_ids": [7, ..]}, predictions {"text_id": 1, "image_ids": [ten ids]}; image to text
has image_id and text_ids instead. A query is found at k if any of its gold ids is among its first k, so one without
gold ids never is.

NOTE(parity): checks, their order and their messages are the released ones. Where those break down (a text_id that is
no integer, a line that is no object, text that is not UTF-8, gold that cannot be read), the message says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECALL_AT = (1, 5, 10)
PREDICTED = 10


class Refused(ValueError):
    """The files cannot be evaluated. The message is the one of the failure JSON."""


@dataclass(frozen=True)
class Direction:
    """Which fields hold the query and what is found, and how messages call them."""

    query: str
    found: str
    item: str  # one of `found`
    items: str

    @property
    def title(self) -> str:
        return self.query.capitalize()


DIRECTIONS = (
    Direction("text_id", "image_ids", "image_id", "images"),
    Direction("image_id", "text_ids", "text_id", "texts"),
)


def count_recall(gold: Path, predictions: Path) -> dict[str, Any]:
    """The success JSON: recall at 1, 5 and 10 and their mean, in percent. Refused where a check fails.

    The direction is that of the gold file.
    """
    way = direction_of(gold) or direction_of(predictions) or DIRECTIONS[0]
    reference = _read_gold(gold, way)
    found = _read_predictions(predictions, way)
    if missing := set(reference.keys()) - set(found.keys()):
        listed = ", ".join(map(str, missing))
        raise Refused(f"The following {way.query}s have no prediction in your submission, please check again: {listed}")
    recalls = [
        sum(not right.isdisjoint(found[query][:k]) for query, right in reference.items()) / len(reference)
        for k in RECALL_AT
    ]
    mean = sum(recalls) / 3.0  # as released: fractions are averaged, then multiplied
    figures = dict(zip(("r1", "r5", "r10"), (recall * 100 for recall in recalls)))
    return {
        "success": True,
        "score": mean * 100,
        "scoreJson": {"score": mean * 100, "mean_recall": mean * 100, **figures},
    }


def failure(message: str) -> dict[str, Any]:
    """The failure JSON."""
    return {"errorDetail": message, "errorMsg": message, "score": 0, "scoreJson": {}, "success": False}


def direction_of(path: Path) -> Direction | None:
    """The direction that the fields of the first line that has any belong to; None where no line has."""
    try:
        for _, line in _lines(path):
            row = _parse(line)
            if isinstance(row, dict):
                for way in DIRECTIONS:
                    if way.query in row and way.found in row:
                        return way
    except OSError:
        pass
    return None


def invert(path: Path) -> Iterator[bytes]:
    """Lines {"image_id": 7, "text_ids": [..]} of annotations {"text_id", "image_ids"}: images as they first occur.

    Refused with the line that is no annotation.
    """
    texts: dict[Any, list] = {}
    for number, line in _lines(path):
        row = _parse(line)
        if not isinstance(row, dict) or "text_id" not in row or not isinstance(row.get("image_ids"), list):
            raise Refused(f'{path}:{number}: is no annotation {{"text_id": 1, "image_ids": [7, ..]}}')
        for image in row["image_ids"]:
            if not isinstance(image, (int, str)):
                raise Refused(f"{path}:{number}: `image_ids` holds {image!r:.50}, which is no id")
            texts.setdefault(image, []).append(row["text_id"])
    return (json.dumps({"image_id": image, "text_ids": of_image}).encode() + b"\n" for image, of_image in texts.items())


def _read_gold(path: Path, way: Direction) -> dict[Any, set]:
    """{query id: ids that are right}; of repeated queries the last counts."""
    if not path.is_file():
        raise Refused(f"The standard file {path} is not found!")
    reference: dict[Any, set] = {}
    for number, line in _lines(path):
        row = _parse(line)
        right = row.get(way.found) if isinstance(row, dict) else None
        if not isinstance(right, list) or way.query not in row or not _all_ids([row[way.query], *right]):
            raise Refused(f'{path}:{number}: is no line {{"{way.query}": 1, "{way.found}": [7, ..]}} of the standard')
        reference[row[way.query]] = set(right)
    if not reference:
        raise Refused(f"{path}: holds no {way.query}; the standard is empty")
    return reference


def _read_predictions(path: Path, way: Direction) -> dict[int, list[int]]:
    """{query id: ten ids}; of repeated queries the last counts."""
    if not path.exists():
        raise Refused("The submission file is not found!")
    found: dict[int, list[int]] = {}
    for _, line in _lines(path):
        row = _parse(line)
        if row is _NO_JSON:
            raise Refused(f"Cannot parse this line into json object: {line}")
        if not isinstance(row, dict) or way.query not in row:
            raise Refused(f"There exists one line not containing {way.query}: {line}")
        query = row[way.query]
        if not isinstance(query, int):
            raise Refused(
                f"Found an invalid {way.query} {query}, it should be an integer (not string), please check your schema"
            )
        if way.found not in row:
            raise Refused(f"There exists one line not containing the predicted {way.found}: {line}")
        _check_found(row[way.found], f"{way.title} {query}", way)
        found[query] = row[way.found]
    return found


def _check_found(ids: Any, who: str, way: Direction) -> None:
    """Refused unless `ids` are ten different integers."""
    if not isinstance(ids, list):
        where = f"{way.query} {who.split(' ', 1)[1]}"
        raise Refused(f"The {way.found} field of {where} is not a list, please check your schema")
    if len(ids) != PREDICTED:
        wanted = f"Require {PREDICTED}, but {len(ids)} founded."
        raise Refused(f"{who} has wrong number of predicted {way.found}! {wanted}")
    for rank, found in enumerate(ids, 1):
        if not isinstance(found, int):
            raise Refused(
                f"{who} has an invalid predicted {way.item} {found} at rank {rank}, "
                "it should be an integer (not string), please check your schema"
            )
    if len(set(ids)) != PREDICTED:
        raise Refused(f"{who} has duplicate topk {way.items} in your prediction. Pleace check again!")


_NO_JSON = object()


def _parse(line: str) -> Any:
    """The JSON value of a line, or _NO_JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _NO_JSON


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without the spaces around them; what is not UTF-8 becomes an escape, which is no JSON."""
    with open(path, encoding="utf-8", errors="backslashreplace") as file:
        yield from enumerate(map(str.strip, file), 1)


def _all_ids(values: list) -> bool:
    return all(isinstance(value, (int, str)) for value in values)
