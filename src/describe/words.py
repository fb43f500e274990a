"""Words of an English text: base forms, numbers, names, and the things that a picture can show.

No model: tables from WordNet (lexicon/) and rules about the words beside. All functions take any string, without bound
on its length, in linear time, and remember what they found about a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache, cached_property, lru_cache

from .lexicon.forms import LONGEST, REMEMBERED, form, is_common, is_known, small_form
from .lexicon.nouns import find_nouns, is_nominal
from .lexicon.splitting import WORD, Token, split_tokens, tokens_in, words_in
from .lexicon.tables import tables
from .sources import Sources

__all__ = [
    "WORD", "Support", "Token", "article", "content_lemmas", "find_names", "find_nouns", "find_numbers", "hypernyms",
    "is_colour", "is_content", "is_name", "is_nominal", "is_photo_word", "is_posture", "lemma", "plural",
    "split_tokens", "split_words", "synonyms",
]  # fmt: skip

HAS_NUMBER = re.compile(r"\d|[^\W_][-‐‑]")  # or a part of a word that may be one
DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
NAMES = ("May", "Will")  # inside a sentence, though the words are function words
LETTERS_AN = frozenset("AEFHILMNORSX")  # their names begin with a vowel: an MRI
SILENT_H = ("hour", "honest", "honor", "honour", "heir")
SOUND_OF_YOU = re.compile(r"(?:uni(?!n|m)|us[eu]|eu|ewe|ut[ei]|ub|one|once|ukulele|u-)", re.IGNORECASE)


def split_words(text: str) -> list[str]:
    """Words and numbers as written, without punctuation: "The dog's 2 T-shirts!" -> The, dog's, 2, T-shirts."""
    return list(words_in(text))


def lemma(word: str) -> str:
    """Base form in lower case: "Men" -> man, "running" -> run, "dog's" -> dog. A word that is not known: without -s."""
    return form(small_form(word)).lemma


def is_content(word: str) -> bool:
    """Whether it says something about the picture: no article, pronoun, preposition, conjunction, auxiliary."""
    return small_form(word) not in tables().function


def content_lemmas(text: str) -> list[str]:
    """Base forms of the content words in order, repeated ones repeated."""
    return [lemma(word) for word in split_words(text) if is_content(word)]


def is_colour(word: str) -> bool:
    return lemma(word) in tables().colours


def is_posture(word: str) -> bool:
    """Sit, stand, lie, ..: what taggers say about people, and no thing."""
    return lemma(word) in tables().postures


def is_photo_word(word: str) -> bool:
    """Words about the picture rather than what it shows: photo, view, background, group, side."""
    return lemma(word) in tables().photo


def normalise_number(digits: str) -> str:
    """ "1,000" -> 1000, "007" -> 7, "3.50" -> 3.5, digits of other scripts -> ASCII."""
    if not digits.isascii():
        digits = "".join(str(int(letter)) if letter.isdigit() else letter for letter in digits)
    if "," in digits:
        digits = digits.replace(",", "" if THOUSANDS.fullmatch(digits) else ".")
    whole, point, rest = digits.partition(".")
    rest = rest.rstrip("0") if "." not in rest else rest
    return (whole.lstrip("0") or "0") + (point + rest if rest else "")


def find_numbers(text: str) -> list[str]:
    """Numbers in order as digits: "two" and "2" -> 2, "twenty-one" -> 21, "two hundred" -> 200, "1,000" -> 1000, the 3
    of "3rd" and of "third", the 16 of "F-16". "One" is no number: "one of the men" counts nobody."""
    words, numbers = words_in(text), tables().numbers
    if numbers.keys().isdisjoint(map(str.lower, words)) and not HAS_NUMBER.search(text):
        return []
    found: list[str] = []
    last = ""  # the number word just before, "" if none
    for word in words:
        if word.isalpha():
            value = numbers.get(small_form(word), "")
            last = join_number(found, last, value) if value else ""
            continue
        last = ""
        for part in re.split(r"[-‐‑]", word):
            value = numbers.get(part.lower(), "")
            if value:
                last = join_number(found, last, value)
                continue
            found += [normalise_number(digits) for digits in DIGITS.findall(part)]
            last = last if part.lower() == "one" and add_one(found, last) else ""
    return found


def join_number(found: list[str], last: str, value: str) -> str:
    """Put the next number word to `found`: twenty + one, two * hundred. Gives what it now stands for."""
    if last and int(value) >= 12 and int(value) in (12, 100, 1000, 1000000) and int(last) < int(value):
        found[-1] = str(int(last) * int(value))
    elif last and len(last) == 2 and last[1] == "0" and last != "10" and len(value) == 1:
        found[-1] = str(int(last) + int(value))
    else:
        found.append(value)
    return found[-1]


