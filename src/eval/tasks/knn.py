"""Chinese-CLIP's top-k files: for every text its nearest images, or the other way round.

NOTE(parity): the released scripts add in float32 on a GPU, in an order that the GPU chooses. Here similarities are
exact sums (see `nearest`), so two items come in another order only where theirs is an accident of rounding, within some
1e-8. Equal features tie in both, and then the first in the gallery's file comes first.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rwkv_clip.config import ranged
from rwkv_clip.device import keep_freed_memory
from rwkv_clip.feature_lines import Id, read_feature_lines
from rwkv_clip.files import DamagedError, check_output, write_whole

from ..nearest import find_nearest


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """The nearest items in Chinese-CLIP's files of features, as make_topk_predictions.py and .._tr.py write them."""

    image_feats: str
    """File of image features, {"image_id": 7, "feature": [0.1, ..]} a line."""
    text_feats: str
    """File of text features, {"text_id": 7, "feature": [0.1, ..]} a line."""
    direction: Literal["t2i", "i2t"] = "t2i"
    """t2i: images for every text, {"text_id": .., "image_ids": [..]}; i2t: texts for every image."""
    top_k: int = ranged(10, minimum=1)
    """Items found for each query, best first; `recall` reads exactly 10."""
    output: str
    """The file to write, a line for each query in the order of its file."""

    def problems(self) -> list[str]:
        return []


def run(settings: KnnSettings) -> int:
    """Find, write, and say where."""
    keep_freed_memory()
    files = {"image": Path(settings.image_feats), "text": Path(settings.text_feats)}
    output = Path(settings.output)
    check_output("output", output, files.values())
    query, item = ("text", "image") if settings.direction == "t2i" else ("image", "text")
    found = {kind: read_feature_lines(path, f"{kind}_id") for kind, path in files.items()}
    for kind, (ids, _) in found.items():
        if not ids:
            raise DamagedError(f"{files[kind]}: holds no features; write them again")
    (asked, queries), (ids, items) = found[query], found[item]
    if queries.shape[1] != items.shape[1]:
        widths = " and ".join(f"{files[kind]} has {found[kind][1].shape[1]}" for kind in ("image", "text"))
        raise DamagedError(f"features of one model have one width, but {widths}; write them again")
    _say_oddities(ids, item, files[item], settings.top_k)
    nearest = find_nearest(torch.from_numpy(queries), torch.from_numpy(items), settings.top_k)
    write_whole(output, (_line(query, asked[row], item, [ids[i] for i in best]) for row, best in enumerate(nearest)))
    print(f"top-{nearest.shape[1]} predictions: {output}")
    return 0


def _say_oddities(ids: list[Id], kind: str, path: Path, count: int) -> None:
    """What the released evaluation would refuse later."""
    if count > len(ids):
        print(f"{path}: holds {len(ids)} features, fewer than top_k {count}: all are listed", file=sys.stderr)
    if repeated := len(ids) - len(set(ids)):
        print(f"{path}: {repeated} lines repeat the {kind}_id of an earlier one", file=sys.stderr)


def _line(query: str, asked: Id, item: str, found: list[Id]) -> bytes:
    return json.dumps({f"{query}_id": asked, f"{item}_ids": found}).encode() + b"\n"
