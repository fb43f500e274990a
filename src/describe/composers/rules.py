"""The composer that needs no model: the caption, with what the tags and the raw text know beside it.

Every content word of its texts is in the sources, and so is every number: it joins, and never says more. That is honest
and plain, the text to fall back to where a model fails, and the one that a model has to beat.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from typing import Any, Literal

from ..cleaning import clean
from ..facts import Facts, find_facts
from ..lexicon.tables import tables
from ..residual_tags import Thing, find_residual
from ..sources import Sources
from ..tokens import CONTEXT, fits, trim
from ..words import content_lemmas, find_nouns
from .composer import Composed

VERSION = 1  # of the rules: another one writes other texts
MOST_THINGS, MOST_THINGS_SHORT = 5, 2

# A text is one form of each kind, for what there is to say. {base}: the caption; {inner}: the same within a sentence.
PLACES = ("{base} {place}", "{Place}, {inner}", "{base}, {place}")
NAMES = ("{name}: {inner}", "{base}: {name}", "{base} ({name})", "{name} - {inner}", "{base} - {name}")
THINGS = (
    "{base}, with {things}.",
    "{base}, along with {things}.",
    "{base}, together with {things}.",
    "{base}, as well as {things}.",
    "{base}, plus {things}.",
    "{base}; there {be} also {things}.",
    "{base}. There {be} also {things}.",
    "{base}. {Things} {are} there as well.",
    "{base}; {things} {are} also there.",
)
TEMPLATES = tuple(product(PLACES, NAMES, THINGS))


@dataclass(frozen=True)
class Rules:
    """Composer `rules`. seed: chooses among the templates, with the row's id. variant: `full`, or `short`: the caption
    and two things. context: CLIP tokens of the longest text, start and end included. ValueError for other values."""

    seed: int = 0
    variant: Literal["short", "full"] = "full"
    context: int = CONTEXT

    name = "rules"
    remote = False

    def __post_init__(self) -> None:
        if self.variant not in ("short", "full"):
            raise ValueError(f"variant: {self.variant!r} is not known; valid names: 'short', 'full'")
        if self.context < 3:
            raise ValueError(f"context: {self.context} leaves no room between start and end of text; use at least 3")

    @property
    def decides(self) -> dict[str, Any]:
        settings = {"seed": self.seed, "variant": self.variant, "context": self.context}
        return {"composer": self.name, "version": VERSION, **settings}

    async def compose(self, rows: Sequence[Sources]) -> AsyncIterator[tuple[int, Composed]]:
        """`rejected` only for rows without any source."""
        for i, row in enumerate(rows):
            text = self.write(row)
            yield i, Composed(text) if text else Composed(status="rejected", reason="no sources")

    async def close(self) -> None:
        """Nothing to let go of."""

    def write(self, sources: Sources) -> str:
        """The row's text: at most `context` CLIP tokens, "" only where no source says anything. A pure function."""
        raw, caption = tidy(sources.raw), tidy(sources.caption)
        base = caption or raw
        full = self.variant == "full"
        most = MOST_THINGS if full else MOST_THINGS_SHORT
        facts = find_facts(raw, caption) if caption and full else Facts()
        said = content_lemmas(" ".join((base, *facts.names, *facts.places)))
        things, special = find_residual(sources.tags, said, most)
        if special and full and caption and not facts.names and _is_subject(special, caption):
            facts = facts._replace(names=(special.phrase,))
        if not base:
            return self._close(join([thing.phrase for thing in things]) or _last_resort(sources))
        digest = blake2b(f"{self.seed} {sources.id} {self.variant}".encode("utf-8", "replace"), digest_size=4).digest()
        template = TEMPLATES[int.from_bytes(digest, "little") % len(TEMPLATES)]
        return self._fit(base, facts, things, template)

    def _fit(self, base: str, facts: Facts, things: list[Thing], template: tuple[str, str, str]) -> str:
        """The longest text that fits: the last things go first, then names, then places, then the end of the base."""
        while True:
            text = realise(base, facts, things, template)
            if fits(text, self.context):
                return text
            if things:
                things = things[:-1]
            elif facts.names:
                facts = facts._replace(names=facts.names[:-1])
            elif facts.places:
                facts = facts._replace(places=facts.places[:-1])
            else:
                return self._close(base)

    def _close(self, text: str) -> str:
        """A text alone as a sentence that fits."""
        return trim(_end(_begin(text)), self.context) if text else ""


