"""Normalised float32 features of many images and texts, for validation during training and for evaluation.

Their bits depend on the model, the device and the set, but not on batch size, ranks or threads. A product of 64 rows is
summed in a different order than one of 7 (in bfloat16 the third digit changes), so the model only ever gets blocks of
one shape, the last one padded with its last row. Whole blocks are distributed over ranks. Where sums depend on the
number of threads (on a CPU), each thread computes whole blocks alone instead of sharing one.

A few more threads decode images ahead of the model (decoders release the interpreter lock).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from .device import AUTOCAST
from .dist import gather, max_over_ranks, rank_and_size
from .models.packed import pack_weights
from .models.specification import ContrastiveModel

if TYPE_CHECKING:
    from tqdm import tqdm

    from .factory import Loaded

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
CPU = torch.device("cpu")
DECODE_WORKERS = min(4, os.cpu_count() or 1)
_ERROR_BYTES = 1000  # of an error that are sent to the other ranks


@dataclass(frozen=True)
class FeatureExtractor:
    """A model with all that is needed to encode images and texts. ValueError for a batch size below 1.

    All ranks call its methods; each encodes a part of the blocks, and all get all features. A ValueError or OSError of
    any rank is a ValueError on all of them. The model's training mode is restored.

    model: encode_image(batch, normalize=True) and encode_text(tokens, normalize=True) -> (B, C); preprocess: image
    -> float (3, h, w); tokenizer: texts -> int64 (n, context). Images are opened and preprocessed in `workers`
    threads (0: none) up to `batch_size` images ahead of the model; no bit depends on either. progress: show a bar.
    before_block: called before each block; a ValueError of it ends the work on all ranks.
    """

    model: ContrastiveModel
    preprocess: Callable[[Image], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]
    device: torch.device = CPU  # or its name
    batch_size: int = 64
    autocast: torch.dtype | None = None  # None: off
    workers: int = DECODE_WORKERS
    progress: bool = False
    before_block: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; use at least 1")
        object.__setattr__(self, "device", torch.device(self.device))

    @classmethod
    def of(cls, loaded: Loaded, device: str | torch.device, **options: Any) -> FeatureExtractor:
        """The extractor for a result of `load_for_inference`, in its precision; options: further fields.

        On a CPU the weights of its linear layers are packed, see `models/packed.py`: they are parameters no more, and
        the model can no longer be trained.
        """
        model, preprocess, tokenizer = loaded.model, loaded.preprocess, loaded.tokenizer
        autocast = AUTOCAST[loaded.precision]
        if autocast in (None, _weight_dtype(model)):
            pack_weights(model.eval())
        return cls(model, preprocess, tokenizer, torch.device(device), autocast=autocast, **options)

    def encode_images(self, open_one: Callable[[int], Image], count: int) -> Tensor:
        """Features (count, C) of the images open_one(0 .. count - 1), float32 on the CPU, of length 1.

        A slice of a set that starts at a multiple of `block_size(device)` has the same bits as in the whole set.
        """
        size, dtype = block_size(self.device), _weight_dtype(self.model)
        indices = [i for start in _own_starts(count, size) for i in range(start, min(start + size, count))]

        def stack() -> Generator[Tensor, None, None]:
            ahead = read_ahead(lambda i: self.preprocess(open_one(i)), indices, self.workers, self.batch_size)
            with contextlib.closing(ahead) as pictures:
                while block := list(itertools.islice(pictures, size)):
                    yield torch.stack(block)

        def encode(block: Tensor) -> Tensor:
            return self.model.encode_image(block.to(device=self.device, dtype=dtype), normalize=True)

        return self._encode(encode, stack(), count, "images")

    def encode_tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        """Features (n, C) of token rows (n, T), float32 on the CPU, of length 1.

        Equal rows are encoded once: less work, and equal texts tie exactly wherever they occur.
        """
        size = block_size(self.device)
        rows, inverse = np.unique(np.asarray(tokens), axis=0, return_inverse=True)
        distinct, place = torch.from_numpy(rows).to(torch.int64), torch.from_numpy(inverse.reshape(-1))

        def encode(block: Tensor) -> Tensor:
            return self.model.encode_text(block.to(self.device), normalize=True)

        blocks = (distinct[start : start + size] for start in _own_starts(len(distinct), size))
        features = self._encode(encode, blocks, len(distinct), "texts")
        return features[place] if len(distinct) else features

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """`encode_tokens` of the tokenized texts."""
        return self.encode_tokens(self.tokenizer(texts))

    def encode_query(self, text: str | None = None, image: Image | None = None) -> Tensor:
        """Feature (C,) of one text or one image, float32 on the CPU, of length 1, as quickly as may be.

        On this rank alone, with all threads and no padding: its last bits may differ from those of the same text or
        image in a set.
        """
        with inference(self.model, self.device, self.autocast):
            if image is not None:
                pixels = self.preprocess(image)[None].to(device=self.device, dtype=_weight_dtype(self.model))
                feature = self.model.encode_image(pixels, normalize=True)
            else:
                feature = self.model.encode_text(self.tokenizer([text or ""]).to(self.device), normalize=True)
            return nn.functional.normalize(feature.float(), dim=-1)[0].cpu()

    def _encode(
        self, encode: Callable[[Tensor], Tensor], blocks: Generator[Tensor, None, None], count: int, unit: str
    ) -> Tensor:
        """Features of all ranks' blocks in order. `blocks`: those of this rank; the last one may be short."""
        device, size, threads = self.device, block_size(self.device), torch.get_num_threads()
        lanes = threads if device.type == "cpu" else 1
        features, taken, problem = [], 0, None
        rank, world = rank_and_size()

        def counted() -> Iterator[Tensor]:
            nonlocal taken
            for block in blocks:
                if self.before_block:
                    self.before_block()
                taken += 1
                yield block

        def run(block: Tensor) -> Tensor:
            filled = torch.cat([block, block[-1:].expand(size - len(block), *block.shape[1:])])
            # Normalised again in float32, as the model may have done it in half precision. Stays on the device: a copy
            # would wait for it.
            return nn.functional.normalize(encode(filled).float(), dim=-1)

        torch.set_num_threads(1)
        try:
            with (
                inference(self.model, device, self.autocast),
                _bar(count, unit, self.progress and rank == 0) as bar,
                contextlib.closing(blocks),
            ):
                for block in read_ahead(run, counted(), lanes if lanes > 1 else 0, lanes, self._enter_lane):
                    features.append(block)
                    bar.update(min(size * world, count - bar.n))
        except (ValueError, OSError) as error:
            problem = error
        finally:
            torch.set_num_threads(threads)
        raise_together(problem, taken, device)
        return _gather_blocks(features, count, size, device)

    def _enter_lane(self) -> None:
        """Prepare a thread that runs the model: these settings are per thread."""
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        # Not the context manager: leaving it in one thread would drop the converted weights of all.
        torch.set_autocast_enabled(self.device.type, self.autocast is not None)
        if self.autocast is not None:
            torch.set_autocast_dtype(self.device.type, self.autocast)


