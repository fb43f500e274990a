"""What limits a run: `python -m rwkv_clip.training.profile_data --train-data PREFIX [--model NAME] [--workers 8 ..]`.

Each stage between a record and a training step is timed separately, then the loader as a whole and, with --model, the
training step on one of its batches. The last line says which of them limits a run, and the remedy.
Exit codes: 0 done, 2 a setting, 3 the data.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import tyro

from rwkv_clip.config import ConfigError, check, ranged
from rwkv_clip.data.image import ImageError
from rwkv_clip.data.mixture import Mixture, describe_shares, open_mixture
from rwkv_clip.data.records import open_records
from rwkv_clip.device import keep_freed_memory
from rwkv_clip.dist import World, join_world, leave_world
from rwkv_clip.errors import run_command
from rwkv_clip.factory import create_model, resolve_spec
from rwkv_clip.losses import make_objective
from rwkv_clip.models.specification import ContrastiveModel
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.transform import normalize

from .checks import check_records
from .data import make_loader
from .data.batch import Batch, Plan
from .data.samples import DataError, Sample, SampleReader, decode_windows, fit_pixels
from .data.torch_loader import CHUNK, TorchLoader
from .settings import DataSettings, DatasetType, ParallelSettings, Precision, Settings
from .state import TrainState
from .trainer import Trainer

ENDLESS = 1 << 40  # steps of a loader that is stopped after some seconds


@dataclass(frozen=True)
class ProfileSettings:
    """The training settings that determine data throughput, under the same names."""

    train_data: str
    """Data: records by prefix, .rec, folder, glob or comma list; Chinese-CLIP's LMDB; .csv .tsv .jsonl .parquet .tar; a
    saved `datasets` folder. Several sources: a::b."""
    model: str | None = None
    """Preset, model JSON or open_clip name: also times its training step, and uses its image size."""
    train_data_upsampling_factors: str | None = None
    """With --train-data a::b, 2::1: how often an epoch takes the records of each source; default: once."""
    dataset_type: DatasetType = "auto"
    """What --train-data is; auto: told by its ending, or by what a folder holds."""
    csv_separator: str | None = None
    """What separates the columns of a table; default: found in it."""
    csv_img_key: str | None = None
    """The column or field with the picture or its name; default: the usual names."""
    csv_caption_key: tuple[str, ...] | None = None
    """The column or field with the caption, or several; default: the usual names."""
    image_folder: str | None = None
    """Where names of pictures in tables begin; default: the folder of the table."""
    index: str | None = None
    """Folder for the indices of tars and Parquet files; default: beside each of them."""
    image_size: int = ranged(224, minimum=1)
    """Image side in pixels, without --model."""
    batch_size: int = ranged(64, minimum=1)
    """Pairs per step."""
    workers: int = ranged(4, minimum=0)
    """Decoding processes (torch) or threads (DALI); 0 decodes in the training process."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    device: str | None = None
    """cpu, cuda or mps; default: the best present."""
    precision: Precision = "auto"
    """Of the training step."""
    torchcompile: bool = False
    """Compile the towers for the training step."""
    seconds: float = ranged(3.0, above=0)
    """How long each stage is timed."""

    def problems(self) -> list[str]:
        return self.data().problems()

    def data(self) -> DataSettings:
        """Those of a run that has these settings."""
        names = {field.name for field in fields(DataSettings)}
        return DataSettings(**{name: value for name, value in vars(self).items() if name in names})


@dataclass(frozen=True)
class Rates:
    """Images per second of each stage: read, decode and resize in one process, collate in the training process."""

    read: float
    decode: float
    resize: float
    collate: float
    loader: float
    step: float | None
    workers: int
    cores: int
    dali: bool = False


REMEDIES = {
    "read": "put the records on a faster disk, or build them with smaller images (data2rec.py --max-side)",
    "decode": "build the records with smaller images (data2rec.py --max-side), or decode on a GPU (--loader dali)",
    "resize": "build the records with smaller images (data2rec.py --max-side), or use a GPU (--loader dali)",
    "collate": "more workers do not help; keep other work off the core of the training process, or train on a GPU",
}
STAGES = {
    "read": "reading records",
    "decode": "decoding",
    "resize": "crop and resize",
    "collate": "collating and copying batches",
}


def slowest_stage(rates: Rates) -> str:
    """Which stage of the loader limits it: the training process, or what the workers spend most time in."""
    active = min(max(rates.workers, 1), rates.cores)
    workers = active / (1 / rates.read + 1 / rates.decode + 1 / rates.resize)
    if rates.collate < workers:
        return "collate"
    return min(("read", "decode", "resize"), key=lambda stage: getattr(rates, stage))


def find_limit(rates: Rates) -> str:
    """One sentence: what limits a run, and the remedy."""
    if rates.step is not None and rates.step <= rates.loader:
        return (
            f"The training step limits this run: {rates.step:,.0f} images/s; the loader gives {rates.loader:,.0f}, "
            f"{rates.loader / rates.step:.1f} times as many: the data are fast enough, fewer --workers may suffice."
        )
    step = "" if rates.step is None else f", while the training step takes {rates.step:,.0f}"
    stage = "decode" if rates.dali else slowest_stage(rates)
    more = rates.workers < rates.cores and stage != "collate"
    remedy = f"raise --workers, {rates.workers} of {rates.cores} cores are in use" if more else REMEDIES[stage]
    name = "DALI (decoding and resizing)" if rates.dali else STAGES[stage]
    which = "this run" if rates.step is not None else "the loader"
    return f"The data limit {which}: {rates.loader:,.0f} images/s{step}; most of it is {name}: {remedy}."


