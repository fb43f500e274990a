"""Prompts: what a row's texts cannot do to them, what their hash covers, and mistakes in a user's own file."""

import dataclasses
import json

import pytest

from helpers.describe_hostile import hostile_texts
from rwkv_clip.describe.answers import Answer, BadAnswer
from rwkv_clip.describe.prompt import SHIPPED, Prompt
from rwkv_clip.describe.sources import Sources, Tag
from rwkv_clip.files import DamagedError

NAMES = ("grounded", "paper")
ROW = Sources("7", "Rex in Brighton", "a dog runs", (Tag("dog", 0.9), Tag("beach")), "SALE")


@pytest.mark.parametrize("name", NAMES)
def test_the_fixed_part_comes_first_and_the_row_last(name):
    prompt = Prompt.load(name)
    first, second = (prompt.messages(row) for row in (ROW, Sources("8", "red Vespa", "a scooter", (Tag("wall"),))))
    assert [m["role"] for m in first] == (["system", "user"] if prompt.system else ["user"])
    assert first[:-1] == second[:-1]
    one, two = first[-1]["content"], second[-1]["content"]
    shared = next(i for i in range(len(one)) if one[i] != two[i])
    assert one[:shared].rstrip("<").endswith("raw>\n" if name == "grounded" else "Raw caption:")
    assert prompt.messages(ROW, "Again.")[-1]["content"] == f"{one}\n\nAgain."


def test_the_published_line_and_what_is_missing():
    said = Prompt.load("paper").messages(ROW)[-1]["content"].splitlines()[-1]
    wanted = (
        "Raw caption:<Rex in Brighton>, synthetic caption:<a dog runs>, and highly relevant detection tags:<dog, beach>"
    )
    assert said == wanted
    said = Prompt.load("paper").messages(Sources("1"))[-1]["content"].splitlines()[-1]
    assert said == "Raw caption:<none>, synthetic caption:<none>, and highly relevant detection tags:<none>"
    assert Prompt.load("grounded").messages(Sources("1"))[-1]["content"].splitlines()[1::3] == ["none"] * 4


@pytest.mark.parametrize("name", NAMES)
def test_hostile_texts_break_no_prompt(name):
    """Wherever they stand: the frame stays, each text stays inside its fence, and nothing is sent that JSON cannot."""
    prompt = Prompt.load(name)
    frame = prompt.messages(Sources("1"))
    pieces = frame[-1]["content"].split(prompt.none)
    texts = list(hostile_texts())
    assert len(texts) >= 300
    for text in texts:
        row = Sources(text[:100], text, text, (Tag(text), Tag("dog"), Tag(text)), text)
        messages = prompt.messages(row, "Again.")
        said = messages[-1]["content"]
        assert messages[:-1] == frame[:-1] and said.endswith("\n\nAgain.")
        assert len(said) < len(frame[-1]["content"]) + 3 * 512 + 3 * 66 + 20
        json.dumps(messages, ensure_ascii=False).encode("utf-8")
        place = 0
        for piece in pieces:  # the frame, in order; what stands between has no sign of a fence
            found = said.find(piece, place)
            assert found >= 0 and not set(said[place:found]) & set("<>\n\0")
            place = found + len(piece)
        assert said.count("<") == frame[-1]["content"].count("<")


@pytest.mark.parametrize(
    "text", ["{raw}", "{caption}{tags}", "{0}", "{", "}}", "%s %(raw)s", "\\1 \\g<0>", "${raw}", "{reason}"]
)
def test_braces_and_format_strings_are_text(text):
    said = Prompt.load("grounded").messages(Sources("1", text, "C", (Tag("T"),), "O"))[-1]["content"]
    assert said.splitlines()[1] == text.replace("<", " ").replace(">", "") and said.count("C") == 1 + text.count("C")


def test_long_lists_and_texts_are_cut():
    tags = tuple(Tag(f"tag{number}") for number in range(100))
    said = Prompt.load("grounded").messages(Sources("1", "word " * 10_000, tags=tags))[-1]["content"]
    assert said.count("tag") == 20 + 2 and len(said) < 1200  # <tags> and </tags>


def change(prompt, key, value):
    return dataclasses.replace(prompt, **{key: value}).sha256


def test_the_hash_covers_all_that_decides_messages_and_answers():
    prompt = Prompt.load("grounded")
    others = [
        change(prompt, "system", prompt.system + " "),
        change(prompt, "user", prompt.user + " "),
        change(prompt, "none", "-"),
        change(prompt, "most_tags", 19),
        change(prompt, "schema", None),
        change(prompt, "hints", {**prompt.hints, "long": "Shorter."}),
        prompt.ascii().sha256,
        Prompt.load("paper").sha256,
    ]
    assert len({prompt.sha256, *others}) == len(others) + 1
    assert change(prompt, "name", "mine") == prompt.sha256 == Prompt.load("grounded").sha256


def test_answers_are_read():
    grounded, paper = Prompt.load("grounded"), Prompt.load("paper")
    assert grounded.read(Answer('{"text": "A dog runs."}')) == "A dog runs."
    assert paper.read(Answer("A dog runs.")) == grounded.read(Answer("A dog runs."), plain=True) == "A dog runs."
    for answer, reason in (
        (Answer("A dog runs."), "not JSON"),
        (Answer('{"text": "A dog runs."}', problem="cut at max_tokens"), "cut at max_tokens"),
        (Answer(json.dumps({"text": "dog " * 80})), "over the context"),
        (Answer(json.dumps({"text": "the M\u00fcller family walks a dog"})), "schema: text does not match"),
    ):
        prompt = grounded.ascii() if "match" in reason else grounded
        with pytest.raises(BadAnswer) as error:
            prompt.read(answer)
        assert error.value.reason == reason
    assert grounded.hint("not JSON") != grounded.hint("over the context") != grounded.hint("not JSON", plain=True)
    assert "not JSON" in grounded.hint("not JSON") and paper.ascii() == paper


@pytest.mark.parametrize(
    "change, words",
    [
        ({"usr": "x"}, "'usr' is no key"),
        ({"user": "no place"}, "user has no {raw}"),
        ({"user": 7}, "user is neither"),
        ({"system": "about {raw}"}, "system has {raw}"),
        ({"schema": {"type": "object"}}, "does not require a string 'text'"),
        ({"schema": {"oneOf": []}}, "oneOf is not checked"),
        ({"answer": "sentence"}, "does not require a string 'sentence'"),
        ({"hints": {"repair": "x"}}, "hints are to have"),
        ({"most_tags": -1}, "whole numbers"),
    ],
)
def test_mistakes_in_a_prompt_file_are_named(tmp_path, change, words):
    content = json.loads((SHIPPED / "grounded.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    assert Prompt.load(path).sha256 == Prompt.load("grounded").sha256
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError) as error:
        Prompt.load(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


def test_what_is_no_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"prompt: gruonded is no file and none of grounded, paper"):
        Prompt.load("gruonded")
    for text, kind in (("{", DamagedError), ("[]", ValueError)):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(kind):
            Prompt.load(tmp_path / "x.json")