def block_size(device: str | torch.device) -> int:
    """Rows that the model gets at once: fewer on a CPU, which few rows keep busy, so that there is little padding."""
    return 16 if torch.device(device).type == "cpu" else 64


@contextlib.contextmanager
def inference(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
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


def read_ahead(
    read: Callable[[K], V], keys: Iterable[K], workers: int, ahead: int, enter: Callable[[], None] | None = None
) -> Generator[V, None, None]:
    """Yield read(key) in the order of keys; `workers` threads (0: none) prepare up to `ahead` results.

    Each thread calls `enter` first. The caller's thread reads `keys`, as results are taken. An error of `read` is
    raised where its result would have come; what is still pending is then dropped.
    """
    if workers < 1:
        yield from map(read, keys)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead", initializer=enter)
    waiting: deque[Future[V]] = deque()
    try:
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) > max(ahead, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def raise_together(problem: Exception | None, at: int, device: torch.device) -> None:
    """Raise an error of any rank on all of them: a rank that continued alone would wait for the others forever.

    at: how many blocks this rank has reached; the error of the first block is raised, as a ValueError if it is another
    rank's. One that is neither a ValueError nor an OSError is raised unchanged by its own rank.
    """
    rank, world = rank_and_size()
    if world == 1:
        if problem:
            raise problem
        return
    note = torch.full((1 + _ERROR_BYTES,), -1, dtype=torch.int64)
    if problem:
        text = torch.tensor(list(str(problem).encode("utf-8", "backslashreplace")[:_ERROR_BYTES]), dtype=torch.int64)
        note[0], note[1 : 1 + len(text)] = at * world + rank, text
    notes = [note for note in gather(note.to(device)).view(world, -1).cpu() if note[0] >= 0]
    if notes:
        where, first = min((int(note[0]), note[1:]) for note in notes)
        if problem and (where == at * world + rank or not isinstance(problem, (ValueError, OSError))):
            raise problem
        raise ValueError(bytes(first[first >= 0].tolist()).decode(errors="replace")) from problem


def on_all_ranks(make: Callable[[], T], device: torch.device) -> T:
    """make() on every rank, or its error on all of them: a rank may have its own disk."""
    problem = None
    try:
        made = make()
    except Exception as error:  # whatever it is: no rank continues alone
        problem = error
    raise_together(problem, 0, device)
    return made


def _own_starts(count: int, size: int) -> range:
    """Where the blocks of this rank start; blocks are dealt out in turn."""
    rank, world = rank_and_size()
    return range(rank * size, count, world * size)


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


def _weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most weights: images follow a model cast as a whole; under autocast it is float32."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _bar(count: int, unit: str, progress: bool) -> tqdm:
    from tqdm import tqdm

    # disable=None: tqdm shows the bar where standard error is a terminal.
    return tqdm(total=count, unit=f" {unit}", desc=f"encode {unit}", disable=None if progress else True, leave=False)