def measure(run: Callable[[], int], seconds: float) -> float:
    """Images per second of `run`, which processes some and returns how many; the first call is not counted."""
    run()
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not images:
        images += run()
    return images / passed


def measure_stages(reader: SampleReader, seconds: float) -> tuple[dict[str, float], float]:
    """(images per second of read, decode and resize in this process, mean bytes of a record's image)."""
    starts = itertools.count(step=CHUNK)
    taken: list[Sample] = []

    def read() -> int:
        start = next(starts)
        taken[:] = reader.read(np.arange(start, start + CHUNK))
        return len(taken)

    rates = {"read": measure(read, seconds)}
    size, samples = reader.image_size, [sample for sample in taken if _decodes(sample, reader.image_size)]
    if not samples:
        raise DataError(f"none of {len(taken)} records holds an image that decodes; check the training data")
    windows = [(decode_windows(sample, size)[0], sample.crops[0].flip) for sample in samples]
    rates["decode"] = measure(lambda: sum(len(decode_windows(sample, size)) for sample in samples), seconds)
    rates["resize"] = measure(lambda: len([fit_pixels(pixels, size, flip) for pixels, flip in windows]), seconds)
    return rates, sum(len(sample.data) for sample in samples) / len(samples)


def _decodes(sample: Sample, size: tuple[int, int]) -> bool:
    try:
        decode_windows(sample, size)
    except ImageError:
        return False
    return True


def measure_collate(size: tuple[int, int], batch: int, device: torch.device, seconds: float) -> float:
    """Chunks of the workers -> one normalised batch on the device."""
    chunks = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8).split(CHUNK)

    def collate() -> int:
        whole = torch.empty(batch, 3, *size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        normalize(torch.cat(chunks, out=whole).to(device, non_blocking=True))
        _wait(device)
        return batch

    return measure(collate, seconds)


def measure_loader(batches: Iterator[Batch], seconds: float) -> tuple[float, Batch]:
    """Images per second of the whole loader, once the queues that filled while it started are empty, and a batch."""
    end = time.perf_counter() + seconds / 2
    while time.perf_counter() < end:
        batch = next(batches)
    return measure(lambda: len(next(batches).ids), seconds), batch


def measure_step(settings: ProfileSettings, model: ContrastiveModel, batch: Batch, world: World, records: int) -> float:
    """Images per second of training steps (forward, loss, backward, optimizer) on one batch, repeated."""
    parallel = ParallelSettings(settings.batch_size, precision=settings.precision, torchcompile=settings.torchcompile)
    train = Settings(parallel=parallel)
    trainer = Trainer(TrainState(model, make_objective(train.loss), train, world, records))

    def step() -> int:
        trainer.step(batch)
        _wait(world.device)
        return len(batch.ids)

    step()  # the very first may compile
    return measure(step, settings.seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(settings: ProfileSettings, say: Callable[[str], None] = print) -> Rates:
    """Measure every stage, print each result at once, then the conclusion."""
    spec = resolve_spec(settings.model)[1] if settings.model is not None else None
    tokenizer = spec.tokenizer() if spec else make_tokenizer()
    data = settings.data()
    factors, reading = data.train_data_upsampling_factors, data.reading()
    records = open_mixture(settings.train_data, factors, None, lambda place: open_records(place, tokenizer, reading))
    model = None
    world = join_world(settings.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    size = (settings.image_size, settings.image_size)
    if spec is not None:
        check_records(records, spec, settings.train_data)
        model = create_model(spec, device=world.device)
        size = model.spec.image_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    say(f"{len(records):,} records, {size[1]} x {size[0]} px, batches of {settings.batch_size}, {cores} cores")
    for line in describe_shares(records) if isinstance(records, Mixture) else []:
        say(line)
    reader = SampleReader(records, 0, size)
    rates, length = measure_stages(reader, settings.seconds)
    megabytes = rates["read"] * (length + 4 * records.layout.width) / 1e6
    say(f"read            {rates['read']:10,.0f} images/s per process ({megabytes:,.0f} MB/s, cached or not)")
    say(f"decode          {rates['decode']:10,.0f} images/s per process")
    say(f"crop, resize    {rates['resize']:10,.0f} images/s per process")
    rates["collate"] = measure_collate(size, settings.batch_size, world.device, settings.seconds)
    say(f"collate, copy   {rates['collate']:10,.0f} images/s")
    plan = Plan(global_batch=settings.batch_size, steps=ENDLESS)
    with contextlib.closing(make_loader(records, plan, size, data, device=world.device)) as loader:
        rates["loader"], batch = measure_loader(iter(loader), settings.seconds)
    dali = not isinstance(loader, TorchLoader)
    kind = "DALI" if dali else "torch"
    say(f"loader          {rates['loader']:10,.0f} images/s ({kind}, {settings.workers} workers)")
    step = None
    if model is not None:
        step = measure_step(settings, model, batch, world, records.epoch_samples)
        say(f"training step   {step:10,.0f} images/s ({settings.model})")
    found = Rates(**rates, step=step, workers=settings.workers, cores=cores, dali=dali)
    say(find_limit(found))
    return found


def main() -> None:
    """Command line."""
    try:
        code = run_command(_command)
    finally:
        leave_world()
    sys.exit(code)


def _command() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    settings = tyro.cli(ProfileSettings, prog="rwkv_clip.training.profile_data", description=__doc__)
    if problems := check(settings):
        raise ConfigError(problems)
    run(settings)


if __name__ == "__main__":
    main()
