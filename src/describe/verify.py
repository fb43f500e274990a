"""Checks a composed text against its sources, and chooses the text that a row ends with.

A model may say what no source says. Rejected are texts with numbers, proper names or things that are in no source, that
deny what no source denies, that talk about their making or refuse, that are in another language or longer than the
context. The noun check is that of CHAIR (arXiv 1809.02156) with the row's own sources in place of annotated objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise

from .lexicon.forms import form, is_common, small_form
from .lexicon.splitting import words_in
from .lexicon.tables import tables
from .sources import Sources
from .tokens import count_tokens, trim
from .words import Support, find_names, find_nouns, find_numbers, lemma

LONGEST_TOKEN = 64  # characters per position of the context; a longer text does not fit, uncounted
MOST_SHOWN = 8  # words in a reason
RUN = 8  # words in a row that a text may not share with the prompt
SAY = r"(?:says?|mentions?|describes?|states?|indicates?|suggests?|provided|given)"
META = re.compile(
    r"\bas an ai\b|\blanguage model\b|\bdetection tags?\b|\bdet tags?\b|\bsyn cap\b|\braw (?:caption|text)\b"
    r"|\b(?:synthetic|generated|merged|combined|final|revised|refined|original) (?:caption|description|text|sentence)\b"
    r"|\bbased on (?:the|this|your|these) (?:\w+ )?"
    r"(?:provided|given|information|tags|captions?|text|input|description)\b"
    rf"|\bthe (?:captions?|tags?|raw|alt[- ]text|input) {SAY}\b"
    r"|\b(?:the )?(?:provided|given) (?:\w+ )?(?:captions?|tags?|text|information|description|input|sources?)\b"
    r"|\baccording to the (?:captions?|tags?|raw|text|description|input)\b"
    r"|\bhere(?: is|'s|s) (?:a|an|the|your|my) (?:\w+ )?(?:captions?|descriptions?|sentences?|summary|merged|text)\b"
    r"|^\W*(?:sure|certainly|of course|okay|absolutely)\b[,.!:]"
    r"|^\W*(?:captions?|descriptions?|outputs?|answer|note)\s*:"
    r"|```|</?think|^\s*\{\s*\"|\bi (?:have )?(?:merged|combined|rewrote|rewritten|summarized)\b"
)
REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|unable|not able|afraid)\b"
    r"|\bi (?:can(?:no|')?t|can not|won't|will not|do not have|don't have)\b"
    r"|\b(?:unable|not able) to (?:assist|help|generate|provide|describe|determine|create|see|view|comply|fulfill)\b"
    r"|\bcan(?:no|')?t (?:assist|help|generate|provide|describe|be determined|fulfill|comply)\b|\bapologi[sz]e\b"
    r"|\b(?:not enough|insufficient|no) (?:\w+ )?(?:information|details|context)\b|\bsorry, (?:but )?i\b"
)
INJECTION = re.compile(
    r"<\|[^|<>]{0,40}\|>|\[/?inst\]|<</?sys>>|</?s>"
    r"|\b(?:ignore|disregard|forget) (?:all |any |the |your )*(?:previous|prior|above|earlier|preceding)\b"
    r"|\bsystem prompt\b|\b(?:your|these|following|previous) instructions\b|https?://|\bwww\."
    r"|<(?:script|img|a|div|iframe)\b"
)
# Without one of these no pattern above matches: most texts have none, and the patterns are slow.
MARKS = re.compile(r"[<\[`{:]|www|https?")
TRIGGERS = """
ai language detection det syn raw caption captions description descriptions text sentence sentences summary
tag tags provided given information input source sources sure certainly course okay absolutely merged combined
rewrote rewritten summarized i unable able can't cant cannot apologize apologise details context sorry ignore
disregard forget prompt instructions alt not think i'm won't don't
"""
WORDS = re.compile(r"[a-z']+")
NEGATION = re.compile(r"\b(?:no(?!\.)|not|cannot|without|w/o|never|none|nobody|nothing|neither|nor)\b|n't\b")
NAMING = frozenset(["in", "at", "from", "near", "to", "named", "called", "lake", "mount"])  # "of": groups too


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in a text.

    rejects: why it is not taken, each "reason" or "reason: words"; empty for a text that is. unsupported: nouns that no
    source has; unsupported_rate: their share of all nouns that a picture can show, None for a text without such nouns
    or in another language. lost_facts: names and numbers of the raw text that are not in this one. same_as: "raw" or
    "caption" where the text repeats it, which is no reason to reject. language: "en", "other" or "" for too few words.
    """

    rejects: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    unsupported_rate: float | None = None
    new_numbers: tuple[str, ...] = ()
    new_names: tuple[str, ...] = ()
    lost_facts: tuple[str, ...] = ()
    same_as: str = ""
    language: str = ""


