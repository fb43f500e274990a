"""What is known about a picture before a text is composed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FROM_TEXT = "text"  # tags that are nouns of the texts: no evidence of what the picture shows


@dataclass(frozen=True, slots=True)
class Tag:
    """Something that is in the picture. score: the tagger's confidence, None where it gave none."""

    name: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of one row. raw: the text found with the picture, cleaned; "" and () for what is missing."""

    id: str
    raw: str = ""
    caption: str = ""
    tags: tuple[Tag, ...] = ()
    ocr: str = ""


def find_sources(row: Mapping[str, Any]) -> Sources:
    """The sources of a job's row. Tags that were taken from its texts say nothing that these do not."""
    names = (row.get("tags") or []) if row.get("tag_source") != FROM_TEXT else []
    scores = row.get("tag_scores") or [None] * len(names)
    tags = tuple(Tag(name, score) for name, score in zip(names, scores))
    return Sources(row["id"], row.get("clean") or "", row.get("caption") or "", tags, row.get("ocr") or "")
