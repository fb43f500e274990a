"""Pictures: every mode becomes the right RGB, limits hold before decoding, damage is an ImageError and
nothing else."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from rwkv_clip.image import (
    CLIP_MEAN,
    CLIP_STD,
    ImageError,
    inspect_image,
    normalize,
    open_image,
    train_transform,
    val_transform,
)

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def paint(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with all colours."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """PNG from raw rows (each with its filter byte), for kinds that PIL does not write."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


RGB = paint(60, 40)
ARRAY = np.asarray(RGB)
GREY = np.repeat(np.asarray(RGB.convert("L"))[..., None], 3, 2)
ALPHA = RGB.copy()
ALPHA.putalpha(Image.linear_gradient("L").resize(RGB.size))
DEEP = ARRAY.astype(np.uint16) * 257
QUANTIZED = RGB.quantize(64)
BINARY = RGB.convert("1")


def rows16(array: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)


MODES = {
    "rgb png": (encode(RGB, "PNG"), ARRAY),
    "grey png": (encode(RGB.convert("L"), "PNG"), GREY),
    "rgba png drops alpha": (encode(ALPHA, "PNG"), ARRAY),
    "la png drops alpha": (encode(ALPHA.convert("LA"), "PNG"), GREY),
    "palette png": (encode(QUANTIZED, "PNG"), np.asarray(QUANTIZED.convert("RGB"))),
    "palette png with transparency": (
        encode(QUANTIZED, "PNG", transparency=3),
        np.asarray(QUANTIZED.convert("RGB")),
    ),
    "1-bit png": (encode(BINARY, "PNG"), np.asarray(BINARY.convert("RGB"))),
    "16-bit grey png": (png(60, 40, 16, 0, rows16(DEEP[..., 1])), np.repeat(ARRAY[..., 1:2], 3, 2)),
    "16-bit rgb png": (png(60, 40, 16, 2, rows16(DEEP.reshape(40, -1))), ARRAY),
    "16-bit grey tiff": (
        encode(Image.fromarray(DEEP[..., 1]), "TIFF"),
        np.repeat(ARRAY[..., 1:2], 3, 2),
    ),
    "cmyk tiff": (encode(RGB.convert("CMYK"), "TIFF"), ARRAY),
    "jpeg": (encode(RGB, "JPEG", quality=100, subsampling=0), ARRAY),
    "progressive jpeg": (encode(RGB, "JPEG", quality=100, subsampling=0, progressive=True), ARRAY),
    "grey jpeg": (encode(RGB.convert("L"), "JPEG", quality=100), GREY),
    "cmyk jpeg": (encode(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0), ARRAY),
    "rgb jpeg": (encode(RGB, "JPEG", quality=100, keep_rgb=True), ARRAY),
    "webp": (encode(RGB, "WEBP", lossless=True), ARRAY),
    "bmp": (encode(RGB, "BMP"), ARRAY),
    "ppm": (encode(RGB, "PPM"), ARRAY),
    "animated gif, first frame": (
        encode(QUANTIZED, "GIF", save_all=True, append_images=[paint(60, 40, 1).quantize(64)]),
        np.asarray(QUANTIZED.convert("RGB")),
    ),
    "animated webp, first frame": (
        encode(RGB, "WEBP", save_all=True, append_images=[paint(60, 40, 1)], lossless=True),
        ARRAY,
    ),
    "1 x 1": (encode(RGB.resize((1, 1)), "PNG"), np.asarray(RGB.resize((1, 1)))),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name, tmp_path):
    data, expected = MODES[name]
    image = open_image(data)
    assert image.mode == "RGB" and image.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(image).astype(int) - expected).mean() <= 1
    (tmp_path / "picture").write_bytes(data)
    assert np.array_equal(np.asarray(open_image(tmp_path / "picture")), np.asarray(image))
    info = inspect_image(data)
    assert (info.width, info.height) == image.size
    assert info.plain == (name in ("jpeg", "progressive jpeg", "grey jpeg"))