def judge(
    sources: Sources,
    text: str,
    context: int = 77,
    language: str = "en",
    max_unsupported: float = 0.0,
    prompt: str = "",
) -> Verdict:
    """Check `text`, composed from `sources`. context: CLIP tokens, start and end included. language: "en", or "any",
    which takes other languages, whose nouns and names are not checked. max_unsupported: the share of unsupported nouns
    up to which a text is taken. prompt: the fixed words of the prompt, which a text may not repeat. ValueError for
    another language."""
    if language not in ("en", "any"):
        raise ValueError(f"language: {language!r} is not known; use 'en' or 'any'")
    if not any(letter.isalnum() for letter in text):
        return Verdict(rejects=("empty",))
    if len(text) > LONGEST_TOKEN * context or count_tokens(text) > context:
        return Verdict(rejects=("too long",))
    rejects = find_phrases(text, prompt)
    spoken = find_language(text)
    if spoken == "other" and language == "en":
        rejects.append("language")
    facts = Facts(sources)
    numbers = tuple(dict.fromkeys(n for n in find_numbers(text) if n not in facts.numbers))
    if "2" in numbers and (has_pair(text) or any(map(joins_two, facts.texts))):
        numbers = tuple(number for number in numbers if number != "2")
    names: tuple[str, ...] = ()
    named: set[str] = set()  # words of names that the sources have: the Gate of the Golden Gate is no gate
    nouns: list[str] = []
    if spoken != "other":
        held = {name: facts.hold_name(name) for name in find_names(text)}
        names = tuple(name for name in held if not held[name]) + find_small_names(text, facts)
        if denied := find_negation(text, sources):
            rejects.append(f"negation: {denied}")
        named = {lemma(word) for name in held if held[name] for word in words_in(name)}
        nouns = find_nouns(text)
    unsupported = tuple(noun for noun in nouns if not facts.support.holds(noun) and noun not in named)
    rate = len(unsupported) / len(nouns) if nouns else None
    rejects += [
        f"{what}: {', '.join(new[:MOST_SHOWN])}" for what, new in (("numbers", numbers), ("names", names)) if new
    ]
    if rate is not None and rate > max_unsupported:
        rejects.append(f"unsupported: {', '.join(unsupported[:MOST_SHOWN])}")
    lost = find_lost(sources.raw, text)
    return Verdict(tuple(rejects), unsupported, rate, numbers, names, lost, find_same(sources, text), spoken)


def find_phrases(text: str, prompt: str) -> list[str]:
    """Reasons to reject that need no sources."""
    plain = text.lower().replace("’", "'")
    if not prompt and MARKS.search(plain) is None and trigger_words().isdisjoint(WORDS.findall(plain)):
        return []
    patterns = (("refusal", REFUSAL), ("meta text", META), ("injection", INJECTION))
    matches = [(name, match[0]) for name, pattern in patterns if (match := pattern.search(plain))]
    found = [f"{name}: {''.join(filter(str.isprintable, shown)).strip()}" for name, shown in matches]
    if prompt and not prompt_runs(prompt).isdisjoint(word_runs(plain)):
        found.append("prompt copied")
    return found


def find_negation(text: str, sources: Sources) -> str:
    """The word by which a text denies something, "" where a source denies something too. What is not there no source
    says, so that a text turns "a dog" into "no dog" and has the right nouns."""
    found = NEGATION.search(text.lower().replace("’", "'"))
    if found is None:
        return ""
    told = (sources.raw, sources.caption, sources.ocr)
    return "" if any(NEGATION.search(source.lower().replace("’", "'")) for source in told) else found[0]


def find_small_names(text: str, facts: Facts) -> tuple[str, ...]:
    """Names in lower case: "in paris", "a dog named rex". Of words that neither the lexicon nor a source has only those
    after a word that names come after: others are as often rare verbs and adjectives."""
    pairs = pairwise(words_in(text))
    new = [word for before, word in pairs if before.lower() in NAMING and word.isalpha() and word.islower()]
    return tuple(dict.fromkeys(word for word in new if not is_common(word) and not facts.hold_word(word)))


@cache
def trigger_words() -> frozenset[str]:
    return frozenset(TRIGGERS.split())


def word_runs(text: str) -> set[tuple[str, ...]]:
    words = [word.lower() for word in words_in(text)]
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


@lru_cache(16)
def prompt_runs(prompt: str) -> frozenset[tuple[str, ...]]:
    return frozenset(word_runs(prompt))


