"""What a raw text knows and a caption does not: names, numbers and places, in the raw text's own words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from .cleaning import grade
from .lexicon.forms import form, is_known
from .lexicon.tables import tables
from .word_lists import ABBREVIATIONS, JOINTS, LINKS, PLACES, PREPOSITIONS, WEEKDAYS
from .words import WORD, Token, content_lemmas, is_content, is_name, is_nominal, lemma, split_tokens

LONGEST_TITLE = 12  # words of a raw text that is taken whole
LONGEST_NAME = 8
MOST_NAMES, MOST_PLACES = 3, 2
_YEAR = re.compile(r"(?:1[6-9]|20)\d\d")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)$")
_LETTER = re.compile(r"[^\W\d_]")


class Facts(NamedTuple):
    """names: what has no preposition before it, whole titles too. places: "in Paris, France", "at the zoo"."""

    names: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


def find_facts(raw: str, caption: str) -> Facts:
    """Of a clean raw text, those of which the caption lacks a word. A short title or name is taken whole."""
    if not raw:
        return Facts()
    known = set(content_lemmas(caption))
    tokens = split_tokens(raw)
    titled = _is_titled(tokens)
    if _is_whole(raw, tokens, titled):
        return Facts(names=(raw.rstrip(" .,;:!?"),)) if _is_new(tokens, known) else Facts()
    spans = [match.span() for match in WORD.finditer(raw)]
    signed = {i for i, (start, _) in enumerate(spans) if start and raw[start - 1] in "$€£¥#"}
    names: list[str] = []
    places: list[str] = []
    latest, last = names, -1  # the list that was added to, and the token after what was added
    for begin, end in _find_runs(tokens, titled and len(tokens) > LONGEST_TITLE, signed):
        span = tokens[begin:end]
        if end - begin > LONGEST_NAME or not _is_new(span, known) or all(token.small in WEEKDAYS for token in span):
            continue
        start = spans[begin][0] - (begin in signed)
        words = raw[start : spans[end - 1][1]]
        before = _find_preposition(tokens, begin)
        gap = raw[spans[begin - 1][1] : start] if begin == last else ""
        if before:
            places.append(f"{before} {words}")
            latest = places
        elif _continues(gap, tokens[begin - 1]) or (gap == ", " and latest is places):
            latest[-1] += gap + words  # in Paris, France; Tom & Jerry; St. Paul
        else:
            names.append(words)
            latest = names
        last = end
    if not places:
        places = _find_common_place(tokens, known)
    return Facts(tuple(dict.fromkeys(names))[:MOST_NAMES], tuple(dict.fromkeys(places))[:MOST_PLACES])


def _continues(gap: str, before: Token) -> bool:
    """Whether what stands between two names makes one of them."""
    return gap == " & " or (gap == ". " and before.small in ABBREVIATIONS)


def _find_runs(tokens: list[Token], titles: bool, signed: set[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the names and numbers of a text, with the words that belong to them."""
    i = 0
    while i < len(tokens):
        begin, end = i, _find_end(tokens, i, titles)
        i = max(i + 1, end)
        if end == begin:
            continue
        if not any(map(_LETTER.search, (_ORDINAL.sub("", token.word) for token in tokens[begin:end]))):
            begin, end = _explain_number(tokens, begin, end, begin in signed)
        else:  # the noun that the name tells more about: a Christmas TREE
            counted = _ORDINAL.search(tokens[end - 1].word) is not None
            most = min(end + 2, len(tokens))
            while end < most and (_is_head(tokens[end]) or (counted and _is_counted(tokens[end]))):
                end += 1
        if end > begin:
            yield begin, end
            i = max(i, end)


def _is_whole(raw: str, tokens: list[Token], titled: bool) -> bool:
    """Whether the raw text is one name or title, not a sentence: its words say more together."""
    if (
        not tokens
        or len(tokens) > LONGEST_TITLE
        or any(after.begins and before.small not in ABBREVIATIONS for before, after in pairwise(tokens))
    ):
        return False
    return titled or grade(raw) == "name"


def _is_titled(tokens: list[Token]) -> bool:
    """Whether All Words Have Capitals, which then say nothing about names."""
    content = [token.word for token in tokens if token.word[0].isalpha() and is_content(token.word)]
    return len(content) >= 2 and all(word[0].isupper() for word in content)


def _is_new(span: list[Token], known: set[str]) -> bool:
    return any(is_content(token.word) and lemma(token.word) not in known for token in span)


