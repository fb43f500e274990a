"""The DALI loader: the same batches as the PyTorch loader, decoded by nvidia-dali on a GPU (or by its CPU threads).

DALI only decodes, crops and, on a GPU, resizes and flips; on a CPU its resize takes 8 times as long as torch's, which
is used instead. It is fed bytes, window and flip through `external_source`, once per view, since it decodes no more
than the window; which record comes next and how it is cropped are decided by `SampleReader`, as for the other loader.
DALI ends its pipeline at the first image that it cannot decode. So it gets plain JPEGs only (see `ImageInfo`),
everything else is decoded by PIL; and when a plain one fails after all, its batch is decoded again on the CPU by the
rule for bad records and the pipeline is rebuilt.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .batch import Batch, Loader, Plan, Tally, stack_samples
from .samples import Fault, Sample, SampleReader, fit_pixels

log = logging.getLogger(__name__)

FAILURES = 3  # pipelines in a row that fail on images which the CPU decodes: the fault is not in the images


def _import_dali():
    try:
        import nvidia.dali
    except ImportError as error:
        raise ValueError(
            "loader: 'dali' needs nvidia-dali (pip install -e '.[dali]', or '.[dali-cuda12]' for CUDA 12); "
            "or use --loader torch"
        ) from error
    return nvidia.dali


def _placeholder() -> np.ndarray:
    """Tiny JPEG in place of an image that PIL decodes."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


def build_pipeline(batch: int, threads: int, size: tuple[int, int], device: torch.device):
    """DALI pipeline: jpeg, start (x, y), shape (width, height) -> the windows, uint8 (H, W, 3) each, on a CPU; on a
    GPU with flip -> uint8 (batch, 3, h, w)."""
    dali = _import_dali()
    from nvidia.dali import fn, types

    gpu = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if gpu else None
    pipeline = dali.Pipeline(batch, threads, index, prefetch_queue_depth=1)
    with pipeline:
        jpeg, start, shape = (fn.external_source(name=name, device="cpu") for name in ("jpeg", "start", "shape"))
        image = fn.decoders.image_slice(
            jpeg,
            start=start,
            shape=shape,
            axis_names="WH",
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # rotated images are not plain: PIL decodes them upright
            jpeg_fancy_upsampling=True,  # on a GPU the same chroma as on a CPU
        )
        if gpu:
            flip = fn.external_source(name="flip", device="cpu")
            image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            image = fn.crop_mirror_normalize(
                image, mirror=flip, dtype=types.UINT8, output_layout="CHW", mean=0.0, std=1.0
            )
        pipeline.set_outputs(image)
    pipeline.build()
    return pipeline


@dataclass
class _Step:
    """One prepared batch: its samples, and the pixels (V, 3, h, w) of those that DALI does not decode, by row."""

    number: int
    samples: list[Sample]
    aside: dict[int, Tensor]


class DaliLoader(Loader):
    """Batches on the GPU `device`, or on the CPU for a CPU device, decoded by DALI with `workers` threads."""

    def __init__(self, reader: SampleReader, plan: Plan, tally: Tally, workers: int, device: torch.device):
        super().__init__(reader, plan, tally, device)
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"loader: 'dali' decodes on cuda or cpu, not on {device.type}; use --loader torch")
        _import_dali()
        self.threads = max(1, workers)
        self._placeholder = _placeholder()
        # Only this name holds the pipeline, so that it is destroyed in the thread that made it. Left to the garbage
        # collector it could be destroyed in a worker process forked later, which would hang: the pipeline's threads do
        # not exist there.
        self._pipeline = None

    def run(self) -> Iterator[tuple[Batch, list[Fault]]]:
        try:
            if self.device.type == "cuda":
                with torch.cuda.stream(torch.cuda.Stream()):
                    yield from self._produce()
            else:
                yield from self._produce()
        finally:
            self._pipeline = None

    def _produce(self) -> Iterator[tuple[Batch, list[Fault]]]:
        self._pipeline, failures = self._build(), 0
        step = self._prepare(0) if self.plan.steps else None
        while step is not None:
            self._feed(step)
            # Python reads the next records while DALI decodes these.
            following = self._prepare(step.number + 1) if step.number + 1 < self.plan.steps else None
            image, failure = None, ""
            try:
                image, failures = self._take(step), 0
            except RuntimeError as error:  # its traceback holds the pipeline, so it must not outlive this line
                failure = str(error)
            if image is None:
                log.warning("DALI could not decode step %d, which is decoded again on the CPU", step.number)
                image = torch.empty(len(step.samples), *self.reader.shape, dtype=torch.uint8)
                step.samples = self.reader.decode_all(step.samples, image)
                failures = 0 if any(sample.fault for sample in step.samples) else failures + 1
                if failures == FAILURES:
                    raise RuntimeError(f"DALI fails on images that PIL decodes; use --loader torch: {failure}")
                self._pipeline = None
                image, self._pipeline = image.to(self.device), self._build()
            yield self.assemble(step.number, image, [stack_samples(step.samples)])
            step = following

    def _build(self):
        count = self.plan.local_batch * self.reader.views
        return build_pipeline(count, self.threads, self.reader.image_size, self.device)

    def _prepare(self, number: int) -> _Step:
        samples = self.reader.read(self.plan.positions(number))
        aside = {}
        for row, sample in enumerate(samples):
            if not sample.info.plain:
                aside[row] = torch.empty(self.reader.shape, dtype=torch.uint8)
                samples[row] = self.reader.decode(sample, aside[row])
        return _Step(number, samples, aside)

    def _feed(self, step: _Step) -> None:
        jpegs, windows = [], []
        for row, sample in enumerate(step.samples):
            own = row not in step.aside
            jpegs += [np.frombuffer(sample.data, np.uint8) if own else self._placeholder] * len(sample.crops)
            windows += [crop[:4] if own else (0, 0, 16, 16) for crop in sample.crops]
        windows = np.array(windows, np.int32)
        self._pipeline.feed_input("jpeg", jpegs)
        self._pipeline.feed_input("start", windows[:, :2].copy())
        self._pipeline.feed_input("shape", windows[:, 2:].copy())
        if self.device.type == "cuda":
            flips = [crop.flip for sample in step.samples for crop in sample.crops]
            self._pipeline.feed_input("flip", np.array(flips, np.int32))
        self._pipeline.schedule_run()

    def _take(self, step: _Step) -> Tensor:
        """Decoded pixels of the step, (B, V, 3, h, w) on the device. RuntimeError if DALI could not decode one of the
        images."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        (output,) = self._pipeline.share_outputs()
        image = torch.empty(len(step.samples), *self.reader.shape, dtype=torch.uint8, device=self.device)
        if image.is_cuda:
            feed_ndarray(output.as_tensor(), image.flatten(0, 1), cuda_stream=torch.cuda.current_stream())
        else:
            _fit_all(output, image, step, self.threads)
        for row, pixels in step.aside.items():
            image[row] = pixels.to(self.device)
        if image.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._pipeline.release_outputs()
        return image


def _fit_all(output, image: Tensor, step: _Step, threads: int) -> None:
    """Resize and flip the windows that DALI decoded into the rows of `image`, with as many threads as DALI has."""

    def fit(row: int) -> None:
        for view, crop in enumerate(step.samples[row].crops):
            window = output.at(row * image.shape[1] + view)
            pixels = torch.from_numpy(window).permute(2, 0, 1)
            image[row, view] = fit_pixels(pixels, tuple(image.shape[3:]), crop.flip)

    rows = [row for row in range(len(step.samples)) if row not in step.aside]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fit, rows))
