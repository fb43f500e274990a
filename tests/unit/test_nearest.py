"""The exact nearest rows through half precision: the definition's answer to the last bit, ties included."""

import numpy as np
import pytest
import torch

from rwkv_clip import nearest
from rwkv_clip.files import DamagedError
from rwkv_clip.metrics import exact_features, nearest_items
from rwkv_clip.nearest import Gallery, measure_loss, search

WIDTH = 24


def unit(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors).numpy()


def halved(vectors: np.ndarray, parts: int = 1) -> Gallery:
    half = vectors.astype(np.float16)
    return Gallery(np.array_split(half, parts), lambda rows: vectors[rows], measure_loss(vectors, half))


def define(queries: np.ndarray, items: np.ndarray, count: int, allowed: np.ndarray | None = None):
    """By definition: every similarity as an exact sum, a stable sort."""
    left, right = (exact_features(torch.from_numpy(some)).numpy() for some in (queries, items))
    scores = left @ right.T
    rows = np.arange(len(items)) if allowed is None else np.flatnonzero(allowed)
    order = np.argsort(-scores[:, rows], axis=1, kind="stable")[:, :count]
    return rows[order], np.take_along_axis(scores[:, rows], order, 1)


def cluster(count: int, spread: float, seed: int = 3) -> np.ndarray:
    """Unit vectors that are `spread` from one of them: half precision cannot tell most of them apart."""
    near = unit(1, seed) + spread * unit(count, seed + 1)
    return near / np.linalg.norm(near, axis=1, keepdims=True)


def repeated(count: int) -> np.ndarray:
    return unit(7)[np.random.default_rng(0).integers(0, 7, count)]


ITEMS = {
    "random": lambda: unit(5000),
    "duplicates": lambda: repeated(5000),
    "one vector": lambda: repeated(5000)[:1].repeat(5000, 0),
    "nearer than half's spacing": lambda: cluster(5000, 2.0**-14),
    "nearer than float32's sums": lambda: cluster(5000, 2.0**-22),
    "a cluster among others": lambda: np.concatenate([unit(4000), cluster(300, 2.0**-13), unit(900, 5)]),
    "zeros": lambda: np.zeros((2000, WIDTH), np.float32),
    "tiny numbers": lambda: np.where(np.arange(WIDTH) == 0, unit(3000), unit(3000) * 2.0**-20).astype(np.float32),
    "blocks that do not end": lambda: unit(64 * 20 + 13),
    "few": lambda: unit(40),
    "one": lambda: unit(1),
}


@pytest.fixture(params=["halves", "singles", "packed", "doubles"])
def product(request, monkeypatch):
    """Each of the four ways to score coarsely."""
    if request.param == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(nearest, "multiplies_halves", lambda: request.param == "halves")
    monkeypatch.setattr(nearest, "multiplies_packed", lambda: request.param == "packed")
    if request.param == "doubles":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    return request.param


