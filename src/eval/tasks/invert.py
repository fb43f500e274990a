"""Text-to-image annotations as image-to-text ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rwkv_clip.files import DamagedError, write_whole

from ..recall_files import Refused, invert


@dataclass(frozen=True, kw_only=True)
class InvertSettings:
    """X.tr.jsonl with the texts of each image, from X.jsonl with the images of each text, as Chinese-CLIP's
    transform_ir_annotation_to_tr.py writes it."""

    input: str
    """Annotations, {"text_id": 1, "image_ids": [7, ..]} a line."""

    def problems(self) -> list[str]:
        return []


def run(settings: InvertSettings) -> int:
    """Write the file beside its input, and say where."""
    output = Path(settings.input.removesuffix(".jsonl") + ".tr.jsonl")
    try:
        write_whole(output, invert(Path(settings.input)))
    except Refused as error:
        raise DamagedError(str(error)) from None
    print(f"inverted: {output}")
    return 0
