"""Builds the lexicon's data files from WordNet 3.0: python -m rwkv_clip.describe.lexicon WORDNET_FOLDER

WORDNET_FOLDER holds data.noun, index.noun, .. and cntlist.rev (Debian: wordnet-base, /usr/share/wordnet). Written are
    nouns.txt      a line per meaning: its nouns TAB line numbers of its more general meanings TAB of what it is part of
    words.txt      a line per class of other words, see CLASSES
    irregular.txt  inflected form and base, by part of speech
    tags.txt       a vocabulary for zero-shot tagging, a tag per line
How often a word is used is read from two places: the counts of WordNet's own tagged texts, and the vocabulary of CLIP's
tokenizer, whose merges were made in the order of how often they came in texts of pictures.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from open_clip.tokenizer import SimpleTokenizer

from rwkv_clip.files import write_whole

from .tables import read_hand

HERE = Path(__file__).parent
# Lexicographer files of nouns (lexnames(5WN)) with things that a picture can show.
CONCRETE = {5: "animal", 6: "artifact", 8: "body", 13: "food", 17: "object", 18: "person", 19: "phenomenon"}
CONCRETE |= {20: "plant", 27: "substance"}
TOPS, GROUPS, PLACES = 3, 14, 15  # the nouns of these only where hand.txt names them
ABOVE = {*CONCRETE, TOPS, GROUPS, PLACES}  # whose meanings may be the more general ones
PERSON = 18
TAGGED, TAGGED_RANK = (5, 6, 13, 17, 20), 36000
SHORT = (5, 6, 13, 20)
MOST_SENSES = 5
FEW = 4  # counts up to this say nothing about which meaning is the usual one
COMMON = 8000  # merges of CLIP's vocabulary before this one make words that are common
KNOWN = 16000  # .. words of which compounds are made
PARTS = {"noun": (1,), "verb": (2,), "adj": (3, 5), "adv": (4,)}


class Synset(NamedTuple):
    """words as WordNet writes them, capitals and underscores included. parents: offsets of the more general meanings;
    wholes: of what it is a part, a member or the substance of."""

    file: int
    words: tuple[str, ...]
    parents: tuple[str, ...]
    wholes: tuple[str, ...]


class Counts(NamedTuple):
    """How often a lemma was tagged, by part of speech and, for nouns, by lexicographer file and by number of the
    meaning, which counts from 1 in the order of the index."""

    parts: dict[str, Counter[int]]
    noun_files: dict[str, Counter[int]]
    meanings: dict[str, Counter[int]]


def read_synsets(path: Path) -> dict[str, Synset]:
    """data.noun -> meanings by offset. The format is that of wndb(5WN)."""
    found = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" | ")[0].split()
        count = int(fields[3], 16)
        words = tuple(fields[4 : 4 + 2 * count : 2])
        pointers = fields[5 + 2 * count :]
        to = [(pointers[i], pointers[i + 1]) for i in range(0, len(pointers) - 3, 4)]
        parents = tuple(offset for symbol, offset in to if symbol in ("@", "@i"))
        wholes = tuple(offset for symbol, offset in to if symbol in ("#p", "#m", "#s"))
        found[fields[0]] = Synset(int(fields[1]), words, parents, wholes)
    return found


def read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """index.POS -> offsets of a lemma's meanings, the most frequent first."""
    found = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            found[fields[0]] = tuple(fields[-int(fields[2]) :])
    return found


def read_counts(path: Path) -> Counts:
    parts: dict[str, Counter[int]] = defaultdict(Counter)
    files: dict[str, Counter[int]] = defaultdict(Counter)
    meanings: dict[str, Counter[int]] = defaultdict(Counter)
    for line in path.read_text(encoding="latin-1").splitlines():
        key, meaning, count = line.split()
        lemma, _, sense = key.partition("%")
        part, file = (int(field) for field in sense.split(":")[:2])
        parts[lemma][3 if part == 5 else part] += int(count)
        if part == 1:
            files[lemma][file] += int(count)
            meanings[lemma][int(meaning)] = int(count)
    return Counts(parts, files, meanings)


def read_ranks(tokenizer: SimpleTokenizer) -> dict[str, int]:
    """Words that are one token of CLIP -> their place among its merges."""
    return {token[:-4]: place for token, place in tokenizer.encoder.items() if token.endswith("</w>")}


