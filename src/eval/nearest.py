"""The exact nearest items of many queries, on a CPU at the speed of its half-precision products.

Exact means: similarities are the exact sums that `metrics.exact_features` defines, and ties come in the order of the
items; so no chunk size, type or number of threads changes a result. A product in bfloat16 or float32, whichever this
machine is faster at, finds candidates: its error is bounded by the lengths of what rounding took away (Cauchy-Schwarz),
and whatever may be among the best within that bound is scored exactly. Where too much may (a model that finds
everything alike), the whole tile is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from rwkv_clip.metrics import nearest_items

ROWS, COLUMNS = 256, 32768  # of a tile of similarities: 16 MiB in bfloat16
_BLOCK = 64  # neighbouring items that are compared as one, by the best of them
_MOST = 64  # blocks with candidates for a query, on average, above which a tile is scored exactly
_GRID = 2.0**26  # that of metrics.exact_features: a vector of length 1 on it is int32, a sum of products below 2^53
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # the largest relative error of rounding


@dataclass(frozen=True)
class _Vectors:
    """Vectors no longer than 1: (n, d) on the grid, as integers, and rounded to the type of the product (zeros may
    follow)."""

    grid: np.ndarray  # int32
    rounded: Tensor
    lost: Tensor  # float64 (n,): no shorter than what rounding to either took away, but for float32's own errors

    @classmethod
    def of(cls, vectors: Tensor, dtype: torch.dtype, fill: bool = False) -> _Vectors:
        """fill: add zeros to `rounded`, so that its rows are whole blocks."""
        grids, rounded, lost = [], [], []
        for part in vectors.split(1024):
            grids.append((part * _GRID).round_().int())  # exact: a power of two
            rounded.append(part.to(dtype))
            lost.append((part - rounded[-1]).norm(dim=1).double() + part.shape[1] ** 0.5 / (2 * _GRID))
        filling = vectors.new_zeros(-len(vectors) % _BLOCK if fill else 0, vectors.shape[1], dtype=dtype)
        return cls(torch.cat(grids).numpy(), torch.cat([*rounded, filling]), torch.cat(lost))


def find_nearest(queries: Tensor, items: Tensor, count: int, *, chunk: tuple[int, int] = (ROWS, COLUMNS)) -> np.ndarray:
    """Indices int64 (n, k) of the `count` best items of each query, best first; k = min(count, items).

    queries (n, d), items (m, d): float32, finite, of any length; similarity is the dot product. A query's length does
    not matter, and items are divided by the power of two that leaves none longer than 1. chunk: queries x items that
    are compared at a time. ValueError where widths differ.
    """
    if queries.shape[1:] != items.shape[1:]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions and items {items.shape[1]}; give one width")
    count, (rows, columns) = min(count, len(items)), chunk
    if not len(queries) or not count:
        return np.zeros((len(queries), count), np.int64)
    dtype = fastest_type()
    gallery = [(at, _Vectors.of(part, dtype, fill=True)) for at, part in _parts(_shortened(items, each=False), columns)]
    asked = (_Vectors.of(part, dtype) for _, part in _parts(_shortened(queries, each=True), rows))
    return np.concatenate([_nearest(part, gallery, count) for part in asked])


@cache
def fastest_type() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, and adds in float32; else float32."""
    left, right = (
        torch.nn.functional.normalize(torch.randn(n, 256, generator=torch.Generator().manual_seed(n)))
        for n in (256, 2048)
    )
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = left.to(dtype), right.to(dtype)
        times = []
        for _ in range(5):  # the first call prepares, and others may be interrupted
            start = time.perf_counter()
            product = a @ b.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    bound = 2 * _UNIT[torch.bfloat16] * (a.float() @ b.float().T).abs() + 1e-4
    adds_well = bool(((product.float() - a.float() @ b.float().T).abs() <= bound).all())
    return torch.bfloat16 if adds_well and seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32


