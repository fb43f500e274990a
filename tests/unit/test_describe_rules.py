"""The rules join what the sources say: nothing is added, nothing is cut in the middle, nothing depends on chance."""

import asyncio
import re
import string
from random import Random

import pytest

from helpers.describe_hostile import hostile_texts
from rwkv_clip.describe.composers.rules import (
    NAMES,
    PLACES,
    TEMPLATES,
    THINGS,
    VERSION,
    Rules,
    join,
    realise,
    tidy,
)
from rwkv_clip.describe.facts import Facts, find_facts
from rwkv_clip.describe.residual_tags import find_residual, read_tag
from rwkv_clip.describe.sources import Sources, Tag
from rwkv_clip.describe.tokens import CONTEXT, count_tokens
from rwkv_clip.describe.verify import judge
from rwkv_clip.describe.word_lists import NEUTRAL
from rwkv_clip.describe.words import content_lemmas, find_numbers, is_content

PHOTOS = (
    *("my dog Rex at Denver Zoo in 2012", "Golden Gate Bridge", "Route 66 in Paris, France with 3 dogs", "brown dog"),
    *("Boeing 747 landing at Heathrow on a cold day", "Street market in Marrakech, Morocco. October 2009", "IMAGINE"),
    *("President Barack Obama speaks with Joe Biden at the White House", "Happy Birthday Emma!", "Day 3: hiking"),
    *("1967 Ford Mustang at the Goodwood Festival of Speed", "two hundred people and twenty-one horses", "", "", ""),
    *("No. 10 Downing Street, London", "a 12-year-old boy with his $500 bike", "What a day! We saw 2 bears...", "2012"),
    *(
        "Hochzeit in M\u00fcnchen",
        "\u6771\u4eac\u30bf\u30ef\u30fc\u306e\u591c\u666f",
        "Two Five Nine",
        "the zoo at 1,000 feet",
        "F-16 over the lake",
    ),
)
CAPTIONS = (
    *("a brown dog sitting on the grass", "A large airplane is flying in the sky.", "a close up of a flower", "", ""),
    *("An old building with a clock tower. There are cars parked outside.", "A dog!", "a red bridge over a river"),
    *("two men in suits standing next to each other", "people are skiing down a hill", "a man on a bike with a dog"),
    *("A sign that says: open", "a group of twenty people", "a plane (white) at the airport", "a kitten on a couch"),
)
TAGS = (
    *("dog", "golden retriever", "animal", "grass", "sky", "tree", "trees", "people", "man", "person", "run", "sit"),
    *("brown", "photo", "fire truck", "hat", "umbrella", "hour glass", "bus", "glasses", "furniture", "apple", "boat"),
    *(
        "Christmas tree",
        "T-shirt",
        "frisbee",
        "corgi",
        "building",
        "church",
        "cat",
        "snow",
        "wood",
        "5",
        "a {b}",
        "\u72ac",
    ),
)


def sources_of(random: Random, strange: list[str]) -> Sources:
    """Made-up sources; with a chance of one in three, one of them is a strange text."""
    scored = random.random() < 0.5
    tags = [
        Tag(name, round(random.random(), 2) if scored else None) for name in random.sample(TAGS, random.randint(0, 12))
    ]
    raw, caption, ocr = random.choice(PHOTOS), random.choice(CAPTIONS), random.choice(("", "", "STOP", "Caf\u00e9 24"))
    if strange and random.random() < 0.33:
        odd = random.choice(strange)
        where = random.randrange(4)
        raw, caption, ocr = (odd if where == i else text for i, text in enumerate((raw, caption, ocr)))
        tags = [*tags, Tag(odd)] if where == 3 else tags
    return Sources(str(random.random()), raw, caption, tuple(tags), ocr)


def texts_of(sources: Sources) -> list[str]:
    texts = (sources.raw, sources.caption, sources.ocr, *(tag.name for tag in sources.tags))
    return [*map(tidy, texts), *texts]


def check(sources: Sources, rules: Rules) -> str:
    """Write a text and hold it against all that is promised."""
    text = rules.write(sources)
    assert text == rules.write(sources) == Rules(rules.seed, rules.variant, rules.context).write(sources)
    assert text == " ".join(text.split()) and count_tokens(text) <= rules.context
    assert bool(text) == any(map(tidy, texts_of(sources)[: len(sources.tags) + 3]))
    said = {word for source in texts_of(sources) for word in content_lemmas(source)}
    new = set(content_lemmas(text)) - said
    # A word longer than the context, or of a script without spaces, may be cut.
    assert not {word for word in new if not any(other.startswith(word) for other in said)}, text
    assert not new or count_tokens(text) >= rules.context - 4, text
    numbers = {number for source in texts_of(sources) for number in find_numbers(source)}
    assert set(find_numbers(text)) <= numbers or new, text
    return text


