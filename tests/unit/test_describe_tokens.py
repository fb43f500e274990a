"""Tokens are counted as the tokenizer counts them, and texts end where a reader would end them."""

import string
import subprocess
import sys
from random import Random

import pytest

from helpers.describe_hostile import hostile_texts
from rwkv_clip.describe.tokens import CONTEXT, READ, count_tokens, fits, trim
from rwkv_clip.tokenizer import make_tokenizer

WORDS = (
    *("a", "dog", "Dogs", "running", "GoldenRetriever", "supercalifragilistic", "beach", "it's", "we'll", "O'Neill"),
    *("don't", "F-16", "1,000", "2012", "7th", "Boeing", "747", "co-operate", "...", "!!!", "(", ")", "#tag", "@me"),
    *(
        "caf\u00e9",
        "na\u00efve",
        "Stra\u00dfe",
        "\u2019s",
        "\u201cquoted\u201d",
        "\u2013",
        "\u20ac50",
        "\u00a3",
        "Pok\u00e9mon",
        "\u0130stanbul",
    ),
    *(
        "&amp;",
        "&lt;b&gt;",
        "&eacute;",
        "&amp;amp;",
        "&#39;",
        "&nbsp;",
        "&unknown;",
        "\u00c3\u00a9",
        "\u00e2\u20ac\u2122",
        "\u00c2\u00a3",
    ),
    *(
        "\u5317\u4eac",
        "\u6771\u4eac\u30bf\u30ef\u30fc",
        "\u043c\u043e\u0441\u043a\u0432\u0430",
        "\u0627\u0644\u0642\u0627\u0647\u0631\u0629",
        "\u0e01\u0e23\u0e38\u0e07",
        "\ud55c\uad6d\uc5b4",
        "\U0001f600",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\u2764\ufe0f",
    ),
    *(
        "<start_of_text>",
        "<END_OF_TEXT>",
        "x<end_of_text>y",
        "</w>",
        "\ufb01sh",
        "\uff21\uff22\uff23",
        "e\u0301",
        "\x00",
        "\x1b[31m",
    ),
    *("\u2028", "\u200b", "\u00a0", "\t", "\n", "\r\n", "\ufffd", "\x85", "\u0661\u0662", "\u00bd", "\u2460"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(context=4 * READ)


def count(tokenizer, text: str) -> int:
    """By the tokenizer itself: its last token is that of the end, whose id is the largest."""
    return int(tokenizer(text)[0].argmax()) + 1


@pytest.mark.parametrize("seed", range(10))
def test_counts_are_the_tokenizers(tokenizer, seed):
    random = Random(seed)
    for _ in range(300):
        words = random.choices(WORDS, k=random.randint(0, 12))
        words += ["".join(random.choices(string.printable, k=random.randint(1, 12))) for _ in range(seed % 3)]
        random.shuffle(words)
        text = random.choice((" ", " ", "", "  ", "-")).join(words)
        if "<end_of_text>" not in text.lower():  # where `count` would stop
            assert count_tokens(text) == count(tokenizer, text), repr(text)


@pytest.mark.parametrize(
    "text, expected",
    [("", 2), (" \n ", 2), ("a", 3), ("<start_of_text>", 3), ("x<END_OF_TEXT>y", 5), ("a dog's tail", 6), ("2012", 6)],
)
def test_counts(text, expected):
    assert count_tokens(text) == expected


def test_any_character_counts_as_the_tokenizer_counts_it(tokenizer):
    random = Random(0)
    for _ in range(300):
        text = "".join(
            chr(random.choice((random.randrange(0xD800), random.randrange(0x10000, 0x2FFFF)))) for _ in range(9)
        )
        assert count_tokens(text) == count(tokenizer, text), repr(text)


def test_what_is_beyond_the_reading_limit_does_not_count():
    assert count_tokens("dog " * READ) == count_tokens(("dog " * READ)[:READ])
    assert count_tokens(" " * 10 * READ + "a dog") == 4
    assert not fits("x" * 10**6) and not fits("a b " * 10**6)


@pytest.mark.parametrize("context", [3, 5, 16, CONTEXT])
def test_what_is_trimmed_fits_and_is_a_beginning(context):
    random = Random(context)
    for _ in range(100):
        text = " ".join(random.choices(WORDS, k=random.randint(0, 120)))
        short = trim(text, context)
        assert fits(short, context)
        assert short == text if fits(text, context) else " ".join(text.split()).startswith(short.removesuffix("."))
        assert trim(short, context) == short


def test_hostile_texts_are_trimmed():
    for text in hostile_texts():
        short = trim(text)
        assert fits(short) and (short.strip() or count_tokens(text) <= 2 or not text.split())


@pytest.mark.parametrize(
    "text, context, short",
    [
        ("A dog runs. A cat sleeps on the mat.", 9, "A dog runs."),
        ("A dog runs on the beach, with waves and people in the sun", 12, "A dog runs on the beach"),
        ("A dog runs on the beach with waves and a man.", 10, "A dog runs on the beach."),
        ("A dog on the beach", 5, "A dog"),
        ("A dog on the beach", 6, "A dog"),
        ("Three dogs (black and white) run", 7, "Three dogs"),
        ("A man, a dog, a cat, a bird and a horse", 12, "A man, a dog, a cat"),
    ],
)
def test_texts_end_at_a_border(text, context, short):
    assert trim(text, context) == short


def test_a_word_that_does_not_fit_is_cut():
    assert trim("xyzzy" * 200) != "xyzzy" * 200 and ("xyzzy" * 200).startswith(trim("xyzzy" * 200))
    assert count_tokens(trim("xyzzy" * 200)) in (CONTEXT - 1, CONTEXT)


@pytest.mark.parametrize("context", [2, 0, -1])
def test_no_room_is_an_error(context):
    with pytest.raises(ValueError, match="context"):
        trim("a dog", context)


def test_counting_does_not_import_open_clip():
    code = (
        "import sys; from rwkv_clip.describe.tokens import count_tokens; count_tokens('a dog'); "
        "sys.exit('open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
