"""Raw web text -> text that can be read, with flags that say what was done to it.

What is noise goes (markup, addresses, file names, camera settings, credits, emoji); what may be a fact stays (numbers,
names, model numbers, money, accents). Every step reads the text once and is skipped where nothing of its kind is there.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from html import unescape
from typing import Literal
from urllib.parse import unquote

import ftfy
from ftfy.badness import is_bad

from . import file_names, patterns

VERSION = 1  # of the cleaning: another one gives other texts
MOST_CHARACTERS = 10_000  # of a raw text that are read; what is longer is no caption
LONGEST_WORD = 60  # ASCII characters; the longest name of a place in use has 58

# What a text may be flagged with, in this order. The pii_ ones mark what may tell who somebody is: a phone number is
# left in the text, an e-mail address is not.
FLAGS = (
    *("cut", "encoding", "control", "html", "special_token", "url", "pii_email", "pii_phone", "mention", "hashtag"),
    *("file_name", "id", "date", "exif", "credit", "stock", "emoji", "shouting", "punctuation"),
)

Grade = Literal["empty", "name", "phrase", "sentence"]


@dataclass(frozen=True, slots=True)
class Cleaned:
    """text: "" where nothing is left. flags: those of FLAGS that apply, in their order. grade: `empty`; `name`, one or
    two words or a name alone; `phrase`; `sentence`, with a verb as far as that can be told without a parser."""

    text: str
    flags: tuple[str, ...]
    grade: Grade


def clean(text: str) -> Cleaned:
    """Make a raw text readable. Never raises; takes a time in proportion to the length, of which MOST_CHARACTERS count
    at most."""
    found: set[str] = set()
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS].rpartition(" ")[0] or text[:MOST_CHARACTERS]
        found.add("cut")
    text = _drop_markup(_decode(text, found), found)
    text = _drop_phrases(" ".join(text.split()), found)
    text = _settle(_clean_words(text, found), found)
    text = _calm(text, found)
    return Cleaned(text, tuple(flag for flag in FLAGS if flag in found) if found else (), grade(text))


def untrusted(text: str, most: int = 512) -> str:
    """A text of somebody else for use in a prompt: one line without control characters, bidi marks, special tokens of
    chat templates and angle brackets, at most `most` characters. Words are left as they are, orders too: what they say
    is the prompt's business."""
    text = text[: 8 * most].translate(_characters)
    text = patterns.SPECIAL_TOKEN.sub(" ", text)  # the space keeps what is around from becoming another one
    text = patterns.FENCE.sub(" ", text.translate(_NO_BRACKETS))
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return (text[: most + 1].rpartition(" ")[0] or text[:most])[:most].rstrip()


# ---- characters ------------------------------------------------------------------------------------------------------

_NO_BRACKETS = str.maketrans(dict.fromkeys("<>|", " "))


class _Characters(dict):
    """Table for str.translate, filled on demand: white space becomes a space, and what has no look of its own goes
    (control, format and bidi characters, surrogates, private ones). ASCII in full width becomes ASCII."""

    def __missing__(self, code: int) -> str | None:
        character, category = chr(code), unicodedata.category(chr(code))
        if character.isspace() or category in ("Zs", "Zl", "Zp"):
            self[code] = " "
        elif category in ("Cc", "Cf", "Cs", "Co", "Cn") or character in "\ufffd\ufe0f\ufe0e\u034f":
            self[code] = None
        else:
            self[code] = chr(code - 0xFEE0) if 0xFF01 <= code <= 0xFF5E else character
        return self[code]


_characters = _Characters()


class _Symbols(dict):
    """The same for emoji, arrows and ornaments, which become a space."""

    def __missing__(self, code: int) -> str:
        emoji = 0x1F000 <= code <= 0x1FBFF or 0x2190 <= code <= 0x2BFF or code in (0x20E3, 0x2122, 0xAE, 0x3030, 0x303D)
        self[code] = " " if emoji else chr(code)
        return self[code]


_symbols = _Symbols()


def _decode(text: str, found: set[str]) -> str:
    """Undo encodings: mojibake, HTML entities, percent; then drop what is no character of a text."""
    plain = text
    if "%" in text and patterns.PERCENT.search(text):
        text = " ".join(map(_unquote, text.split(" ")))
    if not text.isascii() and is_bad(text):
        text = ftfy.fix_encoding(text)
    if text != plain:
        found.add("encoding")
    if "&" in text and patterns.ENTITY.search(text):
        for _ in range(2):  # some pages escape twice
            text = patterns.ENTITY.sub(lambda match: unescape(match[0]), text)
        found.add("html")
    if text.isascii() and text.isprintable():
        return text
    text = unicodedata.normalize("NFC", text.replace("\ufe0f", ""))
    if "\x1b" in text:
        text = patterns.TERMINAL.sub("", text)
        found.add("control")
    shown = text.translate(_characters)
    if len(shown) != len(text):
        found.add("control")
    if not shown.isascii():
        bare = shown.translate(_symbols)
        if bare != shown:
            found.add("emoji")
        shown = bare
    return shown


def _unquote(word: str) -> str:
    """The word without percent encoding, where that gives UTF-8."""
    if not patterns.PERCENT.search(word):
        return word
    try:
        return unquote(word, errors="strict")
    except UnicodeDecodeError:
        return word


