"""Words that were file names, slugs, numbers of pictures or hashtags -> words."""

from __future__ import annotations

import re

_EXTENSION = re.compile(
    r"\.(?:jpe?g|png|gif|bmp|tiff?|webp|heic|raw|cr2|nef|svg|psd|avi|mp4|mov|pdf|html?|php|aspx?)$", re.IGNORECASE
)
# Names that cameras, phones and programs give: IMG_1234, DSC0001, DSCN0042, P1010001, GOPR0012, WP_20130101_001.
_CAMERA = re.compile(
    r"_?(?:(?:img|image|imag|dsc[a-z]?|pict?|picture|photo|foto|mvi|gopr|dcp|dcim|cimg|sany|kif|wp|vid|video|pano|mvc|"
    r"pxl|mg|scan|fullsizerender|screen[-_ ]?shot|untitled|unnamed|file|fb_img|received)"
    r"[-_ ]?(?:e?\d{3,}|\d{4}[-_:]\d\d)|p\d{7})[\w.:()~-]*",
    re.IGNORECASE,
)
# Whole texts that say nothing: what a program calls a picture without a name.
_NAMELESS = re.compile(
    r"(?:untitled|unnamed|no title|no image|fullsizerender|screen[-_ ]?shot|image|img|picture|pic|photo|foto|scan|file|"
    r"video|thumbnail|null|undefined|none|n/a|alt|(?:image|photo|alt) (?:description|caption|text))"
    r"[-_ ]?(?:#|no\.? ?)?\(?\d{0,6}\)?",
    re.IGNORECASE,
)
_VERSIONS = {"copy", "(large)", "(small)", "(medium)", "edited", "edit", "resized", "(2)", "(1)", "web", "final"}
_HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_PARTS = re.compile(r"[_+]+")
_PLUS = re.compile(r"[A-Za-z]{2}\+[A-Za-z]{2}")
_PLUSES = re.compile(r"\w\+\w+\+\w")
_YEAR = re.compile(r"(?:1[6-9]|20)\d\d")
_SIZE = re.compile(r"\d{2,5}x\d{2,5}", re.I)
_SWITCH = re.compile(r"(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])")
_DULL_TAGS = {  # hashtags about the service, not the picture
    *("instagood", "photooftheday", "picoftheday", "instadaily", "instagram", "instamood", "igers", "iphoneonly"),
    *(
        "iphoneography",
        "tbt",
        "nofilter",
        "followme",
        "follow",
        "like4like",
        "likeforlike",
        "l4l",
        "f4f",
        "tagsforlikes",
    ),
    *("instalike", "webstagram", "iphonesia", "squareformat", "foursquare", "uploaded", "flickriosapp", "potd", "ig"),
}


def split_hashtag(tag: str) -> str:
    """GoldenRetriever -> golden retriever; Paris and NYC as they are; "" for tags about the service."""
    tags = [part for part in tag.split("#") if part and part.lower() not in _DULL_TAGS]
    return ", ".join(map(_split_humps, tags))


def _split_humps(tag: str) -> str:
    parts = [hump for part in _PARTS.split(tag) for hump in (_HUMP.findall(part) or [part])]
    if len(parts) < 2:
        return tag
    return " ".join(part if part.isupper() and len(part) > 1 else part.lower() for part in parts)


def is_name_of_a_camera(text: str) -> bool:
    """Whether all of the text is what a camera or a program called a picture."""
    first, _, rest = text.partition(" ")
    return bool(_NAMELESS.fullmatch(text) or (_CAMERA.fullmatch(first) and (not rest or rest.lower() in _VERSIONS)))


def clean_word(word: str, count: int) -> tuple[str, str]:
    """(flag or "", what is left) of one of `count` words: nothing of a camera's file name, the words of any other."""
    core = word.strip("()[]{}\"',;:!?")
    if not core:
        return "", word
    name = _EXTENSION.sub("", core)
    if (
        name != core
        or "_" in core
        or (count == 1 and (core.count("-") >= 2 or _PLUS.search(core)))
        or _PLUSES.search(core)
    ):
        if _CAMERA.fullmatch(name):
            return "file_name", ""
        words = _split_name(name, name != core or count == 1)
        changed = words != core
        return ("file_name" if changed else ""), (word.replace(core, words) if changed else word)
    if _CAMERA.fullmatch(core):
        return "file_name", ""
    if _is_number_of_a_picture(core):
        return "id", ""
    return "", word


def _split_name(name: str, whole: bool) -> str:
    """red_bike-01 -> red bike. whole: the word was a file's name, where hyphens stand for spaces too."""
    if not any(map(str.isalpha, name)):
        return name if _YEAR.fullmatch(name) else ""
    parts = [part for part in _PARTS.split(name) if part]
    if whole and (name.count("-") >= 2 or not any("-" in part and part[-1].isalpha() for part in parts)):
        parts = [piece for part in parts for piece in part.split("-") if piece]
    if len(parts) < 2 and whole:
        return "" if _NAMELESS.fullmatch(name) or (parts and _is_number_of_a_picture(parts[0])) else name
    words = [part for part in parts if not _is_clutter(part)]
    return " ".join(words)


def _is_clutter(part: str) -> bool:
    """Counters, sizes and numbers in a file's name; years stay."""
    number = part.isdigit() and not _YEAR.fullmatch(part)
    return number or bool(_SIZE.fullmatch(part)) or _is_number_of_a_picture(part) or bool(_CAMERA.fullmatch(part))


def _is_number_of_a_picture(core: str) -> bool:
    """12345678 or 3f2a9bc04d: digits without end, or letters and digits in turns."""
    if core.isdigit():
        return len(core) >= 8
    return len(core) >= 10 and core.isascii() and core.isalnum() and len(_SWITCH.findall(core)) >= 3
