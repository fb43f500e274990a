"""Recall of prediction files as a command; the counting is in `recall_files`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from rwkv_clip.errors import DATA
from rwkv_clip.files import check_output, write_whole

from ..recall_files import Refused, count_recall, direction_of, failure


@dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """Recall of Chinese-CLIP's prediction files, as its evaluation.py and evaluation_tr.py count it."""

    gold: Positional[str]
    """Annotations, {"text_id": 1, "image_ids": [7, ..]} a line; for image to text those that `invert` writes."""
    predictions: Positional[str]
    """Ten ids for each query, as `knn` writes them."""
    output: Positional[str]
    """The JSON file with the scores, or with what is wrong with the predictions."""
    strict: bool = False
    """Exit code 3, not 0, where the predictions fail a check."""

    def problems(self) -> list[str]:
        return []


def run(settings: RecallSettings) -> int:
    """Check, count, write the JSON, and print as the released scripts do."""
    gold, predictions, output = Path(settings.gold), Path(settings.predictions), Path(settings.output)
    check_output("output", output, (gold, predictions))
    print(f"Read standard from {gold}")
    print(f"Read user submit file from {predictions}")
    try:
        result, message = count_recall(gold, predictions), ""
    except (Refused, OSError) as error:
        message = str(error)
        result = failure(message)
    write_whole(output, [json.dumps(result).encode()])
    if not message:
        print("The evaluation finished successfully.")
        return 0
    print(f"The evaluation failed: {message}")
    ways = direction_of(gold), direction_of(predictions)
    if all(ways) and ways[0] != ways[1]:
        print(f"{gold} is {ways[0].query} to {ways[0].found}, the predictions are not; see `invert`", file=sys.stderr)
    return DATA if settings.strict else 0
