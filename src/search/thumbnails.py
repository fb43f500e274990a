"""Pictures as the page shows them, and small ones kept in memory up to a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

SIDES = (32, 1024)  # pixels of a thumbnail's longer side: the least, the most
MAX_KEPT = 96 << 20  # bytes of all thumbnails in memory
_OVERHEAD = 200  # bytes that an entry takes beside its picture


def name_type(data: bytes) -> str:
    """The media type of an encoded picture, by its first bytes; application/octet-stream of one that is not shown."""
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    return "application/octet-stream"


class Thumbnails:
    """Thumbnails of a collection's rows: those used last are kept, up to `most` bytes."""

    def __init__(self, picture: Callable[[int, int], bytes], most: int = MAX_KEPT):
        """picture(row, side): a row's picture of at most `side` pixels on a side."""
        self._picture, self._most, self._size = picture, most, 0
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, row: int, side: int) -> bytes:
        """The picture of row `row`, at most `side` pixels on a side. What `picture` raises."""
        with self._lock:
            if (found := self._kept.get((row, side))) is not None:
                self._kept.move_to_end((row, side))
                return found
        made = self._picture(row, side)
        with self._lock:
            if (row, side) not in self._kept:
                self._kept[row, side] = made
                self._size += len(made) + _OVERHEAD
            while self._size > self._most:
                self._size -= len(self._kept.popitem(last=False)[1]) + _OVERHEAD
        return made