def add_one(found: list[str], last: str) -> bool:
    """twenty-one."""
    if len(last) == 2 and last[1] == "0" and last != "10":
        found[-1] = str(int(last) + 1)
        return True
    return False


def find_names(text: str) -> list[str]:
    """Proper names, runs of capitalised words joined: "the Golden Gate Bridge in May" -> Golden Gate Bridge, May.

    In the midst of a sentence every capital counts; at its beginning only a word that is not in the lexicon. Where most
    words have capitals, as in titles, capitals say nothing, and only words that are not in the lexicon count.
    """
    if text[1:].islower():  # most captions: a capital at most at the beginning
        first = words_in(text)[:1] if text[0].isupper() else ()
        return [strip_possessive(word) for word in first if is_name(Token(word, small_form(word), True, False), False)]
    tokens = tokens_in(text)
    titles = is_title(tokens)
    names: list[list[str]] = []
    running = False
    for token in tokens:
        named = is_name(token, titles)
        if named and running and token.joined:
            names[-1].append(strip_possessive(token.word))
        elif named:
            names.append([strip_possessive(token.word)])
        running = named
    return [" ".join(words) for words in names]


def strip_possessive(word: str) -> str:
    return word[:-2] if word.endswith(("'s", "’s")) else word


def is_title(tokens: list[Token]) -> bool:
    """Whether words have capitals because the text is a title: nearly all, or a preposition that stands inside."""
    function = tables().function
    capitals = content = 0
    for token in tokens:
        if token.begins or len(token.word) == 1 or not token.word[0].isalpha():
            continue
        capital = token.word[0].isupper()
        if token.small not in function or token.word in NAMES or token.word.isupper():
            capitals, content = capitals + capital, content + 1
        elif capital:
            return True
    return content >= 3 and capitals > 0.75 * content


def is_name(token: Token, titles: bool) -> bool:
    if not token.word[0].isupper() or token.small in tables().capitals:
        return False
    if len(token.word) == 1 or not any(letter.isalpha() for letter in token.word):
        return False
    if token.begins or titles:
        return not is_common(token.small)
    return token.small not in tables().function or token.word in NAMES


def hypernyms(noun: str) -> frozenset[str]:
    """More general nouns of all its meanings: "dog" -> canine, mammal, animal, .. Empty for what is not known."""
    known = tables()
    places = known.nouns.get(lemma(noun) if " " not in noun else noun, [])
    above = {other for place in places for other in known.above(place)} - set(places)
    return frozenset(word for place in above for word in known.words_of[place]) - {noun}


def synonyms(noun: str) -> frozenset[str]:
    """Other nouns for the same thing, in any of its meanings."""
    known = tables()
    base = lemma(noun) if " " not in noun else noun
    return frozenset(word for place in known.nouns.get(base, []) for word in known.words_of[place]) - {base}


@cache
def irregular_plurals() -> dict[str, str]:
    pairs = tables().irregular["noun"].items()
    found = {base: plural for plural, base in pairs}
    return found | {
        "person": "people",
        "fish": "fish",
        "sheep": "sheep",
        "deer": "deer",
        "bus": "buses",
        "gas": "gases",
    }


def plural(noun: str) -> str:
    """ "fire truck" -> fire trucks, man -> men. Of a plural: itself."""
    start, _, last = noun.rpartition(" ")
    small = last.lower()
    if form(small).kind == "plural" or small in ("people", "jeans", "pants", "shorts", "glasses", "sunglasses"):
        return noun
    if small in irregular_plurals():
        last = irregular_plurals()[small]
    elif small.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif small.endswith("y") and small[-2:-1] not in ("a", "e", "i", "o", "u", ""):
        last = last[:-1] + "ies"
    elif small.endswith("man") and small not in ("human", "german", "roman", "talisman"):
        last = last[:-3] + "men"
    else:
        last += "s"
    return f"{start} {last}" if start else last


def article(phrase: str) -> str:
    """ "a" or "an", by the sound that the phrase begins with: an hour, a unicorn, an MRI, an 8."""
    words = split_words(phrase[:LONGEST])
    if not words:
        return "a"
    first = words[0]
    if first[0].isdigit():
        return "an" if first.startswith("8") or first in ("11", "18") else "a"
    if first.isupper() and len(first) > 1 and (len(first) < 4 or not is_common(first.lower())):
        return "an" if first[0] in LETTERS_AN else "a"
    if first.lower().startswith(SILENT_H):
        return "an"
    if first[0].lower() not in "aeiou" or SOUND_OF_YOU.match(first):
        return "a" if first.lower() != "x-ray" else "an"
    return "an"


