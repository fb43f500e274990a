"""Pictures as a browser can show them: as they are stored, or as small JPEGs that are kept in memory up to a bound."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable

from rwkv_clip.data.image import open_header, open_image, to_rgb

SIDES = (32, 1024)  # pixels of a thumbnail's longer side: the least, the most
QUALITY = 85
MAX_KEPT = 96 << 20  # bytes of all thumbnails in memory
_OVERHEAD = 200  # bytes that an entry takes beside its JPEG


def name_type(data: bytes) -> str | None:
    """The media type of a picture that every current browser shows, by its first bytes; None of any other."""
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    return None


def show_picture(data: bytes, name: str = "picture") -> tuple[bytes, str]:
    """The picture and its media type; one that browsers do not show (TIFF, BMP, ..) as a JPEG. ImageError."""
    kind = name_type(data)
    return (data, kind) if kind else (_encode(open_image(data, name)), "image/jpeg")


def shrink(data: bytes, side: int, name: str = "picture") -> bytes:
    """A JPEG of at most `side` pixels on a side, upright; a smaller picture keeps its size. ImageError."""
    image = open_header(io.BytesIO(data), name)
    image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    image = to_rgb(image, name)
    image.thumbnail((side, side))
    return _encode(image)


def _encode(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


class Thumbnails:
    """Thumbnails of a collection's rows: those used last are kept, up to MAX_KEPT bytes."""

    def __init__(self, picture: Callable[[int], bytes], most: int = MAX_KEPT):
        self._picture, self._most, self._size = picture, most, 0
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, row: int, side: int) -> bytes:
        """JPEG of row `row`, at most `side` pixels on a side. ImageError, OSError."""
        with self._lock:
            if found := self._kept.get((row, side)):
                self._kept.move_to_end((row, side))
                return found
        made = shrink(self._picture(row), side, f"row {row}")
        with self._lock:
            if (row, side) not in self._kept and len(made) <= self._most:
                self._kept[row, side] = made
                self._size += len(made) + _OVERHEAD
            while self._size > self._most:
                self._size -= len(self._kept.popitem(last=False)[1]) + _OVERHEAD
        return made
