"""Normalised float32 features of many pictures and texts, for validation during training and for evaluation.

Their bits depend on the model, the device and the set, but not on batch size, ranks or threads. A product of 64 rows
adds up in another order than one of 7 (in bfloat16 the third digit changes), so the model gets blocks of one shape
only, the last filled up with its last row; ranks share out whole blocks; and where sums depend on the number of
threads (a CPU), each thread computes blocks of its own instead of helping with one.

Pictures are decoded ahead of the model by a few more threads (decoders release the interpreter lock).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from .data.image import ImageError, open_image
from .dist import gather, max_over_ranks, rank_and_size

DECODE_WORKERS = min(4, os.cpu_count() or 1)
_NOTE = 1000  # bytes of an error that other ranks hear of


def open_picture(source: bytes | Path, name: str | None = None) -> Image:
    """A picture of an evaluation set as PIL RGB. ImageError names it: a figure needs every picture."""
    try:
        return open_image(source, name)
    except ImageError as error:
        words = f"{error}; an evaluation leaves nothing out: repair it or remove its entry"
        raise ImageError(words, error.reason) from error


def read_ahead(
    read: Callable, keys: Iterable, workers: int, ahead: int, enter: Callable[[], None] | None = None
) -> Iterator:
    """Yield read(key) in the order of keys; `workers` threads (0: none) prepare up to `ahead` results.

    Each thread calls `enter` first. `keys` is read by the caller's thread, as results are taken.
    An error of `read` is raised where its result would have come; what is still waiting is then dropped.
    """
    if workers < 1:
        yield from map(read, keys)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead", initializer=enter)
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


@contextlib.contextmanager
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
    """Features (count, C) of pictures open_one(0 .. count-1), float32 on the CPU, length 1, on every rank.

    All ranks call it; each opens and encodes its share of the pictures. open_one(i) -> PIL picture, preprocess(PIL) ->
    float tensor (3, h, w), both run in `workers` threads, while the model computes; model.encode_image(batch,
    normalize=True) -> (B, C). batch_size: pictures that are ready beyond those under way; no bit depends on it.
    A part of a set that starts at a multiple of `block_size(device)` has the bits that it has in the whole.
    ValueError or OSError of any rank: a ValueError on all of them.
    """
    _check_batch_size(batch_size)
    device, dtype, size = torch.device(device), _input_dtype(model), block_size(device)
    keys = [i for block in _own_blocks(count, size) for i in range(block * size, min((block + 1) * size, count))]

    def encode(batch: Tensor) -> Tensor:
        return model.encode_image(batch.to(device=device, dtype=dtype), normalize=True)

    def rows() -> Iterator[Tensor]:
        with contextlib.closing(read_ahead(lambda i: preprocess(open_one(i)), keys, workers, batch_size)) as pictures:
            while block := list(itertools.islice(pictures, size)):
                yield torch.stack(block)

    return _encode(model, encode, rows, count, "images", device, autocast, progress)


def encode_texts(
    model: nn.Module,
    tokens: Tensor | np.ndarray,
    *,
    device: str | torch.device,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Features (n, C) of token rows (n, T), float32 on the CPU, length 1; ranks share the work as above.

    Equal rows are encoded once: less work, and equal captions tie exactly wherever they stand.
    """
    _check_batch_size(batch_size)
    device, size = torch.device(device), block_size(device)
    distinct, place = np.unique(np.asarray(tokens), axis=0, return_inverse=True)
    distinct, place = torch.from_numpy(distinct).to(torch.int64), torch.from_numpy(place.reshape(-1))

    def encode(batch: Tensor) -> Tensor:
        return model.encode_text(batch.to(device), normalize=True)

    def rows() -> Iterator[Tensor]:
        return (distinct[block * size : (block + 1) * size] for block in _own_blocks(len(distinct), size))

    features = _encode(model, encode, rows, len(distinct), "texts", device, autocast, progress)
    return features[place] if len(distinct) else features


