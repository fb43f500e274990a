"""CLIP scores: how well each text of a row fits its picture, as a checkpoint sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .pictures import Found
from .towers import Towers

COLUMNS = {"clip_raw": "float", "clip_caption": "float", "clip_generated": "float"}
TEXTS = {"clip_raw": "raw", "clip_caption": "caption", "clip_generated": "generated"}
VERSION = 1


def score(
    rows: Sequence[Mapping[str, Any]], pictures: Sequence[Found], towers: Towers
) -> list[dict[str, float | None]]:
    """The columns of each row: cosines of the features of its picture and of its texts.

    pictures: those of the rows, in their order. A score is None where there is no text or no picture that can be read:
    never a number that could be taken for one.
    """
    wanted = [
        (place, column, text)
        for place, row in enumerate(rows)
        for column, name in TEXTS.items()
        if (text := (row.get(name) or "").strip()) and not pictures[place].reason
    ]
    results: list[dict[str, float | None]] = [dict.fromkeys(COLUMNS) for _ in rows]
    if not wanted:
        return results
    places = sorted({place for place, _, _ in wanted})
    features, reasons = towers.encode_pictures([pictures[place] for place in places])
    own = {place: number for number, place in enumerate(places) if not reasons[number]}
    wanted = [one for one in wanted if one[0] in own]
    if not wanted:
        return results
    texts = towers.encode_texts([text for _, _, text in wanted])
    images = features[[own[place] for place, _, _ in wanted]]
    cosines = (images.double() * texts.double()).sum(-1).tolist()
    for (place, column, _), cosine in zip(wanted, cosines):
        results[place][column] = round(cosine, 6) if math.isfinite(cosine) else None
    return results