@pytest.mark.parametrize("name", ITEMS)
def test_same_as_the_definition(name, product):
    items = ITEMS[name]().astype(np.float32)
    queries = np.concatenate([cluster(1, 0.0), items[len(items) // 2 :][:1], unit(2, seed=9)]).astype(np.float32)
    for count in (1, 10, 130, len(items) + 3):
        for asked in (queries[:1], queries[1:2], queries):
            for gallery in (halved(items), halved(items, parts=3), Gallery.of(items)):
                rows, scores = search(gallery, asked, count)
                wanted = define(asked, items, count)
                assert rows.dtype == np.int64 and scores.dtype == np.float64
                assert np.array_equal(rows, wanted[0]) and np.array_equal(scores, wanted[1])
                former = nearest_items(torch.from_numpy(asked), torch.from_numpy(items), count)
                assert np.array_equal(rows, former[0]) and np.array_equal(scores, former[1])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("name", ["random", "duplicates", "nearer than half's spacing"])
def test_only_allowed_rows(name, share, product, monkeypatch):
    monkeypatch.setattr(nearest, "_FEW_ALLOWED", 100)
    items, queries = ITEMS[name]().astype(np.float32), unit(3, seed=2)
    allowed = np.random.default_rng(1).random(len(items)) < share
    for count in (5, 4000):
        for asked in (queries[:1], queries):
            rows, scores = search(halved(items), asked, count, allowed)
            wanted = define(asked, items, count, allowed)
            assert np.array_equal(rows, wanted[0]) and np.array_equal(scores, wanted[1])


def test_half_precision_alone_would_be_wrong():
    """The items above do what they are there for."""
    items = cluster(5000, 2.0**-14).astype(np.float32)
    plain = np.argsort(-(items.astype(np.float16).astype(np.float64) @ items[0].astype(np.float64)), kind="stable")
    assert not np.array_equal(plain[:10], define(items[:1], items, 10)[0][0])


@pytest.mark.parametrize("name", ["random", "nearer than half's spacing", "tiny numbers"])
def test_every_coarse_score_is_within_its_bound(name, product):
    items, queries = ITEMS[name]().astype(np.float32), exact_features(torch.from_numpy(unit(2, seed=4)))
    coarse, error = nearest._score_coarsely(halved(items), queries)
    exact = queries @ exact_features(torch.from_numpy(items)).T
    assert ((coarse.double() - exact).abs() <= error.fixed + error.relative * coarse.double().abs()).all()


def test_the_rounding_of_a_query_counts(product):
    """Items that half precision holds exactly, along what it takes away from the query, and across the query."""
    query = unit(1, seed=4)
    rounded = query.astype(np.float16).astype(np.float32)
    lost = query - rounded
    lost -= (lost @ rounded.T) * rounded / (rounded @ rounded.T)
    items = (lost / np.linalg.norm(lost)).astype(np.float16).astype(np.float32).repeat(900, 0)
    queries = exact_features(torch.from_numpy(query))
    coarse, error = nearest._score_coarsely(halved(items), queries)
    exact = queries @ exact_features(torch.from_numpy(items)).T
    assert ((coarse.double() - exact).abs() <= error.fixed + error.relative * coarse.double().abs()).all()
    assert product == "halves" or error.fixed.max() < 1e-5


def test_a_process_that_allows_itself_less_than_float32_gets_float64(monkeypatch):
    assert nearest._choose_product(False) is nearest._singles
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert nearest._choose_product(False) is nearest._doubles
    monkeypatch.undo()
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            assert nearest._choose_product(False) is nearest._doubles
        finally:
            matmul.fp32_precision = before


def test_no_items_no_queries_no_results():
    items, queries = unit(900), unit(2)
    for gallery, asked, count, shape in (
        (halved(items[:0]), queries, 5, (2, 0)),
        (halved(items), queries[:0], 5, (0, 5)),
        (halved(items), queries, 0, (2, 0)),
    ):
        rows, scores = search(gallery, asked, count)
        assert rows.shape == scores.shape == shape


@pytest.mark.parametrize(
    ("queries", "allowed", "message"),
    [
        (np.ones((1, 3), np.float32), None, "24 numbers"),
        (np.ones(WIDTH, np.float32), None, "24 numbers"),
        (np.full((1, WIDTH), np.nan, np.float32), None, "not finite"),
        (np.ones((1, WIDTH), np.float32), None, "normalise"),
        (unit(1), np.ones(3, bool), "allowed"),
        (unit(1), np.ones(900, np.int8), "allowed"),
    ],
)
def test_what_is_no_query_is_refused(queries, allowed, message):
    with pytest.raises(ValueError, match=message):
        search(halved(unit(900)), queries, 5, allowed)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.0])
def test_vectors_that_are_none_are_refused(value):
    items = unit(900)
    items[700, 3] = value
    with pytest.raises(ValueError, match="row 700"):
        Gallery.of(items)
    with pytest.raises(ValueError, match="row 700"):
        measure_loss(items, items.astype(np.float16))


def test_numbers_that_are_not_finite_in_a_file_are_found():
    items = unit(900)
    half = items.astype(np.float16)
    half[5] = np.nan
    with pytest.raises(DamagedError, match="not finite"):
        search(Gallery([half], lambda rows: items[rows], 1e-3), unit(1, seed=1), 5)


def test_half_products_are_judged_by_their_sums(monkeypatch):
    """A product that adds in half precision is not used."""
    nearest.multiplies_halves.cache_clear()
    real = torch.mv

    def add_in_half(matrix, vector):
        return (
            (matrix * vector).cumsum(1, dtype=torch.float16)[:, -1]
            if matrix.dtype == torch.half
            else real(matrix, vector)
        )

    monkeypatch.setattr(torch, "mv", add_in_half)
    try:
        assert not nearest.multiplies_halves()
    finally:
        nearest.multiplies_halves.cache_clear()
