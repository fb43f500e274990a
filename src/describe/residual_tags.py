"""Tags that say something which a text does not, as phrases: "a ball", "grass", "trees"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from .lexicon.forms import form, is_common
from .lexicon.tables import tables
from .sources import Tag
from .word_lists import ACTIVITIES, HUMANS, MASS, PLURALS, UNIQUE
from .words import (
    article,
    find_nouns,
    hypernyms,
    is_colour,
    is_photo_word,
    is_posture,
    lemma,
    plural,
    split_words,
    synonyms,
)

LONGEST = 40  # characters of a tag; a longer one is no tag
YOUNG = {  # of what, where the lexicon does not say
    **{"kitten": "cat", "puppy": "dog", "calf": "cow", "lamb": "sheep", "foal": "horse", "piglet": "pig"},
    **{"duckling": "duck", "chick": "chicken", "gosling": "goose", "colt": "horse", "fawn": "deer"},
}


class Thing(NamedTuple):
    """What a tag names. phrase: with its article; head: the base form of its last word; words: base forms of all;
    others: other words for it; above: more general ones; plural: for the verb; person: a word for people."""

    phrase: str
    head: str
    words: frozenset[str]
    others: frozenset[str]
    above: frozenset[str]
    plural: bool
    person: bool


@lru_cache(1 << 14)
def read_tag(name: str) -> Thing | None:
    """None for what names no thing: colours, postures, activities, words about pictures, what is no tag at all."""
    words = split_words(name)
    if not words or len(name) > LONGEST or len(words) > 3 or not name.replace(" ", "").replace("-", "").isalpha():
        return None
    base = lemma(words[-1])
    if is_colour(name) or is_posture(name) or base in ACTIVITIES or (len(words) == 1 and is_photo_word(name)):
        return None
    if not find_nouns(name) and any(map(is_common, (words[-1].lower(), base))):
        return None
    if all(word[0].isupper() for word in words) and all(is_common(word.lower()) for word in words):
        name = name.lower()
    kind = form(words[-1].lower()).kind
    several = kind == "plural" and base != words[-1].lower()
    several = several or words[-1].lower() in PLURALS or plural(name) == name
    if several or words[-1].lower() in MASS:
        phrase = name
    elif words[-1].lower() in UNIQUE and len(words) == 1:
        phrase = f"the {name}"
    else:
        phrase = f"{article(name)} {name}"
    noun = name.lower() if name.lower() in tables().nouns else base
    higher = above(noun)
    lemmas = frozenset(map(lemma, words))
    return Thing(phrase, base, lemmas, synonyms(noun), higher, several, _is_person(base, noun))


def _is_person(base: str, noun: str) -> bool:
    """By the first meaning, which is the most frequent one: a mug is also a face."""
    known = tables()
    meanings = [place for start in known.nouns.get(noun, [])[:1] for place in known.above(start)]
    return base in known.persons or any(not HUMANS.isdisjoint(known.words_of[place]) for place in meanings)


@lru_cache(1 << 14)
def above(word: str) -> frozenset[str]:
    return hypernyms(word) | {YOUNG[word]} if word in YOUNG else hypernyms(word)


@lru_cache(1 << 14)
def _forms(head: str) -> frozenset[str]:
    """A noun, and the adjectives that tell of it: snow, snowy; wood, wooden; park, parked."""
    return frozenset({head, head + "y", head + head[-1:] + "y", head.removesuffix("e") + "y", head + "en", head + "ed"})


def sort_tags(tags: Sequence[Tag]) -> list[Tag]:
    """The most certain first; in the order given where a tag has no score."""
    if any(tag.score is None for tag in tags):
        return list(tags)
    return sorted(tags, key=lambda tag: -(tag.score or 0.0))


def find_residual(tags: Sequence[Tag], base: Iterable[str], most: int) -> tuple[list[Thing], Thing | None]:
    """(up to `most` things that a text with the base forms `base` does not name, a more special word for one that it
    does). Left out are words for, and more general words for, what the text or an earlier thing names, and other words
    for people where there are people."""
    present = set(base)
    persons = tables().persons
    people = not present.isdisjoint(persons)
    things: list[Thing] = []
    special = None
    for tag in sort_tags(tags):
        thing = read_tag(tag.name)
        if thing is None or not present.isdisjoint(_forms(thing.head)) or not present.isdisjoint(thing.others):
            continue
        if (thing.person and people) or any(thing.head in above(word) for word in present):
            continue
        if not present.isdisjoint(thing.above):
            special = special or thing
            continue
        people = people or thing.person
        present |= {thing.head, *thing.words}
        things.append(thing)
        if len(things) == 2 * most:
            break
    special_of_kept = {word for thing in things for word in thing.above}
    things = [thing for thing in things if thing.head not in special_of_kept]
    return things[:most], special
