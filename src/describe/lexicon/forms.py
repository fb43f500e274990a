"""A word and what it comes from: plurals, verbs, degrees and compounds, by the lexicon's tables and by endings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .tables import tables

LONGEST = 64  # characters of a word that is looked up; longer ones are themselves
REMEMBERED = 1 << 16  # words


def small_form(word: str) -> str:
    """Lower case, typographic apostrophes and hyphens as ASCII, without a possessive 's."""
    return word if len(word) > LONGEST else remember_small(word)


@lru_cache(REMEMBERED)
def remember_small(word: str) -> str:
    small = word.lower().replace("’", "'").replace("‐", "-").replace("‑", "-")
    while small.endswith("'s") and len(small) > 2:
        small = small[:-2]
    return small.removesuffix("'")


class Form(NamedTuple):
    """lemma, and how the word comes from it: "base", "plural" (or a verb's -s), "verb" (-ing, -ed), "degree" (-er)."""

    lemma: str
    kind: str


def form(small: str) -> Form:
    """Of a word in small form."""
    return Form(small, "base") if len(small) > LONGEST else remember_form(small)


@lru_cache(REMEMBERED)
def remember_form(small: str) -> Form:
    known = tables()
    if small in known.function:
        return Form(small, "base")
    if small in known.plurals:
        return Form(small, "base")
    if small in known.irregular["noun"]:
        return Form(known.irregular["noun"][small], "plural")
    if small in known.nouns:  # WordNet has arms that are weapons
        single = next((stem for stem in plural_stems(small) if stem in known.nouns), "")
        return Form(single, "plural") if single else Form(small, "base")
    if small in known.irregular["verb"]:
        return Form(known.irregular["verb"][small], "verb")
    for stem in plural_stems(small):
        if stem in known.nouns or stem in known.abstract or stem in known.verbs:
            return Form(stem, "plural")
    for stem in verb_stems(small):
        if stem in known.verbs and small not in known.adjectives:
            return Form(stem, "verb")
    if small in known.irregular["adj"]:
        return Form(known.irregular["adj"][small], "degree")
    if is_known(small):
        return Form(small, "base")
    for stem in degree_stems(small):
        if stem in known.adjectives:
            return Form(stem, "degree")
    if "-" in small:  # the last part is what it is: half-pipes, mother-in-laws
        head, _, last = small.rpartition("-")
        inner = form(last)
        return Form(f"{head}-{inner.lemma}", inner.kind) if inner.kind == "plural" else Form(small, "base")
    if len(small) > 3 and small.endswith("s") and not small.endswith(("ss", "us", "is")) and small.isalpha():
        return Form(small[:-1], "plural")
    return Form(small, "base")


def plural_stems(small: str) -> Iterator[str]:
    if small.endswith("s") and not small.endswith("ss") and len(small) > 3:
        if small.endswith("ies"):
            yield small[:-3] + "y"
        if small.endswith("ves"):
            yield small[:-3] + "f"
            yield small[:-3] + "fe"
        hissing = small.endswith(("sses", "xes", "shes", "ches", "zzes"))
        yield small[:-2] if hissing else small[:-1]
        if small.endswith("es"):
            yield small[:-1] if hissing else small[:-2]
    if small.endswith("men") and len(small) > 4:
        yield small[:-3] + "man"


def verb_stems(small: str) -> Iterator[str]:
    for ending in ("ing", "ied", "ed"):
        if small.endswith(ending) and len(small) > len(ending) + 2:
            stem = small[: -len(ending)]
            if ending == "ied":
                yield stem + "y"
                return
            if stem[-1] == stem[-2] and stem[-1] not in "lsz":
                yield stem[:-1]
            yield stem + "e"
            yield stem
            if stem[-1] == stem[-2]:
                yield stem[:-1]
            return


def degree_stems(small: str) -> Iterator[str]:
    for ending in ("est", "er"):
        if small.endswith(ending) and len(small) > len(ending) + 2:
            stem = small[: -len(ending)]
            yield stem
            yield stem + "e"
            if stem.endswith("i"):
                yield stem[:-1] + "y"
            if stem[-1] == stem[-2]:
                yield stem[:-1]
            return


def is_known(small: str) -> bool:
    """Whether the lexicon has this very form."""
    known = tables()
    return (
        small in known.nouns
        or small in known.function
        or small in known.abstract
        or small in known.verbs
        or small in known.adjectives
        or small in known.adverbs
        or small in known.photo
        or small in known.colours
        or small in known.numbers
    )


def is_common(small: str) -> bool:
    """Whether a word or what it comes from is in the lexicon: paddleboarders, teal-painted."""
    return len(small) <= LONGEST and remember_common(small)


@lru_cache(REMEMBERED)
def remember_common(small: str) -> bool:
    found = form(small)
    if is_known(small) or (found.lemma != small and is_known(found.lemma)):
        return True
    if "-" in small:
        return all(is_common(part) for part in small.split("-") if part)
    for ending in ("er", "or", "ist", "ly", "y", "ish", "less", "ful", "ness", "like"):
        stem = found.lemma.removesuffix(ending)
        if stem != found.lemma and len(stem) > 2 and (is_known(stem) or is_known(stem + "e")):
            return True
    return any(is_known(found.lemma[:i]) and is_known(found.lemma[i:]) for i in range(3, len(found.lemma) - 2))
