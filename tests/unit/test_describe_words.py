"""Words: base forms, nouns that a picture can show, numbers, names, and what supports a noun."""

import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_clip.describe import words
from rwkv_clip.describe.lexicon import tables as lexicon
from rwkv_clip.describe.sources import Sources, Tag

WORDNET = Path("/usr/share/wordnet")  # Debian's package wordnet-base
FOLDER = Path(lexicon.__file__).parent


@pytest.mark.parametrize(
    "word, base",
    [
        ("Dogs", "dog"), ("dog's", "dog"), ("boys’", "boy"), ("men", "man"), ("women", "woman"), ("Children", "child"),
        ("people", "people"), ("berries", "berry"), ("knives", "knife"), ("glasses", "glass"), ("buses", "bus"),
        ("running", "run"), ("ran", "run"), ("jumped", "jump"), ("tried", "try"), ("riding", "ride"), ("sat", "sit"),
        ("building", "building"), ("painting", "painting"), ("bigger", "big"), ("happiest", "happy"),
        ("grass", "grass"), ("jeans", "jeans"), ("sunglasses", "sunglasses"), ("firemen", "fireman"),
        ("arms", "arm"), ("crosses", "cross"), ("quokkas", "quokka"), ("x", "x"), ("tennis", "tennis"),
    ],
)  # fmt: skip
def test_lemma(word, base):
    assert words.lemma(word) == base


@pytest.mark.parametrize(
    "text, nouns",
    [
        ("A brown dog runs through the snow.", ["dog", "snow"]),
        ("People watch the race while boys play with a ball.", ["people", "boy", "ball"]),
        ("A man in a red jacket walks his dogs.", ["man", "jacket", "dog"]),
        ("She is painting a wall.", ["wall"]),
        ("A painting hangs on the wall.", ["painting", "wall"]),
        ("He wants to watch.", []),
        ("A fish in a tank.", ["fish", "tank"]),
        ("A group of people in the background of the photo.", ["people"]),
        ("A herd of elephants crosses the road.", ["elephant", "road"]),
        ("Two hot dogs and an ice cream.", ["hot dog", "ice cream"]),
        ("A traffic light at night.", ["traffic light"]),
        ("The orange ball and the light blue car.", ["ball", "car"]),
        ("A box of oranges.", ["box", "orange"]),
        ("The bride and the groom stand in a park.", ["bride", "groom", "park"]),
        ("A watch on a table.", ["watch", "table"]),
        ("The mug, made by hand, stands on a shelf.", ["mug", "shelf"]),
        ("She looks at the camera.", []),
        ("She holds a camera.", ["camera"]),
        ("A dog, a dog and another dog.", ["dog"]),
        ("It is lovely and very peaceful there.", []),
        ("", []),
    ],
)
def test_nouns_that_a_picture_can_show(text, nouns):
    assert words.find_nouns(text) == nouns


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("two dogs, 3 cats and a bird", ["2", "3"]),
        ("Twenty-one people, thirty two cars", ["21", "32"]),
        ("two hundred, three thousand, five dozen", ["200", "3000", "60"]),
        ("1,000 men and 1,000,000.50 women", ["1000", "1000000.5"]),
        ("3.50 or 3,5", ["3.5", "3.5"]),
        ("the 3rd of May, the third man", ["3", "3"]),
        ("F-16, 10-year-old, 7am, 2-1, 1965", ["16", "10", "7", "2", "1", "1965"]),
        ("007 and 0", ["7", "0"]),
        ("٣ dogs", ["3"]),
        ("one of the men", []),
        ("twenty-one", ["21"]),
        ("a dog", []),
    ],
)
def test_numbers(text, numbers):
    assert words.find_numbers(text) == numbers


@pytest.mark.parametrize(
    "text, names",
    [
        ("The Eiffel Tower in Paris at night", ["Eiffel Tower", "Paris"]),
        ("Paris at night", ["Paris"]),
        ("Dogs play in the park", []),
        ("Kayakers paddle on Lake Tahoe", ["Lake Tahoe"]),
        ("A T-shirt and a TV. I see Tom's dog", ["Tom"]),
        ("Sunset At The Beach In Honolulu", ["Honolulu"]),
        ("In May, the Arsenal team won", ["May", "Arsenal"]),
        ("a man, Peter, and his wife Anna", ["Peter", "Anna"]),
        ("no capitals in paris", []),
        ("", []),
    ],
)
def test_names(text, names):
    assert words.find_names(text) == names


