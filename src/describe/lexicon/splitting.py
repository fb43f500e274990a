"""Texts cut into words."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from .forms import small_form

# Letters and digits, joined by apostrophes, hyphens and, between digits, points and commas. Nothing in it makes the
# search go back, so it takes linear time.
WORD = re.compile(r"[^\W_]+(?:['’\-‐‑][^\W_]+|(?<=\d)[.,](?=\d)[^\W_]+)*")
SHORT = 1024  # characters of a text whose words are remembered: those of one row are asked for several times
BREAKS = re.compile(r'[.!?:;\n"“”|•]')


class Token(NamedTuple):
    """A word of a text, `word` as written and `small` in lower case without 's; begins: of a sentence; joined: only
    blanks or a hyphen stand before it."""

    word: str
    small: str
    begins: bool
    joined: bool


def words_in(text: str) -> tuple[str, ...]:
    return remember_words(text) if len(text) <= SHORT else tuple(WORD.findall(text))


@lru_cache(2048)
def remember_words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text))


def tokens_in(text: str) -> list[Token]:
    return remember_tokens(text) if len(text) <= SHORT else split_tokens(text)


@lru_cache(16)
def remember_tokens(text: str) -> list[Token]:
    return split_tokens(text)


def split_tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    end = 0
    for match in WORD.finditer(text):
        start = match.start()
        between = text[end:start]
        if not tokens:
            begins, joined = True, False
        elif between in (" ", "-"):
            begins, joined = False, True
        else:
            begins = BREAKS.search(between) is not None
            joined = not begins and not between.strip(" -")
        tokens.append(Token(match[0], small_form(match[0]), begins, joined))
        end = match.end()
    return tokens