def realise(base: str, facts: Facts, things: Sequence[Thing], template: tuple[str, str, str]) -> str:
    """Put the parts into the forms of a template, as a sentence. Where a form does not suit the base, which may hold
    several sentences or colons, the next one does."""
    place_form, name_form, things_form = template
    ended = base.endswith(("!", "?", "…", "..."))
    several = ended or any(mark in base for mark in (". ", "! ", "? "))
    base = base if ended else base.rstrip(" .,;:")
    if facts.places:
        leads = place_form.startswith("{Place}")
        if leads and (several or (facts.names and name_form.startswith("{name}"))):
            place_form = PLACES[0]
        place = " ".join(facts.places)
        base = _fill(place_form, base, place=place, Place=_begin(place))
    trails = False  # a name at the end: what is listed next would seem to belong to it
    if facts.names:
        if several and name_form.startswith("{base}"):
            name_form = NAMES[0]
        if ":" in name_form and ":" in base:
            name_form = NAMES[2]
        base = _fill(name_form, base, name=", ".join(facts.names))
        trails = name_form.endswith("{name}")
    if not things:
        return _end(_begin(base))
    if several or trails:
        things_form = _as_sentence(things_form, several)
    elif things_form == THINGS[0] and " with " in base:
        things_form = THINGS[1]
    listed = join([thing.phrase for thing in things])
    is_are = ("are" if things[0].plural else "is", "are" if things[0].plural or len(things) > 1 else "is")
    text = _fill(things_form, base, things=listed, Things=_begin(listed), be=is_are[0], are=is_are[1])
    return _begin(text.replace("!.", "!").replace("?.", "?").replace("….", "…").replace("....", "..."))


def _as_sentence(form: str, whole: bool) -> str:
    """The form, or one that does not continue the base; `whole`: one that does not share its sentence either."""
    forms = [other for other in THINGS if other.startswith("{base}." if whole else ("{base}.", "{base};"))]
    return form if form in forms else forms[THINGS.index(form) % len(forms)]


def _fill(form: str, base: str, **parts: str) -> str:
    """str.replace for each field: texts of others may hold braces."""
    filled = ""
    for piece in form.replace("{", "\0{").replace("}", "}\0").split("\0"):
        if piece == "{base}":
            filled += base
        elif piece == "{inner}":
            filled += _continue(base)
        else:
            filled += parts[piece[1:-1]] if piece[:1] == "{" else piece
    return filled


def join(phrases: Sequence[str]) -> str:
    """a; a and b; a, b, and c."""
    if len(phrases) < 3:
        return " and ".join(phrases)
    return ", ".join(phrases[:-1]) + ", and " + phrases[-1]


def tidy(text: str) -> str:
    """A source as one line of readable text, "" where it has no letter or digit; nothing changes in one that is."""
    plain = len(text) < 2000 and not any(mark in text for mark in (" .", " ,", "<", "  ", "|>"))
    if not (plain and text.isascii() and text.isprintable()):
        if not plain or any(unicodedata.category(character)[0] == "C" for character in text):
            return clean(text).text
        text = " ".join(text.split())
    return text.strip() if any(map(str.isalnum, text)) else ""


def _begin(text: str) -> str:
    """With a capital at its beginning, unless the first word has capitals within: iPhone."""
    first = text.split(" ", 1)[0]
    return text if not first[:1].islower() or first != first.lower() else text[:1].upper() + text[1:]


def _continue(text: str) -> str:
    """As it goes on within a sentence: "A dog" -> "a dog"; names keep their capital."""
    first = text.split(" ", 1)[0]
    small = first.lower()
    function = small in tables().function or small in tables().numbers
    return small + text[len(first) :] if (function and first != "I" and first[1:].islower()) or first == "A" else text


def _end(text: str) -> str:
    text = text.rstrip(" ,;:")
    return text if text.endswith((".", "!", "?", "…", '."', "。", "！", "？")) or not text else text + "."


def _is_subject(special: Thing, caption: str) -> bool:
    """Whether the tag is a more special word for the one thing that the caption begins with: a retriever for a dog."""
    first = next(iter(find_nouns(caption)), "")
    return first in special.above and re.search(rf"\b{re.escape(first)}\b", caption.lower()) is not None


def _last_resort(sources: Sources) -> str:
    """What is there when no caption, raw text or tag names a thing: text in the picture, or the tags as they are."""
    names = [name for name in (tidy(tag.name) for tag in sources.tags[:MOST_THINGS]) if name]
    return tidy(sources.ocr) or join(names)
