"""The lexicon's data files as tables, read when the first word is asked for (some 30 ms)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


def read_lines(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def read_classes(name: str) -> dict[str, list[str]]:
    """Lines of: class TAB words between blanks."""
    return {line.split("\t")[0]: line.split("\t")[1].split() for line in read_lines(name)}


def read_hand() -> dict[str, list[str]]:
    """hand.txt: [section], then words between blanks, # comments; of the section `synonyms` whole lines."""
    sections: dict[str, list[str]] = {}
    name = ""
    for line in read_lines("hand.txt"):
        line = line.split("#")[0].strip()
        if line.startswith("["):
            name = line.strip("[]")
            sections[name] = []
        elif line:
            sections[name] += [line] if name == "synonyms" else line.split()
    return sections


def read_pairs(pairs: list[str]) -> dict[str, str]:
    """ "two=2", .. as a dict."""
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


class Tables:
    """nouns: noun -> places of its meanings in words_of and parents, the first one the most frequent. Nouns of two
    words have a blank between them."""

    def __init__(self) -> None:
        self.nouns: dict[str, list[int]] = {}
        self.words_of: list[list[str]] = []
        self.parents: list[str] = []
        for place, line in enumerate(read_lines("nouns.txt")):
            words, _, parents = line.partition("\t")
            self.words_of.append(words.replace("_", " ").split(",") if words else [])
            self.parents.append(parents)
            for word in self.words_of[place]:
                self.nouns.setdefault(word, []).append(place)
        self.two_words = {noun.split(" ")[0] for noun in self.nouns if " " in noun}
        hand = read_hand()
        self.function, self.colours, self.photo = (frozenset(hand[name]) for name in ("function", "colours", "photo"))
        self.postures, self.persons = frozenset(hand["postures"]), frozenset(hand["persons"])
        self.capitals, self.foreign = frozenset(hand["capitals"]), frozenset(hand["foreign"])
        self.numbers, self.implied = read_pairs(hand["numbers"]), read_pairs(hand["implied_numbers"])
        self.abbreviations = read_pairs(hand["abbreviations"])
        for line in hand["synonyms"]:
            self.add_synonyms(line.split())
        classes = {name: frozenset(words) for name, words in read_classes("words.txt").items()}
        self.abstract, self.verbs, self.adjectives = classes["noun"], classes["verb"], classes["adj"]
        self.adverbs, self.verb_first = classes["adv"], classes["verb-first"]
        self.adjective_first, self.verb_too = classes["adj-first"], classes["verb-too"]
        forms = read_classes("irregular.txt")
        self.irregular = {part: read_pairs(pairs) for part, pairs in forms.items()}
        self._above: dict[int, frozenset[int]] = {}

    def add_synonyms(self, words: list[str]) -> None:
        """Give all words the meanings of the first that has some. A new meaning if none has."""
        known = next((self.nouns[word] for word in words if word in self.nouns), None)
        if known is None:
            known = [len(self.parents)]
            self.words_of.append([])
            self.parents.append("")
        for word in words:
            have = self.nouns.setdefault(word, [])
            for place in known:
                if place not in have:
                    have.append(place)
                    self.words_of[place].append(word)

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
