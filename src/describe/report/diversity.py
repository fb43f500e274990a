"""How varied texts are, counted over a stream in bounded memory: words, pairs and triples of words, rare words."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..dedup import mix_bits

MOST_KEPT = 1 << 19  # hashes of one kind: up to as many are counted exactly, beyond to about 0.2 %
MOST_WORDS = 1 << 16  # words of which it is known in how many rows they are
BATCH = 1 << 16  # words that are gathered before they are hashed together
RARE = 3  # rows, at most, that have a rare word


class Distinct:
    """How many different values were added.

    Of the mixed 64 bits of a value those are kept that end in `level` zeros; the level rises when more than `most` are
    kept, and each stands for 2 ** level values (adaptive sampling; Flajolet, 1990; standard error 1.2 / sqrt(most)).
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most or MOST_KEPT
        self.level = 0
        self.kept = np.empty(0, np.uint64)
        self._waiting: list[NDArray[np.uint64]] = []  # merged when they are as many as the kept ones: few sorts
        self._number = 0

    def add(self, values: NDArray[np.uint64]) -> None:
        """Mixed 64-bit hashes, (n,)."""
        self._waiting.append(np.unique(self._sample(values)))
        self._number += len(self._waiting[-1])
        if self._number >= len(self.kept):
            self._merge()

    def _merge(self) -> None:
        self.kept = np.unique(np.concatenate([self.kept, *self._waiting]))
        self._waiting, self._number = [], 0
        while len(self.kept) > self.most:
            self.level += 1
            self.kept = self._sample(self.kept)

    def _sample(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return values[(values & np.uint64((1 << self.level) - 1)) == 0]

    def count(self) -> int:
        """Exact while the level is 0."""
        self._merge()
        return len(self.kept) << self.level


class Phrases:
    """Different words, pairs and triples of words of one of the three texts.

    growth: (texts, different words up to there), at texts that grow by a quarter from one to the next.
    """

    def __init__(self) -> None:
        self.texts = 0
        self.totals = [0, 0, 0]
        self.distinct = [Distinct(), Distinct(), Distinct()]
        self.growth: list[tuple[int, int]] = []
        self._words, self._lengths = array("I"), array("I")
        self._next = 1

    def add(self, words: Sequence[str]) -> None:
        """The words of one text."""
        self.texts += 1
        self._words.extend([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words])
        self._lengths.append(len(words))
        if self.texts >= self._next or len(self._words) >= BATCH:
            self._count()
        if self.texts >= self._next:
            self.growth.append((self.texts, self.distinct[0].count()))
            self._next = max(self.texts + 1, self.texts * 5 // 4)

    def _count(self) -> None:
        words = np.array(self._words, np.uint64)
        texts = np.repeat(np.arange(len(self._lengths)), self._lengths)
        del self._words[:], self._lengths[:]
        hashes = mix_bits(words)
        for size in (1, 2, 3):
            if size > 1:
                hashes = mix_bits(hashes[:-1] ^ (words[size - 1 :] * np.uint64(2 * size + 1)))
            within = hashes[texts[size - 1 :] == texts[: len(texts) - size + 1]] if len(texts) >= size else hashes[:0]
            self.totals[size - 1] += len(within)
            self.distinct[size - 1].add(within)

    def results(self) -> dict:
        """texts, words, vocabulary, distinct_1 to 3 (different ones / all, None where none are), growth, exact."""
        self._count()
        if not self.growth or self.growth[-1][0] != self.texts:
            self.growth.append((self.texts, self.distinct[0].count()))
        shares = {
            f"distinct_{size}": distinct.count() / total if total else None
            for size, distinct, total in zip((1, 2, 3), self.distinct, self.totals)
        }
        exact = all(distinct.level == 0 for distinct in self.distinct)
        vocabulary = self.distinct[0].count()
        growth = [list(point) for point in self.growth if point[0]]
        about = {"texts": self.texts, "words": self.totals[0], "vocabulary": vocabulary}
        return about | shares | {"exact": exact, "growth": growth}


class Survival:
    """Which words of the raw texts are in the generated text of the same row. Words are sampled by their hash when more
    than MOST_WORDS are met, so that shares stay right."""

    def __init__(self) -> None:
        self.level = 0
        self.words: dict[int, list[int]] = {}  # hash of a word -> [rows with it, rows whose generated text has it]

    def add(self, raw: Iterable[str], generated: Iterable[str]) -> None:
        """The words of the two texts of one row."""
        kept = set(generated)
        for word in set(raw):
            value = zlib.crc32(word.encode("utf-8", "surrogatepass")) * 0x9E3779B97F4A7C15 >> 32 & 0xFFFFFFFF
            if value & ((1 << self.level) - 1):
                continue
            counts = self.words.setdefault(value, [0, 0])
            counts[0] += 1
            counts[1] += word in kept
        while len(self.words) > MOST_WORDS:
            self.level += 1
            mask = (1 << self.level) - 1
            self.words = {value: counts for value, counts in self.words.items() if not value & mask}

    def results(self) -> dict:
        """Of all words of raw texts and of the rare ones (in at most RARE rows): occurrences, and those that are kept;
        words counts different ones. In rows, estimated by the sample where `sampled` is above 1."""
        rare = [counts for counts in self.words.values() if counts[0] <= RARE]
        scale = 1 << self.level
        return {
            "rare_rows": RARE,
            "words": len(self.words) * scale,
            "rare_words": len(rare) * scale,
            "share_kept": _share(self.words.values()),
            "rare_share_kept": _share(rare),
            "sampled": scale,
        }


def _share(counts: Iterable[list[int]]) -> float | None:
    rows, kept = map(sum, zip(*counts)) if (counts := list(counts)) else (0, 0)
    return kept / rows if rows else None
