"""The DALI loader: the same batches as the PyTorch loader, decoded by nvidia-dali on a GPU (or by its CPU
threads).

DALI only decodes, crops and, on a GPU, resizes and mirrors; on a CPU its resize takes 8 times as long as torch's,
which does it then. It is fed bytes, window and mirror through `external_source`; which record comes next and how it
is cropped are decided by `SampleReader`, as for the other loader. DALI
ends its pipeline at the first picture that it cannot decode. So it gets plain JPEGs only (see `ImageInfo`),
everything else is decoded by PIL; and when a plain one fails after all, its batch is decoded again on the CPU
by the rule for bad records and the pipeline is built anew.
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

from .torch_loader import Batch, Loader, Plan, Tally, decode_samples, faults_of, stack_text
from .samples import Fault, Sample, SampleReader, fit_pixels

log = logging.getLogger(__name__)

FAILURES = 3  # pipelines in a row that fail on pictures which the CPU decodes: the fault is not in the pictures


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
    """Tiny JPEG that keeps the place of a picture which PIL decodes."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


def build_pipeline(batch: int, threads: int, size: tuple[int, int], device: torch.device):
    """DALI pipeline: jpeg, start (x, y), shape (width, height) -> the windows, uint8 (H, W, 3) each, on a CPU; on a
    GPU with mirror -> uint8 (batch, 3, h, w)."""
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
            adjust_orientation=False,  # turned pictures are not plain: PIL decodes them upright
            jpeg_fancy_upsampling=True,  # on a GPU the same chroma as on a CPU
        )
        if gpu:
            mirror = fn.external_source(name="mirror", device="cpu")
            image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            image = fn.crop_mirror_normalize(
                image, mirror=mirror, dtype=types.UINT8, output_layout="CHW", mean=0.0, std=1.0
            )
        pipeline.set_outputs(image)
    pipeline.build()
    return pipeline


@dataclass
class _Step:
    """One prepared batch: its samples, and the pixels of those that DALI does not decode, by row."""

    number: int
    samples: list[Sample]
    aside: dict[int, torch.Tensor]


class DaliLoader(Loader):
    """Batches on the GPU `device`, or on the CPU for a CPU device, decoded by DALI with `workers` threads."""

    def __init__(self, reader: SampleReader, plan: Plan, tally: Tally, workers: int, device: torch.device):
        super().__init__(reader, plan, tally, device)
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"loader: 'dali' decodes on cuda or cpu, not on {device.type}; use --loader torch")
        _import_dali()
        self.threads = max(1, workers)
        self._placeholder = _placeholder()
        # Only this name holds the pipeline, so that it ends in the thread that made it. Left to the garbage
        # collector it could end in a worker process forked later, which hangs: its threads are not there.
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
            except RuntimeError as error:  # its traceback holds the pipeline, so it does not leave this line
                failure = str(error)
            if image is None:
                log.warning("DALI could not decode step %d, it is decoded again on the CPU", step.number)
                image = torch.empty(len(step.samples), 3, *self.reader.image_size, dtype=torch.uint8)
                step.samples = decode_samples(self.reader, step.samples, image)
                failures = 0 if any(sample.fault for sample in step.samples) else failures + 1
                if failures == FAILURES:
                    raise RuntimeError(f"DALI fails on pictures that PIL decodes; use --loader torch: {failure}")
                self._pipeline = None
                image, self._pipeline = image.to(self.device), self._build()
            text, ids, epochs = stack_text(step.samples)
            yield Batch(image, text, ids, epochs, self.plan.first(step.number)), faults_of(step.samples)
            step = following

    def _build(self):
        return build_pipeline(self.plan.local_batch, self.threads, self.reader.image_size, self.device)

    def _prepare(self, number: int) -> _Step:
        samples = self.reader.read(self.plan.positions(number))
        aside = {}
        for row, sample in enumerate(samples):
            if not sample.info.plain:
                samples[row], aside[row] = self.reader.decode(sample)
        return _Step(number, samples, aside)

    def _feed(self, step: _Step) -> None:
        jpegs, windows = [], np.zeros((len(step.samples), 4), np.int32)
        for row, sample in enumerate(step.samples):
            own = row not in step.aside
            jpegs.append(np.frombuffer(sample.data, np.uint8) if own else self._placeholder)
            windows[row] = sample.window if own else (0, 0, 16, 16)
        self._pipeline.feed_input("jpeg", jpegs)
        self._pipeline.feed_input("start", windows[:, :2].copy())
        self._pipeline.feed_input("shape", windows[:, 2:].copy())
        if self.device.type == "cuda":
            self._pipeline.feed_input("mirror", np.array([sample.flip for sample in step.samples], np.int32))
        self._pipeline.schedule_run()

    def _take(self, step: _Step) -> torch.Tensor:
        """Decoded pixels of the step, on the device. RuntimeError if DALI could not decode one of the
        pictures."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        (output,) = self._pipeline.share_outputs()
        shape = (len(step.samples), 3, *self.reader.image_size)
        image = torch.empty(shape, dtype=torch.uint8, device=self.device)
        if image.is_cuda:
            feed_ndarray(output.as_tensor(), image, cuda_stream=torch.cuda.current_stream())
        else:
            _fit_all(output, image, step, self.threads)
        for row, pixels in step.aside.items():
            image[row] = pixels.to(self.device)
        if image.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._pipeline.release_outputs()
        return image


def _fit_all(output, image: torch.Tensor, step: _Step, threads: int) -> None:
    """Resize and mirror the windows that DALI decoded into the rows of `image`, with as many threads as DALI has."""

    def fit(row: int) -> None:
        pixels = torch.from_numpy(output.at(row)).permute(2, 0, 1)
        image[row] = fit_pixels(pixels, tuple(image.shape[2:]), step.samples[row].flip)

    rows = [row for row in range(len(step.samples)) if row not in step.aside]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fit, rows))
