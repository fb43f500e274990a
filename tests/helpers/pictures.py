"""Pictures made of numbers, encoded, and records of them."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from rwkv_clip.data.records import Header, RecordSet, RecordWriter, pack


def paint(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with all colours."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Photograph-like: large soft shapes, edges and a little grain."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    edges = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((width, height), 0)
    grain = random.normal(0, 4, (height, width, 1))
    return Image.fromarray((0.7 * np.asarray(soft) + 0.3 * np.asarray(edges) + grain).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The bytes of a file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed: int, mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).convert(mode), kind)


def tokens_of(i: int) -> np.ndarray:
    """Labels of record i: three texts that say which record and text they are."""
    return np.full(231, i, np.float32) + np.repeat(np.arange(3, dtype=np.float32), 77) * 1000


def write_records(prefix, images: list[bytes], labels: Callable[[int], np.ndarray] = tokens_of) -> RecordSet:
    """Records without a description beside them; `labels` gives the tokens of record i."""
    with RecordWriter(prefix) as writer:
        for i, image in enumerate(images):
            writer.write(i, pack(Header(0, labels(i), i, 0), image))
    return RecordSet(prefix)