def _find_end(tokens: list[Token], begin: int, titles: bool) -> int:
    """The end of the run of names and numbers that begins here; `begin` where none does."""
    end = begin
    while end < len(tokens) and (end == begin or tokens[end].joined):
        if _is_named(tokens, end, titles) or (
            end + 1 < len(tokens) and tokens[end + 1].joined and _leads(tokens, begin, end, titles)
        ):
            end += 1
        else:
            break
    return end


def _is_named(tokens: list[Token], i: int, titles: bool) -> bool:
    token = tokens[i]
    if is_name(token, titles) or token.word[0].isdigit() or _is_model(token.word):
        return True
    around = tokens[max(0, i - 1) : i + 2]
    return token.word == "May" and any(other.word[0].isdigit() for other in around)


def _leads(tokens: list[Token], begin: int, i: int, titles: bool) -> bool:
    """Whether this word and the next ones are parts of one name: STATUE OF Liberty, LAKE Tahoe, Tom AND Sarah."""
    token, after = tokens[i], tokens[i + 1]
    if i == begin:  # a noun with a capital, because a sentence begins or because it is a part of the name
        if not token.word[0].isupper() or titles or not is_content(token.word):
            return False
        if after.small in ("of", "de") and i + 2 < len(tokens) and tokens[i + 2].joined:
            return is_name(tokens[i + 2], titles)
        return (is_nominal(token.small) or not is_known(token.small)) and is_name(after, titles)
    if token.small in JOINTS and after.small == "the" and i + 2 < len(tokens) and tokens[i + 2].joined:
        return token.small == "of" and is_name(tokens[i + 2], titles)
    if token.small == "the" and tokens[i - 1].small == "of":
        return is_name(after, titles)
    return (token.small in JOINTS or token.small in LINKS) and is_name(after, titles)


def _is_model(word: str) -> bool:
    """F-16, A320, U2."""
    return word[0].isupper() and any(map(str.isdigit, word))


def _is_head(token: Token) -> bool:
    base, kind = form(token.small)
    known = tables()
    named = (
        base in known.nouns
        and not token.small.endswith("ing")
        and base not in known.verb_first
        and base not in known.verb_too
    )
    return token.joined and named and kind in ("base", "plural") and token.small not in known.function


def _explain_number(tokens: list[Token], begin: int, end: int, signed: bool) -> tuple[int, int]:
    """A number with the noun that it counts or belongs to. A year and a number with a sign may stand alone; any other
    says nothing: (begin, begin)."""
    if end < len(tokens) and _is_counted(tokens[end]):
        return begin, end + 1
    if begin and tokens[begin].joined and form(tokens[begin - 1].small).lemma in tables().nouns:
        return begin - 1, end
    alone = end - begin == 1 and (signed or _YEAR.fullmatch(tokens[begin].word))
    return (begin, end) if alone else (begin, begin)


def _is_counted(token: Token) -> bool:
    """3 DOGS, the 2012 OLYMPICS, her 30th BIRTHDAY."""
    if not token.joined or not is_content(token.word) or not token.word.isalpha():
        return False
    base, kind = form(token.small)
    return kind == "plural" or base in tables().nouns or base in tables().abstract


def _find_preposition(tokens: list[Token], begin: int) -> str:
    """ "in", "at the", or "" where no preposition stands before."""
    if not begin or not tokens[begin].joined:
        return ""
    before = tokens[begin - 1].small
    if before in PREPOSITIONS:
        return before
    if before == "the" and begin > 1 and tokens[begin - 1].joined and tokens[begin - 2].small in PREPOSITIONS:
        return f"{tokens[begin - 2].small} the"
    return ""


def _find_common_place(tokens: list[Token], known: set[str]) -> list[str]:
    """ "at the zoo": the first place that has no name."""
    for i in range(2, len(tokens)):
        preposition, determiner, noun = tokens[i - 2 : i + 1]
        if noun.small in PLACES and noun.small not in known and noun.joined and determiner.joined:
            if i + 1 < len(tokens) and tokens[i + 1].joined and is_content(tokens[i + 1].word):
                continue  # the park bench
            if preposition.small in PREPOSITIONS and determiner.small in ("the", "a", "an", "my", "our", "their"):
                known_thing = determiner.small if determiner.small in ("a", "an") else "the"
                return [f"{preposition.small} {known_thing} {noun.small}"]
    return []
