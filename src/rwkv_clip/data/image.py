"""Pictures: what may be opened, how every mode becomes RGB, and the transforms from a picture to a tensor.

Sizes are checked on the header alone, so a small file that unpacks to gigabytes is refused before any pixel
is decoded. PIL keeps the first frame of an animation. Transparency is dropped, as `convert("RGB")` does, not
blended with a background. Pictures are upright everywhere, in training as in evaluation: an orientation tag
(EXIF, or XMP without it) is obeyed and then gone. What PIL cannot read in a tag is no tag.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features

from ..errors import DATA

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = 50_000_000
MAX_SIDE = 32_768
MAX_BYTES = 32_000_000


def _reads_avif() -> bool:
    """Pillow does from 11.3 on, where it was built with libavif; else by a plugin that registers itself."""
    if "avif" in features.modules and features.check("avif"):
        return True
    try:
        import pillow_avif  # noqa: F401
    except ImportError:
        return False
    return True


# Formats that every Pillow decodes by itself, and AVIF. Not in the list, for example: EPS, which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", *(["AVIF"] if _reads_avif() else []))

START, END = b"\xff\xd8", b"\xff\xd9"
EDGE = re.compile(b"\xff[\xd8\xd9]")
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive: Huffman-coded frame headers
OTHER_FRAMES = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
SCAN, ADOBE, APP1 = 0xDA, 0xEE, 0xE1
COMPONENT_IDS = (b"\x01\x02\x03", b"\x00\x01\x02")  # the usual names of Y, Cb, Cr

EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how APP1 segments of a JPEG begin
ORIENTATION = 0x0112
TURNS = {  # of the orientation tag: what makes the stored pixels upright
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

THIN = 32  # long side / short side from which only the middle of a picture is scaled up


class ImageError(ValueError):
    """A picture cannot be used. `reason`: "image too large" or "image unreadable", for counting."""

    exit_code = DATA

    def __init__(self, message: str, reason: str = "image unreadable"):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageInfo:
    """Width and height in pixels of the upright picture. `plain`: an ordinary 8-bit grey or YCbCr JPEG, complete and
    stored upright, which every decoder reads alike; anything else should go through PIL. `turn`: what makes the stored
    pixels upright, None where they are."""

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
    """Size and kind of an encoded picture, from its header. ImageError beyond the limits or if it has no
    header."""
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
    width, height = getattr(image, "_tile_size", image.size)  # of a TIFF, whose `size` may be the upright one already
    return ImageInfo(*((height, width) if turn in SIDEWAYS else (width, height)), False, turn)


def _tags_follow_pixels(data: bytes) -> bool:
    """Whether a PNG has chunks behind its pixels that may hold an orientation: PIL reads them with the pixels."""
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
    """What makes an image upright, from the tags that have been read so far; None where PIL finds no usable one."""
    try:
        return TURNS.get(Image.Image.getexif(image).get(ORIENTATION))  # PngImageFile's own would decode the picture
    except Exception:  # PIL's parsers raise SyntaxError, struct.error, TypeError, ...
        return None


def _find_turn_in(exif: list[bytes], xmp: bytes) -> Image.Transpose | None:
    """The same for a JPEG's APP1 segments, joined as PIL joins them."""
    tags = b"".join(exif)
    if not any(mark in tags for mark in (b"\x01\x12", b"\x12\x01")) and b"tiff:Orientation" not in xmp:
        return None  # most JPEGs: PIL would need as long for this as the rest of the walk
    holder = Image.Image()
    holder.info = {"exif": EXIF + tags, "xmp": xmp} if exif else {"xmp": xmp}
    return _find_turn(holder)


def _inspect_jpeg(data: bytes) -> ImageInfo | None:
    """Walk the markers up to the first scan; None where the walk meets anything that PIL should judge
    instead."""
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

    16-bit greys are scaled to 8 bits. ImageError if PIL cannot."""
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
    """16-bit greys (modes I;16*, and I where PIL widened them) -> L; PIL's own convert would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    scale = 257.0 if image.mode != "I" or values.max(initial=0) > 255 else 1.0
    return Image.fromarray(np.rint(values / scale).clip(0, 255).astype(np.uint8))