class Builder:
    """Chooses nouns and their meanings; see build."""

    def __init__(self, folder: Path):
        self.synsets = read_synsets(folder / "data.noun")
        self.index = {part: read_index(folder / f"index.{part}") for part in PARTS}
        self.counts = read_counts(folder / "cntlist.rev")
        tokenizer = SimpleTokenizer()
        self.encode, self.ranks = tokenizer.encode, read_ranks(tokenizer)
        self.hand, self.folder = read_hand(), folder
        hand = self.hand
        self.extra = {*hand["nouns"], *hand["groups"], *hand["persons"]}
        self.not_nouns = {*hand["function"], *hand["not_nouns"], *hand["photo"]} - self.extra

    def is_concrete(self, offset: str, lemma: str) -> bool:
        file = self.synsets[offset].file
        return file in CONCRETE or (file in (TOPS, PLACES, GROUPS) and lemma in self.extra)

    def is_written_small(self, offset: str, lemma: str) -> bool:
        """Not a name: Paris, Newton, or the unit named after him."""
        return lemma in self.synsets[offset].words

    def senses(self, lemma: str) -> list[str]:
        """Offsets of the meanings that count for this lemma: the first that is a thing, and others that are known to be
        used. A person only where nothing else comes first: WordNet knows dogs and cats that are unloved people."""
        counts = self.counts.meanings.get(lemma, Counter())
        found: list[str] = []
        for number, offset in enumerate(self.index["noun"].get(lemma, ()), 1):
            if not self.is_concrete(offset, lemma) or not self.is_written_small(offset, lemma):
                continue
            if not found or counts[number] or (not counts and len(found) < 2):
                found.append(offset)
        if found and self.synsets[found[0]].file != PERSON:
            found = [offset for offset in found if self.synsets[offset].file != PERSON]
        return found[:MOST_SENSES]

    def is_common(self, lemma: str) -> bool:
        words = lemma.split("_")
        if lemma in self.extra:
            return True
        if len(words) > 2 or not re.fullmatch(r"[a-z]+([_-][a-z]+)*", lemma) or len(lemma) < 3:
            return False
        if len(words) == 2:
            return all(self.ranks.get(word, COMMON) < COMMON for word in words) and self.is_unlike_its_words(lemma)
        counted = lemma in self.ranks or self.concrete_count(lemma) > 0
        return counted or self.is_compound(lemma) or self.is_short(lemma)

    def is_short(self, lemma: str) -> bool:
        """Two tokens of CLIP, and a made thing, an animal, food, a plant, or one who does: tricycle, golfer."""
        file = self.synsets[self.index["noun"][lemma][0]].file
        does = lemma.endswith(("er", "or", "ist", "man")) and any(self.is_part(lemma[:-n]) for n in (1, 2, 3))
        return (file in SHORT or (file == PERSON and does)) and len(self.encode(lemma)) == 2

    def is_compound(self, lemma: str, most: int = KNOWN) -> bool:
        """Of two common words: surfboard."""
        return any(self.is_part(lemma[:i], most) and self.is_part(lemma[i:], most) for i in range(3, len(lemma) - 2))

    def is_unlike_its_words(self, lemma: str) -> bool:
        """Of two words and no kind of the second: ground ball, but not race car, which is a car. Adjectives and -ing
        make phrases as often, old man and riding horse, and are left to hand.txt."""
        first, last = lemma.split("_")
        if first in self.index["adj"] or first.endswith("ing") or last not in self.index["noun"]:
            return False
        above = [self.index["noun"][lemma][0]]
        for offset in above:
            above += self.synsets[offset].parents
        return not any(last in self.synsets[offset].words for offset in above)

    def is_part(self, word: str, most: int = KNOWN) -> bool:
        return self.ranks.get(word, most) < most and any(word in self.index[p] for p in ("noun", "verb", "adj"))

    def concrete_count(self, lemma: str) -> int:
        return sum(n for file, n in self.counts.noun_files.get(lemma, {}).items() if file in CONCRETE)

    def is_shown(self, lemma: str) -> bool:
        """Whether the noun, where it is one, mostly means a thing."""
        if lemma in self.extra:
            return True
        if lemma in self.not_nouns:
            return False
        concrete, nouns = self.concrete_count(lemma), sum(self.counts.noun_files.get(lemma, {}).values())
        if nouns > FEW:
            return concrete >= 0.3 * nouns
        return any(self.is_concrete(offset, lemma) for offset in self.index["noun"][lemma][:2])

    def nouns(self) -> dict[str, list[str]]:
        """Lemma -> offsets."""
        chosen = {}
        for lemma in self.index["noun"]:
            if self.is_common(lemma) and self.is_shown(lemma):
                senses = self.senses(lemma)
                if senses:
                    chosen[lemma] = senses
        return chosen

    def is_tag(self, lemma: str) -> bool:
        first = self.index["noun"][lemma][0]
        spelled = {word for offset in self.index["noun"][lemma] for word in self.synsets[offset].words}
        is_name = any(word != lemma and word.lower() == lemma for word in spelled)
        if "_" in lemma or self.synsets[first].file not in TAGGED or not self.is_written_small(first, lemma):
            return False
        counted = self.concrete_count(lemma)
        if (is_name and not counted) or (len(lemma) < 4 and counted < 2):
            return False
        return self.ranks.get(lemma, TAGGED_RANK) < TAGGED_RANK or (len(lemma) > 6 and self.is_compound(lemma, 4000))

    def other_uses(self, chosen: dict[str, list[str]]) -> dict[str, set[str]]:
        """Of the chosen: those that are more often verbs, more often adjectives, and sometimes verbs."""
        uses: dict[str, set[str]] = {"verb-first": set(), "adj-first": set(), "verb-too": set()}
        for lemma in chosen:
            counts, concrete = self.counts.parts.get(lemma, Counter()), self.concrete_count(lemma)
            if counts[2] and lemma in self.index["verb"]:
                uses["verb-first" if counts[2] > concrete and lemma not in self.extra else "verb-too"].add(lemma)
            person = self.synsets[chosen[lemma][0]].file == PERSON  # the young, the brave
            if lemma in self.index["adj"] and counts[3] + person > concrete and lemma not in self.extra:
                uses["adj-first"].add(lemma)
        return uses


