"""Time, tokens and money: of a job, and of more rows at the rates that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCALES = (100_000, 1_000_000, 15_061_515)  # the last is YFCC15M, which the paper describes
COUNTS = ("rows", "failed", "prompt_tokens", "completion_tokens")


def count_stages(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{stage: rows, seconds, failed, prompt_tokens, completion_tokens, rows_per_second}, 0 for what was not counted."""
    found = {}
    for name, stage in stages.items():
        counts: dict[str, Any] = {column: int(stage.get(column) or 0) for column in COUNTS}
        seconds = float(stage.get("seconds") or 0)
        rate = counts["rows"] / seconds if seconds > 0 else None
        found[name] = counts | {"seconds": seconds, "rows_per_second": rate}
    return found


def price_of(tokens: Mapping[str, Any], prices: Mapping[str, Any] | None) -> float | None:
    """Money for prompt_tokens and completion_tokens; prices are for a million. None without prices."""
    if not prices:
        return None
    return sum(tokens[f"{kind}_tokens"] * float(prices.get(kind) or 0) for kind in ("prompt", "completion")) / 1e6


def cost_of(
    stages: Mapping[str, Mapping[str, Any]], used: Mapping[str, int], prices: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Seconds, tokens and money of all stages. Tokens are those that the stages counted, else those of the rows."""
    total = {
        column: sum(stage[column] for stage in stages.values()) for column in ("prompt_tokens", "completion_tokens")
    }
    if not any(total.values()):
        total = {column: used[column] for column in total}
    seconds = sum(stage["seconds"] for stage in stages.values())
    return total | {"seconds": seconds, "money": price_of(total, prices), "currency": (prices or {}).get("currency")}


def scale_up(
    stages: Mapping[str, Mapping[str, Any]], prices: Mapping[str, Any] | None, scales: Sequence[int] = SCALES
) -> list[dict[str, Any]]:
    """Hours, tokens and money of more rows, the stages one after the other at the rates of this job."""
    timed = [stage for stage in stages.values() if stage["rows"] and stage["seconds"] > 0]
    lines = []
    for rows in scales if timed else ():
        tokens = {
            column: round(sum(stage[column] / stage["rows"] for stage in timed) * rows)
            for column in ("prompt_tokens", "completion_tokens")
        }
        hours = sum(stage["seconds"] / stage["rows"] for stage in timed) * rows / 3600
        lines.append({"rows": rows, "hours": hours, **tokens, "money": price_of(tokens, prices)})
    return lines
