"""Texts that a checker of composed texts must refuse, made by planting something in good ones, and paraphrases that it
must let pass (unit/describe/, written by hand)."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from rwkv_clip.describe.sources import Sources, Tag
from rwkv_clip.describe.verify import judge
from rwkv_clip.describe.words import find_numbers, plural

DATA = Path(__file__).resolve().parents[1] / "unit" / "describe"
PLACES = [
    "Paris",
    "Nairobi",
    "Oslo",
    "Toronto",
    "Lake Garda",
    "Mount Fuji",
    "Buenos Aires",
    "Ohio",
    "Singapore",
    "Kyoto",
]
PEOPLE = [
    "Robert",
    "Sophia",
    "Mr. Miller",
    "Angela Brown",
    "Carlos",
    "Yuki",
    "Priya",
    "Olga Petrova",
    "Kevin",
    "Fatima",
]
BRANDS = ["Toyota", "Nike", "Coca-Cola", "Samsung", "IKEA", "Lufthansa", "Heineken", "Canon"]
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 9: "nine", 12: "twelve", 20: "twenty"}


def read_rows(name: str) -> list[tuple[Sources, list[str]]]:
    """Sources and texts."""
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    return [
        (
            Sources(row["id"], row["raw"], row["caption"], tuple(Tag(tag) for tag in row["tags"]), row["ocr"]),
            row["texts"],
        )
        for row in rows
    ]


PARAPHRASES = read_rows("paraphrases.jsonl")
ROWS = [*PARAPHRASES, *read_rows("rows.jsonl")]
TEXTS = [(sources, text) for sources, texts in ROWS for text in texts]


def words_of(sources: Sources) -> str:
    return " ".join([sources.raw, sources.caption, sources.ocr, *(tag.name for tag in sources.tags)]).lower()


def plant_object(rng: random.Random, sources: Sources, text: str, unless: dict[str, list[str]]) -> tuple[str, str]:
    """The text with an object that is not in the picture, and that object: put in place of one that is, or added."""
    have = words_of(sources)
    absent = [name for name, words in unless.items() if not any(w.lower() in have for w in [*name.split(), *words])]
    name = rng.choice(absent)
    article = "an" if name[0] in "aeiou" else "a"
    shown = [tag.name for tag in sources.tags if re.search(rf"\b(a|the|an) {re.escape(tag.name)}\b", text)]
    start = text.rstrip(".")
    ways = [
        f"{start}, next to {article} {name}.",
        f"{start} with {article} {name} in the background.",
        f"{start}, while {article} {name} is nearby.",
        f"{start}, and two {plural(name)} are visible behind.",
        f"There is {article} {name} here, and {text[0].lower()}{text[1:]}",
    ]
    if shown:
        old = rng.choice(shown)
        ways += [re.sub(rf"\b(a|the|an) {re.escape(old)}\b", f"{article} {name}", text, count=1)] * 3
    return rng.choice(ways), name


def plant_number(rng: random.Random, sources: Sources, text: str) -> tuple[str, str]:
    """The text with a number changed, or with a new one, and that number."""
    taken = set(find_numbers(words_of(sources))) | set(find_numbers(text))
    new = str(rng.choice([n for n in WORDS if str(n) not in taken]))
    digits = re.search(r"\d+", text)
    if digits:
        changed = str(int(digits[0]) + rng.choice([1, 3, 10]))
        if changed not in taken:
            return text[: digits.start()] + changed + text[digits.end() :], changed
    word = re.search(r"\b(two|three|five|twelve)\b", text, re.IGNORECASE)
    if word:
        return text[: word.start()] + WORDS[int(new)] + text[word.end() :], new
    ways = [f"{text.rstrip('.')}, seen by {WORDS[int(new)]} people.", f"{text.rstrip('.')}, one of {new}."]
    if "1987" not in taken:
        ways.append(f"{text.rstrip('.')} in 1987.")
    made = rng.choice(ways)
    return made, "1987" if "1987" in made else new


def plant_name(rng: random.Random, sources: Sources, text: str) -> tuple[str, str]:
    """The text with a name changed, or with a new one, and that name."""
    place, person, brand = rng.choice(PLACES), rng.choice(PEOPLE), rng.choice(BRANDS)
    start = text.rstrip(".")
    ways = [
        (f"{start} in {place}.", place),
        (f"{start}, photographed by {person}.", person),
        (f"{start}, sponsored by {brand}.", brand),
        (f"In {place}, {text[0].lower()}{text[1:]}", place),
        (f"{person} is here: {text[0].lower()}{text[1:]}", person),
    ]
    names = [name for name in re.findall(r"(?<=[a-z] )[A-Z][a-z]{3,}\b", text) if name in sources.raw]
    if names:
        old = rng.choice(names)
        ways += [(re.sub(rf"\b{old}\b", place, text, count=1), place)] * 4
    return rng.choice(ways)


def read_objects() -> dict[str, list[str]]:
    rows = [json.loads(line) for line in (DATA / "objects.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["object"]: row["unless"] for row in rows}


def plants() -> dict[str, list[tuple[Sources, str, str]]]:
    """500: kind -> sources, text, what was planted."""
    rng, unless = random.Random(20), read_objects()
    chosen = {"unsupported": rng.choices(TEXTS, k=260), "numbers": rng.choices(TEXTS, k=120)}
    chosen["names"] = rng.choices(TEXTS, k=120)
    return {
        "unsupported": [(s, *plant_object(rng, s, text, unless)) for s, text in chosen["unsupported"]],
        "numbers": [(s, *plant_number(rng, s, text)) for s, text in chosen["numbers"]],
        "names": [(s, *plant_name(rng, s, text)) for s, text in chosen["names"]],
    }


def is_found(kind: str, sources: Sources, text: str, planted: str) -> bool:
    """Whether it is named under the right reason: finding something else in the text does not count."""
    verdict = judge(sources, text)
    if kind == "unsupported":
        return any(planted in noun or noun in planted.split() for noun in verdict.unsupported)
    if kind == "numbers":
        return planted in verdict.new_numbers
    return any(planted in name or name in planted for name in verdict.new_names)


def false_alarms(rows: list[tuple[Sources, list[str]]]) -> list[tuple[str, tuple[str, ...]]]:
    judged = [(text, judge(sources, text).rejects) for sources, texts in rows for text in texts]
    return [(text, rejects) for text, rejects in judged if rejects]
