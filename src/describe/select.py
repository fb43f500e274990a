"""Which rows are written out. Nothing is dropped unless a setting says so: what was found are columns, to choose by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rwkv_clip.config import ranged

from .cleaning import FLAGS

TEXTS = {"raw": "raw", "synthetic": "caption", "generated": "generated"}  # name in a record -> column of a row

PII = "pii"  # all flags that begin with it


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Reasons to drop a row; without any of them all rows are kept."""

    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Drop all but the first row of a group: of equal generated texts, or also of nearly equal ones."""
    min_tokens: int = ranged(0, minimum=0, maximum=75)
    """Fewest tokens of the generated text, start and end of text not counted."""
    require_picture: bool = False
    """Drop rows that name no picture."""
    require: tuple[Literal["raw", "synthetic", "generated"], ...] = ()
    """Texts that a row must have."""
    drop_flags: tuple[str, ...] = ()
    """Drop rows whose raw text has one of these flags, such as url; pii stands for pii_email and pii_phone."""
    drop_unsupported: float | None = ranged(None, minimum=0, maximum=1)
    """Drop rows with a larger fraction of nouns in their composed text that no source supports; fallbacks stay."""
    min_clip: float | None = ranged(None, minimum=-1, maximum=1)
    """Lowest CLIP score of the generated text; rows that have none are dropped under a reason of their own."""

    def problems(self) -> list[str]:
        """Flags that no row can have: they would drop nothing, unseen."""
        unknown = [flag for flag in self.drop_flags if flag != PII and flag not in FLAGS]
        return [f"drop_flags: {flag!r} is no flag; there are {', '.join((PII, *FLAGS))}" for flag in unknown]

    def judge(self, row: Mapping[str, Any]) -> str:
        """Why a merged row of a job is dropped, in words to count by; "" where it is kept."""
        return self._judge_texts(row) or self._judge_scores(row) or self._judge_duplicates(row)

    def _judge_texts(self, row: Mapping[str, Any]) -> str:
        if self.require_picture and not row.get("image"):
            return "no picture"
        for name in self.require:
            if not has_text(row, name):
                return f"no {name} text"
        for flag in self.drop_flags:
            if any(found == flag or (flag == PII and found.startswith("pii_")) for found in row.get("flags") or ()):
                return f"flag {flag}"
        if (row.get("tokens_generated") or 2) - 2 < self.min_tokens:
            return f"fewer than {self.min_tokens} tokens"
        return ""

    def _judge_scores(self, row: Mapping[str, Any]) -> str:
        rate, taken = row.get("unsupported_rate"), row.get("engine") == row.get("composer")
        if self.drop_unsupported is not None and taken and rate is not None and rate > self.drop_unsupported:
            return f"more than {self.drop_unsupported:g} of the nouns unsupported"
        if self.min_clip is not None:
            score = row.get("clip_generated")
            if score is None:
                return "no CLIP score"
            if not score >= self.min_clip:
                return f"CLIP score below {self.min_clip:g}"
        return ""

    def _judge_duplicates(self, row: Mapping[str, Any]) -> str:
        if self.duplicates != "keep" and row.get("duplicate_of"):
            return "duplicate"
        return "near duplicate" if self.duplicates == "near" and row.get("near_duplicate_of") else ""


def has_text(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has the text that is called `name` in a record."""
    return bool((row.get(TEXTS[name]) or "").strip())
