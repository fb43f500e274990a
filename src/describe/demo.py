"""Rows to describe without any data: scenes of the demo set with web text, terse captions and a tagger's words.

OUTPUT/rows.jsonl    id, image, raw, synthetic, tags, tag_scores
OUTPUT/images/       the pictures
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rwkv_clip.config import ranged
from rwkv_clip.demo.captions import write_texts
from rwkv_clip.demo.pictures import draw_picture, encode_picture
from rwkv_clip.demo.scenes import COLORS, SHAPES, Scene, draw_train_scene
from rwkv_clip.files import write_whole

LOST, WRONG = 0.2, 0.15  # of the tags: not seen, or seen and not there


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Draw pictures with raw texts, captions and tags, to try the other commands on."""

    output: str
    """Folder for rows.jsonl and images/."""
    rows: int = ranged(200, minimum=1, maximum=1_000_000)
    """How many pictures to draw."""
    size: int = ranged(128, minimum=16, maximum=1024)
    """Pixels on a side of each."""
    seed: int = ranged(0, minimum=0)
    """Seed of the scenes."""

    def problems(self) -> list[str]:
        """None beyond the limits."""
        return []


def write_demo(settings: DemoSettings) -> Path:
    """Draw the scenes and write them; returns the file of rows. OSError."""
    images = Path(settings.output) / "images"
    images.mkdir(parents=True, exist_ok=True)
    file = images.parent / "rows.jsonl"
    write_whole(file, (json.dumps(row).encode() + b"\n" for row in _draw_rows(settings, images)))
    return file


def _draw_rows(settings: DemoSettings, images: Path) -> Iterator[dict[str, Any]]:
    for number in range(settings.rows):
        scene = draw_train_scene(settings.seed, number)
        name = f"scene-{number:05d}.jpg"
        (images / name).write_bytes(encode_picture(draw_picture(scene, settings.size), "jpeg"))
        texts, (tags, scores) = write_texts(scene), _see(scene)
        texts = {key: texts[key] for key in ("raw", "synthetic")}
        yield {"id": name.removesuffix(".jpg"), "image": name, **texts, "tags": tags, "tag_scores": scores}


def _see(scene: Scene) -> tuple[list[str], list[float]]:
    """Tags and scores as a tagger might give them."""
    draw = Random(f"{scene.key}/tags")
    there = [scene.background, *(word for thing in scene.things for word in (thing.shape, thing.color, thing.texture))]
    found = {word: draw.uniform(0.7, 1.0) for word in there if draw.random() >= LOST}
    if draw.random() < WRONG:
        found[draw.choice([*SHAPES, *COLORS])] = draw.uniform(0.6, 0.8)
    ordered = sorted(found, key=lambda word: -found[word])
    return ordered, [round(found[word], 3) for word in ordered]
