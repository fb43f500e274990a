"""Pictures: which may be opened, what their headers say, and how every mode becomes upright RGB.

Sizes are checked on the header alone, so a small file that unpacks to gigabytes is refused before any pixel is decoded.
Of an animation the first frame is kept. Transparency is dropped, as `convert("RGB")` does, not blended with a
background. Pictures are upright in training as in evaluation: an orientation tag (EXIF, or XMP without it) is applied
and removed. A tag that PIL cannot read is ignored.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from ..errors import DATA

MAX_PIXELS = 50_000_000
MAX_SIDE = 32_768
MAX_BYTES = 32_000_000


def _reads_avif() -> bool:
    """Pillow does from 11.3 on if it was built with libavif; before that, a plugin registers itself."""
    if "avif" in features.modules and features.check("avif"):
        return True
    try:
        import pillow_avif  # noqa: F401
    except ImportError:
        return False
    return True


# Formats that every Pillow decodes by itself, and AVIF. Left out, for example: EPS, which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", *(["AVIF"] if _reads_avif() else []))

START, END = b"\xff\xd8", b"\xff\xd9"
EDGE = re.compile(b"\xff[\xd8\xd9]")
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive: Huffman-coded frame headers
OTHER_FRAMES = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
SCAN, ADOBE, APP1 = 0xDA, 0xEE, 0xE1
COMPONENT_IDS = (b"\x01\x02\x03", b"\x00\x01\x02")  # the usual names of Y, Cb, Cr

EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how APP1 segments of a JPEG begin
ORIENTATION = 0x0112
TURNS = {  # orientation tag -> what makes the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(TURNS[number] for number in (5, 6, 7, 8))  # width and height change places
PNG_TAGS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that may hold an orientation


class ImageError(ValueError):
    """A picture cannot be used. `reason`: "image too large" or "image unreadable", for counting."""

    exit_code = DATA

    def __init__(self, message: str, reason: str = "image unreadable"):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageInfo:
    """Width and height in pixels of the upright picture.

    plain: an ordinary 8-bit grey or YCbCr JPEG, complete and stored upright, which every decoder reads alike; anything
    else should go through PIL. turn: what makes the stored pixels upright, None if they are.
    """

    width: int
    height: int
    plain: bool
    turn: Image.Transpose | None = None


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width} x {height} pixels, nothing to show")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,} in all or {MAX_SIDE:,} on a side; "
            f"scale it down",
            reason="image too large",
        )


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"{name}: {size:,} bytes, more than {MAX_BYTES:,}; store it smaller", reason="image too large")


def open_header(source: io.BytesIO | str | Path, name: str) -> Image.Image:
    """PIL image with the header read and the limits checked, no pixel decoded."""
    try:
        image = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}", reason="image too large") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in a format that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # PIL's parsers raise OSError, SyntaxError, struct.error, KeyError, ...
        raise ImageError(f"{name}: {type(error).__name__}: {error}") from None
    _check_size(*image.size, name)
    return image


def inspect_image(data: bytes, name: str = "image") -> ImageInfo:
    """Size and kind of an encoded picture, from its header. ImageError beyond the limits or without a header."""
    _check_bytes(len(data), name)
    info = _inspect_jpeg(data) if data[:2] == START else None
    if info is None:
        return _inspect_with_pil(data, name)
    _check_size(info.width, info.height, name)
    return info


def _inspect_with_pil(data: bytes, name: str) -> ImageInfo:
    image = open_header(io.BytesIO(data), name)
    if image.format == "PNG" and _tags_follow_pixels(data):
        to_rgb(image, name)
    turn = _find_turn(image)
    width, height = getattr(image, "_tile_size", image.size)  # `size` of a TIFF may be the upright one already
    return ImageInfo(*((height, width) if turn in SIDEWAYS else (width, height)), False, turn)


def _tags_follow_pixels(data: bytes) -> bool:
    """Whether a PNG has chunks after its pixels that may hold an orientation: PIL reads them with the pixels."""
    at, pixels = 8, False
    while at + 8 <= len(data):
        kind = data[at + 4 : at + 8]
        if pixels and kind in PNG_TAGS:
            return True
        if kind == b"IEND":
            return False
        pixels |= kind == b"IDAT"
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, from the tags that have been read so far; None if PIL finds no usable one."""
    try:
        return TURNS.get(Image.Image.getexif(image).get(ORIENTATION))  # PngImageFile's own would decode the picture
    except Exception:  # PIL's parsers raise SyntaxError, struct.error, TypeError, ...
        return None


