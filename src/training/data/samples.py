"""From a position to pixels: read the record, inspect its image's header, draw its crops, decode, crop, resize.

Both loaders take their samples from the one `SampleReader` here, so they agree on order, crops, flips, texts and on
which records are bad. A bad record at position p is replaced by the next good one in order (p + 1, p + 2, ..), in a
mixture by the next good one of its source.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rwkv_clip.data.image import SIDEWAYS, ImageError, ImageInfo, inspect_image, open_header, to_rgb
from rwkv_clip.data.mixture import Mixture
from rwkv_clip.data.records import RecordError, Records
from rwkv_clip.errors import DATA
from rwkv_clip.files import hash_bytes

from ..policy import RESAMPLING, Policy
from ..settings import DataSettings
from .augment import crop_windows, draw_caption, draw_flips, draw_policy_seed
from .order import make_order

try:  # deprecated since torchvision 0.29; where it is gone PIL decodes, at 0.8 of the speed
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

SEARCH = 1000  # bad records in a row after which the data set counts as broken

# An image decoded at a fraction of its size must still be this much larger than the result: with 1.0 pixels differ by
# up to 2.5/255 on average from full decoding, with 1.5 by 0.6 (images with hard edges and grain).
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


class Crop(NamedTuple):
    """What a view shows: a window in pixels of the upright image, flipped left to right or not."""

    x: int
    y: int
    width: int
    height: int
    flip: bool = False


@dataclass
class Sample:
    """A readable record: encoded image, one crop per view, and token ids of its texts (N, T)."""

    position: int
    id: int
    epoch: int  # in a mixture the pass of its source
    data: bytes
    info: ImageInfo
    tokens: np.ndarray
    name: str
    crops: tuple[Crop, ...] = ()
    turn: int = 0  # it is the turn-th that could take the place of the record at its position; 0: that record
    fault: Fault | None = None  # of the record that this one replaces
    key: int | None = None  # of the encoded image (`hash_bytes`), where keys are asked for


class SampleReader:
    """Reads and decodes samples by their position in the order of the records (`make_order`).

    image_size: (height, width) of a view. views: random crops taken of each image. keys: whether samples have keys.
    """

    def __init__(
        self,
        records: Records,
        seed: int,
        image_size: tuple[int, int],
        settings: DataSettings = DataSettings(),
        views: int = 1,
        keys: bool = False,
    ):
        if views < 1:
            raise ValueError(f"views: {views}; an image needs at least one")
        self.records, self.seed, self.image_size = records, seed, image_size
        self.settings, self.views, self.keys = settings, views, keys
        self.order = make_order(records, seed)
        name = settings.auto_augment
        self.policy = None if name is None else Policy(name, image_size, settings.interpolation)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a sample's pixels: (V, 3, h, w)."""
        return self.views, 3, *self.image_size

    def read(self, positions: np.ndarray) -> list[Sample]:
        """One sample per position, headers checked and crops drawn, pixels not decoded yet."""
        samples = []
        ids, epochs = self.order.find(positions)
        for position, index, epoch in zip(positions.tolist(), ids.tolist(), epochs.tolist()):
            try:
                samples.append(self._load(position, index, epoch))
            except (RecordError, ImageError) as error:
                samples.append(self._next_good(self._fault(position, index, error), 0))
        self._draw(samples)
        return samples

    def decode(self, sample: Sample, image: torch.Tensor) -> Sample:
        """Decode all views into `image`, uint8 (V, 3, h, w); returns the sample, or if it does not decode the next good
        one in order, which is decoded instead."""
        for _ in range(SEARCH):
            try:
                decode_views(sample, image, self.settings.interpolation)
                self._transform(sample, image)
                return sample
            except ImageError as error:
                fault = self._fault(sample.position, sample.id, error)
            first = sample.fault or fault
            sample = self._next_good(fault, sample.turn)
            sample.fault = first
            self._draw([sample])
        raise _hopeless(fault)

    def _transform(self, sample: Sample, image: torch.Tensor) -> None:
        """Apply the augmentation policy, if there is one, to all views in place."""
        if self.policy is None:
            return
        for view, pixels in enumerate(image):
            seed = draw_policy_seed(self.seed, sample.epoch, sample.id, view)
            pixels.copy_(self.policy.apply(pixels, seed))

    def decode_all(self, samples: list[Sample], image: torch.Tensor) -> list[Sample]:
        """`decode` of each sample into its row of `image`, uint8 (B, V, 3, h, w)."""
        return [self.decode(sample, row) for sample, row in zip(samples, image)]

    def _load(self, position: int, index: int, epoch: int) -> Sample:
        drawn = None
        if self.records.several and self.settings.text_choice != "first":
            drawn = draw_caption(self.seed, epoch, index)
        data, tokens = self.records.draw_sample(index, drawn)
        name = self.records.name(index)
        info = inspect_image(data, name)
        key = hash_bytes(data) if self.keys else None
        return Sample(position, index, epoch, data, info, tokens, name, key=key)

    def _next_good(self, fault: Fault, after: int) -> Sample:
        """The first sample whose header is good among those that may stand in at the fault's position, after the
        `after`-th of them; carries the fault."""
        for turn in range(after + 1, after + 1 + SEARCH):
            try:
                sample = self._load(fault.position, *self.order.stand_in(fault.position, turn))
            except (RecordError, ImageError):
                continue  # counted at its own position
            sample.turn, sample.fault = turn, fault
            return sample
        raise _hopeless(fault)

    def _fault(self, position: int, index: int, error: RecordError | ImageError) -> Fault:
        reason = getattr(error, "reason", "record damaged")
        source = f" in {self.records.source_of(index)}" if isinstance(self.records, Mixture) else ""
        return Fault(position, reason + source, str(error))

    def _draw(self, samples: list[Sample]) -> None:
        facts = [(sample.id, sample.epoch, sample.info.width, sample.info.height) for sample in samples]
        ids, epochs, widths, heights = np.array(facts, np.int64).T
        views = []
        for view in range(self.views):
            windows = crop_windows(widths, heights, self.seed, epochs, ids, self.settings, view)
            flips = draw_flips(self.seed, epochs, ids, self.settings.flip, view)
            views.append([Crop(*window, flip) for window, flip in zip(windows.tolist(), flips.tolist())])
        for sample, crops in zip(samples, zip(*views)):
            sample.crops = crops


