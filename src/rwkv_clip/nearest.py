"""The exact nearest of many vectors at the speed of one pass over them in half precision, on a CPU.

Exact means what `metrics.nearest_items` means: similarities are the exact sums of `metrics.exact_features`, and ties
come in the order of the rows. A product in half precision or float32 gives every row a coarse score whose error is
bounded: by Cauchy-Schwarz for what rounding took away from a vector or a query, and by the classical bound on a float32
sum of n products in any order, n u / (1 - n u) |x||y| with u = 2^-24 (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1). Whatever may be among the best within that bound is scored exactly, and nothing else is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .files import DamagedError
from .metrics import exact_features, nearest_items

_BLOCK = 64  # neighbouring rows that are compared as one, by the best of them
_ROWS = 1024  # that are converted to float32 at a time: 2.5 MiB of 640 numbers, which stay in the cache
_EXACT_ROWS = 8192  # that are scored exactly at a time
_SCORES = 1 << 25  # coarse scores that are kept at a time: 128 MiB
_FEW = 4096  # rows up to which a float64 product of all is as quick
_ONE_BY_ONE = 2  # queries up to which the product in half precision pays
_LONGEST = 1.01  # vectors that `exact_features` accepts
_HALF, _SINGLE = 2.0**-11, 2.0**-24  # the largest relative error of rounding
_GRID_STEP = 2.0**-26  # of exact_features

Exact = Callable[[np.ndarray], np.ndarray]  # row numbers, increasing -> their float32 vectors


@dataclass(frozen=True)
class Gallery:
    """Vectors to search, n in all, of C numbers and length 1 or less.

    coarse: float16 or float32 (n_i, C), the rows one part after the other, C-contiguous (they may be memory-mapped).
    exact: gives the vectors that count, float32 (m, C), for increasing row numbers. lost: no coarse row is farther than
    this from the vector that counts, rounded as `exact_features` does.
    """

    coarse: Sequence[np.ndarray]
    exact: Exact
    lost: float

    def __len__(self) -> int:
        return sum(map(len, self.coarse))

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.coarse[0].shape[1]

    @classmethod
    def of(cls, vectors: np.ndarray, name: str = "items") -> Gallery:
        """The gallery of float32 or float16 vectors (n, C) that are their own coarse form. ValueError as
        `exact_features`."""
        for start in range(0, len(vectors), _EXACT_ROWS):
            _check_lengths(vectors[start : start + _EXACT_ROWS], start, name)
        half_a_step = _GRID_STEP / 2 * vectors.shape[1] ** 0.5
        return cls([vectors], lambda rows: np.asarray(vectors[rows], np.float32), half_a_step)


def measure_loss(vectors: np.ndarray, coarse: np.ndarray, name: str = "items") -> float:
    """The largest distance of a coarse row from its vector as `exact_features` rounds it; both (n, C).

    ValueError as `exact_features`.
    """
    if not len(vectors):
        return 0.0
    exact = exact_features(torch.from_numpy(np.array(vectors)), name).numpy()
    # The float64 norm itself is off by a few ulps.
    return float(np.linalg.norm(exact - coarse.astype(np.float64), axis=1).max()) * (1 + 2.0**-40)


def _check_lengths(vectors: np.ndarray, start: int, name: str) -> None:
    norms = torch.from_numpy(np.array(vectors)).float().norm(dim=1)
    wrong = torch.nonzero(~(norms <= _LONGEST)).flatten()  # NaN, too
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{name}: row {start + row} has norm {norms[row]:.4g}; normalise features to length 1 first")


def search(
    gallery: Gallery, queries: np.ndarray, count: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 (q, k) of the `count` nearest of each query and their similarities float64, best first, ties in the
    order of the rows; k = min(count, rows that are allowed).

    queries: float32 (q, C) of length 1. allowed: bool (n,), the rows to search; default: all. The same as
    `metrics.nearest_items` of the queries and the gallery's exact vectors, to the last bit, whatever the threads.
    ValueError for other shapes and for queries that are not finite or too long.
    """
    asked = _check(gallery, queries, allowed)
    total = len(gallery) if allowed is None else int(np.count_nonzero(allowed))
    count = min(max(count, 0), total)
    if not len(queries) or not count:
        return np.zeros((len(queries), count), np.int64), np.zeros((len(queries), count))
    if total <= _FEW:
        rows = np.arange(len(gallery)) if allowed is None else np.flatnonzero(allowed)
        items = torch.from_numpy(gallery.exact(rows))
        places, scores = nearest_items(asked.float(), items, count)
        return rows[places.numpy()], scores.numpy()
    barred = None if allowed is None else torch.from_numpy(~allowed)
    rows, scores = np.empty((len(asked), count), np.int64), np.empty((len(asked), count))
    step = max(1, _SCORES // len(gallery))
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        for place, (coarse, error) in enumerate(zip(*_score_coarsely(gallery, part)), start):
            if barred is not None:
                coarse.masked_fill_(barred, -torch.inf)
            candidates = _find_candidates(coarse, count, error)
            rows[place], scores[place] = _best(gallery.exact, asked[place].numpy(), candidates, count)
    return rows, scores


def _check(gallery: Gallery, queries: np.ndarray, allowed: np.ndarray | None) -> Tensor:
    """The queries on the grid, float64."""
    if queries.ndim != 2 or queries.shape[1] != gallery.width:
        raise ValueError(f"queries: shape {queries.shape}; give one vector of {gallery.width} numbers per row")
    if allowed is not None and (allowed.shape != (len(gallery),) or allowed.dtype != np.bool_):
        raise ValueError(f"allowed: {allowed.dtype} {allowed.shape}; give bool ({len(gallery)},)")
    return exact_features(torch.from_numpy(np.array(queries, np.float32)), "queries")


# ---- coarse scores ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Error:
    """A coarse score c is within fixed + relative |c| of the exact one."""

    fixed: float
    relative: float = 0.0


def _score_coarsely(gallery: Gallery, asked: Tensor) -> tuple[Tensor, list[_Error]]:
    """Scores float32 (q, n), and how far those of each query may be off."""
    half = all(part.dtype == np.float16 for part in gallery.coarse)
    products = _products(half and len(asked) <= _ONE_BY_ONE and multiplies_halves())
    scores = torch.empty(len(asked), len(gallery))
    ends = list(accumulate(map(len, gallery.coarse)))
    for part, end in zip(gallery.coarse, ends):
        products(torch.from_numpy(part), asked, scores[:, end - len(part) : end])
    longest = _LONGEST + gallery.lost
    rounding = gallery.width * _SINGLE / (1 - gallery.width * _SINGLE)
    errors = []
    for query in asked:
        if products is _halves:
            rounded = query.half().double()
            apart, length, relative = float((query - rounded).norm()), float(rounded.norm()), _HALF / (1 - _HALF)
        else:  # values on the grid below 1 are float32
            apart, length, relative = 0.0, float(query.norm()), 0.0
        # |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'|, then the sum, then what underflows
        fixed = apart * _LONGEST + length * gallery.lost + rounding * length * longest + 2.0**-24 * (relative > 0)
        errors.append(_Error(fixed * (1 + 2.0**-30) + gallery.width * 2.0**-126, relative))
    return scores, errors


def _products(half: bool) -> Callable[[Tensor, Tensor, Tensor], None]:
    if half:
        return _halves
    # Where the process allows itself less than float32 in products, only float64 is sure to have it.
    return _singles if torch.get_float32_matmul_precision() == "highest" else _doubles


def _halves(part: Tensor, asked: Tensor, scores: Tensor) -> None:
    for query, row in zip(asked, scores):
        row.copy_(torch.mv(part, query.half()))


def _singles(part: Tensor, asked: Tensor, scores: Tensor) -> None:
    queries = asked.float().T.contiguous()
    if part.dtype == torch.float32:
        torch.mm(queries.T, part.T, out=scores) if scores.is_contiguous() else scores.copy_(queries.T @ part.T)
        return
    buffer = torch.empty(min(_ROWS, len(part)), part.shape[1])
    for start in range(0, len(part), _ROWS):
        rows = part[start : start + _ROWS]
        scores[:, start : start + len(rows)] = (buffer[: len(rows)].copy_(rows) @ queries).T


def _doubles(part: Tensor, asked: Tensor, scores: Tensor) -> None:
    for start in range(0, len(part), _ROWS):
        rows = part[start : start + _ROWS].double()
        scores[:, start : start + len(rows)] = asked @ rows.T


@cache
def multiplies_halves() -> bool:
    """Whether this machine's product of a half-precision matrix and vector adds in float32, and is faster than
    converting the matrix. Decided once, on numbers whose half-precision sums would be far off."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(4096, 640, generator=generator).mul_(0.05).half()
    vector = torch.rand(640, generator=generator).mul_(0.05).half()
    exact = matrix.double() @ vector.double()
    bound = 1.001 * (_HALF * exact + 640 * _SINGLE * exact) + 2.0**-24
    if not bool(((torch.mv(matrix, vector).double() - exact).abs() <= bound).all()):
        return False
    asked, scores = vector.double()[None], torch.empty(1, len(matrix))
    return _seconds(lambda: _halves(matrix, asked, scores)) < _seconds(lambda: _singles(matrix, asked, scores))


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):  # the first call prepares, and others may be interrupted
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# ---- exact ones ------------------------------------------------------------------------------------------------------


def _find_candidates(coarse: Tensor, count: int, error: _Error) -> np.ndarray:
    """Rows, increasing, whose coarse score (float32 (n,), -inf where barred) allows them to be among the best."""
    whole = len(coarse) // _BLOCK * _BLOCK
    blocks = coarse[:whole].view(-1, _BLOCK).amax(1)
    best = torch.cat([blocks, coarse[whole:]])
    # As many blocks have a row that is this good, so `count` rows are, within the error.
    enough = float((best if len(best) >= count else coarse).topk(count).values[-1])
    if enough == -np.inf:
        enough = float(coarse.topk(count).values[-1])
    if not np.isfinite(enough):
        raise DamagedError("items: hold numbers that are not finite; write the vectors again")
    least = enough - error.fixed - error.relative * abs(enough)  # that the `count` best have exactly
    bound = least - error.fixed
    bound /= 1 + error.relative if bound >= 0 else 1 - error.relative
    limit = float(np.nextafter(np.float32(bound - 2.0**-40), np.float32(-np.inf)))
    good = torch.nonzero(blocks >= limit).flatten()
    if len(good) > len(blocks) // 8:
        return torch.nonzero(coarse >= limit).flatten().numpy()
    inside = torch.nonzero(coarse[:whole].view(-1, _BLOCK)[good] >= limit)
    rest = torch.nonzero(coarse[whole:] >= limit).flatten() + whole
    return torch.cat([good[inside[:, 0]] * _BLOCK + inside[:, 1], rest]).numpy()


def _best(exact: Exact, query: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best of the candidate rows by exact similarity, ties in the order of the rows."""
    places, scores = np.empty(0, np.int64), np.empty(0)
    for start in range(0, len(rows), _EXACT_ROWS):
        part = rows[start : start + _EXACT_ROWS]
        vectors = exact_features(torch.from_numpy(exact(part)), "items").numpy()
        scores, places = np.concatenate([scores, vectors @ query]), np.concatenate([places, part])
        # Earlier rows come first, and a stable sort keeps them before equal ones.
        order = np.argsort(-scores, kind="stable")[:count]
        scores, places = scores[order], places[order]
    return places, scores
