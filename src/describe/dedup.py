"""Texts that occur more than once: the same words, or nearly the same words in the same order.

Exact: equal once letter case, white space and punctuation are taken away. Near: similarity at least `threshold`, where

    similarity(a, b) = common / (len(a) + len(b) - common)

and `common` is the length of the longest common subsequence of their words. It is the Jaccard index, but words count
only where the order is the same, so "a dog bites a man" does not become "a man bites a dog". At 0.8 one changed word is
near in a text of nine words or more, one added or dropped word in five or more.

Candidates come from MinHash over the words of a text (the second "a" of a text is a word of its own): the Jaccard index
of these sets is never below the similarity. Bands of a row's hashes are sorted one after the other; neighbours with an
equal band are compared, first by a sketch of 64 bits that never refuses a near pair, then exactly. About 180 bytes per
row are kept, and no text.

Broder: On the resemblance and containment of documents (1997). Common subsequence in bits: Hyyrö (2004).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BANDS, HASHES = 16, 5  # of each band; tests/bench/describe_dedup.py: what other numbers find and cost
NEIGHBOURS = 8  # in the order of a band that a row is compared with
MOST_WORDS = 256  # of a text that are compared for near duplicates
MOST_FIRST = 64  # rows that a row of those that hang together may repeat
BLOCK = 8192  # rows that are hashed at once
PAIRS = 1 << 18  # that are compared by sketch at once

_ASCII_WORD = re.compile("[a-z0-9]+")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Duplicates(NamedTuple):
    """(n,) int64 each: the number of the first row of a row's group, -1 for rows that repeat nothing.

    A row is in `exact` or in `near`, never in both, and the row that `near` names is itself at most a first one.
    """

    exact: NDArray[np.int64]
    near: NDArray[np.int64]


class _Letters(dict[int, str]):
    """For str.translate: letters, digits and marks stay, all else parts words. Characters of Chinese and Japanese,
    which put no space between words, are words of their own."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] not in "LNM":
            character = " "
        elif 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000:
            character = f" {character} "
        self[code] = character
        return character


_LETTERS = _Letters()


