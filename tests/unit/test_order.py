"""Order: every record once per epoch, the same stream for every world size, any place found at once."""

import math
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from rwkv_clip.training.data.batch import Plan
from rwkv_clip.training.data.order import Order

FROZEN = [10, 830, 707, 343, 102, 47]
COUNTS = [*range(1, 70), 97, 127, 128, 129, 1000, 4096, 4097, 100_003]


@pytest.mark.parametrize("seed", [0, 7])
def test_each_record_once_per_epoch(seed):
    for count in COUNTS:
        order = Order(count, seed)
        for epoch in (0, 1, 12):
            ids = order.at(np.arange(epoch * count, (epoch + 1) * count))
            assert np.array_equal(np.sort(ids), np.arange(count)), (count, epoch)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_million_records_in_every_world(world):
    count, global_batch = 1_000_000, 960
    order = Order(count, seed=5)
    steps = math.ceil(2 * count / global_batch)
    stream = order.at(np.arange(steps * global_batch)) if world == 1 else None
    ranks = [Plan(global_batch=global_batch, steps=steps, rank=rank, world=world) for rank in range(world)]
    positions = np.concatenate([plan.positions(step) for step in range(steps) for plan in ranks])
    assert np.array_equal(positions, np.arange(steps * global_batch))
    if stream is not None:
        for epoch in (0, 1):
            seen = np.bincount(stream[epoch * count : (epoch + 1) * count], minlength=count)
            assert (seen == 1).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_resume_continues_in_the_same_order(world):
    count, global_batch, steps = 1_000_000, 960, 3
    order, random = Order(count, seed=5), np.random.default_rng(world)
    for start in (random.integers(0, 3 * count // global_batch, 50) * global_batch).tolist():
        straight = order.at(np.arange(start, start + steps * global_batch))
        resumed = [
            Order(count, seed=5).at(
                Plan(global_batch=global_batch, steps=steps, start=start, rank=rank, world=world).positions(step)
            )
            for step in range(steps)
            for rank in range(world)
        ]
        assert np.array_equal(np.concatenate(resumed), straight)  # in order, nothing sorted


def test_seek_is_immediate_and_stores_nothing():
    for count in (15_061_515, 10**9):
        order = Order(count, 3)
        took = []
        for place in (0, count - 1, 31 * count + 12345, 10**15):
            begin = time.perf_counter()
            ids = order.at(np.arange(place, place + 512))
            took.append(time.perf_counter() - begin)
            assert ids.min() >= 0 and ids.max() < count and len(np.unique(ids)) > 500
        assert min(took) < 5e-3
        assert len(pickle.dumps(order)) < 500


def test_every_permutation_is_as_likely():
    count, epochs = 5, 24_000
    rows = Order(count, 1).at(np.arange(count * epochs)).reshape(epochs, count)
    _, seen = np.unique(rows, axis=0, return_counts=True)
    kinds = math.factorial(count)
    assert len(seen) == kinds
    chi_square = ((seen - epochs / kinds) ** 2 / (epochs / kinds)).sum()
    assert abs(chi_square - (kinds - 1)) < 4 * math.sqrt(2 * (kinds - 1))


def test_epochs_and_seeds_are_unrelated():
    count = 10_000
    first, second = Order(count, 0).at(np.arange(2 * count)).reshape(2, count)
    other = Order(count, 1).at(np.arange(count))
    for left, right in ((first, second), (first, other), (first, np.arange(count)), (first[1:], first[:-1])):
        assert (left == right).sum() < 10  # one match is expected by chance
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.05


def test_order_is_frozen():
    # A run resumed by a later version must go on in the same order.
    assert Order(1000, 7).at(np.array([0, 1, 2, 999, 1000, 123_456])).tolist() == FROZEN


def test_scalar_shape_and_epoch():
    order = Order(10, 0)
    many = order.at(np.arange(24).reshape(4, 6))
    assert many.shape == (4, 6) and many.dtype == np.int64
    assert isinstance(order.at(13), int) and order.at(13) == many[2, 1]
    assert order.epoch(np.array([0, 9, 10, 29])).tolist() == [0, 0, 1, 2]
    assert order.at(np.zeros(0, np.int64)).shape == (0,)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="count: 0"):
        Order(0, 0)
    with pytest.raises(ValueError, match="position: -1"):
        Order(5, 0).at(-1)


def test_any_sequence_of_resumes_worlds_and_batches_gives_each_sample_once():
    """A run cut into random pieces, each on another number of ranks, with another batch: the same stream, unsorted."""
    random, count = np.random.default_rng(0), 100_003
    straight = Order(count, 9).at(np.arange(count))
    for _ in range(50):
        pieces, position = [], 0
        while position < count:
            world = int(random.choice([1, 2, 3, 4, 8]))
            global_batch, steps = 24 * int(random.integers(1, 40)), int(random.integers(1, 60))
            plan = Plan(global_batch=global_batch, steps=steps, start=position, world=world)
            plans = [replace(plan, rank=rank) for rank in range(world)]
            pieces += [plan.positions(step) for step in range(steps) for plan in plans]
            position += steps * global_batch
        stream = Order(count, 9).at(np.concatenate(pieces)[:count])
        assert np.array_equal(stream, straight) and (np.bincount(stream, minlength=count) == 1).all()
