"""Words of an English text: base forms, numbers, names, and the things that a picture can show.

No model: tables from WordNet (lexicon/) and rules about the words beside. All functions take any string, without bound
on its length, in linear time, and remember what they found about a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import NamedTuple

from .lexicon.forms import LONGEST, REMEMBERED, form, is_common, is_known, small_form
from .lexicon.tables import tables
from .sources import Sources

WORD = re.compile(r"\d+(?:[.,]\d+)+(?![^\W_])|[^\W_]+(?:['’\-‐‑][^\W_]+)*")
DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
LETTERS_AN = frozenset("AEFHILMNORSX")  # their names begin with a vowel: an MRI
SILENT_H = ("hour", "honest", "honor", "honour", "heir")
SOUND_OF_YOU = re.compile(r"(?:uni(?!n|m)|us[eu]|eu|ewe|ut[ei]|ub|one|once|ukulele|u-)", re.IGNORECASE)


class Token(NamedTuple):
    """A word of a text, `word` as written and `small` in lower case without 's; begins: of a sentence; joined: only
    blanks or a hyphen stand before it."""

    word: str
    small: str
    begins: bool
    joined: bool


def word_set(words: str) -> frozenset[str]:
    """The words of a constant."""
    return frozenset(words.split())


def split_words(text: str) -> list[str]:
    """Words and numbers as written, without punctuation: "The dog's 2 T-shirts!" -> The, dog's, 2, T-shirts."""
    return WORD.findall(text)