def _hopeless(fault: Fault) -> DataError:
    return DataError(
        f"no good record among the {SEARCH} after position {fault.position}, "
        f"where {fault.message}; check the training data"
    )


def decode_views(sample: Sample, image: torch.Tensor, interpolation: str = "bilinear") -> None:
    """Decode, crop, resize (antialiased) and flip all views of a sample into `image`, uint8 (V, 3, h, w).
    ImageError if it is damaged."""
    size = tuple(image.shape[2:])
    for view, window, crop in zip(image, decode_windows(sample, size, interpolation), sample.crops):
        view.copy_(fit_pixels(window, size, crop.flip, interpolation))


def decode_windows(sample: Sample, size: tuple[int, int], interpolation: str = "bilinear") -> list[torch.Tensor]:
    """The pixels in each crop's window, uint8 (3, H, W), any strides; of `size` already where the image is so large
    that it was decoded at a fraction of its size. ImageError if it is damaged.

    What several crops need is decoded once.
    """
    plain, by_size, windows = None, {}, []
    for crop in sample.crops:
        enough = _enough(sample.info, crop, size)
        if plain is None and decode_jpeg and sample.info.plain and not _halves(sample.info, enough):
            plain = _decode_jpeg(sample.data)
        if plain is None or _halves(sample.info, enough):
            windows.append(_decode_with_pil(sample, crop, size, enough, by_size, interpolation))
        else:
            windows.append(plain[:, crop.y : crop.y + crop.height, crop.x : crop.x + crop.width])
    return windows


def fit_pixels(
    pixels: torch.Tensor, size: tuple[int, int], flip: bool, interpolation: str = "bilinear"
) -> torch.Tensor:
    """Resize (antialiased) and flip: uint8 (3, H, W), any strides -> contiguous uint8 (3, h, w).

    torch resizes as PIL does, measured 1.3 to 2 times as fast (to 224 and 500 px), and 8 times as fast as DALI's CPU.
    """
    if pixels.shape[1:] != size:
        pixels = torch.nn.functional.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0]
    return (pixels.flip(2) if flip else pixels).contiguous()


def _enough(info: ImageInfo, crop: Crop, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the whole image that leaves the crop SPARE times as large as the result."""
    wide, tall = info.width * size[1] / crop.width, info.height * size[0] / crop.height
    return math.ceil(SPARE * wide), math.ceil(SPARE * tall)


def _halves(info: ImageInfo, enough: tuple[int, int]) -> bool:
    """Whether half the image's width and height are enough, or less: PIL decodes only as much."""
    return info.width >= 2 * enough[0] and info.height >= 2 * enough[1]


def _decode_jpeg(data: bytes) -> torch.Tensor | None:
    """All pixels of a plain JPEG, uint8 (3, H, W), by torchvision: the same numbers as PIL's in 0.8 of the time.
    None where PIL should report what is wrong."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def _decode_with_pil(
    sample: Sample,
    crop: Crop,
    size: tuple[int, int],
    enough: tuple[int, int],
    decoded: dict[tuple[int, int], Image.Image],
    interpolation: str,
) -> torch.Tensor:
    """decoded: whole images by the size at which they were decoded; one that is missing is added."""
    image, turn = open_header(io.BytesIO(sample.data), sample.name), sample.info.turn
    if sample.info.plain or turn is not None:  # libjpeg decodes at 1/2, 1/4 or 1/8 of the size where that leaves enough
        image.draft(None, enough[::-1] if turn in SIDEWAYS else enough)
    scale = image.size
    if scale not in decoded:
        decoded[scale] = to_rgb(image, sample.name)
    image, (x, y, width, height, _) = decoded[scale], crop
    across, down = image.width / sample.info.width, image.height / sample.info.height
    if across < 1:
        box = (x * across, y * down, (x + width) * across, (y + height) * down)
        image = image.resize((size[1], size[0]), RESAMPLING[interpolation], box=box)
    else:
        image = image.crop((x, y, x + width, y + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
