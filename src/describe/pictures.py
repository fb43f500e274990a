"""The pictures of rows, read once from their source, by the rules of the record builder.

A picture comes with its row or lies in the folder of pictures. Addresses are not followed: a caption or a field that
holds one names a file that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rwkv_clip.config import ranged
from rwkv_clip.data.encode import Encoder, RowError
from rwkv_clip.data.fields import Choice, Texts
from rwkv_clip.data.image import ImageError, encode_jpeg, find_upright_form, open_image, scale_down
from rwkv_clip.data.rows import Row
from rwkv_clip.data.sources import PAIRS, Source

BEYOND = "row beyond the end of the source"
MANIFESTS = ("jsonl", "json", "csv", "npy")  # kinds of source whose rows name files, and hold a picture only instead
MOST_STREAMS = 4  # that are kept open


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


class PictureReader:
    """Pictures of a job's rows, as they are asked for.

    Rows that name a file are looked up at once; others, whose pictures came with them, are read from the source. That
    is one pass over it where they are asked for in its order, and two where a few readers do so in turn; going back
    costs a pass over what lies before.
    """

    def __init__(self, source: Source, settings: PictureSettings):
        self._source, self._find = source, settings.finder().find_picture
        self._folder = _find_folder(source, settings)
        self._streams: list[_Stream] = []

    def read(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Found]:
        """One `Found` for each row of a job (`row`, its number in the source, and `image`), taken one by one as the
        results are, so that they may be a stream themselves. SourceError where the source cannot be read."""
        for row in rows:
            number, name = row["row"], row.get("image")
            if name is not None and self._folder is not None:
                found: Row | None = Row(name, {"image": name}, self._folder)
            else:
                found = self._take(number)
            if found is None:
                yield Found(number, reason=BEYOND)
                continue
            try:
                yield Found(number, self._find(found).read())
            except RowError as error:
                yield Found(number, reason=str(error))

    def _take(self, number: int) -> Row | None:
        """The row of the source with this number, from the stream that is nearest before it."""
        before = [stream for stream in self._streams if stream.at <= number]
        if before:
            stream = max(before, key=lambda stream: stream.at)
            self._streams.remove(stream)
        else:
            stream = _Stream(self._source, number)
        self._streams = [*self._streams, stream][-MOST_STREAMS:]  # the one that was used last comes last
        return stream.take(number)


class _Stream:
    """A source that is being read. at: number of the next row."""

    def __init__(self, source: Source, start: int):
        self._rows, self.at = source.rows(start), start

    def take(self, number: int) -> Row | None:
        row = None
        while self.at <= number:
            row = next(self._rows, None)
            self.at += 1
        return row


def _find_folder(source: Source, settings: PictureSettings) -> Path | None:
    """The folder that a job's names of pictures start from, where it is one for all rows and names are all they have:
    a table may hold the picture and its name."""
    if source.kind == PAIRS:
        return source.files[0] if len(source.files) == 1 else None
    if source.kind not in MANIFESTS or settings.image_field is not None:
        return None
    folders = {file.parent for file in (source.files if source.images is None else [source.images])}
    return folders.pop() if len(folders) == 1 else None


def read_pictures(source: Source, wanted: Iterable[int], settings: PictureSettings) -> Iterator[Found]:
    """One `Found` for each wanted row number, from the source itself: one pass where the numbers increase."""
    return PictureReader(source, settings).read({"row": number} for number in wanted)


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
    scaled = scale_down(picture, max_side)
    if scaled is picture and (form := find_upright_form(found.data)):
        return found.data, form
    return encode_jpeg(scaled, quality), "jpg"