def split_tokens(text: str) -> list[Token]:
    tokens, end = [], 0
    for match in WORD.finditer(text):
        between = text[end : match.start()]
        begins = not tokens or any(mark in between for mark in '.!?:;\n"“”|•')
        tokens.append(Token(match[0], small_form(match[0]), begins, not begins and not between.strip(" -")))
        end = match.end()
    return tokens


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
    of "3rd" and the 16 of "F-16". "One" is no number: "one of the men" counts nobody."""
    found: list[str] = []
    last = ""  # the number word just before, "" if none
    for match in WORD.finditer(text):
        word = match[0]
        if word.isalpha():
            value = tables().numbers.get(word.lower(), "")
            last = join_number(found, last, value) if value else ""
            continue
        last = ""
        for part in re.split(r"[-‐‑]", word):
            value = tables().numbers.get(part.lower(), "")
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
    tokens = split_tokens(text)
    titles = is_title(tokens)
    names: list[str] = []
    running = False
    for token in tokens:
        named = is_name(token, titles)
        if named and running and token.joined:
            names[-1] += " " + strip_possessive(token.word)
        elif named:
            names.append(strip_possessive(token.word))
        running = named
    return names


def strip_possessive(word: str) -> str:
    return word[:-2] if word.endswith(("'s", "’s")) else word


def is_title(tokens: list[Token]) -> bool:
    """Whether words have capitals because the text is a title: nearly all, or a preposition that stands inside."""
    inner = [token for token in tokens if token.word[0].isalpha() and not token.begins and len(token.word) > 1]
    if any(token.word[0].isupper() and token.small in tables().function for token in inner):
        return True
    content = [token.word[0].isupper() for token in inner if is_content(token.word)]
    return len(content) >= 3 and sum(content) > 0.75 * len(content)


def is_name(token: Token, titles: bool) -> bool:
    if not token.word[0].isupper() or token.small in tables().capitals:
        return False
    if len(token.word) == 1 or not any(letter.isalpha() for letter in token.word):
        return False
    if token.begins or titles:
        return not is_common(token.small)
    return token.small not in tables().function


def find_nouns(text: str) -> list[str]:
    """Base forms of the nouns that a picture can show, each once, in order; "hot dog" and other nouns of two words that
    the lexicon has as one. Words that are nouns and something else are judged by their neighbours."""
    tokens = split_tokens(text)
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
        if is_thing(tokens[i - 1] if i and token.joined else None, token, after):
            found[form(token.small).lemma] = None
    return list(found)


def is_thing(before: Token | None, token: Token, after: Token | None) -> bool:
    """Whether this word is here a noun that a picture can show. before, after: its neighbours, None where the sentence
    begins or ends or a punctuation mark stands between."""
    known = tables()
    base, kind = form(token.small)
    if base not in known.nouns or kind in ("verb", "degree") or token.small in known.function:
        return False
    if base in known.photo or token.small.removesuffix("s") in known.photo or token.small in known.numbers:
        return False
    if base in known.colours and kind != "plural":
        return False
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
    if not mostly and base not in known.verb_too:
        return False
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
        or (small in known.function and small not in known.subjects)
        or before.word.endswith(("'s", "’s"))
        or small.endswith(("ing", "ed"))
        or form(small).lemma in known.nouns
    )


def is_nominal(small: str) -> bool:
    """A noun or adjective."""
    known = tables()
    base = form(small).lemma
    return base in known.nouns or (base in known.abstract and base not in known.verbs) or base in known.adjectives


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
    return found | {"person": "people", "fish": "fish", "sheep": "sheep", "deer": "deer", "child": "children"}


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
        known = tables()
        self.lemmas: set[str] = set()
        for text in texts:
            for word in split_words(text):
                self.lemmas |= word_roots(word)
        self.person = not self.lemmas.isdisjoint(known.persons)
        self.meanings = {
            place for base in self.lemmas for sense in known.nouns.get(base, ()) for place in known.above(sense)
        }
        self.person = self.person or known.person in self.meanings
        self.alive = self.person or known.animal in self.meanings

    @classmethod
    def of(cls, sources: Sources) -> Support:
        return cls((sources.raw, sources.caption, sources.ocr, *(tag.name for tag in sources.tags)))

    def holds(self, noun: str) -> bool:
        """Whether the sources have the noun, a synonym, something more special, or what it is a part of. Persons stand
        for each other, compounds for their parts and the other way round, near words (hand.txt) for each other."""
        known = tables()
        base = noun if " " in noun else lemma(noun)
        if base in self.lemmas or (self.person and base in known.persons) or (self.alive and base in known.body):
            return True
        if not self.lemmas.isdisjoint(known.near.get(base, ())):
            return True
        for place in known.nouns.get(base, ()):
            if place in self.meanings or not self.meanings.isdisjoint(known.wholes_of(place)):
                return True
        return any(all(self.holds_part(part) for part in parts) for parts in split_noun(base))

    def holds_part(self, part: str) -> bool:
        known = tables()
        if part in self.lemmas or part in known.photo or (self.person and part in known.persons):
            return True
        return any(place in self.meanings for place in known.nouns.get(part, ()))


@lru_cache(REMEMBERED)
def word_roots(word: str) -> frozenset[str]:
    """A word's forms that support a noun: "Snowboarders" -> snowboarders, snowboarder, snowboard. A compound that is
    not in the lexicon stands for its parts."""
    small = small_form(word)
    base = form(small).lemma
    found = {small, base}
    found.update(root for root in quality_roots(small) if root in tables().nouns)
    for parts in split_noun(base):
        if len(parts) == 1 or base not in tables().nouns or "-" in base:
            found |= {form(part).lemma for part in parts}
    return frozenset(found)


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


@lru_cache(REMEMBERED)
def split_noun(base: str) -> tuple[tuple[str, ...], ...]:
    """What a noun may be made of: "tabletop" -> (table, top), "trumpeter" -> (trumpet,), "fire truck" -> (fire, truck)."""
    if len(base) > LONGEST:
        return ()
    if " " in base or "-" in base:
        return (tuple(base.replace("-", " ").split()),)
    ways = [(base[:i], base[i:]) for i in range(3, len(base) - 2) if is_known(base[:i]) and is_known(base[i:])]
    known = tables()
    person = any(known.person in known.above(place) for place in known.nouns.get(base, ())) or base not in known.nouns
    for ending in ("er", "or", "ist", "ian", "eer") if person else ():
        stem = base.removesuffix(ending)
        if stem != base and len(stem) > 2:
            ways += [(root,) for root in (stem, stem + "e", undouble(stem)) if is_known(root) and len(root) > 2]
    return tuple(ways)