class Support:
    """What a row's sources say is in the picture."""

    def __init__(self, texts: Iterable[str]):
        self.lemmas: set[str] = set()
        for text in texts:
            self.lemmas.update(*map(word_roots, words_in(text)))

    @cached_property
    def meanings(self) -> set[int]:
        found: set[int] = set()
        found.update(*map(meanings_above, self.lemmas))
        return found

    @cached_property
    def person(self) -> bool:
        return not self.lemmas.isdisjoint(tables().persons) or tables().person in self.meanings

    @cached_property
    def alive(self) -> bool:
        return self.person or tables().animal in self.meanings

    @classmethod
    def of(cls, sources: Sources) -> Support:
        return cls((sources.raw, sources.caption, sources.ocr, *(tag.name for tag in sources.tags)))

    def holds(self, noun: str) -> bool:
        """Whether the sources have the noun, a synonym, something more special, or what it is a part of. Persons stand
        for each other, compounds for their parts and the other way round, near words (hand.txt) for each other."""
        known = tables()
        base = noun if " " in noun else lemma(noun)
        if base in self.lemmas or (base in known.persons and self.person) or (base in known.body and self.alive):
            return True
        if not self.lemmas.isdisjoint(known.near.get(base, ())):
            return True
        if any(other in self.lemmas or self.has_kind(other) for other in known.supported_by.get(base, ())):
            return True
        for place in known.nouns.get(base, ()):
            if place in self.meanings or not self.meanings.isdisjoint(known.wholes_of(place)):
                return True
        if base.endswith("woman") and len(base) > 5 and self.person and self.holds(base[:-5] + "man"):
            return True
        return any(parts and all(map(self.holds_part, parts)) for parts in split_noun(base))

    def holds_part(self, part: str) -> bool:
        known = tables()
        if part in self.lemmas or part in known.photo or (part in known.persons and self.person):
            return True
        return self.has_kind(part)

    def has_kind(self, noun: str) -> bool:
        """Something that is a kind of the noun, or the noun."""
        return any(place in self.meanings for place in tables().nouns.get(noun, ()))


@lru_cache(REMEMBERED)
def meanings_above(base: str) -> frozenset[int]:
    """All meanings of a noun and what is more general than they."""
    known = tables()
    return frozenset(place for sense in known.nouns.get(base, ()) for place in known.above(sense))


def word_roots(word: str) -> frozenset[str]:
    return frozenset({word}) if len(word) > LONGEST else remember_roots(word)


@lru_cache(REMEMBERED)
def remember_roots(word: str) -> frozenset[str]:
    """A word's forms that support a noun: "Snowboarders" -> snowboarders, snowboarder, snowboard. A compound that is
    not in the lexicon stands for its parts."""
    small = small_form(word)
    base = form(small).lemma
    found = {small, base}
    found.update(root for root in quality_roots(small) if root in tables().nouns)
    for parts in split_noun(base):
        # of a noun of the lexicon only what is made of two: a snowboard is a board, but a carpet is no pet
        if len(parts) == 1 or base not in tables().nouns or "-" in base or is_kind(base, parts[-1]):
            found |= {form(part).lemma for part in parts}
    return frozenset(found)


def is_kind(base: str, last: str) -> bool:
    """Whether a compound's last part says what it is: a chessboard is a gameboard."""
    return any(noun.endswith(last) for noun in hypernyms(base))


def undouble(stem: str) -> str:
    """runn -> run."""
    return stem[:-1] if stem[-1:] == stem[-2:-1] else stem


def quality_roots(small: str) -> Iterator[str]:
    """Nouns of adjectives: snowy, foggy, icy, wooden."""
    if small in tables().adjectives and len(small) > 3 and small.endswith(("y", "en")):
        stem = small[:-1] if small.endswith("y") else small[:-2]
        yield from (stem, stem + "e")
        if stem[-1] == stem[-2]:
            yield stem[:-1]


def split_noun(base: str) -> tuple[tuple[str, ...], ...]:
    return () if len(base) > LONGEST else remember_split(base)


@lru_cache(REMEMBERED)
def remember_split(base: str) -> tuple[tuple[str, ...], ...]:
    """What a noun may be made of: tabletop -> (table, top), trumpeter -> (trumpet,), fire truck -> (fire, truck)."""
    if " " in base or "-" in base:
        return (tuple(base.replace("-", " ").split()),)
    ways: list[tuple[str, ...]] = [
        (base[:i], base[i:]) for i in range(3, len(base) - 2) if is_known(base[:i]) and is_known(base[i:])
    ]
    known = tables()
    person = any(known.person in known.above(place) for place in known.nouns.get(base, ())) or base not in known.nouns
    for ending in ("er", "or", "ist", "ian", "eer") if person else ():
        stem = base.removesuffix(ending)
        if stem != base and len(stem) > 2:
            ways += [(root,) for root in (stem, stem + "e", undouble(stem)) if is_known(root) and len(root) > 2]
    return tuple(ways)
