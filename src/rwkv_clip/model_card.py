"""The README.md of exported weights: front matter that the hub reads, how to use them, how they were made.

Nothing that tells about the machine (paths, host) is written, and nothing is made up: without a licence it says
`unknown`, without a training run there is no recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PIPELINE = "zero-shot-image-classification"  # what the hub's widget and filters call it
# Settings of a run that say where and on what it ran, not how: they are left out.
_OF_THE_MACHINE = frozenset(
    (
        *("logs", "name", "resume", "allow_change", "train_data", "val_data", "val_split", "workers", "loader"),
        *("device", "model", "pretrained", "pretrained_image", "pretrained_text", "report_to", "max_ranks"),
        *("save_every_n_steps", "log_every_n_steps"),
    )
)


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    name: str
    library: str  # open_clip, rwkv_clip or transformers
    description: Mapping[str, Any]  # of the model, as JSON
    parameters: int
    usage: str  # Python
    license: str | None = None  # an identifier of the hub, such as mit
    tags: Iterable[str] = ()
    language: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)  # state.json of a checkpoint


def write_card(card: Card) -> str:
    """The text of README.md, ending with a newline."""
    return "\n".join([*_front_matter(card), "", f"# {card.name}", *_about(card), *_recipe(card), *_metrics(card), ""])


def _front_matter(card: Card) -> list[str]:
    """YAML; every value is written as JSON, which YAML reads."""
    tags = list(dict.fromkeys(["clip", "rwkv_clip", *card.tags]))
    values: dict[str, Any] = {"license": card.license or "unknown", "library_name": card.library}
    values |= {"pipeline_tag": PIPELINE, "tags": tags} | ({"language": card.language} if card.language else {})
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()), "---"]


def _about(card: Card) -> list[str]:
    text = f"A contrastive image-text model of {card.parameters:,} parameters, exported by rwkv_clip."
    described = json.dumps(card.description, indent=1, ensure_ascii=False)
    return ["", text, "", "```python", card.usage.strip(), "```", "", "## Model", "", "```json", described, "```"]


def _recipe(card: Card) -> list[str]:
    state = card.state
    if not state:
        return []
    rows = {"steps": state.get("step"), "samples seen": state.get("samples_seen")}
    rows |= {"pairs per step": state.get("global_batch"), "version of rwkv_clip": state.get("version")}
    settings = {key: value for key, value in state.get("settings", {}).items() if key not in _OF_THE_MACHINE}
    lines = ["", "## Training", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    records = state.get("records") or {}
    if records:
        lines += [
            f"| training pairs | {records.get('count')} |",
            f"| fingerprint of the data | `{records.get('digest')}` |",
        ]
    return [*lines, "", "Settings:", "", "```json", json.dumps(settings, indent=1, ensure_ascii=False), "```"]


def _metrics(card: Card) -> list[str]:
    if not card.metrics:
        return []
    rows = (f"| {name} | {value:.4g} |" for name, value in card.metrics.items())
    return ["", "## Evaluation", "", "| | |", "|---|---|", *rows]
