"""What is known about a picture before a text is composed for it."""

from __future__ import annotations

from dataclasses import dataclass


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