def find_language(text: str) -> str:
    """ "en", "other", or "" where there are too few words to tell. By the script, and by function words."""
    if not text.isascii():
        letters = [letter for letter in text if letter.isalpha()]
        if sum(letter > "\u024f" for letter in letters) > 0.2 * len(letters):
            return "other"
    words = [small_form(word) for word in words_in(text)]
    known = tables()
    english = sum(map(known.function.__contains__, words))
    foreign = sum(map(known.only_foreign.__contains__, words))
    if foreign >= 2 and foreign > english:
        return "other"
    if english:
        return "en"
    small = [word for word in words if len(word) > 2 and word.isalpha()]
    if len(small) >= 5 and sum(is_common(word) for word in small) < 0.4 * len(small):
        return "other"
    return "en" if len(small) >= 5 else ""


class Facts:
    """Numbers, names and things of a row's sources."""

    def __init__(self, sources: Sources):
        self.texts = (sources.raw, sources.caption, sources.ocr, *(tag.name for tag in sources.tags))
        self.support = Support(self.texts)

    @cached_property
    def numbers(self) -> set[str]:
        implied = tables().implied
        found = {number for text in self.texts for number in find_numbers(text)}
        return found | {implied[word] for word in self.support.lemmas if word in implied}

    @cached_property
    def strange(self) -> list[str]:
        """Words that are not in the lexicon: names, #hashtagsinoneword."""
        return [word for word in self.support.lemmas if not is_common(word)]

    def hold_name(self, name: str) -> bool:
        return all(self.hold_word(small_form(word)) for word in words_in(name))

    def hold_word(self, word: str) -> bool:
        """A word of a name, also where the sources shorten it, have it inside a hashtag, or derive another from it."""
        known, have = tables(), self.support.lemmas
        if word in have or lemma(word) in have or word in known.function or not any(c.isalpha() for c in word):
            return True
        if any(word in known.abbreviations[short] for short in have & known.abbreviations.keys()):
            return True
        if have.issuperset(known.abbreviations.get(word, word)) or (
            "-" in word and all(map(self.hold_word, word.split("-")))
        ):
            return True
        if len(word) > 3 and any(word in other for other in self.strange):
            return True
        return any(is_derived(word, other) for other in self.strange) or self.support.holds(word)


def is_derived(word: str, other: str) -> bool:
    """Kenya and Kenyan, Paris and Parisian: all but the last two letters of the shorter one begin both."""
    shorter, longer = sorted((word, other), key=len)
    stem = max(4, len(shorter) - 2)
    return shorter[:stem] == longer[:stem] and len(longer) - len(shorter) <= 4 and len(shorter) >= 4


def has_pair(text: str) -> bool:
    """Two hands, two eyes: numbers that nobody needs to be told."""
    words = [lemma(word) for word in words_in(text)]
    counted = [after for word, after in pairwise(words) if word in ("two", "2")]
    return bool(counted) and all(word in tables().pairs for word in counted)


def joins_two(text: str) -> bool:
    """A man and a woman, a dog and its puppy: two people, two dogs."""
    words = words_in(text)
    places = (i for i, word in enumerate(words) if word == "and")
    return any(any(map(is_one, words[max(i - 3, 0) : i])) and any(map(is_one, words[i + 1 : i + 4])) for i in places)


def is_one(word: str) -> bool:
    """A noun for one person or animal."""
    known = tables()
    base, kind = form(small_form(word))
    alive = any(
        not known.above(place).isdisjoint((known.person, known.animal)) for place in known.nouns.get(base, ())[:1]
    )
    return kind == "base" and base != "people" and (alive or base in known.persons)


def find_lost(raw: str, text: str) -> tuple[str, ...]:
    """Names and numbers of the raw text that `text` does not have."""
    words: set[str] = set()
    names = find_names(raw)
    if names:
        words = {small_form(word) for word in words_in(text)}
        words |= {lemma(word) for word in words}
        names = [name for name in names if not all(small_form(w) in words for w in words_in(name))]
    have = set(find_numbers(text))
    return tuple(dict.fromkeys(names + [number for number in find_numbers(raw) if number not in have]))


def find_same(sources: Sources, text: str) -> str:
    words = [word.lower() for word in words_in(text)]
    for name, other in (("raw", sources.raw), ("caption", sources.caption)):
        others = words_in(other)
        if len(others) == len(words) and [word.lower() for word in others] == words:
            return name
    return ""


def choose(
    composed: str | None, composer: str, verdict: Verdict | None, sources: Sources, rules_text: str, context: int = 77
) -> tuple[str, str]:
    """The row's text and its engine: the composed one if the verdict has nothing against it, else what the rules
    wrote, else the caption, else the raw text, cut to the context; ("", "") where there is nothing at all."""
    if composed and verdict is not None and not verdict.rejects:
        return composed, composer
    for engine, text in (("rules", rules_text), ("caption", sources.caption), ("raw", sources.raw)):
        rejected = text == composed and verdict is not None
        if not rejected and any(letter.isalnum() for letter in text):
            short = trim(text, context)
            if short:
                return short, engine
    return "", ""