def _find_turn_in(exif: list[bytes], xmp: bytes) -> Image.Transpose | None:
    """The same for a JPEG's APP1 segments, joined as PIL joins them."""
    tags = b"".join(exif)
    if not any(mark in tags for mark in (b"\x01\x12", b"\x12\x01")) and b"tiff:Orientation" not in xmp:
        return None  # most JPEGs: asking PIL would take as long as all the rest of the walk
    holder = Image.Image()
    holder.info = {"exif": EXIF + tags, "xmp": xmp} if exif else {"xmp": xmp}
    return _find_turn(holder)


def _inspect_jpeg(data: bytes) -> ImageInfo | None:
    """Walk the markers up to the first scan; None at anything that PIL should judge instead."""
    at, size, plain, exif, xmp = 2, None, True, [], b""
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2 or marker in OTHER_FRAMES:
            return None
        if marker in FRAMES:
            if size is not None or len(body) < 6 or len(body) != 6 + 3 * body[5]:
                return None
            size = (int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"))
            grey = body[5] == 1
            plain &= body[0] == 8 and (grey or (body[5] == 3 and body[6::3] in COMPONENT_IDS))
        elif marker == ADOBE and body[:5] == b"Adobe":
            plain &= len(body) >= 12 and body[11] == 1  # stored as YCbCr, not RGB or CMYK
        elif marker == APP1 and body.startswith(EXIF):
            exif.append(body[len(EXIF) :])
        elif marker == APP1 and body.startswith(XMP):
            xmp = body[len(XMP) :]
        elif marker == SCAN:
            break
        at += 2 + length
    else:
        return None
    if size is None or 0 in size:  # a height of 0 is given after the first scan: legal and rare
        return None
    edge = EDGE.search(data, at)  # 5 times as fast as two searches with find
    turn = _find_turn_in(exif, xmp) if exif or xmp else None
    plain = plain and turn is None and edge is not None and edge[0] == END
    return ImageInfo(*(size[::-1] if turn in SIDEWAYS else size), plain, turn)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Decode, turn upright and convert any mode to 8-bit RGB, without tags; `image` keeps its mode and its tags.

    16-bit greys are scaled to 8 bits. ImageError if PIL cannot decode it.
    """
    try:
        if image.mode == "F":
            raise ImageError(f"{name}: floating-point pixels have no defined range; store 8-bit RGB")
        image.load()
        turn = _find_turn(image)
        if image.mode.startswith("I"):
            image = _scale_grey(image)
        elif "transparency" in image.info:  # a tag that names a colour; PIL would warn about it
            image = image.copy()
            del image.info["transparency"]
        image = image.convert("RGB")
        if turn is not None:
            image = image.transpose(turn)
        image.info = {}
        return image
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: {type(error).__name__}: {error}") from None


def _scale_grey(image: Image.Image) -> Image.Image:
    """16-bit greys (modes I;16*, and I if PIL widened them) -> L; PIL's own convert would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    scale = 257.0 if image.mode != "I" or values.max(initial=0) > 255 else 1.0
    return Image.fromarray(np.rint(values / scale).clip(0, 255).astype(np.uint8))


def open_image(source: bytes | str | Path, name: str | None = None) -> Image.Image:
    """Encoded bytes or a path -> RGB picture, upright, without tags.

    ImageError: more than 32 MB, 50 MP or 32,768 pixels on a side (checked before decoding), an unknown format, damage.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "image"
        _check_bytes(len(source), name)
        return to_rgb(open_header(io.BytesIO(source), name), name)
    name = name or str(source)
    try:
        _check_bytes(Path(source).stat().st_size, name)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}; check the path") from None
    with open_header(source, name) as image:
        return to_rgb(image, name)


def open_picture(source: bytes | Path, name: str | None = None) -> Image.Image:
    """`open_image` of an evaluation set. The ImageError adds a remedy: a figure needs every picture."""
    try:
        return open_image(source, name)
    except ImageError as error:
        text = f"{error}; an evaluation leaves no picture out: repair it or remove its entry"
        raise ImageError(text, error.reason) from error


# ---- written again ---------------------------------------------------------------------------------------------------


def scale_down(picture: Image.Image, longest: int) -> Image.Image:
    """The picture with at most `longest` pixels on its longer side, bicubic; itself where it has no more, or for 0."""
    if not longest or max(picture.size) <= longest:
        return picture
    scale = longest / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    """File bytes of a JPEG without metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def find_upright_form(data: bytes, name: str = "image") -> str:
    """`jpg` or `png` where every program shows these bytes alike and upright: an ordinary JPEG or a still 8-bit PNG
    without a turn; else "". Only the header is read, which proves nothing about the rest. ImageError."""
    info = inspect_image(data, name)
    if info.plain:
        return "jpg"
    if info.turn is not None:
        return ""
    header = open_header(io.BytesIO(data), name)
    still = not getattr(header, "is_animated", False)
    return "png" if header.format == "PNG" and header.mode in ("RGB", "L") and still else ""
