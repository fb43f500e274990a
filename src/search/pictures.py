"""Pictures of rows: where they are found again, and the bytes that a browser shows.

A place is JSON: {"file": name, "root": 0} below one of the collection's folders, {"record": 17} of its records, or
{"kept": ["part-000001", 3]}, a copy that the index made because the picture came inside another file. {}: none.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rwkv_clip.data.image import MAX_BYTES, encode_jpeg, find_upright_form, open_header, scale_down, to_rgb
from rwkv_clip.data.recordio import RecordError, RecordFile, unpack
from rwkv_clip.data.records import RecordSet
from rwkv_clip.files import OutsideError, find_below, read_bytes

KEPT_SIDE = 1024  # pixels of a copy in the index, on its longer side
QUALITY = 90
MOST_FILES = 64  # of copies that stay open


class NoPicture(LookupError):
    """A row has no picture, or its file is gone."""


class Pictures:
    """Places -> encoded pictures as they are stored, at most MAX_BYTES. roots: folders. records: what `RecordSet`
    takes. kept: the index's folder of copies. outside: names may lead out of their root."""

    def __init__(
        self, roots: Sequence[Path] = (), records: str | None = None, kept: Path | None = None, outside: bool = False
    ):
        self._roots, self._spec, self._kept, self._outside = list(roots), records, kept, outside
        self._open: dict[str, RecordFile] = {}
        self._lock = threading.Lock()

    def read(self, place: dict[str, Any]) -> bytes:
        """The bytes at a place. NoPicture where there are none, OSError where they cannot be read."""
        if "file" in place:
            return self._read_file(place)
        try:
            if "record" in place and self._spec is not None:
                return self._records.sample(place["record"])[0]
            if "kept" in place and self._kept is not None:
                name, number = place["kept"]
                return bytes(unpack(self._open_kept(str(name)).view(number))[1])
        except RecordError as error:
            raise NoPicture(str(error)) from None
        raise NoPicture("the collection does not say where its pictures are")

    def _read_file(self, place: dict[str, Any]) -> bytes:
        number, name = place.get("root", 0), place["file"]
        roots = self._roots if number is None else self._roots[number : number + 1]
        for root in roots:
            try:
                if (file := find_below(root, name, self._outside)) is not None:
                    return read_bytes(file, MAX_BYTES)
            except (OutsideError, ValueError) as error:
                raise NoPicture(str(error)) from None
        raise NoPicture(f"{name}: no such file; index the pictures again, or say where they are (--images)")

    @cached_property
    def _records(self) -> RecordSet:
        return RecordSet(self._spec or "")

    def _open_kept(self, name: str) -> RecordFile:
        assert self._kept is not None
        with self._lock:
            if name not in self._open:
                if "/" in name or name.startswith("."):
                    raise NoPicture(f"{name}: is no file of copies")
                if len(self._open) == MOST_FILES:
                    self._open.pop(next(iter(self._open)))
                self._open[name] = RecordFile(self._kept / f"{name}.rec")
            return self._open[name]


def show_upright(data: bytes, max_side: int = 0, name: str = "picture") -> bytes:
    """JPEG or PNG bytes that any program shows upright, at most `max_side` pixels on a side (0: any).

    Upright JPEG and 8-bit PNG files that are small enough stay as they are; others become new JPEG files. ImageError
    for what cannot be decoded, and beyond 32 MB or 50 megapixels.
    """
    form = find_upright_form(data, name)
    header = open_header(io.BytesIO(data), name)
    if max_side:
        header.draft(None, (2 * max_side, 2 * max_side))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    picture = to_rgb(header, name)
    scaled = scale_down(picture, max_side)
    return data if scaled is picture and form else encode_jpeg(scaled, QUALITY)
