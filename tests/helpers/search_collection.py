"""A small collection to search in, without a model: scenes of the demo set and an encoder that counts words and colors.

    collection = make_collection(60)
    with running(collection) as url: ...

Texts and pictures share one space: half of a row's vector stands for the words of its caption, the other half for the
picture's colors by place. So a caption finds its own row first, and so does the very picture; nothing is random.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from rwkv_clip.data.image import open_image
from rwkv_clip.demo.captions import write_texts
from rwkv_clip.demo.pictures import draw_picture, encode_picture
from rwkv_clip.demo.scenes import draw_test_scenes
from rwkv_clip.search.pictures import show_upright
from rwkv_clip.search.vectors import Vectors

WIDTH = 256  # of a vector; half of it for words
GRID = 6  # places on a side whose colors are compared


def read_words(text: str) -> np.ndarray:
    """Unit vector (WIDTH / 2,) of the words of a text; of letters where it is not in Latin script."""
    found = np.zeros(WIDTH // 2)
    for word in re.findall(r"[a-z]+|[^\x00-\x7f]", text.lower()):
        if word not in ("a", "an", "the", "in", "on", "at", "and", "of", "with", "it"):
            found[zlib.crc32(word.encode("utf-8", "replace")) % len(found)] += 1
    length = np.linalg.norm(found)
    return found / length if length else np.full(len(found), len(found) ** -0.5)


def read_colors(picture: Image.Image) -> np.ndarray:
    """Unit vector (WIDTH / 2,) of a picture's colors by place."""
    small = np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX), np.float64).reshape(-1) / 255 - 0.5
    found = np.zeros(WIDTH // 2)
    found[: len(small)] = small + 1e-3
    return found / np.linalg.norm(found)


class Encoder:
    """Stands in for `rwkv_clip.search.encoding.Model`. delay: seconds that a text or picture takes."""

    checkpoint = "runs/stand-in"

    def __init__(self, delay: float = 0.0):
        self.delay = delay

    def encode_text(self, text: str) -> np.ndarray:
        time.sleep(self.delay)
        return np.concatenate([read_words(text), np.zeros(WIDTH // 2)]).astype(np.float32)

    def encode_picture(self, data: bytes) -> np.ndarray:
        time.sleep(self.delay)
        return np.concatenate([np.zeros(WIDTH // 2), read_colors(open_image(data, "picture"))]).astype(np.float32)


class StandIn:
    """What the server uses of `rwkv_clip.search.collection.Collection`, in memory."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]], pictures: Sequence[bytes], model: Encoder | None):
        self.name, self.model, self._rows, self._pictures = name, model, rows, pictures
        words = np.stack([read_words(row["text"]) for row in rows])
        colors = np.stack([read_colors(open_image(data)) for data in pictures])
        self.vectors = Vectors.of([(np.concatenate([words, colors], axis=1) * 0.5**0.5).astype(np.float32)])

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, row: int, max_side: int = 0) -> bytes:
        if not self._pictures[row]:
            raise LookupError("no picture")
        return show_upright(self._pictures[row], max_side)

    def describe(self, row: int) -> dict[str, Any]:
        return self._rows[row]

    def filters(self) -> dict[str, list]:
        names = dict.fromkeys(name for row in self._rows for name in row["fields"])
        return {name: sorted({row["fields"][name] for row in self._rows if name in row["fields"]}) for name in names}

    def select(self, wanted: Mapping[str, Sequence]) -> np.ndarray:
        return np.array([all(row["fields"].get(n) in v for n, v in wanted.items()) for row in self._rows])


def make_collection(
    count: int = 60, size: int = 224, changes: Mapping[int, Mapping[str, Any]] | None = None
) -> StandIn:
    """`count` scenes of the demo set, `size` pixels on a side. changes: row -> what is different in its description."""
    rows, pictures = [], []
    for number, scene in enumerate(draw_test_scenes(0, count)):
        fields = {"background": scene.background, "things": len(scene.things)}
        row = {"id": f"scene-{number:04d}.jpg", "text": write_texts(scene)["generated"], "fields": fields}
        rows.append({**row, **(changes or {}).get(number, {})})
        pictures.append(encode_picture(draw_picture(scene, size), "jpeg"))
    return StandIn("demo", rows, pictures, Encoder())


def make_picture(width: int = 64, height: int = 64, seed: int = 0, kind: str = "PNG") -> bytes:
    """A picture of noise, encoded."""
    noise = Random(seed).randbytes(3 * 64)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (8, 8), noise).resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


@contextlib.contextmanager
def running(collection: Any, **options: Any) -> Iterator[str]:
    """The server of a collection in a thread of this process, and its address."""
    import uvicorn

    from rwkv_clip.search import server

    instance = uvicorn.Server(server.configure(server.build_app(collection, **options)))
    with server.listen(server.LOOPBACK, 0) as listener:
        thread = threading.Thread(target=instance.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            instance.should_exit = True
            thread.join(15)
