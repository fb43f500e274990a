"""Which record comes next: a pure function of seed, epoch and position, with nothing stored and O(1) seek."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rwkv_clip.data.mixture import Mixture
from rwkv_clip.data.records import Records

from .augment import GAMMA, hash64, mix64

ROUNDS = 20  # with fewer, counts below about 100 favour some permutations (tested by chi-square)
KEY = 0x4F72646572  # keeps these hashes apart from the augmentation's: "Order"
MIXED = 0x4D69786564  # and the seeds of a mixture's orders from the run's: "Mixed"


class Sizes(NamedTuple):
    """Of permutations: how many places, and bits and masks of the halves of a number that holds the last one; scalars,
    or uint64 arrays for many permutations."""

    count: np.uint64 | np.ndarray
    low: np.uint64 | np.ndarray
    high_mask: np.uint64 | np.ndarray
    low_mask: np.uint64 | np.ndarray

    @classmethod
    def make(cls, count: int) -> Sizes:
        """Of a permutation of so many places."""
        bits = (count - 1).bit_length()
        numbers = count, bits // 2, (1 << (bits - bits // 2)) - 1, (1 << (bits // 2)) - 1
        return cls(*map(np.uint64, numbers))

    def of(self, rows: np.ndarray) -> Sizes:
        """Those of some of many permutations; scalars are those of all."""
        return self if np.ndim(self.count) == 0 else Sizes(*(column[rows] for column in self))


def permute_places(places: np.ndarray, keys: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Where the permutations by `keys`, uint64 (N,), take places in [0, count): int64 (N,) -> int64 (N,).

    An alternating Feistel network on the smallest power of two that holds `count`; a value that falls outside is
    permuted again until it falls inside (cycle walking), which takes fewer than two passes on average.
    """
    index = places.astype(np.uint64)
    left = np.arange(index.size)  # those that are still outside
    while left.size:
        own = sizes.of(left)
        index[left] = _pass_network(index[left], keys[left], own)
        left = left[index[left] >= own.count]
    return index.astype(np.int64)


def _pass_network(value: np.ndarray, keys: np.ndarray, sizes: Sizes) -> np.ndarray:
    """One pass over the power of two: the halves alternate in being masked by a keyed hash of the other."""
    high, low = value >> sizes.low, value & sizes.low_mask
    for turn in range(ROUNDS):
        keys = keys + GAMMA
        if turn % 2 == 0:
            high = high ^ (mix64(low ^ keys) >> np.uint64(16) & sizes.high_mask)
        else:
            low = low ^ (mix64(high ^ keys) >> np.uint64(16) & sizes.low_mask)
    return high << sizes.low | low


class Order:
    """An endless sequence of record indices in which every epoch of `count` positions holds each index once.

    Position p belongs to epoch p // count; inside an epoch the index is a permutation of p % count, keyed by seed and
    epoch. So a run's place in its data is one integer, and any process finds any place at once.
    """

    def __init__(self, count: int, seed: int):
        if not 1 <= count <= 1 << 62:
            raise ValueError(f"count: {count} records cannot be ordered; need at least one")
        self.count, self.seed = int(count), int(seed)
        self._sizes = Sizes.make(self.count)

    def epoch(self, position: int | np.ndarray) -> np.ndarray:
        """Epoch of each position, int64."""
        return np.asarray(position, np.int64) // self.count

    def at(self, position: int | np.ndarray) -> np.ndarray | int:
        """Record index in [0, count) at each position >= 0: int for an int, int64 array of its shape for an
        array."""
        where = np.atleast_1d(np.asarray(position, np.int64))
        if where.size and where.min() < 0:
            raise ValueError(f"position: {where.min()} is before the beginning; positions count from 0")
        epochs, places = np.divmod(where.ravel(), self.count)
        index = permute_places(places, hash64(KEY, self.seed, epochs), self._sizes)
        return int(index[0]) if np.ndim(position) == 0 else index.reshape(where.shape)

    def find(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record index, epoch) at each position, int64."""
        return self.at(position), self.epoch(position)

    def stand_in(self, position: int, turn: int) -> tuple[int, int]:
        """(record index, epoch) of the `turn`-th record, from 1, that may take the place of the one at `position`."""
        return self.at(position + turn), (position + turn) // self.count


class MixedOrder:
    """An endless sequence of record indices of several sources, `samples[i]` of source i in every epoch.

    counts: records of each source; its indices follow those of the sources before it. Position p belongs to epoch
    e = p // count, where count is the sum of `samples`. A permutation of the epoch, as in `Order`, says which of the
    epoch's samples it is: the r-th of source i takes the place e * samples[i] + r in the source's own sequence.

    That sequence repeats a permutation of the source's records, a pass each, and takes a new one whenever a pass and an
    epoch end together. So every epoch, and the first k epochs for any k, hold each record of a source equally often, up
    to one: its share, rounded down or up; and a source is used up before one of its records comes again. (With a new
    permutation for every pass, the two passes that meet within an epoch could have the same record in it.)
    """

    def __init__(self, counts: list[int], samples: list[int], seed: int):
        seeds = hash64(MIXED, seed, np.arange(len(counts) + 1)) >> np.uint64(1)
        self._mix, self._seeds = Order(sum(samples), int(seeds[0])), seeds[1:]
        self.count = self._mix.count
        self._sizes = Sizes(*map(np.array, zip(*map(Sizes.make, counts))))
        self._counts, self._samples = np.array(counts, np.int64), np.array(samples, np.int64)
        self._ends, self._offsets = np.cumsum(self._samples), np.cumsum(self._counts) - self._counts
        rounds = [min(math.lcm(*pair), 1 << 62) for pair in zip(counts, samples)]  # places until both end together
        self._rounds = np.array(rounds, np.int64)

    def at(self, position: int | np.ndarray) -> np.ndarray | int:
        """Record index at each position >= 0: int for an int, int64 array of its shape for an array."""
        index = self.find(np.asarray(position, np.int64))[0]
        return int(index) if np.ndim(position) == 0 else index

    def find(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record index, pass of its source) at each position, int64. No record has a pass twice."""
        where = np.asarray(position, np.int64)
        index, passes = self._find(*self._locate(where.ravel()))
        return index.reshape(where.shape), passes.reshape(where.shape)

    def stand_in(self, position: int, turn: int) -> tuple[int, int]:
        """(record index, pass) of the `turn`-th record, from 1, that may take the place of the one at `position`: the
        next ones in the sequence of its source, so that shares stay as they are."""
        numbers, places = self._locate(np.array([position], np.int64))
        index, passes = self._find(numbers, places + turn)
        return int(index[0]), int(passes[0])

    def _locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, place in the sequence of that source) of each position."""
        slots = np.asarray(self._mix.at(position))
        numbers = np.searchsorted(self._ends, slots, side="right")
        samples = self._samples[numbers]
        return numbers, position // self.count * samples + slots - (self._ends[numbers] - samples)

    def _find(self, numbers: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record index, pass) of places in the sequences of sources."""
        passes, within = np.divmod(places, self._counts[numbers])
        keys = hash64(KEY, self._seeds[numbers], places // self._rounds[numbers])
        return permute_places(within, keys, self._sizes.of(numbers)) + self._offsets[numbers], passes


def make_order(records: Records, seed: int) -> Order | MixedOrder:
    """The order of training on these records."""
    if not isinstance(records, Mixture):
        return Order(len(records), seed)
    counts, samples = zip(*((len(source.records), source.samples) for source in records.sources))
    return MixedOrder(list(counts), list(samples), seed)
