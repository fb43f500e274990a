"""Which record comes next: a pure function of seed, epoch and position, with nothing stored and O(1) seek."""

from __future__ import annotations

import numpy as np

from .augment import GAMMA, hash64, mix64

ROUNDS = 20  # with fewer, counts below about 100 favour some permutations (tested by chi-square)
KEY = 0x4F72646572  # keeps these hashes apart from the augmentation's: "Order"


class Order:
    """An endless sequence of record indices in which every epoch of `count` positions holds each index once.

    Position p belongs to epoch p // count; inside an epoch the index is a permutation of p % count, keyed by
    seed and epoch. The permutation is an alternating Feistel network on the smallest power of two that holds
    `count`; a value that falls outside is permuted again until it falls inside (cycle walking), which takes
    fewer than two passes on average. So a run's place in its data is one integer, and any process finds any
    place at once.
    """

    def __init__(self, count: int, seed: int):
        if not 1 <= count <= 1 << 62:
            raise ValueError(f"count: {count} records cannot be ordered; need at least one")
        self.count, self.seed = int(count), int(seed)
        bits = (self.count - 1).bit_length()
        self._low = np.uint64(bits // 2)
        self._masks = (
            np.uint64((1 << (bits - bits // 2)) - 1),
            np.uint64((1 << (bits // 2)) - 1),
        )

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
        index = places.astype(np.uint64)
        keys = hash64(KEY, self.seed, epochs)
        left = np.arange(index.size)  # those that are still outside
        while left.size:
            index[left] = self._permute(index[left], keys[left])
            left = left[index[left] >= self.count]
        index = index.astype(np.int64)
        return int(index[0]) if np.ndim(position) == 0 else index.reshape(where.shape)

    def _permute(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass over the power of two: the halves alternate in being masked by a keyed hash of the other."""
        high, low = value >> self._low, value & self._masks[1]
        for turn in range(ROUNDS):
            keys = keys + GAMMA
            if turn % 2 == 0:
                high = high ^ (mix64(low ^ keys) >> np.uint64(16) & self._masks[0])
            else:
                low = low ^ (mix64(high ^ keys) >> np.uint64(16) & self._masks[1])
        return high << self._low | low