@pytest.mark.parametrize(
    "noun, many",
    [
        ("dog", "dogs"), ("box", "boxes"), ("city", "cities"), ("boy", "boys"), ("man", "men"), ("woman", "women"),
        ("person", "people"), ("child", "children"), ("knife", "knives"), ("sheep", "sheep"), ("bench", "benches"),
        ("fire truck", "fire trucks"), ("jeans", "jeans"), ("dogs", "dogs"), ("human", "humans"), ("bus", "buses"),
    ],
)  # fmt: skip
def test_plural(noun, many):
    assert words.plural(noun) == many


@pytest.mark.parametrize(
    "phrase, article",
    [
        ("dog", "a"), ("apple", "an"), ("hour", "an"), ("unicorn", "a"), ("umbrella", "an"), ("European city", "a"),
        ("MRI scan", "an"), ("SUV", "an"), ("UFO", "a"), ("8 year old", "an"), ("11 men", "an"), ("x-ray", "an"),
        ("one-way street", "a"), ("uniform", "a"), ("old uniform", "an"), ("", "a"), ("house", "a"),
    ],
)  # fmt: skip
def test_article(phrase, article):
    assert words.article(phrase) == article


def test_kinds_of_words():
    assert words.is_colour("Red") and not words.is_colour("dog")
    assert words.is_posture("sitting") and not words.is_posture("dog")
    assert words.is_content("dog") and not words.is_content("The")
    assert words.content_lemmas("The dogs of the men") == ["dog", "man"]
    assert words.split_words("The dog's 2 T-shirts: 1,000!") == ["The", "dog's", "2", "T-shirts", "1,000"]


def test_relations():
    assert {"animal", "mammal"} <= words.hypernyms("dog") and "dog" not in words.hypernyms("dog")
    assert "sofa" in words.synonyms("couch") and "couch" not in words.synonyms("couch")
    assert words.hypernyms("quokkas") == words.synonyms("quokkas") == frozenset()


SOURCES = Sources("1", "a snowboarder in the Alps", "A couple of dogs in a foggy forest", (Tag("fire truck"),), "CAFE")


@pytest.mark.parametrize("noun", ["snowboarder", "snowboard", "man", "dog", "animal", "vehicle", "fog", "cafe", "hand"])
def test_supported(noun):
    assert words.Support.of(SOURCES).holds(noun)


@pytest.mark.parametrize("noun", ["cat", "chef", "surfboard", "car", "beach", "hot dog", "house", "wheelbarrow"])
def test_unsupported(noun):
    assert not words.Support.of(SOURCES).holds(noun)


def test_nothing_supports_nothing():
    support = words.Support.of(Sources("1"))
    assert not support.holds("person") and not support.holds("hand") and not support.holds("")


def test_the_lexicon_is_read_when_a_word_is_asked_for():
    code = (
        "import rwkv_clip.describe.verify; from rwkv_clip.describe.lexicon.tables import tables; "
        "assert tables.cache_info().misses == 0; from rwkv_clip.describe.words import lemma; "
        "assert lemma('dogs') == 'dog' and tables.cache_info().misses == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_files_are_whole():
    known = lexicon.tables()
    assert len(known.nouns) > 14_000
    for place in range(len(known.parents)):
        assert place in known.above(place)
        assert all(0 <= whole < len(known.parents) for whole in known.wholes_of(place))
    tags = lexicon.read_lines("tags.txt")
    assert 2_000 <= len(tags) <= 4_500 and tags == sorted(set(tags)) and all(tags)
    assert "Princeton" in (FOLDER / "LICENSE.wordnet").read_text() and "3.0" in (FOLDER / "LICENSE.wordnet").read_text()


@pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="WordNet's files are not on this machine")
def test_the_files_are_what_the_command_makes(tmp_path):
    command = [sys.executable, "-m", "rwkv_clip.describe.lexicon", str(WORDNET), "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["irregular.txt", "nouns.txt", "tags.txt", "words.txt"]
    for name in made:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), f"{name}: run the command again"
