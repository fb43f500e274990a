"""Text in pictures: fonts by their characters, lines by their width."""

from types import SimpleNamespace

import pytest

from rwkv_clip import fonts
from rwkv_clip.fonts import DEFAULT, REMEDY, find_fonts, wrap_text


def test_plain_text_needs_no_other_font():
    assert find_fonts("a dog, ein Hündchen\n") == ([DEFAULT], "")


@pytest.mark.parametrize("installed", [True, False])
def test_chinese_takes_an_installed_font_or_says_what_to_install(monkeypatch, installed):
    found = SimpleNamespace(name="Some CJK", fname="x.ttc") if installed else None
    monkeypatch.setattr(fonts, "_find_font", lambda characters: found)
    assert find_fonts("狗 dog") == (([DEFAULT, "Some CJK"], "") if installed else ([DEFAULT], REMEDY))


def test_a_font_without_one_of_the_characters_is_not_taken(monkeypatch):
    monkeypatch.setattr(fonts, "_has", lambda path, character: character != "狗")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    fonts._find_font.cache_clear()
    assert fonts._find_font(frozenset("狗猫")) is None
    assert fonts._find_font(frozenset("猫"))
    fonts._find_font.cache_clear()


@pytest.mark.parametrize(
    "text, columns, most, lines",
    [
        ("a small red dog runs", 10, 100, "a small\nred dog\nruns"),
        ("一只小狗在草地上奔跑", 8, 100, "一只小狗\n在草地上\n奔跑"),
        ("一只小狗，在草地上", 8, 100, "一只小狗，\n在草地上"),  # a comma starts no line
        ("一只小狗在草地上奔跑", 8, 14, "一只小狗\n在.."),
        ("", 8, 14, ""),
    ],
)
def test_lines(text, columns, most, lines):
    assert wrap_text(text, columns, most) == lines