SETTINGS = [Rules(), Rules(3, "short"), Rules(1, "full", 20), Rules(2, "full", 9)]


@pytest.mark.parametrize("rules", SETTINGS, ids=str)
def test_nothing_is_added(rules):
    random = Random(rules.context)
    for _ in range(1000):
        check(sources_of(random, []), rules)


@pytest.mark.parametrize("rules", SETTINGS, ids=str)
def test_nothing_is_added_to_hostile_sources(rules):
    random = Random(rules.context)
    strange = [text for text in hostile_texts() if len(text) < 10_000]
    strange += ["".join(random.choices(string.printable, k=random.randint(1, 60))) for _ in range(100)]
    for _ in range(1000):
        text = check(sources_of(random, strange), rules)
        assert text.isprintable() and "<|" not in text


def test_texts_of_a_megabyte():
    for odd in hostile_texts():
        if len(odd) > 10_000:
            text = Rules().write(Sources("1", odd, odd, (Tag(odd), Tag("dog")), odd))
            assert text and count_tokens(text) <= CONTEXT
            text = Rules().write(Sources("1", odd, "a dog", (Tag("cat"),)))
            assert "dog" in text and "cat" in text and count_tokens(text) <= CONTEXT


def test_texts_pass_the_checks_for_composed_ones():
    random = Random(7)
    for _ in range(1000):
        sources = sources_of(random, [])
        text = Rules().write(sources)
        verdict = judge(sources, text)
        assert not text or not [reject for reject in verdict.rejects if reject != "language"], (sources, text, verdict)
        assert not verdict.unsupported


def test_texts_are_sentences():
    """A capital or what has none at the beginning, a mark at the end, no doubled marks, brackets in pairs."""
    random = Random(5)
    for _ in range(2000):
        text = Rules(seed=1).write(sources_of(random, []))
        if text:
            assert not text[0].islower() and text[-1] in ".!?\u2026", text
            assert not re.search(r"[,;:]{2}| [,.;:]|\.\.(?!\.)|[,;:]\.|\b(an?) (the|an?)\b", text.replace("...", "")), (
                text
            )
            assert text.count("(") == text.count(")"), text


def test_templates_bring_neutral_words_only():
    assert len(TEMPLATES) == len(set(TEMPLATES)) >= 16
    for form in (*PLACES, *NAMES, *THINGS):
        words = set(re.sub(r"{\w+}", " ", form).lower().replace(".", " ").split())
        assert {word.strip(",;:()-") for word in words} - {""} <= NEUTRAL, form
    assert not [word for word in NEUTRAL if is_content(word)]


def test_rows_and_seeds_choose_the_template():
    def write(row: int, seed: int) -> str:
        tags = (Tag("tree"), Tag("hat"))
        return Rules(seed).write(Sources(str(row), "Rex in Paris", "a dog on the grass", tags))

    assert len({write(row, 0) for row in range(200)}) >= 30
    assert [write(row, 0) for row in range(20)] != [write(row, 1) for row in range(20)]


def test_every_template_with_every_kind_of_base():
    things = [thing for name in ("trees", "hat", "snow") if (thing := read_tag(name))]
    for template in TEMPLATES:
        for base in ("a dog runs", "A dog. A cat.", "A dog!", "sign: open", "iPhone {base} {name}"):
            for facts in (
                Facts(),
                Facts(("Rex",)),
                Facts((), ("in Rome",)),
                Facts(("Rex", "Tom"), ("in Rome", "in May")),
            ):
                text = realise(base, facts, things, template)
                for part in (*facts.names, *facts.places, "trees", "a hat", "snow"):
                    assert part.lower() in text.lower(), text
                assert text.count("{") == base.count("{") and text.endswith(".") and "!." not in text


@pytest.mark.parametrize(
    "raw, caption, names, places",
    [
        ("my dog Rex at Denver Zoo in 2012", "a dog", ("Rex",), ("at Denver Zoo", "in 2012")),
        ("Golden Gate Bridge", "a red bridge", ("Golden Gate Bridge",), ()),
        ("we drove along Route 66 in Paris, France", "a car", (), ("along Route 66", "in Paris, France")),
        ("Christmas tree at the Museum of Modern Art", "a room", ("Christmas tree",), ("at the Museum of Modern Art",)),
        ("Boeing 747 landing at Heathrow on a cold day", "a plane", ("Boeing 747",), ("at Heathrow",)),
        ("birthday party at the zoo for a friend", "a cat", (), ("at the zoo",)),
        ("we sat on my porch", "a cat", (), ("on the porch",)),
        ("the park bench was wet", "a cat", (), ()),
        ("President Barack Obama speaks", "a man", ("President Barack Obama",), ()),
        ("a boy and his $500 bike", "a boy", ("$500 bike",), ()),
        ("lunch with Sarah and Tom in Rome", "people", ("Sarah and Tom",), ("in Rome",)),
        ("Day 3: hiking", "people", (), ()),
        ("Tour de France, stage 17: Andy Schleck", "men", ("Tour de France", "stage 17", "Andy Schleck"), ()),
        ("St. Paul's Cathedral", "a dome", ("St. Paul's Cathedral",), ()),
        ("we saw St. Paul, Tom & Jerry", "a dome", ("St. Paul", "Tom & Jerry"), ()),
        ("her 30th birthday, runner #4521", "a cake", ("30th birthday", "#4521"), ()),
        ("for sale: a bike, 9,000 miles, $2,500", "a bike", ("9,000 miles", "$2,500"), ()),
        ("Amsterdam canal boats in summer", "a river", ("Amsterdam canal boats",), ()),
        ("born on Tuesday", "a baby", (), ()),
        ("Rex on the grass", "Rex on the grass", (), ()),
        ("Brown dog", "a brown dog in the sun", (), ()),
        ("", "a dog", (), ()),
    ],
)
def test_facts_of_raw_texts(raw, caption, names, places):
    assert find_facts(raw, caption) == Facts(names, places)