def open_image(source: bytes | str | Path, name: str | None = None) -> Image.Image:
    """Encoded bytes or a path -> RGB picture, upright, without tags.

    ImageError: more than 32 MB, 50 MP or 32768 pixels on a side (checked before decoding), unknown format,
    damaged.
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


class _Thin:
    """Cut the long side of a picture that is far longer than wide to what a centre crop of (height, width) can see.

    Scaled up whole, 32,768 x 1 pixels would become 7,340,032 x 224. From either end goes a multiple of the short side,
    so that the middle of the scaled picture stays where it was, to a fraction of a pixel.
    """

    def __init__(self, size: tuple[int, int]):
        self.most = THIN * -(-max(size) // min(size))  # times the short side

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = min(image.size), max(image.size)
        if long <= self.most * short:
            return image
        cut = (long - self.most * short) // (2 * short) * short
        across, down = (cut, 0) if image.width == long else (0, cut)
        return image.crop((across, down, image.width - across, image.height - down))

    def __repr__(self) -> str:
        return f"Thin(most={self.most})"


class _Cover:
    """Resize, keeping the aspect, to the smallest picture that covers (height, width)."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        width = max(self.size[1], round(image.width * scale))
        height = max(self.size[0], round(image.height * scale))
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f"Cover(size={self.size})"


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Image size as (height, width); ValueError unless both are positive."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if height < 1 or width < 1:
        raise ValueError(f"image_size: {size} is not a picture; use a positive number or (height, width)")
    return height, width


def prepare(size: int | tuple[int, int]) -> list:
    """What has to come before any transform that scales a PIL picture to cover `size` and crops its centre: upright,
    RGB (a palette or 1-bit picture cannot be interpolated), and not too thin to be scaled in memory."""
    return [to_rgb, _Thin(_pair(size))]


def val_transform(size: int | tuple[int, int]):
    """Evaluation: PIL picture -> normalised float32 (3, h, w): upright, RGB, short side bicubic, centre crop, CLIP
    mean/std.

    The same numbers as open_clip's and torchvision's for upright RGB and square sizes; (h, w) covers the frame, then
    crops.
    """
    from torchvision import transforms as T

    height, width = _pair(size)
    cover = T.Resize(height, T.InterpolationMode.BICUBIC) if height == width else _Cover((height, width))
    crop = T.CenterCrop((height, width))
    return T.Compose([*prepare(size), cover, crop, T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])


def train_transform(size: int | tuple[int, int]):
    """Training with PIL pictures: upright, RGB, random crop (area 0.7-1, aspect 0.8-1.25) resized linearly, mirror
    p=0.5, CLIP mean/std -> float32 (3, h, w). Random numbers come from torch's global generator."""
    from torchvision import transforms as T

    crop = T.RandomResizedCrop(_pair(size), (0.7, 1.0), (0.8, 1.25), T.InterpolationMode.BILINEAR)
    flip = T.RandomHorizontalFlip(0.5)
    return T.Compose([to_rgb, crop, flip, T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])


def normalize(
    image: torch.Tensor,
    mean: tuple[float, ...] | torch.Tensor = CLIP_MEAN,
    std: tuple[float, ...] | torch.Tensor = CLIP_STD,
) -> torch.Tensor:
    """(B, 3, h, w) uint8 0..255, or float 0..1, on any device -> float32, normalised per channel.

    mean, std: three numbers each; float32 tensors on the images' device are taken as they are."""
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image: shape {tuple(image.shape)} is not (batch, 3, height, width)")
    full = 255.0 if image.dtype == torch.uint8 else 1.0
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image: dtype {image.dtype} is neither uint8 nor floating point")
    centre, scale = (torch.as_tensor(values, device=image.device).view(3, 1, 1) for values in (mean, std))
    # In place: on a CPU three more fresh copies of the batch take longer than the arithmetic.
    return image.to(torch.float32, copy=True).div_(full).sub_(centre).div_(scale)
