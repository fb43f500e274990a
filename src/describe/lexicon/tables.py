"""The lexicon's data files as tables, read when the first word is asked for (some 30 ms)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
LINES = ("synonyms", "near", "supported_by", "kinds")  # sections of hand.txt whose lines are read whole
PHRASES = ("idioms", "tags")  # .. and those of words between commas, which may have blanks


def read_lines(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def read_classes(name: str) -> dict[str, list[str]]:
    """Lines of: class TAB words between blanks."""
    return {line.split("\t")[0]: line.split("\t")[1].split() for line in read_lines(name)}


def read_hand() -> dict[str, list[str]]:
    """hand.txt: [section], then words between blanks, or as LINES and PHRASES say; # comments."""
    sections: dict[str, list[str]] = {}
    name = ""
    for line in read_lines("hand.txt"):
        line = line.split("#")[0].strip()
        if line.startswith("["):
            name = line.strip("[]")
            sections[name] = []
        elif line:
            if name in PHRASES:
                sections[name] += line.split(", ")
            else:
                sections[name] += [line] if name in LINES else line.split()
    return sections


def read_pairs(pairs: list[str]) -> dict[str, str]:
    """ "two=2", .. as a dict."""
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


class Tables:
    """nouns: noun -> places of its meanings in words_of, parents (more general meanings) and wholes (of what it is a
    part). Nouns of two words have a blank between them."""

    def __init__(self) -> None:
        self.nouns: dict[str, list[int]] = {}
        self.words_of: list[list[str]] = []
        self.parents: list[str] = []
        self.wholes: list[str] = []
        for place, line in enumerate(read_lines("nouns.txt")):
            words, parents, wholes = (*line.split("\t"), "", "")[:3]
            self.words_of.append(words.replace("_", " ").split(",") if words else [])
            self.parents.append(parents)
            self.wholes.append(wholes)
            for word in self.words_of[place]:
                self.nouns.setdefault(word, []).append(place)
        hand = read_hand()
        self.function, self.colours, self.photo = (frozenset(hand[name]) for name in ("function", "colours", "photo"))
        self.groups, self.articles, self.be = (frozenset(hand[name]) for name in ("groups", "articles", "be"))
        self.subjects, self.after_verbs = frozenset(hand["subjects"]), frozenset(hand["after_verbs"])
        self.plurals = frozenset(hand["plurals"])
        self.before_nouns, self.idioms = frozenset(hand["before_nouns"]), frozenset(hand["idioms"])
        self.postures, self.persons = frozenset(hand["postures"]), frozenset(hand["persons"])
        self.capitals = frozenset(hand["capitals"])
        self.only_foreign = frozenset(hand["foreign"]) - self.function
        self.numbers, self.implied = read_pairs(hand["numbers"]), read_pairs(hand["implied_numbers"])
        self.abbreviations = {short: whole.split("+") for short, whole in read_pairs(hand["abbreviations"]).items()}
        self.ing_nouns, self.pairs = frozenset(hand["ing_nouns"]), frozenset(hand["pairs"])
        for word, kind in (line.split(", ") for line in hand["kinds"]):
            self.add_kind(word, kind)
        for line in hand["synonyms"]:
            self.add_synonyms(line.split(", "))
        self.two_words = {noun.split(" ")[0] for noun in self.nouns if " " in noun}
        self.near: dict[str, set[str]] = {}
        self.supported_by: dict[str, set[str]] = {}
        for alike in (line.split(", ") for line in hand["near"]):
            for word in alike:
                self.near.setdefault(word, set()).update(alike)
        for word, *others in (line.split(", ") for line in hand["supported_by"]):
            self.supported_by.setdefault(word, set()).update(others)
        classes = {name: frozenset(words) for name, words in read_classes("words.txt").items()}
        self.abstract, self.verbs, self.adjectives = classes["noun"], classes["verb"], classes["adj"]
        self.adverbs, self.verb_first = classes["adv"], classes["verb-first"]
        self.adjective_first, self.verb_too = classes["adj-first"], classes["verb-too"]
        self.body = frozenset(hand["body"])
        forms = read_classes("irregular.txt")
        self.irregular = {part: read_pairs(pairs) for part, pairs in forms.items()}
        self._above: dict[int, frozenset[int]] = {}
        self.person, self.animal = self.nouns["person"][0], self.nouns["animal"][0]

    def add_kind(self, word: str, kind: str) -> None:
        """A noun that the files do not have, and its more general one."""
        if word not in self.nouns:
            self.nouns[word] = [len(self.parents)]
            self.words_of.append([word])
            self.parents.append(str(self.nouns[kind][0]) if kind in self.nouns else "")
            self.wholes.append("")

    def add_synonyms(self, words: list[str]) -> None:
        """Give all words the meanings of the first that has some. A new meaning if none has."""
        known = next((self.nouns[word] for word in words if word in self.nouns), None)
        if known is None:
            known = [len(self.parents)]
            self.words_of.append([])
            self.parents.append("")
            self.wholes.append("")
        for word in words:
            have = self.nouns.setdefault(word, [])
            for place in known:
                if place not in have:
                    have.append(place)
                    self.words_of[place].append(word)

    def wholes_of(self, place: int) -> list[int]:
        """Meanings of what this one is a part, a member or the substance of."""
        return [int(whole) for whole in self.wholes[place].split()]

    def above(self, place: int) -> frozenset[int]:
        """A meaning and all more general ones."""
        if place not in self._above:
            found = {place}
            for parent in self.parents[place].split():
                found |= self.above(int(parent))
            self._above[place] = frozenset(found)
        return self._above[place]


@cache
def tables() -> Tables:
    return Tables()