def _drop_markup(text: str, found: set[str]) -> str:
    if "<" not in text and "[" not in text:
        return text
    for _ in range(3):
        text, tokens = patterns.SPECIAL_TOKEN.subn(" ", text)
        text, tags = patterns.TAG.subn(" ", text)
        if tokens:
            found.add("special_token")
        if tags:
            found.add("html")
        if not tokens and not tags:
            break
    return text


# ---- phrases and words -----------------------------------------------------------------------------------------------


def _drop_phrases(text: str, found: set[str]) -> str:
    """What takes several words: camera settings, dates, credits, the words of picture agencies."""
    lower = text.lower()
    for flag, hint, pattern in patterns.PHRASES:
        if hint.search(lower):
            shorter = pattern.sub(" ", text)
            if shorter != text:
                found.add(flag)
                text = shorter
    if patterns.DIGIT.search(text):
        settings = patterns.EXIF.findall(text)
        if len(settings) >= 2:  # one alone may be something else: ISO 9001, 50mm
            text = patterns.EXIF.sub(" ", text)
            found.add("exif")
        if patterns.PHONE.search(text):
            found.add("pii_phone")
    return text


def _clean_words(text: str, found: set[str]) -> str:
    words = text.split()
    if words and len(words) <= 3 and file_names.is_name_of_a_camera(text):
        found.add("file_name")
        return ""
    kept: list[str] = []
    tags: list[str] = []  # the run of hashtags that the text may end with
    for word in words:
        letters = word if word[-1] not in ".,!?" else word[:-1]
        if letters.isalpha() and (len(word) <= LONGEST_WORD or not word.isascii()):
            if tags:
                kept += tags
                tags = []
            kept.append(word)
            continue
        flag, clean_word = _clean_word(word, len(words))
        if flag:
            found.add(flag)
        if flag == "hashtag":
            tags += [clean_word] if clean_word else []
        elif clean_word:
            kept += [*tags, clean_word]
            tags = []
    if tags:
        kept = _add_tags(kept, tags)
    if found & patterns.LEAVES_ENDS:
        while kept and kept[-1].lower().strip(",:;-(|") in patterns.OPEN_ENDS:
            kept.pop()
        while kept and kept[0].lower() in patterns.OPEN_STARTS:
            del kept[0]
    return " ".join(kept)


def _add_tags(kept: list[str], tags: list[str]) -> list[str]:
    """Hashtags at the end, as a list; those whose words are in the text already say nothing."""
    said = " ".join(kept).lower()
    new = [tag for tag in dict.fromkeys(tags) if tag.lower() not in said]
    if kept and new and kept[-1][-1].isalnum() and kept[-1].lower() not in patterns.OPEN_ENDS:
        kept = [*kept[:-1], kept[-1] + ","]
    return [*kept, *(tag + "," for tag in new[:-1]), *new[-1:]]


def _clean_word(word: str, count: int) -> tuple[str, str]:
    """(flag or "", what is left of the word) for one of `count` words that is not letters alone."""
    if "@" in word:
        if word == "@":
            return "", "at"
        if patterns.EMAIL.search(word[:300]):
            return "pii_email", ""
        if word.lstrip("(['\".:-")[:1] == "@":
            return "mention", ""
    if "." in word or "://" in word:
        url = patterns.URL.search(word[:300])
        if url:
            return "url", word[: url.start()].rstrip("(<[:=-")
    if "#" in word:
        match = patterns.HASHTAG.fullmatch(word[:300])
        if match:
            return "hashtag", file_names.split_hashtag(match[1])
    if word in patterns.EMOTICONS:
        return "emoji", ""
    if len(word) > LONGEST_WORD and word.isascii():
        return "id", ""
    return file_names.clean_word(word, count)


# ---- the whole -------------------------------------------------------------------------------------------------------


def _settle(text: str, found: set[str]) -> str:
    """Punctuation and white space as a reader expects them."""
    if not patterns.UNSETTLED.search(text):
        return text
    once = text
    for pattern, instead in patterns.PUNCTUATION:
        text = pattern.sub(instead, text)
    text = " ".join(text.split())
    text = text.strip(patterns.EDGES).lstrip(patterns.LEFT_EDGES).strip()
    if text != once:
        found.add("punctuation")
    return text if any(map(str.isalnum, text)) else ""


def _calm(text: str, found: set[str]) -> str:
    """SHOUTED WORDS in sentence case. Known acronyms and words with digits stay."""
    capitals = len(patterns.CAPITAL.findall(text)) if text.isascii() else sum(map(str.isupper, text))
    words = text.split()
    if capitals < 8 or len(words) < 2 or capitals < 0.8 * sum(map(str.isalpha, text)):
        return text
    found.add("shouting")
    calm = [
        word if word.strip(".,;:!?'\"()") in patterns.ACRONYMS or any(map(str.isdigit, word)) else word.lower()
        for word in words
    ]
    text = " ".join(calm)
    return text[:1].upper() + text[1:]


def grade(text: str) -> Grade:
    """How much of a text a clean text is."""
    if not text:
        return "empty"
    words = text.split()
    if not text.isascii() and patterns.NO_SPACES.search(text):
        return "sentence" if text.endswith(("。", "！", "？")) else "phrase"
    if len(words) <= 2:
        return "name"
    lower = {word.strip(".,;:!?\"()'") for word in text.lower().split()}
    if len(words) >= 4 and lower & patterns.FINITE:
        return "sentence"
    if len(words) <= 6 and all(word[0].isupper() or word[0].isdigit() or word in patterns.CONNECTORS for word in words):
        return "name"
    return "sentence" if len(words) >= 6 and text.endswith((".", "!", "?")) else "phrase"