def fold(text: str) -> list[str]:
    """The words that a text is compared by: case folded, without punctuation and symbols."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS).split()


def similarity(a: Sequence[int] | Sequence[str], b: Sequence[int] | Sequence[str]) -> float:
    """Words that are common in the same order / words of either, 0 to 1; 0 where both are empty."""
    common = _count_common(a, b)
    return common / max(1, len(a) + len(b) - common)


def find_duplicates(texts: Iterable[str], threshold: float = 0.8) -> Duplicates:
    """Exact and near duplicates among texts, which are read once and not kept.

    threshold: least similarity of near duplicates, above 0.5 and up to 1 (ValueError). Of rows that repeat each other
    the one that comes first is the first row of the group. Each row of `near` is near to its first row itself: a chain
    of small steps is not one group. Texts without a letter or digit are in no group. The same texts in the same order
    give the same arrays, on every machine.
    """
    if not 0.5 < threshold <= 1:
        raise ValueError(f"threshold: {threshold} is not above 0.5 and at most 1; 0.8 is usual")
    blocks = [_Block(part) for part in _batches(texts, BLOCK)]
    rows = sum(len(block.digests) for block in blocks)
    exact = _find_exact(blocks, rows)
    near = np.full(rows, -1, np.int64)
    kept = np.flatnonzero((exact < 0) & (_join([block.lengths for block in blocks], np.int64) > 0))
    if len(kept) > 1 and threshold < 1:
        _Search(blocks, kept, threshold).find(near)
    return Duplicates(exact, near)


def _batches(texts: Iterable[str], most: int) -> Iterator[list[str]]:
    source = iter(texts)
    while part := list(islice(source, most)):
        yield part


def _join(parts: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


class _Block:
    """What is kept of up to BLOCK texts.

    digests (n,) uint64 of all words; lengths (n,) int64, words (sum of lengths,) uint32 and their starts (n + 1,) of
    the first MOST_WORDS; bands (n, BANDS) uint32; sketch (n,) uint64.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words, lengths, digests = array("I"), [], []
        for text in texts:
            folded = fold(text)
            content = " ".join(folded).encode("utf-8", "surrogatepass")
            digests.append(blake2b(content, digest_size=8).digest() if folded else bytes(8))
            del folded[MOST_WORDS:]
            words.extend([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in folded])
            lengths.append(len(folded))
        self.digests = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
        self.lengths = np.array(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.words = np.array(words, np.uint32)
        self.bands = np.zeros((len(texts), BANDS), np.uint32)
        self.sketch = np.zeros(len(texts), np.uint64)
        some = np.flatnonzero(self.lengths)
        if len(some):
            tokens = _number_repeats(self.words, np.repeat(np.arange(len(texts)), self.lengths))
            starts = self.starts[some]
            self.bands[some] = _hash_bands(tokens, starts)
            # One bit of 64 is turned for each word: rows of which k words differ differ in at most k bits.
            self.sketch[some] = np.bitwise_xor.reduceat(np.uint64(1) << (tokens >> np.uint64(58)), starts)


def _number_repeats(words: NDArray[np.uint32], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 mixed bits for each word: equal where the word and how often it came before in its row are equal."""
    keys = (rows.astype(np.uint64) << np.uint64(32)) | words
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    place = np.arange(len(keys))
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    repeats = np.empty(len(keys), np.uint64)
    repeats[order] = (place - np.maximum.accumulate(np.where(first, place, 0))).astype(np.uint64)
    return mix_bits(words.astype(np.uint64) + (repeats << np.uint64(32)))


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit decides every bit."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash_bands(tokens: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """(rows, BANDS): HASHES least values of each row, mixed to 32 bits."""
    factors = mix_bits(np.arange(BANDS * HASHES, dtype=np.uint64)) | np.uint64(1)
    bands = np.empty((len(starts), BANDS), np.uint32)
    for band in range(BANDS):
        key = np.zeros(len(starts), np.uint64)
        for factor in factors[band * HASHES : (band + 1) * HASHES]:
            key = mix_bits(key ^ np.minimum.reduceat(tokens * factor, starts))
        bands[:, band] = key >> np.uint64(32)
    return bands


def _find_exact(blocks: list[_Block], rows: int) -> NDArray[np.int64]:
    digests = _join([block.digests for block in blocks], np.uint64)
    order = np.argsort(digests, kind="stable")  # of equal ones the first row comes first
    ordered = digests[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, rows), bool), ordered[1:] != ordered[:-1]]))
    first = np.repeat(order[starts], np.diff(np.append(starts, rows)))
    exact = np.full(rows, -1, np.int64)
    repeated = (first != order) & (ordered != 0)
    exact[order[repeated]] = first[repeated]
    return exact


class _Search:
    """Near duplicates among the rows `kept` (ascending numbers of rows)."""

    def __init__(self, blocks: list[_Block], kept: NDArray[np.int64], threshold: float) -> None:
        self.blocks, self.kept, self.threshold = blocks, kept, threshold
        self.lengths = _join([block.lengths for block in blocks], np.int32)[kept]
        self.sketch = _join([block.sketch for block in blocks], np.uint64)[kept]
        self.parent = np.arange(len(kept))  # of rows that hang together, the first one

    def find(self, near: NDArray[np.int64]) -> None:
        """Fill `near` (n,)."""
        for band in range(BANDS):
            self._compare_band(band)
        roots = self._roots()
        order = np.argsort(roots, kind="stable")
        borders = np.flatnonzero(np.diff(roots[order])) + 1
        sizes = np.diff(np.concatenate([[0], borders, [len(order)]]))
        for start, size in zip(np.concatenate([[0], borders])[sizes > 1], sizes[sizes > 1]):
            self._name_first(order[start : start + size].tolist(), near)

    def _compare_band(self, band: int) -> None:
        """Join rows whose band is equal and whose texts are near."""
        other = (band + 1) % BANDS  # sorts a large bucket, so that alike rows are neighbours there, too
        keys = _join([block.bands[:, band] for block in self.blocks], np.uint64)[self.kept]
        keys = (keys << np.uint64(32)) | _join([block.bands[:, other] for block in self.blocks], np.uint32)[self.kept]
        order = np.argsort(keys, kind="stable")
        keys = keys[order] >> np.uint64(32)
        for distance in range(1, NEIGHBOURS + 1):
            places = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(places):
                return
            for start in range(0, len(places), PAIRS):
                part = places[start : start + PAIRS]
                self._compare(order[part], order[part + distance])

    def _compare(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        words = self.lengths[left] + self.lengths[right]
        differing = _count_bits(self.sketch[left] ^ self.sketch[right])
        possible = np.flatnonzero(differing <= self._most_differing(words))
        left, right = left[possible], right[possible]
        roots = self._roots()
        apart = np.flatnonzero(roots[left] != roots[right])
        for a, b in zip(left[apart].tolist(), right[apart].tolist()):
            a_root, b_root = self._root(a), self._root(b)
            if a_root != b_root and self._is_near(a, b):
                self.parent[max(a_root, b_root)] = min(a_root, b_root)

    def _most_differing(self, words: Any) -> Any:
        """Words that are in one of two near texts only, at most, of the words of both (a count or an array)."""
        return words * (1 - self.threshold) / (1 + self.threshold) + 1e-9

    def _roots(self) -> NDArray[np.int64]:
        while True:
            above = self.parent[self.parent]
            if np.array_equal(above, self.parent):
                return above
            self.parent = above

    def _root(self, row: int) -> int:
        while (above := int(self.parent[row])) != row:
            row = above
        return row

    def _is_near(self, a: int, b: int) -> bool:
        return similarity(self._words(a), self._words(b)) >= self.threshold - 1e-9

    def _words(self, row: int) -> list[int]:
        block, place = divmod(int(self.kept[row]), BLOCK)
        starts = self.blocks[block].starts
        return self.blocks[block].words[starts[place] : starts[place + 1]].tolist()

    def _name_first(self, rows: list[int], near: NDArray[np.int64]) -> None:
        """Of rows that hang together, each with a first row that it is near to itself; the ones met last are tried
        first, and MOST_FIRST are remembered."""
        firsts: list[tuple[int, int, int]] = []
        for row in rows:
            sketch, length = int(self.sketch[row]), int(self.lengths[row])
            met = (row, sketch, length)
            for place in reversed(range(len(firsts))):
                first, its_sketch, its_length = firsts[place]
                possible = (sketch ^ its_sketch).bit_count() <= self._most_differing(length + its_length)
                if possible and self._is_near(row, first):
                    near[self.kept[row]] = self.kept[first]
                    met = firsts.pop(place)
                    break
            firsts.append(met)
            del firsts[:-MOST_FIRST]


def _count_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Set bits of each value, added in pairs, fours and bytes (numpy counts them itself from 2.0 on)."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def _count_common(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence."""
    places: dict = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(a)) - 1
    free = full
    for word in b:
        matches = free & places.get(word, 0)
        free = (free + matches | free - matches) & full
    return len(a) - free.bit_count()