def _nearest(asked: _Vectors, gallery: list[tuple[int, _Vectors]], count: int) -> np.ndarray:
    """Indices (n, count) of one chunk of queries."""
    scores = np.full((len(asked.grid), count), -np.inf)  # in units of the grid's square: whole numbers
    places = np.full((len(asked.grid), count), -1)
    for start, items in gallery:
        for row, columns, similarities in _compare(asked, items, count, scores[:, -1] / _GRID**2):
            every = np.concatenate([scores[row], similarities])
            # Earlier items come first, and a stable sort keeps them before equal ones.
            best = np.argsort(-every, kind="stable")[:count]
            scores[row], places[row] = every[best], np.concatenate([places[row], columns + start])[best]
    return places


def _compare(
    asked: _Vectors, items: _Vectors, count: int, least: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(query, columns in order, exact similarities) of all items that may be among the `count` best of a query.

    least: the similarity that earlier items ask of this chunk's, for each query.
    """
    candidates = _find_candidates(asked, items, count, torch.from_numpy(least))
    if candidates is None:
        queries, vectors = (torch.from_numpy(some.grid) / _GRID for some in (asked, items))
        columns, similarities = nearest_items(queries.double(), vectors.double(), count)
        order = columns.argsort(dim=1)
        columns, similarities = columns.gather(1, order), similarities.gather(1, order) * _GRID**2
        yield from zip(range(len(columns)), columns.numpy(), similarities.numpy())
        return
    rows, places = candidates
    ends = np.searchsorted(rows, np.arange(len(asked.grid) + 1))
    for row, query in enumerate(asked.grid.astype(np.float64)):
        columns = places[ends[row] : ends[row + 1]]
        if len(columns):
            yield row, columns, items.grid[columns].astype(np.float64) @ query


def _find_candidates(
    asked: _Vectors, items: _Vectors, count: int, least: Tensor
) -> tuple[np.ndarray, np.ndarray] | None:
    """(rows, columns), row by row, of pairs that may be among a row's `count` best; None where they are too many."""
    blocks = -(-len(items.grid) // _BLOCK)
    if blocks < 2 * count:
        return None
    tile = asked.rounded @ items.rounded.T
    tile[:, len(items.grid) :] = -torch.inf  # the rows that fill the last block
    tile = tile.view(len(tile), blocks, _BLOCK)
    # |q.x - q'.x'| <= |q - q'| |x'| + |q| |x - x'|, and what adding in float32 and rounding the sum take away.
    lost = 1.01 * (asked.lost + items.lost.max()) + asked.grid.shape[1] * 2.0**-23
    unit = 2.02 * _UNIT[tile.dtype]

    def bound(best: Tensor) -> Tensor:
        # As many blocks have an item that is this good, so the `count` best are, within the error of either side.
        enough = best.topk(count, dim=1).values[:, -1].double()
        enough = torch.maximum(enough - unit * enough.abs() - lost, least)
        return (enough - lost - unit * (enough.abs() + lost))[:, None]

    # Bits of floats, read as integers, order numbers from 0 on, several times faster. A block of negative ones gets any
    # of these, which is no candidate as long as one must be positive.
    best = tile.view(_BITS[tile.dtype]).amax(2).view(tile.dtype)
    enough = bound(best)
    if (enough <= 0).any():
        best = tile.amax(2)
        enough = bound(best)
    rows, places = (best >= enough).nonzero(as_tuple=True)
    if len(rows) > _MOST * len(tile):
        return None
    which, offsets = (tile[rows, places] >= enough[rows]).nonzero(as_tuple=True)
    return rows[which].numpy(), (places[which] * _BLOCK + offsets).numpy()


def _shortened(vectors: Tensor, each: bool) -> Tensor:
    """Vectors divided by powers of two, which is exact, so that none is longer than 1; each: one for every vector."""
    lengths = torch.cat([part.double().norm(dim=1, keepdim=True) for part in vectors.split(1024)])
    longest = (lengths if each else lengths.max()).clamp(min=2.0**-100)
    # Lengths just above 1 are unit vectors whose rounding went up; metrics allows for these.
    powers = torch.log2(longest / 1.005).ceil()
    return vectors if not powers.any() else (vectors.double() * 2.0**-powers).float()


def _parts(vectors: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, vectors[start : start + size]) for start in range(0, len(vectors), size))
