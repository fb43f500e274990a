"""Pictures: every mode becomes the right RGB, limits hold before decoding, damage is an ImageError and
nothing else."""

import io
import resource
import struct
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.pictures import encode, paint
from rwkv_clip import transform as transform_module
from rwkv_clip.data.image import FORMATS, ImageError, inspect_image, open_image, to_rgb
from rwkv_clip.factory import preprocess_of
from rwkv_clip.training.data import samples
from rwkv_clip.training.data.samples import Crop, Sample, decode_windows, fit_pixels
from rwkv_clip.transform import CLIP_MEAN, CLIP_STD, normalize, train_transform, val_transform

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


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


TURNS = {  # orientation tag -> how the upright picture is stored
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def tag(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def with_late_tag(picture: Image.Image, orientation: int) -> bytes:
    """PNG whose eXIf chunk stands behind the pixels."""
    body = b"eXIf" + tag(orientation)[6:]
    data = encode(picture, "PNG")
    return data[:-12] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[-12:]


FINE = {"quality": 100, "subsampling": 0}
TAGGED = {
    "JPEG": lambda p, o: encode(p, "JPEG", **FINE, exif=tag(o)),
    "progressive JPEG": lambda p, o: encode(p, "JPEG", **FINE, exif=tag(o), progressive=True),
    "CMYK JPEG": lambda p, o: encode(p.convert("CMYK"), "JPEG", **FINE, exif=tag(o)),
    "JPEG, XMP": lambda p, o: encode(p, "JPEG", **FINE, xmp=xmp(o)),
    "JPEG, Exif before XMP": lambda p, o: encode(p, "JPEG", **FINE, exif=tag(o), xmp=xmp(1 + o % 8)),
    "PNG": lambda p, o: encode(p, "PNG", exif=tag(o)),
    "PNG, tag behind the pixels": with_late_tag,
    "WebP": lambda p, o: encode(p, "WEBP", lossless=True, exif=tag(o)),
    "TIFF": lambda p, o: encode(p, "TIFF", exif=tag(o)),
    "packed TIFF": lambda p, o: encode(p, "TIFF", exif=tag(o), compression="tiff_lzw"),
    "AVIF": lambda p, o: encode(p, "AVIF", quality=97, subsampling="4:4:4", exif=tag(o)),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", TAGGED)
def test_pictures_are_upright_everywhere(kind, orientation):
    if kind == "AVIF" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow does not read AVIF")
    upright, turn = paint(60, 40), TURNS[orientation]
    data = TAGGED[kind](upright if turn is None else upright.transpose(turn), orientation)
    info, opened = inspect_image(data), open_image(data)
    assert (info.width, info.height) == opened.size == upright.size
    assert info.plain == (
        orientation == 1 and kind in ("JPEG", "progressive JPEG", "JPEG, XMP", "JPEG, Exif before XMP")
    )
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(upright)).mean() < 2
    assert not opened.getexif() and not opened.info  # nothing that could turn it again
    transform = val_transform((32, 48))
    assert torch.equal(transform(Image.open(io.BytesIO(data))), transform(opened))
    sample = Sample(0, 0, 0, data, info, np.zeros((1, 1)), kind, (Crop(0, 0, 30, 40),))
    pixels = fit_pixels(decode_windows(sample, (40, 30))[0], (40, 30), False).permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - np.asarray(upright)[:, :30]).mean() < 2


@pytest.mark.parametrize("orientation", TURNS)
def test_large_turned_jpegs_are_decoded_at_a_fraction(orientation, monkeypatch):
    upright, turn = paint(1200, 900), TURNS[orientation]
    data = encode(upright if turn is None else upright.transpose(turn), "JPEG", quality=97, exif=tag(orientation))
    sample = Sample(0, 0, 0, data, inspect_image(data), np.zeros((1, 1)), "x", (Crop(300, 100, 600, 675),))
    decoded = []
    monkeypatch.setattr(samples, "to_rgb", lambda image, name: decoded.append(max(image.size)) or to_rgb(image, name))
    pixels = fit_pixels(decode_windows(sample, (50, 100))[0], (50, 100), False).permute(1, 2, 0).numpy()
    expected = upright.resize((100, 50), Image.Resampling.BILINEAR, box=(300, 100, 900, 775))
    assert decoded == [300] and np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's of damaged tags
def test_damaged_tags_mean_what_pil_makes_of_them():
    random, good = np.random.default_rng(0), tag(6)
    picture, obeyed = paint(60, 40), 0
    for trial in range(600):
        damaged = np.frombuffer(good, np.uint8).copy()
        damaged[random.integers(6, len(good), 1 + trial % 3)] = random.integers(0, 256)
        body = damaged[: len(good) - (trial % 5 == 0) * int(random.integers(0, 20))].tobytes()
        data = encode(picture, "JPEG", exif=body)
        try:
            size = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
        except Exception:
            size = picture.size
        info = inspect_image(data)
        assert (info.width, info.height) == open_image(data).size == size, body
        assert val_transform(8)(Image.open(io.BytesIO(data))).shape == (3, 8, 8)
        obeyed += size != picture.size
    assert 50 < obeyed < 550


def siglip(size: int | tuple[int, int]):
    """The transform of a model whose pixels are not normalised as CLIP's: open_clip's."""
    return preprocess_of(SimpleNamespace(spec=SimpleNamespace(image_size=size, pixels=((0.5,) * 3, (0.5,) * 3))))


TRANSFORMS = {"val": val_transform, "train": train_transform, "open_clip": siglip}


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("name", MODES)
def test_transforms_take_files_as_the_commands_do(name, kind):
    transform, data = TRANSFORMS[kind](24), MODES[name][0]
    torch.manual_seed(0)
    picture = Image.open(io.BytesIO(data))
    picture.load()
    mode, tags = picture.mode, dict(picture.info)
    taken = transform(picture)
    torch.manual_seed(0)
    assert torch.equal(taken, transform(open_image(data)))
    assert (picture.mode, picture.info) == (mode, tags)  # the caller's picture is as it was


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_transforms_convert_before_they_scale(mode):
    if mode == "PA":
        picture = RGB.convert("P").convert("PA")
    else:
        picture = Image.fromarray(DEEP[..., 0]) if mode == "I;16" else RGB.convert(mode)
    assert picture.mode == mode
    rgb = Image.fromarray(ARRAY[..., 0]).convert("RGB") if mode == "I;16" else picture.convert("RGB")
    for make in (val_transform, siglip):
        assert torch.equal(make(24)(picture), make(24)(rgb))


THIN = """
import resource, sys
from types import SimpleNamespace
from PIL import Image
from rwkv_clip.data.image import open_image
from rwkv_clip.factory import preprocess_of
from rwkv_clip.transform import val_transform
spec = SimpleNamespace(pixels=((0.5,) * 3, (0.5,) * 3))
transforms = [val_transform(224), val_transform((224, 112))]
for spec.image_size in ((224, 224), (224, 112)):
    transforms.append(preprocess_of(SimpleNamespace(spec=spec)))
for transform in transforms:
    transform(Image.new("RGB", (300, 200)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in ((32768, 1), (1, 32768)):
    Image.new("RGB", size).save(sys.argv[1])
    for transform in transforms:
        transform(open_image(sys.argv[1])), transform(Image.open(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_thin_pictures_need_no_memory(tmp_path):
    command = [sys.executable, "-c", THIN, str(tmp_path / "thin.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # MB


@pytest.mark.parametrize("long", [321, 1000, 2500])
@pytest.mark.parametrize("short", [1, 5, 30])
@pytest.mark.parametrize("size", [24, (24, 16), (16, 24)])
def test_thin_pictures_look_as_if_scaled_whole(long, short, size, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (short, long, 3), dtype=np.uint8)
    for picture in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())):
        for make in (val_transform, siglip):
            cut = make(size)
            monkeypatch.setattr(transform_module, "THIN", 10**6)
            whole = make(size)
            monkeypatch.undo()
            scale = torch.tensor(CLIP_STD if make is val_transform else (0.5,) * 3).view(3, 1, 1)
            assert ((cut(picture) - whole(picture)) * scale).abs().max() <= 1.001 / 255


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow does not read AVIF")
def test_avif():
    data = encode(RGB, "AVIF", quality=98, subsampling="4:4:4")
    assert np.abs(np.asarray(open_image(data)).astype(int) - ARRAY).mean() < 2
    info = inspect_image(data)
    assert (info.width, info.height, info.plain) == (60, 40, False)
    for cut in (data[:20], data[: len(data) // 2], data[:-1]):
        with pytest.raises(ImageError):
            open_image(cut)
    with pytest.raises(ImageError, match="9000 x 6000 pixels"):
        inspect_image(encode(Image.new("L", (9000, 6000)), "AVIF", speed=10))


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
