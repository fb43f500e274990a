"""From a position to pixels: read the record, look at its picture's header, draw its crop, decode, crop,
resize.

Both loaders take their samples from the one `SampleReader` here, so they agree on order, crops, mirrors,
texts and on which records are bad. A bad record at position p gives its place to the next good one in order
(p + 1, p + 2, ...).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from rwkv_clip.errors import DATA
from rwkv_clip.data.image import SIDEWAYS, ImageError, ImageInfo, inspect_image, open_header, to_rgb
from rwkv_clip.data.records import RecordError, RecordSet

from .augment import Augmentation, crop_windows, draw_flips
from .order import Order

try:  # deprecated since torchvision 0.29; where it is gone PIL decodes, at 0.8 of the speed
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

SEARCH = 1000  # that many bad records in a row: the data set is broken, not a record

# A picture decoded at a fraction of its size must still be this much larger than the result: with 1.0 pixels
# differ by up to 2.5/255 on average from full decoding, with 1.5 by 0.6 (pictures with hard edges and grain).
SPARE = 1.5


class DataError(ValueError):
    """Too many records are bad; the message names the first ones."""

    exit_code = DATA


@dataclass(frozen=True)
class Fault:
    """Why the record at `position` of the order was replaced."""

    position: int
    reason: str
    message: str


@dataclass
class Sample:
    """A readable record, its crop (x, y, width, height) in pixels of the upright picture, mirror, and texts
    (V, T)."""

    position: int
    id: int
    epoch: int
    data: bytes
    info: ImageInfo
    tokens: np.ndarray
    name: str
    window: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False
    fault: Fault | None = None  # of the record whose place this one takes


class SampleReader:
    """Reads and decodes samples by their position in `Order(len(records), seed)`; image_size is (height,
    width)."""

    def __init__(
        self,
        records: RecordSet,
        seed: int,
        image_size: tuple[int, int],
        augmentation: Augmentation = Augmentation(),
    ):
        self.records, self.seed, self.image_size = records, seed, image_size
        self.augmentation = augmentation
        self.order = Order(len(records), seed)

    def read(self, positions: np.ndarray) -> list[Sample]:
        """One sample per position, headers checked and crops drawn, pixels not decoded yet."""
        samples = []
        for position, index in zip(positions.tolist(), self.order.at(positions).tolist()):
            try:
                samples.append(self._load(position, index))
            except (RecordError, ImageError) as error:
                samples.append(self._next_good(_fault(position, error)))
        self._draw(samples)
        return samples

    def decode(self, sample: Sample) -> tuple[Sample, torch.Tensor]:
        """Pixels uint8 (3, h, w) of `sample`, or of the next good sample in order if it does not decode."""
        for _ in range(SEARCH):
            try:
                return sample, decode_crop(sample, self.image_size)
            except ImageError as error:
                fault = _fault(sample.position, error)
            first = sample.fault or fault
            sample = self._next_good(fault)
            sample.fault = first
            self._draw([sample])
        raise _hopeless(fault)

    def _load(self, position: int, index: int) -> Sample:
        data, tokens = self.records.sample(index)
        name = self.records.name(index)
        info = inspect_image(data, name)
        return Sample(position, index, position // self.order.count, data, info, tokens, name)

    def _next_good(self, fault: Fault) -> Sample:
        """The first sample after the fault's position whose header is good; carries the fault."""
        for position in range(fault.position + 1, fault.position + 1 + SEARCH):
            try:
                sample = self._load(position, self.order.at(position))
            except (RecordError, ImageError):
                continue  # counted in its own place
            sample.fault = fault
            return sample
        raise _hopeless(fault)

    def _draw(self, samples: list[Sample]) -> None:
        ids = np.array([sample.id for sample in samples], np.int64)
        epochs = np.array([sample.epoch for sample in samples], np.int64)
        widths = np.array([sample.info.width for sample in samples], np.int64)
        heights = np.array([sample.info.height for sample in samples], np.int64)
        how = self.augmentation
        windows = crop_windows(widths, heights, self.seed, epochs, ids, how.area, how.aspect).tolist()
        flips = draw_flips(self.seed, epochs, ids, how.flip).tolist()
        for sample, window, flip in zip(samples, windows, flips):
            sample.window, sample.flip = tuple(window), flip


def _fault(position: int, error: RecordError | ImageError) -> Fault:
    return Fault(position, getattr(error, "reason", "record damaged"), str(error))


def _hopeless(fault: Fault) -> DataError:
    return DataError(
        f"no good record among the {SEARCH} after position {fault.position}, "
        f"where {fault.message}; check the training data"
    )


def decode_crop(sample: Sample, size: tuple[int, int]) -> torch.Tensor:
    """Crop, resize (linear, antialiased) and mirror one sample: contiguous uint8 (3, h, w). ImageError if
    damaged."""
    return fit_pixels(decode_window(sample, size), size, sample.flip)


def decode_window(sample: Sample, size: tuple[int, int]) -> torch.Tensor:
    """The pixels in the sample's window, uint8 (3, H, W), any strides; of `size` already where the picture is so large
    that it was decoded at a fraction of its size. ImageError if damaged."""
    x, y, width, height = sample.window
    whole = _decode_plain(sample, size)
    if whole is None:
        return _decode_with_pil(sample, size)
    return whole[:, y : y + height, x : x + width]


def fit_pixels(pixels: torch.Tensor, size: tuple[int, int], flip: bool) -> torch.Tensor:
    """Resize (linear, antialiased) and mirror: uint8 (3, H, W), any strides -> contiguous uint8 (3, h, w).

    torch resizes as PIL does, measured 1.3 to 2 times as fast (to 224 and 500 px), and 8 times as fast as DALI's CPU.
    """
    if pixels.shape[1:] != size:
        pixels = torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return (pixels.flip(2) if flip else pixels).contiguous()


def _enough(sample: Sample, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the whole picture that leaves the crop SPARE times as large as the result."""
    wide, tall = (full * to / own for full, to, own in zip(_full(sample), size[::-1], sample.window[2:]))
    return math.ceil(SPARE * wide), math.ceil(SPARE * tall)


def _full(sample: Sample) -> tuple[int, int]:
    return sample.info.width, sample.info.height


def _decode_plain(sample: Sample, size: tuple[int, int]) -> torch.Tensor | None:
    """All pixels of a plain JPEG, uint8 (3, H, W), by torchvision: the same numbers as PIL's in 0.8 of the time.
    None where PIL decodes less (at half the size or below), and where PIL should say what is wrong."""
    half = all(full >= 2 * enough for full, enough in zip(_full(sample), _enough(sample, size)))
    if half or decode_jpeg is None or not sample.info.plain:
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(sample.data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def _decode_with_pil(sample: Sample, size: tuple[int, int]) -> torch.Tensor:
    x, y, width, height = sample.window
    image = open_header(io.BytesIO(sample.data), sample.name)
    turn = sample.info.turn
    if sample.info.plain or turn is not None:  # libjpeg decodes at 1/2, 1/4 or 1/8 of the size where that leaves enough
        enough = _enough(sample, size)
        image.draft(None, enough[::-1] if turn in SIDEWAYS else enough)
    image = to_rgb(image, sample.name)
    across, down = image.width / sample.info.width, image.height / sample.info.height
    if across < 1:
        box = (x * across, y * down, (x + width) * across, (y + height) * down)
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    else:
        image = image.crop((x, y, x + width, y + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
