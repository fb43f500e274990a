"""Augmentation as a function: crop, flip and text choice of a sample depend on (seed, epoch, sample) only.

Nothing here draws from a stateful generator. A number is a hash of (seed, epoch, sample, draw), so it is the same for
any number of workers or ranks, in any batch, after any resume, and for every decoder. An image may be seen in several
views: view 0 is what a run with one view sees, each further view has draws of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..settings import DataSettings

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the counter step of splitmix64
MIX_A, MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

ATTEMPTS = 10

# Which draw of a sample serves which purpose. A new purpose takes a new number, so that resumed runs see no change.
FLIP, TEXT, CROP_X, CROP_Y, POLICY, CAPTION, CROP_SHAPE = 0, 1, 2, 3, 4, 5, 16
DROP_PATH = 1 << 20  # and the following: one for every residual branch that may be dropped
NEXT_VIEW = 1 << 32  # from a draw for one view of an image to the same draw for the next


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): uint64 -> uint64, each input bit reaches each output
    bit."""
    x = x ^ (x >> np.uint64(30))
    x = x * MIX_A
    x = x ^ (x >> np.uint64(27))
    x = x * MIX_B
    return x ^ (x >> np.uint64(31))


def hash64(*counters: int | np.ndarray) -> np.ndarray:
    """Hash of integers, broadcast against each other -> uint64 array. The order of the arguments matters."""
    state = np.zeros((1,), np.uint64)
    for counter in counters:
        value = np.atleast_1d(np.asarray(counter)).astype(np.uint64)
        state = mix64((state + GAMMA) ^ mix64(value * GAMMA + MIX_B))
    return state


def uniforms(seed: int, epoch: int | np.ndarray, sample: int | np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) per broadcast element of (epoch, sample, draw), 53 random bits each."""
    bits = hash64(seed, epoch, sample, draw) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def draw_flips(seed: int, epochs: np.ndarray, ids: np.ndarray, probability: float = 0.5, view: int = 0) -> np.ndarray:
    """Whether each sample's view is flipped left to right: bool (B,)."""
    return uniforms(seed, epochs, ids, FLIP + view * NEXT_VIEW) < probability


def draw_texts(
    seed: int, epochs: np.ndarray, ids: np.ndarray, count: int, probs: Sequence[float] | None = None
) -> np.ndarray:
    """Which of its `count` texts a sample shows: int64 (B,). probs: of each text, with the sum 1; default: uniform."""
    drawn = uniforms(seed, epochs, ids, TEXT)
    if probs is None:
        return np.minimum((drawn * count).astype(np.int64), count - 1)
    ends = np.cumsum(np.asarray(probs, np.float64))
    return np.searchsorted(ends[:-1] / ends[-1], drawn, side="right").astype(np.int64)  # never one of probability 0


def draw_caption(seed: int, epoch: int, sample: int) -> float:
    """Which of the captions that a text of a sample is drawn from: uniform in [0, 1), the same for all its texts."""
    return float(uniforms(seed, epoch, sample, CAPTION)[0])


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """Keys of rows of token ids: int (.., T), each id in [0, 2^32) and T at most 2^16 -> int64 (..), at least 0.

    A sum over the places of 64 random bits for (id, place), mixed once more (Zobrist 1970): equal rows have equal keys,
    and two others have so by a chance of 2^-63, unless they are made to."""
    places = (rows.astype(np.uint64) << np.uint64(16)) | np.arange(rows.shape[-1], dtype=np.uint64)
    return (mix64(mix64((places + np.uint64(1)) * GAMMA).sum(-1, dtype=np.uint64)) >> np.uint64(1)).astype(np.int64)


def draw_policy_seed(seed: int, epoch: int, sample: int, view: int = 0) -> int:
    """The seed of a view's augmentation policy: 64 bits."""
    return int(hash64(seed, epoch, sample, POLICY + view * NEXT_VIEW)[0])


def draw_drops(seed: int, epochs: np.ndarray, ids: np.ndarray, branches: int) -> np.ndarray:
    """Uniform numbers by which stochastic depth drops branches: float64 (branches, B)."""
    return uniforms(seed, epochs, ids, DROP_PATH + np.arange(branches)[:, None])


def crop_windows(
    widths: np.ndarray,
    heights: np.ndarray,
    seed: int,
    epochs: np.ndarray,
    ids: np.ndarray,
    settings: DataSettings = DataSettings(),
    view: int = 0,
) -> np.ndarray:
    """Random crops, drawn as DALI does from random_area and random_aspect_ratio: int64 (B, 4), rows (x, y, width,
    height), each inside its image of `widths` x `heights` pixels.

    The fraction of the image's area is uniform in `crop_area` of the settings, width / height is log-uniform in
    `crop_aspect`; the first of ten attempts that fits is taken. An image too wide or too tall for any of them gets the
    largest window of an allowed shape. The position is uniform. With `crop` "whole" the window is the image.
    """
    area, aspect, draw = settings.crop_area, settings.crop_aspect, view * NEXT_VIEW
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    if settings.crop == "whole":
        return np.stack([np.zeros_like(widths), np.zeros_like(widths), widths, heights], 1)
    draws = draw + CROP_SHAPE + np.arange(2 * ATTEMPTS)[:, None]
    first, second = np.split(uniforms(seed, np.asarray(epochs)[None], np.asarray(ids)[None], draws), 2)
    target = (area[0] + (area[1] - area[0]) * first) * (widths * heights)
    ratio = np.exp(np.log(aspect[0]) + np.log(aspect[1] / aspect[0]) * second)
    tall = np.maximum(np.rint(np.sqrt(target / ratio)).astype(np.int64), 1)
    wide = np.maximum(np.rint(np.sqrt(target * ratio)).astype(np.int64), 1)
    fits = (wide <= widths) & (tall <= heights)
    pick = fits.argmax(0), np.arange(len(widths))
    last_wide, last_tall = _largest(widths, heights, area[1], aspect)
    width = np.where(fits.any(0), wide[pick], last_wide)
    height = np.where(fits.any(0), tall[pick], last_tall)
    x = (uniforms(seed, epochs, ids, draw + CROP_X) * (widths - width + 1)).astype(np.int64)
    y = (uniforms(seed, epochs, ids, draw + CROP_Y) * (heights - height + 1)).astype(np.int64)
    return np.stack([np.minimum(x, widths - width), np.minimum(y, heights - height), width, height], 1)


def _largest(widths, heights, most: float, aspect: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Largest window inside each image with a shape in `aspect` and at most the fraction `most` of its area."""
    wide = np.minimum(widths, np.maximum(1, (heights * aspect[1]).astype(np.int64)))
    tall = np.minimum(heights, np.maximum(1, (widths / aspect[0]).astype(np.int64)))
    shrink = np.sqrt(np.minimum(1.0, most * widths * heights / (wide * tall)))
    return np.maximum(1, (wide * shrink).astype(np.int64)), np.maximum(1, (tall * shrink).astype(np.int64))