def block_size(device: str | torch.device) -> int:
    """Rows that the model gets at a time, always: small where few fill the processor, and the last block is short."""
    return 16 if torch.device(device).type == "cpu" else 64


def _own_blocks(count: int, size: int) -> range:
    """Numbers of the blocks that this rank encodes, dealt out in turn."""
    rank, world = rank_and_size()
    return range(rank, -(-count // size), world)


def _encode(
    model: nn.Module,
    encode: Callable[[Tensor], Tensor],
    rows: Callable[[], Iterator[Tensor]],
    count: int,
    unit: str,
    device: torch.device,
    autocast: torch.dtype | None,
    progress: bool,
) -> Tensor:
    """Features of all ranks' blocks in order. `rows` yields this rank's blocks; the last one may be short."""
    size, threads = block_size(device), torch.get_num_threads()
    lanes = threads if device.type == "cpu" else 1

    def enter() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        # Not the context: leaving it in one thread would drop the weights that all have converted.
        torch.set_autocast_enabled(device.type, autocast is not None)
        if autocast is not None:
            torch.set_autocast_dtype(device.type, autocast)

    def run(block: Tensor) -> Tensor:
        filled = torch.cat([block, block[-1:].expand(size - len(block), *block.shape[1:])])
        # Length 1 in float32, also where the model normalised in half precision. On the device: a copy would wait.
        return torch.nn.functional.normalize(encode(filled).float(), dim=-1)

    features, taken, problem = [], 0, None
    rank, world = rank_and_size()

    def counted() -> Iterator[Tensor]:
        nonlocal taken
        with contextlib.closing(rows()) as blocks:
            for block in blocks:
                taken += 1
                yield block

    torch.set_num_threads(1)
    try:
        with (
            inference(model, device, autocast),
            _bar(count, unit, progress and rank == 0) as bar,
            contextlib.closing(counted()) as blocks,
        ):
            for block in read_ahead(run, blocks, lanes if lanes > 1 else 0, lanes, enter):
                features.append(block)
                bar.update(min(size * world, count - bar.n))
    except (ValueError, OSError) as error:
        problem = error
    finally:
        torch.set_num_threads(threads)
    raise_together(problem, taken, device)
    return _gather_blocks(features, count, size, device)


def _gather_blocks(features: list[Tensor], count: int, size: int, device: torch.device) -> Tensor:
    """Every rank's blocks -> (count, C) in the order of the set, on the CPU."""
    if not count:
        return torch.zeros(0, 0)
    world = rank_and_size()[1]
    if world == 1:
        return torch.cat(features)[:count].cpu()
    most = -(-count // (size * world))
    width = int(max_over_ranks(torch.tensor(features[0].shape[1] if features else 0, device=device)))
    own = torch.zeros(most * size, width, device=device)
    if features:
        own[: size * len(features)] = torch.cat(features)
    return gather(own).view(world, most, size, width).transpose(0, 1).reshape(-1, width)[:count].cpu()


def raise_together(problem: Exception | None, at: int, device: torch.device) -> None:
    """An error of any rank is one on all: who goes on alone would wait forever for the others.

    at: how far this rank came; the error of the first block is raised, as a ValueError where it is another rank's. One
    that is neither a ValueError nor an OSError is raised by its own rank as it is.
    """
    rank, world = rank_and_size()
    if world == 1:
        if problem:
            raise problem
        return
    note = torch.full((1 + _NOTE,), -1, dtype=torch.int64)
    if problem:
        text = torch.tensor(list(str(problem).encode("utf-8", "backslashreplace")[:_NOTE]), dtype=torch.int64)
        note[0], note[1 : 1 + len(text)] = at * world + rank, text
    notes = [note for note in gather(note.to(device)).view(world, -1).cpu() if note[0] >= 0]
    if notes:
        where, first = min((int(note[0]), note[1:]) for note in notes)
        if problem and (where == at * world + rank or not isinstance(problem, (ValueError, OSError))):
            raise problem
        raise ValueError(bytes(first[first >= 0].tolist()).decode(errors="replace")) from problem


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
