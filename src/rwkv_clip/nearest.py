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
_ROWS = 4096  # that are converted to float32 at a time: 10 MiB of 640 numbers, which stay in the cache
_EXACT_ROWS = 4096  # that are scored exactly at a time
_SCORES = 1 << 24  # coarse scores that are kept at a time: 64 MiB
_FEW, _FEW_ALLOWED = 512, 4096  # rows, and allowed ones, up to which all are scored exactly
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
    if total <= (_FEW if allowed is None else _FEW_ALLOWED):
        rows = np.arange(len(gallery)) if allowed is None else np.flatnonzero(allowed)
        items = torch.from_numpy(gallery.exact(rows))
        places, similarities = nearest_items(asked.float(), items, count)
        return rows[places.numpy()], similarities.numpy()
    barred = None if allowed is None else torch.from_numpy(~allowed)
    found = []
    for part in asked.split(max(1, _SCORES // len(gallery))):
        coarse, error = _score_coarsely(gallery, part)
        if barred is not None:
            coarse.masked_fill_(barred, -torch.inf)
        found.append(_best(gallery.exact, part, *_find_candidates(coarse, count, error), count))
        del coarse  # before the next ones are made
    return np.concatenate([rows for rows, _ in found]), np.concatenate([scores for _, scores in found])


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
    """A coarse score c of query i is within fixed[i] + relative |c| of the exact one."""

    fixed: Tensor  # float64 (q, 1)
    relative: float


def _score_coarsely(gallery: Gallery, asked: Tensor) -> tuple[Tensor, _Error]:
    """Scores float32 (q, n), and how far they may be off."""
    half = all(part.dtype == np.float16 for part in gallery.coarse)
    product = _choose_product(half and len(asked) <= _ONE_BY_ONE and multiplies_halves())
    scores = torch.empty(len(asked), len(gallery))
    for part, end in zip(gallery.coarse, accumulate(map(len, gallery.coarse))):
        product(torch.from_numpy(part), asked, scores[:, end - len(part) : end])
    # float32 holds the grid's values below 1, so only the product in half precision rounds the query.
    rounded = asked.half().double() if product is _halves else asked
    apart, length = (asked - rounded).norm(dim=1, keepdim=True), rounded.norm(dim=1, keepdim=True)
    share = gallery.width * _SINGLE / (1 - gallery.width * _SINGLE)
    # |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'|, then the sum's own error, then what underflows
    fixed = apart * _LONGEST + length * (gallery.lost + share * (_LONGEST + gallery.lost))
    least = 2.0**-24 if product is _halves else gallery.width * 2.0**-126
    return scores, _Error(fixed * (1 + 2.0**-30) + least, _HALF / (1 - _HALF) if product is _halves else 0.0)


def _choose_product(half: bool) -> Callable[[Tensor, Tensor, Tensor], None]:
    if half:
        return _halves
    return _singles if _adds_in_float32() else _doubles


def _adds_in_float32() -> bool:
    """Whether the process allows itself no less in products of float32; else only float64 is sure to have it."""
    newer = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9's setting, beside which the older one raises
    if getattr(newer, "fp32_precision", "ieee") not in ("none", "ieee"):
        return False
    return torch.get_float32_matmul_precision() == "highest"


def _halves(part: Tensor, asked: Tensor, scores: Tensor) -> None:
    for query, row in zip(asked, scores):
        row.copy_(torch.mv(part, query.half()))


def _singles(part: Tensor, asked: Tensor, scores: Tensor) -> None:
    queries = asked.float()
    product = _multiply_packed(queries) if len(queries) > 1 and multiplies_packed() else _multiply(queries)
    buffer = None if part.dtype == torch.float32 else torch.empty(min(_ROWS, len(part)), part.shape[1])
    for start in range(0, len(part), _ROWS):
        rows = part[start : start + _ROWS]
        scores[:, start : start + len(rows)] = product(rows if buffer is None else buffer[: len(rows)].copy_(rows)).T


def _multiply(queries: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows float32 (m, C) -> their products with the queries (m, q)."""
    turned = queries.T.contiguous()
    return lambda rows: rows @ turned


def _multiply_packed(queries: Tensor) -> Callable[[Tensor], Tensor]:
    """The same by oneDNN, to which the queries are the weights of a linear layer."""
    packed = torch.ops.mkldnn._reorder_linear_weight(queries)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


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
    return _is_faster(lambda: _halves(matrix, asked, scores), lambda: _singles(matrix, asked, scores))


@cache
def multiplies_packed() -> bool:
    """Whether oneDNN multiplies a few queries faster than torch's usual library here. Decided once; both add in
    float32, so the answers are the same."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, queries = (torch.rand(n, 640, generator=generator) for n in (_ROWS, 8))
    packed, usual = _multiply_packed(queries), _multiply(queries)
    return _is_faster(lambda: packed(rows), lambda: usual(rows))


def _is_faster(first: Callable[[], object], second: Callable[[], object]) -> bool:
    times = []
    for _ in range(20):  # in turn: the first call prepares, and on a busy machine most are interrupted
        times.append([_time(call) for call in (first, second)])
    best, other = map(min, zip(*times))
    return best < other


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- exact ones ------------------------------------------------------------------------------------------------------


def _find_candidates(coarse: Tensor, count: int, error: _Error) -> tuple[np.ndarray, np.ndarray]:
    """(queries, rows) in order, all pairs whose coarse score (float32 (q, n), -inf where barred) allows the row to be
    among the `count` best."""
    whole = coarse.shape[1] // _BLOCK * _BLOCK
    blocks = coarse[:, :whole].unflatten(1, (-1, _BLOCK)).amax(2)
    best = torch.cat([blocks, coarse[:, whole:]], dim=1)
    # As many blocks have a row that is this good, so `count` rows are, within the error.
    enough = best.topk(count, dim=1).values[:, -1] if best.shape[1] >= count else coarse.new_full((1,), -torch.inf)
    if (enough == -torch.inf).any():
        enough = coarse.topk(count, dim=1).values[:, -1]
    if best.isnan().any() or not torch.isfinite(enough).all():
        raise DamagedError("items: hold numbers that are not finite; write the vectors again")
    good = enough[:, None].double()
    least = good - error.fixed - error.relative * good.abs()  # that the `count` best have exactly
    bound = least - error.fixed
    bound = bound / (1 + error.relative * bound.sign()) - 2.0**-40
    limit = torch.nextafter(bound.float(), torch.tensor(-torch.inf))
    queries, places = torch.nonzero(blocks >= limit, as_tuple=True)
    if len(queries) > blocks.numel() // 8:
        found, rows = torch.nonzero(coarse >= limit, as_tuple=True)
        return found.numpy(), rows.numpy()
    which, offsets = torch.nonzero(
        coarse[:, :whole].unflatten(1, (-1, _BLOCK))[queries, places] >= limit[queries], as_tuple=True
    )
    more, rest = torch.nonzero(coarse[:, whole:] >= limit, as_tuple=True)
    queries = torch.cat([queries[which], more])
    rows = torch.cat([places[which] * _BLOCK + offsets, rest + whole])
    order = torch.argsort(queries, stable=True)
    return queries[order].numpy(), rows[order].numpy()


def _best(
    exact: Exact, asked: Tensor, queries: np.ndarray, rows: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, similarities), (q, count) each: the best of each query's candidates, of which it has `count` or more, by
    exact similarity, ties in the order of the rows."""
    scores = np.empty(len(rows))
    for start in range(0, len(rows), _EXACT_ROWS):
        part = slice(start, start + _EXACT_ROWS)
        wanted, back = np.unique(rows[part], return_inverse=True)
        vectors = exact_features(torch.from_numpy(exact(wanted)), "items")
        first, last = queries[part][0], queries[part][-1]
        if first == last:
            scores[part] = (vectors @ asked[first]).numpy()[back]
        else:
            scores[part] = (vectors[back] * asked[queries[part]]).sum(1).numpy()
    order = np.lexsort((rows, -scores, queries))
    places = np.searchsorted(queries, np.arange(len(asked)))[:, None] + np.arange(count)
    return rows[order][places], scores[order][places]
