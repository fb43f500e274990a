"""Published figures, from published.json: what papers printed, for the same sets, shown beside ours.

A method whose figures are not in that file is left out of every table and named below it; nothing is estimated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@dataclass(frozen=True)
class PublishedRow:
    """One method: percent. `retrieval` has, for each set, six recalls in the order of RECALLS, None where none was
    printed."""

    method: str
    model: str  # its name in tables
    source: str
    retrieval: dict[str, list[float | None]]
    classification: dict[str, float]
    average: float | None = None  # of the eleven classification sets, as printed


@cache
def _content() -> dict:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Every published row, newest method last."""
    return tuple(PublishedRow(**row) for row in _content()["rows"])


@cache
def chinese_rows() -> tuple[PublishedRow, ...]:
    """Published rows of Chinese retrieval sets (MUGE's validation set, the test sets of Flickr30K-CN and COCO-CN),
    zero-shot and fine-tuned. Their sources do not print how many pictures a set has."""
    return tuple(PublishedRow(**row) for row in _content()["chinese"])


@cache
def chinese_sets() -> frozenset[str]:
    """Names of the sets that `chinese_rows` are about."""
    return frozenset(name for row in chinese_rows() for name in row.retrieval)


def published_samples(task: str) -> dict[str, int]:
    """Sets of a task in the order of the papers, with the number of pictures of their published figures."""
    return _content()["samples"].get(task, {})


def not_at_hand(task: str) -> list[str]:
    """Methods of the papers' tables that have no figures of this task in published.json."""
    present = {row.method for row in published_rows() if getattr(row, task, None)}
    return [method for method in _content()["methods"] if method not in present]
