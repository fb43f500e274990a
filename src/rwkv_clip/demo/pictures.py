"""Draw the scenes of the demo set with PIL: supersampled, so edges are smooth at 64 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from .scenes import BACKGROUNDS, MIDDLE, Scene, Thing

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

PAINT: dict[str, RGB] = {
    "red": (214, 34, 40),
    "orange": (248, 132, 16),
    "yellow": (250, 218, 40),
    "green": (26, 142, 60),
    "blue": (28, 84, 214),
    "purple": (122, 40, 168),
    "pink": (252, 128, 186),
    "black": (30, 30, 34),
}
CLOSE_UP = 1.6  # a thing alone in the middle has the picture to itself
RADIUS = {"small": 0.15, "large": 0.22}  # fraction of the picture's side
OVERSAMPLING = 4
JPEG_QUALITY = 92
_DARK = {"night"}
_BRIGHT_PAINT = {"yellow", "pink", "orange"}  # their stripes and dots are dark, the others' are white
_SHADOW = [value * 2 // 7 for value in range(256)]  # mask -> opacity
_VARIANTS = 8  # pictures per background and process; each is shifted, mirrored and dimmed anew per scene


def _mix(a: RGB, b: RGB, fraction: float) -> RGB:
    return tuple(round(x + (y - x) * fraction) for x, y in zip(a, b))


def _regular(count: int, radii: tuple[float, ...], turn: float = 0.0) -> Points:
    """`count` points round the origin, radii in turn, the first one on top (turned by `turn` degrees)."""
    angles = (math.radians(turn) + 2 * math.pi * i / count for i in range(count))
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def _heart() -> Points:
    """The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to radius 1."""
    turns = [2 * math.pi * i / 48 for i in range(48)]
    high = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(1.08 * math.sin(t) ** 3, -(y + 2.5) / 14) for t, y in zip(turns, high)]


def _cross(arm: float = 0.36) -> Points:
    corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points: Points = []
    for _ in range(4):
        points += corner
        corner = [(-y, x) for x, y in corner]
    return points


# Contours in units of the radius, y downwards; a second contour is a hole.
CONTOURS: dict[str, list[Points]] = {
    "circle": [_regular(48, (0.95,))],
    "square": [_regular(4, (1.2,), 45)],
    "triangle": [[(x, y + 0.2) for x, y in _regular(3, (1.15,))]],
    "star": [_regular(10, (1.12, 0.48))],
    "heart": [_heart()],
    "diamond": [[(0, -1.12), (0.76, 0), (0, 1.12), (-0.76, 0)]],
    "cross": [_cross()],
    "ring": [_regular(48, (1.0,)), _regular(48, (0.52,))],
}


def _grain(rng: Random, width: int, soft: float) -> Image.Image:
    """Grey noise around 128 (mode L), blurred by `soft` pixels."""
    noise = Image.frombytes("L", (width, width), rng.randbytes(width * width))
    return noise.filter(ImageFilter.GaussianBlur(soft)) if soft else noise


def _gradient(width: int, top: RGB, bottom: RGB) -> Image.Image:
    mask = Image.linear_gradient("L").resize((width, width))
    return Image.composite(Image.new("RGB", (width, width), bottom), Image.new("RGB", (width, width), top), mask)


def _roughen(image: Image.Image, grain: Image.Image, fraction: float) -> Image.Image:
    return Image.blend(image, ImageChops.overlay(image, Image.merge("RGB", (grain,) * 3)), fraction)


def _draw_paper(rng: Random, width: int) -> Image.Image:
    return _roughen(Image.new("RGB", (width, width), (205, 205, 207)), _grain(rng, width, 1.0), 0.5)


def _draw_sky(rng: Random, width: int) -> Image.Image:
    image, mask = _gradient(width, (112, 176, 232), (206, 230, 246)), Image.new("L", (width, width), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(4):
        x, y, r = rng.uniform(0, width), rng.uniform(0, width), rng.uniform(0.05, 0.08) * width
        for shift in (-1.5, -0.5, 0.6, 1.6):
            high = r * rng.uniform(0.6, 1.0)
            draw.ellipse((x + shift * r - r, y - high, x + shift * r + r, y + high), fill=215)
    image.paste((255, 255, 255), (0, 0), mask.filter(ImageFilter.GaussianBlur(width / 48)))
    return image


def _draw_night(rng: Random, width: int) -> Image.Image:
    image = _gradient(width, (14, 18, 54), (48, 46, 104))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, r = rng.uniform(0, width), rng.uniform(0, width), rng.uniform(0.003, 0.008) * width
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(235, 235, rng.randint(190, 255)))
    return image


def _draw_sand(rng: Random, width: int) -> Image.Image:
    image = _roughen(Image.new("RGB", (width, width), (226, 202, 150)), _grain(rng, width, 0.7), 0.7)
    draw, phase = ImageDraw.Draw(image), rng.uniform(0, 7)
    for row in range(-1, 11):
        y0 = (row + rng.uniform(0, 0.5)) * width / 10
        wave = [(x, y0 + width / 45 * math.sin(phase + row + 9 * x / width)) for x in range(0, width + 8, 8)]
        draw.line(wave, fill=(206, 178, 124), width=max(1, width // 90), joint="curve")
    return image


def _draw_bricks(rng: Random, width: int) -> Image.Image:
    image = Image.new("RGB", (width, width), (222, 214, 204))
    draw, high, wide, gap = ImageDraw.Draw(image), width / 8, width / 4, width / 90
    for row, column in ((r, c) for r in range(9) for c in range(-1, 5)):
        x, y = (column + row % 2 / 2) * wide, row * high
        shade = _mix((178, 122, 100), (206, 156, 130), rng.random())
        draw.rectangle((x + gap, y + gap, x + wide - gap, y + high - gap), fill=shade)
    return _roughen(image, _grain(rng, width, 1.0), 0.4)


def _draw_grass(rng: Random, width: int) -> Image.Image:
    image = Image.new("RGB", (width, width), (150, 190, 104))
    draw = ImageDraw.Draw(image)
    for _ in range(700):
        x, y, long = rng.uniform(0, width), rng.uniform(0, width * 1.08), rng.uniform(0.04, 0.09) * width
        shade = _mix((112, 160, 70), (186, 216, 136), rng.random())
        draw.line((x, y, x + rng.uniform(-0.4, 0.4) * long, y - long), fill=shade, width=max(1, width // 120))
    return image


DRAW_BACKGROUND: dict[str, Callable[[Random, int], Image.Image]] = dict(
    zip(BACKGROUNDS, (_draw_paper, _draw_sky, _draw_night, _draw_sand, _draw_bricks, _draw_grass), strict=True)
)


@lru_cache(maxsize=256)
def _background(name: str, variant: int, width: int) -> Image.Image:
    return DRAW_BACKGROUND[name](Random(f"{name}/{variant}"), width)


def _place_background(rng: Random, name: str, width: int) -> Image.Image:
    image = _background(name, rng.randrange(_VARIANTS), width)
    if name not in ("sky", "night"):  # a sky has a top and a bottom
        image = ImageChops.offset(image, rng.randrange(8) * width // 8, rng.randrange(0, 4) * width // 4)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.92, 1.06))


def _paint_body(thing: Thing, paint: RGB, width: int, unit: float) -> Image.Image:
    """A square of paint with the thing's texture; `unit` is the radius in pixels."""
    body = Image.new("RGB", (width, width), paint)
    if thing.texture == "plain":
        return body
    draw = ImageDraw.Draw(body)
    mark = _mix(paint, (70, 20, 20), 0.8) if thing.color in _BRIGHT_PAINT else (250, 250, 250)
    step = unit * (0.52 if thing.size == "large" else 0.66)  # coarser on a small thing, or it is lost at 64 pixels
    if thing.texture == "striped":
        for i in range(-1, 2 * int(width / step) + 2):
            x = i * step
            draw.line((x, -1, x - width, width + 1), fill=mark, width=round(step * 0.3))
    else:
        r = step * 0.24
        count = int(0.6 * width / step) + 1
        middle = width / 2
        for row in range(-count, count + 1):
            for column in range(-count, count + 1):
                x, y = middle + (column + row % 2 / 2) * step, middle + row * step * 0.87
                draw.ellipse((x - r, y - r, x + r, y + r), fill=mark)
    return body


