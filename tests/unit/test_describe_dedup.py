"""Duplicates of texts: what is found, what is not joined, and that nothing decides but the texts and their order."""

import random

import numpy as np
import pytest

from rwkv_clip.describe import dedup
from rwkv_clip.describe.dedup import find_duplicates, fold, similarity

LONG = "a tall man in a red coat holds a striped umbrella beside the old stone bridge"


def random_texts(rows: int, seed: int, vocabulary: int = 3000) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.randint(8, 25))) for _ in range(rows)]


def slow_common(a, b) -> int:
    """The textbook's table."""
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for place, y in enumerate(b):
            row.append(above[place] + 1 if x == y else max(row[-1], above[place + 1]))
        above = row
    return above[-1]


@pytest.mark.parametrize(
    "text, other",
    [
        ("A dog.", "a DOG"),
        ("a  dog\n runs", "a dog runs"),
        ('"A dog", he said!', "a dog he said"),
        ("ＣＡＦÉ", "café"),
        ("Straße", "STRASSE"),
        ("一只狗。", "一只 狗"),
    ],
)
def test_case_space_and_punctuation_do_not_count(text, other):
    assert find_duplicates(["something else", text, other]).exact.tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    "text, other",
    [
        ("a dog", "a dogs"),
        ("कि", "की"),
        ("一只狗", "一只猫"),
        ("2 dogs", "3 dogs"),
        ("", ""),
        ("!!", "??"),
        ("🐕", "🐈"),
    ],
)
def test_what_differs_is_not_the_same(text, other):
    assert find_duplicates([text, other]).exact.tolist() == [-1, -1]


def test_exact_duplicates_name_the_first_row():
    found = find_duplicates(["b b", "a a", "A a", "b b", "a, a", ""])
    assert found.exact.tolist() == [-1, -1, 1, 0, 1, -1] and (found.near == -1).all()
    assert found.exact.dtype == found.near.dtype == np.int64


@pytest.mark.parametrize(
    "other, near",
    [
        (LONG.replace("red", "blue"), True),
        (LONG.replace(" old", ""), True),
        (LONG + " today", True),
        (LONG.replace("striped", "very wide striped"), True),
        (" ".join(reversed(LONG.split())), False),  # the same words in another order
        (LONG.replace("man", "woman").replace("red", "blue").replace("bridge", "gate"), False),
    ],
)
def test_near_duplicates(other, near):
    found = find_duplicates([LONG, other])
    assert found.near.tolist() == [-1, 0 if near else -1] and (found.exact == -1).all()


def test_an_order_that_changes_the_meaning_is_not_near():
    assert (find_duplicates(["the dog bites the man", "the man bites the dog"]).near == -1).all()


def test_similarity_is_that_of_the_longest_common_subsequence():
    rng = random.Random(1)
    for _ in range(300):
        a, b = ([rng.randrange(6) for _ in range(rng.randrange(30))] for _ in range(2))
        common = slow_common(a, b)
        assert similarity(a, b) == common / max(1, len(a) + len(b) - common)


def test_planted_duplicates_are_found_and_nothing_else():
    texts = random_texts(6000, 2)
    rng = random.Random(3)
    exact, near = {}, {}
    for place in range(5000, 6000):
        source = rng.randrange(5000)
        words = texts[source].split()
        if place % 2:
            exact[place], texts[place] = source, texts[source].upper() + " !"
            continue
        spot = rng.randrange(len(words))
        words[spot : spot + 1] = ["changed"] if place % 4 else []
        near[place], texts[place] = source, " ".join(words)
    found = find_duplicates(texts)
    assert {row: int(found.exact[row]) for row in exact} == exact
    assert not set(np.flatnonzero(found.exact >= 0)) - set(exact)
    possible = {row: source for row, source in near.items() if similarity(fold(texts[row]), fold(texts[source])) >= 0.8}
    assert len(possible) > 450
    missed = [row for row, source in possible.items() if found.near[row] != source and found.near[row] not in near]
    assert len(missed) <= 0.01 * len(possible)
    for row in np.flatnonzero(found.near >= 0):
        assert similarity(fold(texts[row]), fold(texts[found.near[row]])) >= 0.8 - 1e-9


def test_a_chain_of_small_steps_is_not_one_group():
    texts = [" ".join(f"w{word}" for word in range(start, start + 20)) for start in range(300)]
    found = find_duplicates(texts)
    for row, first in enumerate(found.near):
        assert first < 0 or (row - first <= 2 and found.near[first] < 0)
    assert (found.near >= 0).sum() == 200  # of three in a row, two repeat the first


@pytest.mark.parametrize("block", [1, 7, 8192])
def test_how_rows_are_cut_decides_nothing(monkeypatch, block):
    texts = random_texts(400, 4, vocabulary=60) * 2 + [LONG, LONG + " today", "", LONG]
    expected = find_duplicates(texts)
    monkeypatch.setattr(dedup, "BLOCK", block)
    monkeypatch.setattr(dedup, "PAIRS", 3)
    found = find_duplicates(text for text in texts)
    assert np.array_equal(found.exact, expected.exact) and np.array_equal(found.near, expected.near)


def test_one_template_with_another_number_is_one_group():
    texts = [f"photo number {number} of the big house in the old town" for number in range(3000)]
    assert find_duplicates(texts).near.tolist() == [-1] + [0] * 2999


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["\ud800 dog", "\ud800 dog"], ["x" * 1_000_000, "word " * 200_000]])
def test_odd_texts(texts):
    found = find_duplicates(texts)
    assert len(found.exact) == len(found.near) == len(texts)


def test_the_end_of_a_long_text_still_decides_whether_it_is_the_same():
    text = "word " * 1000
    found = find_duplicates([text + "one", text + "two"])
    assert found.exact.tolist() == [-1, -1] and found.near.tolist() == [-1, 0]


@pytest.mark.parametrize("threshold", [0.5, 0, 1.01, -1, float("nan")])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold: "):
        find_duplicates([], threshold)


def test_bits_are_counted():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64, endpoint=False)
    assert dedup._count_bits(values).tolist() == [int(value).bit_count() for value in values]
