"""The data of tests/bench/third_text.py: whose raw text is whose, and what is made of sentences."""

import random

import pytest
import third_text

ROWS = [
    {"image": f"{i}.jpg", "captions": [f"A red dog number{i} runs over wet grass near tree {k} ." for k in range(5)]}
    for i in range(200)
]


def test_a_seed_gives_the_same_rows_and_another_gives_others():
    assert third_text.make_rows(ROWS, 3) == third_text.make_rows(ROWS, 3) != third_text.make_rows(ROWS, 4)


def test_a_share_of_the_raw_texts_is_of_another_picture_and_captions_never_are():
    made = third_text.make_rows(ROWS, 0)
    assert [row["id"] for row in made] == [row["image"] for row in ROWS]
    named = [i for i, row in enumerate(made) if "number" in row["raw"]]  # in others the word was cut
    swapped = sum(f"number{i} " not in f"{made[i]['raw']} " for i in named)
    assert 0.2 < swapped / len(named) < 0.4
    assert all(f"number{i}" in row["synthetic"] for i, row in enumerate(made))


def test_terse_captions_are_short_and_end_in_a_word_of_content():
    assert (
        third_text.make_terse("A small red dog runs over the wet grass near a tree .")
        == "a small dog runs over the wet"
    )
    assert third_text.make_terse("Two dogs are in the big and") == "two dogs are in the big"


@pytest.mark.parametrize("seed", range(5))
def test_tags_have_scores_and_are_nouns(seed):
    tags = third_text.draw_tags(["A dog on the grass.", "A man with a ball."], ["kite"], random.Random(seed))
    assert {name for name, _ in tags} <= {"dog", "grass", "man", "ball", "kite"} and all(0 < s <= 1 for _, s in tags)