def _draw_thing(canvas: Image.Image, thing: Thing, dark: bool, rng: Random) -> None:
    """Shadow, textured body and rim of one thing, at its place, give or take a few pixels."""
    side = canvas.width
    unit = RADIUS[thing.size] * side * rng.uniform(0.93, 1.05) * (CLOSE_UP if thing.place == MIDDLE else 1)
    middle = [0.5 if thing.place == MIDDLE else 0.28 + 0.44 * at for at in reversed(thing.place)]  # x, y
    x0, y0 = (side * (m + rng.uniform(-0.03, 0.03)) for m in middle)
    turn = math.radians(rng.uniform(-7, 7))
    cos, sin = math.cos(turn) * unit, math.sin(turn) * unit
    width = math.ceil(2.6 * unit)
    left, top = round(x0 - width / 2), round(y0 - width / 2)
    contours = [
        [(x * cos - y * sin + width / 2, x * sin + y * cos + width / 2) for x, y in points]
        for points in CONTOURS[thing.shape]
    ]
    mask = Image.new("L", (width, width), 0)
    for level, points in enumerate(contours):
        ImageDraw.Draw(mask).polygon(points, fill=0 if level else 255)
    shift = round(side / 64)
    canvas.paste((0, 0, 0), (left + shift, top + shift * 2), mask.point(_SHADOW))
    paint = _mix(PAINT[thing.color], (255, 255, 255) if rng.random() < 0.5 else (0, 0, 0), rng.uniform(0, 0.1))
    canvas.paste(_paint_body(thing, paint, width, unit), (left, top), mask)
    rim = _mix(paint, (255, 255, 255), 0.6) if dark else _mix(paint, (0, 0, 0), 0.45)
    draw = ImageDraw.Draw(canvas)
    for points in contours:
        ring = [(left + x, top + y) for x, y in (*points, *points[:2])]
        draw.line(ring, fill=rim, width=max(2, round(side / 90)), joint="curve")


def draw_picture(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels; the same scene and size give the same pixels."""
    rng = Random(f"{scene.key}/picture")
    canvas = _place_background(rng, scene.background, size * OVERSAMPLING)
    for thing in scene.things:
        _draw_thing(canvas, thing, scene.background in _DARK, rng)
    return canvas.reduce(OVERSAMPLING)


def encode_picture(image: Image.Image, kind: str) -> bytes:
    """File bytes of a picture: "jpeg" (full colour resolution: the things are small) or "png"."""
    stream = BytesIO()
    if kind == "jpeg":
        image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
