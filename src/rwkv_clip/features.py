"""Normalised float32 features of many pictures and texts, for validation during training and for evaluation.

Pictures are decoded ahead of the model by a few threads (decoders release the interpreter lock).
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from rwkv_clip.image import ImageError, open_image

DECODE_WORKERS = min(4, os.cpu_count() or 1)


def open_picture(source: bytes | Path, name: str | None = None) -> Image:
    """A picture of an evaluation set as PIL RGB. ValueError names it: a figure needs every picture."""
    try:
        return open_image(source, name)
    except ImageError as error:
        raise ValueError(f"{error}; an evaluation leaves nothing out: repair it or remove its entry") from error


def read_ahead(read: Callable, keys: Iterable, workers: int, ahead: int) -> Iterator:
    """Yield read(key) in the order of keys; `workers` threads (0: none) prepare up to `ahead` results.

    An error of `read` is raised where its result would have come; what is still waiting is then dropped.
    """
    if workers < 1:
        yield from map(read, keys)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque = deque()
    try:
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) > max(ahead, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def inference(model: nn.Module, device: torch.device, autocast: torch.dtype | None):
    """Evaluation mode, no gradients, autocast to `autocast` (None: off); restores the model's mode.

    no_grad and not inference_mode: a buffer cached inside the latter would break the next training step.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield
    finally:
        model.train(training)


def encode_images(
    model: nn.Module,
    open_one: Callable[[int], Image],
    count: int,
    preprocess: Callable,
    *,
    device: str | torch.device,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    workers: int = DECODE_WORKERS,
    progress: bool = False,
) -> Tensor:
    """Features (count, C) of pictures open_one(0 .. count-1), float32 on the CPU, length 1.

    open_one(i) -> PIL picture, preprocess(PIL) -> float tensor (3, h, w), both run in `workers` threads;
    model.encode_image(batch, normalize=True) -> (B, C).
    """
    _check_batch_size(batch_size)
    device = torch.device(device)
    pictures = read_ahead(lambda i: preprocess(open_one(i)), range(count), workers, 2 * batch_size)
    dtype = _input_dtype(model)
    features = []
    with inference(model, device, autocast), _bar(count, "images", progress) as bar:
        for start in range(0, count, batch_size):
            batch = torch.stack([next(pictures) for _ in range(start, min(start + batch_size, count))])
            encoded = model.encode_image(batch.to(device=device, dtype=dtype), normalize=True)
            features.append(_unit(encoded))
            bar.update(len(batch))
    return torch.cat(features) if features else torch.zeros(0, 0)


def encode_texts(
    model: nn.Module,
    tokens: Tensor | np.ndarray,
    *,
    device: str | torch.device,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Features (n, C) of token rows (n, T), float32 on the CPU, length 1.

    Equal rows are encoded once: less work, and equal captions tie exactly whatever batch they would be in.
    """
    _check_batch_size(batch_size)
    device = torch.device(device)
    rows, place = np.unique(np.asarray(tokens), axis=0, return_inverse=True)
    rows, place = torch.from_numpy(rows).to(torch.int64), torch.from_numpy(place.reshape(-1))
    features = []
    with inference(model, device, autocast), _bar(len(rows), "texts", progress) as bar:
        for batch in rows.split(batch_size) if len(rows) else ():
            features.append(_unit(model.encode_text(batch.to(device), normalize=True)))
            bar.update(len(batch))
    return torch.cat(features)[place] if features else torch.zeros(0, 0)


def _unit(features: Tensor) -> Tensor:
    """Lengths of exactly 1 in float32, also where the model normalised in half precision."""
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _input_dtype(model: nn.Module) -> torch.dtype:
    """The type of most weights: pictures follow a model cast as a whole; under autocast it is float32."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; use at least 1")


def _bar(count: int, unit: str, progress: bool):
    from tqdm import tqdm

    # disable=None: tqdm shows the bar where standard error is a terminal.
    return tqdm(total=count, unit=f" {unit}", desc=f"encode {unit}", disable=None if progress else True, leave=False)
