"""The pictures of rows, read once from their source, by the rules of the record builder.

A picture comes with its row or lies in the folder of pictures. Addresses are not followed: a caption or a field that
holds one names a file that is not there.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rwkv_clip.config import ranged
from rwkv_clip.data.encode import Encoder, RowError
from rwkv_clip.data.fields import Choice, Texts
from rwkv_clip.data.image import ImageError, inspect_image, open_header, open_image
from rwkv_clip.data.sources import Source

BEYOND = "row beyond the end of the source"


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Where the pictures are."""

    images: str | None = None
    """Folder of the pictures; default: that of the manifest, or images/ in it."""
    image_field: str | None = None
    """Field with the picture or its path, if it has none of the usual names."""
    allow_outside: bool = False
    """Names may lead out of the folder of the pictures (`..`, absolute, links)."""
    max_side: int = ranged(0, minimum=0)
    """Scale larger pictures down to this many pixels on the longer side where they are written or sent; 0: keep."""

    def problems(self) -> list[str]:
        """A folder that is none."""
        if self.images is not None and not Path(self.images).is_dir():
            return [f"images: {self.images!r} is no folder; name the folder of the pictures"]
        return []

    def finder(self) -> Encoder:
        """What finds the picture of a row, as for records."""
        choice = Choice(Texts(("raw",), ("raw",)))  # its texts are not asked for
        folder = Path(self.images) if self.images else None
        return Encoder(choice, images=folder, image_field=self.image_field, allow_outside=self.allow_outside)


class Found(NamedTuple):
    """The picture of the row with this number in its source: its bytes as found, or the reason why there are none."""

    row: int
    data: bytes = b""
    reason: str = ""


def read_pictures(source: Source, wanted: Iterable[int], settings: PictureSettings) -> Iterator[Found]:
    """One `Found` for each wanted row number, in one pass over the source.

    wanted: increasing numbers, taken one by one as the results are, so that they may come from a stream of rows.
    ValueError where they do not increase; SourceError where the source cannot be read.
    """
    find, rows, at = settings.finder().find_picture, None, 0
    for number in wanted:
        if rows is None:
            rows, at = source.rows(number), number
        if number < at:
            raise ValueError(f"pictures: row {number} is asked for after row {at - 1}; rows must keep their order")
        row = None
        while at <= number:
            row = next(rows, None)
            at += 1
        if row is None:
            yield Found(number, reason=BEYOND)
            continue
        try:
            yield Found(number, find(row).read())
        except RowError as error:
            yield Found(number, reason=str(error))


def open_found(found: Found) -> Image.Image:
    """The picture as upright RGB. ImageError where there is none, or none that can be decoded; `reason` to count by."""
    if found.reason:
        raise ImageError(f"row {found.row}: {found.reason}", found.reason)
    try:
        return open_image(found.data, f"row {found.row}")
    except ImageError as error:  # the record builder's word for it
        reason = "unreadable image" if "unreadable" in error.reason else error.reason
        raise ImageError(str(error), reason) from None


def encode_upright(found: Found, max_side: int = 0, quality: int = 95) -> tuple[bytes, str]:
    """(JPEG or PNG bytes that any program shows upright, `jpg` or `png`), at most `max_side` pixels on a side (0: any).

    Upright JPEG and 8-bit PNG files that are small enough stay as they are; others become new JPEG files. Every picture
    is decoded once: a header proves nothing. ImageError.
    """
    picture = open_found(found)
    fits = not max_side or max(picture.size) <= max_side
    info = inspect_image(found.data)
    if fits and info.plain:
        return found.data, "jpg"
    if fits and info.turn is None:
        header = open_header(io.BytesIO(found.data), "image")
        if header.format == "PNG" and header.mode in ("RGB", "L"):
            return found.data, "png"
    if not fits:
        scale = max_side / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), "jpg"
