"""From records to batches."""

from __future__ import annotations

import importlib.util

import torch

from rwkv_clip.config import ConfigError, check
from rwkv_clip.data.records import Records

from ..settings import DataSettings
from .batch import Loader, Plan, Tally
from .samples import SampleReader
from .torch_loader import TorchLoader

LOADERS = ("auto", "dali", "torch")


def make_loader(
    records: Records,
    plan: Plan,
    image_size: int | tuple[int, int],
    settings: DataSettings,
    *,
    seed: int = 0,
    views: int = 1,
    keys: bool = False,
    device: str | torch.device = "cpu",
) -> Loader:
    """Iterable of the plan's batches, with `views` random crops of each image, (height, width) or a square. keys:
    whether batches have `image_keys`.

    settings.loader: "torch" (worker processes), "dali", or "auto": DALI where it is installed, `device` is a GPU and
    the settings are nothing that only torch does.
    settings.workers: processes (torch) or threads (DALI). With DALI on a GPU the images arrive there, else on the CPU.
    Iterating raises DataError when more than settings.max_bad records and more than the fraction
    settings.max_bad_fraction are bad, WorkerLost when a process dies. ConfigError or ValueError for invalid settings.
    """
    problems = check(settings)
    if settings.loader not in LOADERS:
        problems.append(f"loader: {settings.loader!r} is not one of {', '.join(LOADERS)}")
    if problems:
        raise ConfigError(problems)
    device = torch.device(device)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size: {image_size} is not a size; use a positive number or (height, width)")
    tally = Tally(plan.world, settings.max_bad, settings.max_bad_fraction)
    reader = SampleReader(records, seed, size, settings, views, keys)
    can_dali = device.type == "cuda" and not settings.beyond_dali() and _has_dali()
    if settings.loader == "torch" or (settings.loader == "auto" and not can_dali):
        return TorchLoader(reader, plan, tally, settings.workers, device)
    from .dali_loader import DaliLoader

    return DaliLoader(reader, plan, tally, settings.workers, device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