def order(builder: Builder, chosen: dict[str, list[str]]) -> list[str]:
    """Offsets of all meanings that are written: those of the chosen nouns and the more general ones, once each."""
    seen: dict[str, None] = {}
    for senses in chosen.values():
        waiting = list(senses)
        while waiting:
            offset = waiting.pop()
            if offset not in seen:
                seen[offset] = None
                waiting += [
                    o for o in builder.synsets[offset].parents if builder.synsets[o].file in {*CONCRETE, 14, 15}
                ]
    return sorted(seen)


def nouns_lines(builder: Builder, chosen: dict[str, list[str]]) -> list[str]:
    offsets = order(builder, chosen)
    place = {offset: i for i, offset in enumerate(offsets)}
    words: dict[str, list[str]] = {offset: [] for offset in offsets}
    for lemma, senses in chosen.items():
        for offset in senses:
            words[offset].append(lemma)
    lines = []
    for offset in offsets:
        _, _, parents, wholes = builder.synsets[offset]
        columns = [" ".join(str(place[other]) for other in others if other in place) for others in (parents, wholes)]
        lines.append("\t".join([",".join(sorted(words[offset])), *columns]).rstrip("\t"))
    return lines


def words_lines(builder: Builder, chosen: dict[str, list[str]]) -> list[str]:
    """Words that are common and no chosen nouns, by class; and the chosen ones that are more often something else."""
    classes: dict[str, set[str]] = {part: set() for part in PARTS}
    for part in PARTS:
        for lemma in builder.index[part]:
            known = lemma in builder.ranks or builder.counts.parts.get(lemma)
            small = part != "noun" or any(builder.is_written_small(o, lemma) for o in builder.index[part][lemma])
            new = part != "noun" or lemma not in chosen
            if known and small and new and re.fullmatch(r"[a-z]+(-[a-z]+)*", lemma):
                classes[part].add(lemma)
    classes |= builder.other_uses(chosen)
    return [f"{name}\t{' '.join(sorted(words))}" for name, words in classes.items()]


def irregular_lines(builder: Builder, chosen: dict[str, list[str]]) -> list[str]:
    lines = []
    for part in PARTS:
        pairs = []
        for line in (builder.folder / f"{part}.exc").read_text(encoding="latin-1").splitlines():
            form, base = line.split()[:2]
            known = base in chosen if part == "noun" else (base in builder.ranks or builder.counts.parts.get(base))
            if known and form != base and re.fullmatch(r"[a-z]+", form) and re.fullmatch(r"[a-z]+", base):
                pairs.append(f"{form}={base}")
        lines.append(f"{part}\t{' '.join(pairs)}")
    return lines


def tags_lines(builder: Builder, chosen: dict[str, list[str]]) -> list[str]:
    """Of the nouns those that are made things, animals, food, places and plants first of all, common, no verbs or
    adjectives and no names; and hand.txt's."""
    other = builder.other_uses(chosen)
    never = {*builder.hand["not_tags"], *other["verb-first"], *other["adj-first"]}
    tags = {lemma for lemma in chosen if lemma not in never and builder.is_tag(lemma)}
    return sorted(tags | set(builder.hand["tags"]))


FILES = {
    "nouns.txt": nouns_lines,
    "words.txt": words_lines,
    "irregular.txt": irregular_lines,
    "tags.txt": tags_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rwkv_clip.describe.lexicon", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="WORDNET_FOLDER")
    parser.add_argument("--output", type=Path, default=HERE, help="where the files go, else beside this one")
    arguments = parser.parse_args()
    builder = Builder(arguments.folder)
    chosen = builder.nouns()
    print(f"{len(chosen):,} nouns, {sum('_' in lemma for lemma in chosen):,} of them of two words")
    for name, lines_of in FILES.items():
        lines = lines_of(builder, chosen)
        write_whole(arguments.output / name, [("\n".join(lines) + "\n").encode()])
        print(f"{name}: {len(lines):,} lines, {(arguments.output / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
