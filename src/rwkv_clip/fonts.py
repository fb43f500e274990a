"""Text in pictures: a font that has its characters, and lines that fit, for writing without spaces, too."""

from __future__ import annotations

import textwrap
import unicodedata
from contextlib import suppress
from functools import lru_cache
from typing import Any

DEFAULT = "DejaVu Sans"  # comes with matplotlib
PREFERRED = ("CJK", "Han", "WenQuanYi", "PingFang", "YaHei", "SimHei", "Heiti")  # in names of complete Chinese fonts
REMEDY = "no installed font has these characters; on Debian: apt-get install fonts-noto-cjk"


def find_fonts(text: str) -> tuple[list[str], str]:
    """(font families for matplotlib, in the order in which a character is looked up; what is missing, "" if nothing).

    An installed font is added where matplotlib's own lacks a character of `text`.
    """
    missing = _find_missing(text)
    found = _find_font(missing) if missing else None
    return [DEFAULT, *([found.name] if found else [])], REMEDY if missing and not found else ""


def find_font_file(text: str) -> str | None:
    """Path of an installed font that has all characters of `text` which matplotlib's own lacks, else None."""
    missing = _find_missing(text)
    found = _find_font(missing) if missing else None
    return found.fname if found else None


def _find_missing(text: str) -> frozenset[str]:
    """The characters that matplotlib's own font lacks."""
    from matplotlib.font_manager import findfont

    own = findfont(DEFAULT)
    return frozenset(c for c in text if not c.isspace() and not _has(own, c))


@lru_cache(maxsize=256)
def _find_font(characters: frozenset[str]) -> Any:
    """matplotlib's entry of an installed font with all of the characters; None if there is none."""
    return _search(characters) or (_search(characters) if _add_new_fonts() else None)


def _search(characters: frozenset[str]) -> Any:
    from matplotlib.font_manager import fontManager

    fonts = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]
    for font in sorted(fonts, key=lambda f: (not any(word in f.name for word in PREFERRED), f.weight != 400, f.name)):
        if all(_has(font.fname, c) for c in characters):
            return font
    return None


def _add_new_fonts() -> int:
    """Add the fonts that were installed after matplotlib made its list of them. Returns their number."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    listed, added = {font.fname for font in fontManager.ttflist}, 0
    for path in sorted(set(findSystemFonts()) - listed):
        with suppress(OSError, RuntimeError):
            fontManager.addfont(path)
            added += 1
    return added


@lru_cache(maxsize=64)
def _open(path: str) -> Any:
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


def _has(path: str, character: str) -> bool:
    try:
        return bool(_open(path).get_char_index(ord(character)))
    except (OSError, RuntimeError):
        return False


def wrap_text(text: str, columns: int, most: int) -> str:
    """Text in lines of up to `columns` columns, shortened to `most`; a Chinese character takes two columns."""
    if not any(unicodedata.east_asian_width(c) in "WF" for c in text):
        return textwrap.fill(textwrap.shorten(text, most), columns)
    lines, used, total = [""], 0, 0
    for character in text:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if total + width > most - 4:
            return "\n".join(lines) + ".."
        closing = unicodedata.category(character) in ("Po", "Pe", "Pf")  # never starts a line
        if used + width > columns and not closing:
            lines, used = [*lines, ""], 0
        lines[-1] += character
        used, total = used + width, total + width
    return "\n".join(line.strip() for line in lines)