def test_gigantic_picture_is_refused_on_its_header():
    bomb = png(13_344, 13_344, 8, 2, bytes(200_000))  # 178 megapixels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = []
    for look in (inspect_image, open_image, open_image):
        begin = time.perf_counter()
        with pytest.raises(ImageError, match="13344 x 13344 pixels") as error:
            look(bomb)
        took.append(time.perf_counter() - begin)
        assert error.value.reason == "image too large"
    assert min(took) < 0.01
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    with pytest.raises(ImageError):
        open_image(png(60_000, 60_000, 8, 2, bytes(100)))
    with pytest.raises(ImageError, match="on a side"):
        open_image(png(40_000, 1, 8, 2, bytes(100)))
    with pytest.raises(ImageError, match="40000 x 1"):  # the same limit on the fast path for JPEG
        inspect_image(MODES["jpeg"][0].replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 1, 40_000), 1))


def test_long_files_are_refused(tmp_path):
    with pytest.raises(ImageError, match="32,000,001 bytes"):
        open_image(bytes(32_000_001))
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(32_000_001)
    with pytest.raises(ImageError, match=r"long\.png: 32,000,001 bytes"):
        open_image(tmp_path / "long.png")
    with pytest.raises(ImageError, match=r"missing\.png"):
        open_image(tmp_path / "missing.png")


def test_damaged_jpegs_are_not_plain():
    good = encode(paint(300, 200), "JPEG", quality=90)
    assert inspect_image(good).plain
    half = len(good) // 2
    for bad in (good[:half], good[:-2], good[:half] + bytes(half), good[:half] + b"\xff\xd8" + good[half:]):
        assert not inspect_image(bad).plain
        with pytest.raises(ImageError):
            open_image(bad)
    for bad in (b"", b"\xff", b"\xff\xd8", b"nonsense" * 9, good[:30]):
        with pytest.raises(ImageError):
            inspect_image(bad, "record 7")


def test_any_damage_is_an_image_error():
    random = np.random.default_rng(0)
    sources = [MODES[name][0] for name in ("jpeg", "progressive jpeg", "palette png", "animated gif, first frame")]
    refused = 0
    for trial in range(1200):
        data = np.frombuffer(sources[trial % len(sources)], np.uint8).copy()
        where = random.integers(0, min(len(data), 700), 3)
        data[where] = random.integers(0, 256, 3)
        cut = int(random.integers(1, len(data) + 1)) if trial % 3 == 0 else len(data)
        try:
            inspect_image(data[:cut].tobytes())
            open_image(data[:cut].tobytes())
        except ImageError:
            refused += 1
    assert 300 < refused < 1200


def test_rotation_tag_counts_in_evaluation_only():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    stored = paint(60, 40)
    opened = open_image(encode(stored, "JPEG", quality=95, exif=exif))
    assert opened.size == (60, 40)
    turned = val_transform(32)(opened)
    upright = val_transform(32)(stored.transpose(Image.Transpose.ROTATE_270))
    assert (turned - upright).abs().mean() < 0.05
    assert (turned - val_transform(32)(stored)).abs().mean() > 0.2


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (37, 500)])
def test_val_transform_is_that_of_open_clip(size):
    from open_clip.transform import image_transform

    theirs = image_transform(64, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    picture = paint(*size)
    assert torch.equal(val_transform(64)(picture), theirs(picture))


def test_other_sizes():
    assert val_transform((64, 32))(paint(300, 200)).shape == (3, 64, 32)
    assert val_transform((32, 64))(paint(33, 200)).shape == (3, 32, 64)
    assert torch.equal(val_transform((64, 64))(paint(90, 70)), val_transform(64)(paint(90, 70)))
    assert train_transform((64, 32))(paint(300, 200)).shape == (3, 64, 32)
    for transform in (val_transform, train_transform):
        with pytest.raises(ValueError, match="image_size"):
            transform(0)


def test_normalize():
    picture = paint(48, 48)
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    expected = val_transform(48)(picture)[None]
    torch.testing.assert_close(normalize(whole), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(normalize(whole / 255), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="shape"):
        normalize(whole[0])
    with pytest.raises(ValueError, match="dtype"):
        normalize(whole.long())
