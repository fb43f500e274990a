"""Which words of a text are nouns for something that a picture can show."""

from __future__ import annotations

from functools import lru_cache

from .forms import REMEMBERED, Form, form, verb_stems
from .splitting import Token, tokens_in
from .tables import tables


def find_nouns(text: str) -> list[str]:
    """Base forms of the nouns that a picture can show, each once, in order; "hot dog" and other nouns of two words that
    the lexicon has as one. Words that are nouns and something else are judged by their neighbours."""
    tokens = tokens_in(text)
    found: dict[str, None] = {}
    skip = False
    for i, token in enumerate(tokens):
        if skip:
            skip = False
            continue
        after = tokens[i + 1] if i + 1 < len(tokens) and tokens[i + 1].joined else None
        if after and token.small in tables().two_words:
            pair = f"{token.small} {form(after.small).lemma}"
            if pair in tables().nouns:
                found[pair] = None
                skip = True
                continue
        noun = noun_form(token.small)
        if noun and is_thing(tokens[i - 1] if i and token.joined else None, token, after, noun):
            found[noun.lemma] = None
    return list(found)


@lru_cache(REMEMBERED)
def noun_form(small: str) -> Form | None:
    """The form of a word that can be a noun for something that a picture can show, None for others."""
    known = tables()
    base, kind = form(small)
    if base not in known.nouns or kind in ("verb", "degree") or small in known.function or small in known.numbers:
        return None
    if (
        small.endswith("ing")
        and small not in known.ing_nouns
        and any(stem in known.verbs for stem in verb_stems(small))
    ):
        return None
    if base in known.photo or small.removesuffix("s") in known.photo or (base in known.colours and kind != "plural"):
        return None
    return Form(base, kind)


def is_thing(before: Token | None, token: Token, after: Token | None, noun: Form) -> bool:
    """Whether this word is here a noun. before, after: its neighbours, None where the sentence begins or ends or a
    punctuation mark stands between."""
    known = tables()
    base, kind = noun
    if after and (after.small == "of" and base in known.groups):
        return False  # a herd of
    if before and f"{before.small} {token.small}" in known.idioms:
        return False
    if token.small.endswith("ing"):
        follows = after is not None and after.small in known.articles
        return not follows and not (before is not None and before.small in known.be)
    if base in known.verbs and is_verb_here(before, token, after, kind):
        return False
    if base in known.adjective_first and kind == "base":
        return not (after is not None and is_nominal(after.small)) and before is not None and opens_noun(before)
    return True


def is_verb_here(before: Token | None, token: Token, after: Token | None, kind: str) -> bool:
    """Of a word that may be a verb, too: a dog RUNS through, crowds WATCH the, to FISH, he STANDS."""
    known = tables()
    base = form(token.small).lemma
    mostly = base in known.verb_first
    follows = after is None or after.small in known.after_verbs or after.small in known.adverbs
    if before is None:
        return mostly and follows and not token.begins
    previous = before.small
    if previous in known.subjects or (previous == "to" and kind == "base" and mostly):
        return True
    if (
        previous in known.articles
        or previous in known.before_nouns
        or previous in known.numbers
        or before.word.endswith(("'s", "’s"))
    ):
        return False
    subject = form(previous)
    many = subject.kind == "plural" or previous in ("people", "group", "couple", "crowd")
    if subject.lemma in known.nouns or subject.lemma in known.photo or before.word[0].isupper():
        if mostly:  # a man WALKS, the bride and the groom STAND; but: a market STAND
            return kind == "plural" or follows
        if kind == "plural":  # a boy SWINGS his, the wine GLASSES on
            return after is not None and (after.small in known.articles or (not many and follows))
        return many and follows
    if previous in known.adjectives or previous in known.colours:
        return False
    return mostly and follows


def opens_noun(before: Token) -> bool:
    """Words that stand before a noun."""
    known, small = tables(), before.small
    return (
        small in known.articles
        or small in known.adjectives
        or small in known.colours
        or small in known.numbers
        or small in known.before_nouns
        or before.word.endswith(("'s", "’s"))
        or small.endswith(("ing", "ed"))
        or form(small).lemma in known.nouns
    )


def is_nominal(small: str) -> bool:
    """A noun or adjective."""
    known = tables()
    base = form(small).lemma
    return base in known.nouns or (base in known.abstract and base not in known.verbs) or base in known.adjectives