@pytest.mark.parametrize(
    "tags, base, phrases, special",
    [
        ("dog animal grass sky run brown photo trees", "a dog in the park", "grass|the sky|trees", None),
        ("sofa cat pillow", "a kitten on a couch", "a pillow", None),
        ("woman hat person", "a man", "a hat", None),
        ("umbrella hat", "", "an umbrella|a hat", None),
        ("retriever ball", "a dog", "a ball", "a retriever"),
        ("snow wood park", "a snowy street, a wooden house, a parked car", "", None),
        ("skier cup fish", "a man", "a cup|fish", None),
        ("pants stairs kitten", "a dog", "pants|stairs|a kitten", None),
        ("a b c d e f g", "", "", None),
    ],
)
def test_residual_tags(tags, base, phrases, special):
    things, other = find_residual([Tag(name) for name in tags.split()], content_lemmas(base), 5)
    assert [thing.phrase for thing in things] == [phrase for phrase in phrases.split("|") if phrase]
    assert (other and other.phrase) == special


def test_the_most_certain_tags_are_taken():
    names = ("hat", "tree", "boat", "umbrella", "cat", "bus", "apple")
    tags = [Tag(name, score=i / 10) for i, name in enumerate(names)]
    assert [thing.head for thing in find_residual(tags, [], 3)[0]] == ["apple", "bus", "cat"]
    assert [thing.head for thing in find_residual([*tags, Tag("snow")], [], 3)[0]] == ["hat", "tree", "boat"]


@pytest.mark.parametrize(
    "sources, text",
    [
        (Sources("1"), ""),
        (Sources("1", raw="my cat at home"), "My cat at home."),
        (Sources("1", raw="What a day!"), "What a day!"),
        (Sources("1", caption="a dog"), "A dog."),
        (Sources("1", tags=(Tag("dog"), Tag("apple"), Tag("snow"))), "A dog, an apple, and snow."),
        (Sources("1", tags=(Tag("running"),)), "Running."),
        (Sources("1", ocr="STOP"), "STOP."),
        (Sources("1", raw="...", caption=" \U0001f600 ", tags=(Tag("-"),)), ""),
        (Sources("1", raw="...", caption="Two dogs , one cat ."), "Two dogs, one cat."),
        (Sources("1", raw="iPhone"), "iPhone."),
    ],
)
def test_what_is_there_is_used(sources, text):
    assert Rules().write(sources) == text


def test_short_texts_have_two_things_and_no_facts():
    tags = tuple(map(Tag, ("tree", "hat", "boat", "snow")))
    for row in range(50):
        text = Rules(0, "short").write(Sources(str(row), "Rex in Paris, 2012", "a dog on grass", tags)).lower()
        assert "tree" in text and "hat" in text and not re.search("boat|snow|rex|paris|2012", text)


def test_lists():
    assert [join(list("abcd")[:n]) for n in range(5)] == ["", "a", "a and b", "a, b, and c", "a, b, c, and d"]


def test_composer():
    rows = [Sources("1", caption="a dog"), Sources("2"), Sources("3", raw="Paris")]

    async def collect():
        return [pair async for pair in Rules().compose(rows)]

    pairs = asyncio.run(collect())
    assert [i for i, _ in pairs] == [0, 1, 2]
    assert [(one.text, one.status) for _, one in pairs] == [("A dog.", "ok"), ("", "rejected"), ("Paris.", "ok")]
    decides = {"composer": "rules", "version": VERSION, "seed": 4, "variant": "short", "context": 50}
    assert Rules(4, "short", 50).decides == decides
    assert not Rules.remote and Rules().name == "rules"


@pytest.mark.parametrize("settings", [{"variant": "long"}, {"context": 2}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Rules(**settings)
