"""Pictures made to do harm: bombs, wrong endings, other formats, rare modes. Ordinary ones: unit/test_image.py."""

import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pictures import encode, paint
from rwkv_clip.data.image import ImageError, inspect_image, open_image
from rwkv_clip.training.data.samples import Crop, Sample, decode_windows, fit_pixels
from rwkv_clip.transform import val_transform

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def part(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, bits=8, color=2, rows=None) -> bytes:
    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    rows = (b"\0" + bytes(3 * width)) * height if rows is None else rows
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def peak() -> int:
    """kB"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


JPEG = encode(paint(60, 40), "JPEG")
ZEROS = zlib.compress(bytes(100_000_000), 9)  # 97 kB
EXIF = b"Exif\0\0II*\0" + struct.pack("<I", 8)  # one directory follows
HARMLESS = {  # read or refused; what they unpack to is never held
    "zTXt": png(8, 8, part(b"zTXt", b"a\0\0" + ZEROS)),
    "iTXt": png(8, 8, part(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "iCCP": png(8, 8, part(b"iCCP", b"a\0\0" + ZEROS)),
    "many texts": png(8, 8, *[part(b"tEXt", b"a\0" + b"x" * 1000)] * 1000),
    "ICC in pieces": JPEG[:2]
    + b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 99]) + bytes(60_000)) for i in range(1, 99))
    + JPEG[2:],
    "EXIF that announces 2 GB": JPEG[:2]
    + segment(0xE1, EXIF + struct.pack("<HHHIII", 1, 0x010E, 2, 0x7FFFFFFF, 26, 0))
    + JPEG[2:],
    "EXIF in a circle": JPEG[:2] + segment(0xE1, EXIF + struct.pack("<HHHIII", 1, 0x0112, 3, 1, 6, 8)) + JPEG[2:],
}
DISGUISED = {
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x)(w) file\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "psd": b"8BPS\0\1" + bytes(30),
    "ico": b"\0\0\1\0\1\0" + bytes(30),
    "html": b"<html><script>alert(1)</script></html>",
    "zip": b"PK\3\4" + bytes(60),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_metadata_bombs(name):
    val_transform(8)(paint(9, 9))  # imports torchvision
    before, begin = peak(), time.perf_counter()
    try:
        inspect_image(HARMLESS[name])
        assert val_transform(8)(open_image(HARMLESS[name])).shape == (3, 8, 8)
    except ImageError:
        pass
    assert time.perf_counter() - begin < 1 and peak() - before < 20_000


@pytest.mark.parametrize("kind", DISGUISED)
def test_other_formats_called_jpg(kind, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(DISGUISED[kind])
    for look in (inspect_image, open_image):
        with pytest.raises(ImageError, match="not a picture in a format that is read"):
            look(DISGUISED[kind])
    with pytest.raises(ImageError, match=r"picture\.jpg: not a picture"):
        open_image(path)


def enlarge(data: bytes, form: str, *tags: tuple[int, int, int]) -> bytes:
    """Width and height tags of a TIFF set to 13,344."""
    for tag in tags:
        at = data.index(struct.pack(form, *tag)) + 8
        data = data[:at] + struct.pack("<I", 13_344) + data[at + 4 :]
    return data


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "JPEG2000", "BMP"])
def test_pixel_bombs_of_every_format(kind):
    """Headers that announce 178 megapixels: refused on the header, in no time and no memory."""
    data = {
        "PNG": png(13_344, 13_344, rows=bytes(200_000)),
        "GIF": b"GIF89a" + struct.pack("<HHBBB", 13_344, 13_344, 0, 0, 0) + b"," + bytes(20),
        "TIFF": enlarge(encode(RGB, "TIFF"), "<HHI", (256, 4, 1), (257, 4, 1)),
        "JPEG2000": encode(RGB, "JPEG2000").replace(struct.pack(">II", 40, 60), struct.pack(">II", 13_344, 13_344)),
        "BMP": encode(RGB, "BMP").replace(struct.pack("<ii", 60, 40), struct.pack("<ii", 13_344, 13_344)),
    }[kind]
    before, took = peak(), []
    for _ in range(3):
        begin = time.perf_counter()
        with pytest.raises(ImageError, match="13344 x 13344 pixels"):
            inspect_image(data)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.1 and peak() - before < 20_000


RGB = paint(60, 40)
GREY = RGB.convert("L").convert("RGB")
ALPHA = RGB.copy()
ALPHA.putalpha(Image.linear_gradient("L").resize(RGB.size))
TABLE = RGB.quantize(64)
TURNED = Image.Exif()
TURNED[0x0112] = 6
FINE = {"quality": 100, "subsampling": 0}
DEEP = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(GREY)[..., 0].astype(np.uint16) * 257)
MODES = {
    "CMYK": (encode(RGB.convert("CMYK"), "JPEG", **FINE), RGB),
    "16-bit": (png(60, 40, bits=16, color=0, rows=DEEP), GREY),
    "palette": (encode(TABLE, "PNG"), TABLE.convert("RGB")),
    "palette and alpha": (encode(TABLE, "PNG", transparency=bytes(range(64))), TABLE.convert("RGB")),
    "LA": (encode(ALPHA.convert("LA"), "PNG"), GREY),
    "1-bit": (encode(RGB.convert("1"), "PNG"), RGB.convert("1").convert("RGB")),
    "EXIF rotation": (encode(RGB, "JPEG", exif=TURNED, **FINE), RGB.transpose(Image.Transpose.ROTATE_270)),
    "1x1": (encode(RGB.resize((1, 1)), "PNG"), RGB.resize((1, 1))),
    "animated GIF": (encode(TABLE, "GIF", save_all=True, append_images=[GREY.quantize(9)]), TABLE.convert("RGB")),
    "animated WebP": (encode(RGB, "WEBP", save_all=True, append_images=[GREY], lossless=True), RGB),
    "progressive": (encode(RGB, "JPEG", progressive=True, **FINE), RGB),
    "PNG called jpg": (encode(RGB, "PNG"), RGB),
}


@pytest.mark.parametrize("name", MODES)
def test_twelve_modes_through_the_loader(name):
    """As training decodes them: the whole picture as crop, at its own size."""
    data, expected = MODES[name]
    info = inspect_image(data)
    sample = Sample(0, 0, 0, data, info, np.zeros((1, 1)), name, (Crop(0, 0, info.width, info.height),))
    pixels = fit_pixels(decode_windows(sample, (info.height, info.width))[0], (info.height, info.width), False)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, expected.height, expected.width)
    reference = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert (pixels.float() - reference.float()).abs().mean() <= 1
    whole = val_transform(40)(open_image(data))
    assert whole.shape == (3, 40, 40) and whole.isfinite().all()


@pytest.mark.parametrize("name", MODES)
def test_truncated_modes_are_refused(name):
    data = MODES[name][0]
    for size in (len(data) // 2, len(data) - len(data) // 5):
        cut = data[:size]
        try:
            info = inspect_image(cut)
            sample = Sample(0, 0, 0, cut, info, np.zeros((1, 1)), name, (Crop(0, 0, info.width, info.height),))
            fit_pixels(decode_windows(sample, (8, 8))[0], (8, 8), False)
        except ImageError:
            continue
        assert name.startswith("animated") or name == "1x1", "all that counts, a first frame or a pixel, is there"
