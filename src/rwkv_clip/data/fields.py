"""Which fields of a row hold the texts, ready token ids and the picture; decided once, from the first rows.

Names that the user gives are taken as they are. Otherwise the usual names are tried in order, and the first that the
source has is used for all its rows: a row without it is not given another text.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .records import TEXT_NAMES
from .rows import IMAGE_ENDINGS, Row

# Other names of the two texts. `caption` is the raw text where it is the first of these, else the synthetic one.
RAW_FIELDS = ("raw", "raw_caption", "caption", "captions", "text", "txt", "title")
SYNTHETIC_FIELDS = ("synthetic", "ofa", "caption")
CAPTION_FIELDS = ("captions", "caption", "title", "text", "raw", "raw_caption", "txt")  # where all captions are wanted
IMAGE_FIELDS = ("image", "images", "image_path", "filepath", "file_name", "filename", "path", *IMAGE_ENDINGS)
TOKEN_FIELDS = ("tokens", "texts")  # `texts` is what the published YFCC15M calls them
GUESS = 100  # rows that the choice is made from
SHOWN = 30  # names of fields in a message

Found = TypeVar("Found")


class FieldError(ValueError):
    """No row has what is needed. `wanted`: fields that the user named; a later row may have one of them."""

    def __init__(self, message: str, wanted: Iterable[str] = ()):
        super().__init__(message)
        self.wanted = tuple(wanted)


def find_field(fields: dict[str, Any], path: str) -> Any:
    """fields["a"], fields["a.0"] or fields["a"][0] for the path "a.0"; None where there is nothing."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for step in path.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, (list, tuple)) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def find_tokens(fields: dict[str, Any], field: str) -> np.ndarray | None:
    """Token ids at `field` as a float64 array of the shape they have there; None if there are no numbers."""
    value = find_field(fields, field)
    if isinstance(value, (list, np.ndarray)) and len(value):
        try:
            return np.asarray(value, np.float64)
        except (TypeError, ValueError):  # a list of texts, for example
            pass
    return None


def list_fields(rows: Iterable[Row]) -> str:
    """The names of all fields, for a message."""
    names = list(dict.fromkeys(str(key) for row in rows for key in row.fields))
    return (", ".join(names[:SHOWN]) + ", .." * (len(names) > SHOWN)) or "no fields at all"


# ---- texts and token ids ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """The texts of a record: their names, raw first, and the field that each one is found in."""

    names: tuple[str, ...]
    fields: tuple[str, ...]

    @classmethod
    def parse(cls, entries: tuple[str, ...]) -> Texts:
        """'raw', 'raw=captions.0' or 'captions.0' (named by its place: raw, synthetic, generated)."""
        names, fields = [], []
        for place, entry in enumerate(entries):
            name, equals, field = entry.partition("=")
            if not equals:
                field = name
                if "." in name:
                    name = name_text(place)
            if not name or not field:
                raise ValueError(f"texts: {entry!r} is not NAME, NAME=FIELD or FIELD.NUMBER")
            names.append(name)
            fields.append(field)
        if not names or names[0] != "raw" or len(set(names)) != len(names):
            raise ValueError(
                f"texts: {list(entries)} gives the names {names}; they must differ and begin with raw, the "
                f"text that stands in for a missing one; for example raw=caption synthetic=blip"
            )
        return cls(tuple(names), tuple(fields))


def name_text(place: int) -> str:
    """Name of the text at `place`, where it has no other."""
    return TEXT_NAMES[place] if place < len(TEXT_NAMES) else f"view{place + 1}"  # as earlier releases name it


class Choice(NamedTuple):
    """What is taken from every row: the ready token ids of `token_field`, or else `texts`. `aside`: fields that look
    like more of either, but are not taken."""

    texts: Texts
    token_field: str | None = None
    aside: tuple[str, ...] = ()


def choose_fields(rows: list[Row], entries: tuple[str, ...], token_field: str | None, context: int) -> Choice:
    """From the first rows, and the entries of --texts. ValueError, with the fields there are, where one is missing."""
    named = Texts.parse(entries) if entries else None
    if not rows:
        return Choice(named or Texts.parse(TEXT_NAMES[:1]), token_field)
    if token_field or named is None or named.names == named.fields:  # fields that are named mean texts
        field, count = _choose_tokens(rows, named, token_field, context)
        if field:
            return Choice(named or Texts.parse(TEXT_NAMES[:count]), field)
    texts = _choose_texts(rows, named)
    usual = dict.fromkeys((*RAW_FIELDS, *SYNTHETIC_FIELDS, *TEXT_NAMES, *TOKEN_FIELDS))
    return Choice(texts, None, () if named else tuple(name for name in usual if name not in texts.fields))


def _choose_tokens(
    rows: list[Row], named: Texts | None, token_field: str | None, context: int
) -> tuple[str | None, int]:
    """(the field of ready token ids, texts in it); (None, 0) where there are none, or what looks like them does not fit
    and there are texts beside it."""
    for field in (token_field,) if token_field else TOKEN_FIELDS:
        found = [(row, ids.shape) for row in rows if (ids := find_tokens(row.fields, field)) is not None]
        if not found:
            continue
        texts = not token_field and _choose([row for row, _ in found], RAW_FIELDS) is not None
        row, shape = found[0]
        count = shape[0] // context if len(shape) == 1 else shape[0]
        fits = shape in ((count * context,), (count, context))
        fits &= count == len(named.names) if named else 1 <= count <= len(TEXT_NAMES)
        if fits and not (texts and any(other != shape for _, other in found)):
            return field, count
        if not texts:
            wanted = f"the {len(named.names)} of --texts" if named else "one to three"
            raise ValueError(
                f"{row.name}: {field}: numbers of shape {shape} are not {wanted} texts of --context {context}, that is "
                f"(texts * {context},) or (texts, {context}); give the --context they were made with, or --texts "
                f"raw=FIELD to take texts instead"
            )
    if token_field:
        message = f"token_field: no row has numbers in {token_field!r}; they have {list_fields(rows)}"
        raise FieldError(message, [token_field])
    return None, 0


def _choose_texts(rows: list[Row], named: Texts | None) -> Texts:
    places: dict[str, str] = {}
    for name, field in zip(named.names, named.fields) if named else zip(TEXT_NAMES, TEXT_NAMES):
        usual = {"raw": RAW_FIELDS, "synthetic": SYNTHETIC_FIELDS}.get(field, (field,))
        usual = [other for other in usual if other == field or other not in places.values()]
        place = _choose(rows, usual)
        if place is None and name == TEXT_NAMES[0]:  # texts that are all empty will be counted as such
            present = {other for other in usual for row in rows if find_field(row.fields, other) is not None}
            place = next((other for other in usual if other in present), None)
        if place is None and (named or name == TEXT_NAMES[0]):
            others = f" (nor {', '.join(usual[1:])})" if usual[1:] else ""
            leave = "" if name == TEXT_NAMES[0] else f", or leave {name} out"
            whose = "no row has" if named else f"none of the first {len(rows)} rows has"
            raise FieldError(
                f"texts: {whose} a text {field!r}{others}; they have {list_fields(rows)}; say where it is, "
                f"--texts {name}=FIELD{leave}",
                usual if named else (),
            )
        if place is not None:
            places[name] = place
    return Texts(tuple(places), tuple(places.values()))


def _choose(rows: list[Row], names: Iterable[str]) -> str | None:
    """The first of the names under which some row has something, a text that is not empty for example."""
    return next((name for name in names if any(_is_there(row, name) for row in rows)), None)


def _is_there(row: Row, field: str) -> bool:
    value = first_text(find_field(row.fields, field))
    return value is not None and not (isinstance(value, str) and not value.strip())


def first_text(value: Any) -> Any:
    """Of a list of captions the first one, else the value."""
    if isinstance(value, (list, tuple)):
        return value[0] if value else None
    return value


def check_image_field(rows: list[Row], image_field: str | None) -> None:
    """FieldError where no row has a picture or its path."""
    names = (image_field,) if image_field else IMAGE_FIELDS
    inside = not image_field and any(row.image is not None for row in rows)
    if not rows or inside or any(find_field(row.fields, name) is not None for row in rows for name in names):
        return
    whose = "no row has" if image_field else f"none of the first {len(rows)} rows has"
    others = "" if image_field else f" (nor {', '.join(names[1:])})"
    raise FieldError(
        f"image_field: {whose} a field {names[0]!r}{others}; they have {list_fields(rows)}; say where the picture or "
        f"its path is, --image-field FIELD",
        names if image_field else (),
    )


# ---- conditions ------------------------------------------------------------------------------------------------------

_CONDITION = re.compile(r"([^=!<>]+)(!=|==|>=|<=|=|>|<)(.*)", re.DOTALL)
_ORDERS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Condition:
    """`field=value`, `field=one,two`, `field!=value`, or `field>=number` (also > <= <): which rows to take."""

    field: str
    sign: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """ValueError if `text` has another form."""
        match = _CONDITION.fullmatch(text)
        if not match or not match[1].strip():
            raise ValueError(
                f"where: {text!r} is not FIELD=VALUE, FIELD=VALUE,VALUE, FIELD!=VALUE or FIELD>=NUMBER (> <= <)"
            )
        field, sign, values = match[1].strip(), match[2].replace("==", "="), match[3]
        if sign in _ORDERS and _to_number(values) is None:
            raise ValueError(f"where: {text!r}: {values.strip()!r} is not a number")
        return cls(field, sign, tuple(value.strip() for value in values.split(",")))

    def __str__(self) -> str:
        return f"{self.field}{self.sign}{','.join(self.values)}"

    def judge(self, row: Row) -> tuple[bool, str | None]:
        """(whether to take the row, what is to be counted because the row gives no answer)."""
        value, reason = find_field(row.fields, self.field), None
        if self.sign in _ORDERS:
            number = _to_number(value)
            taken = number is not None and _ORDERS[self.sign](number, _to_number(self.values[0]))
            if number is None and value is not None:
                reason = f"{self.field} is not a number"
        else:
            taken = any(_denotes(value, text) for text in self.values) == (self.sign == "=")
        if value is None:
            reason = f"no field {self.field}"
        return taken, reason and f"{self}: {reason}, {'taken' if taken else 'left out'}"


def _denotes(value: Any, text: str) -> bool:
    """Whether `text` denotes this value: numbers are compared by value (1 is 1.0), true and false in any case, bytes as
    the text that they are, dates and other types of tables as Python prints them, texts exactly."""
    if isinstance(value, str):
        return value == text
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if value is None or isinstance(value, (list, dict)):
        return text == json.dumps(value, default=str)
    if isinstance(value, bytes):
        return value == text.encode("utf-8", "surrogateescape")
    if text == str(value):
        return True
    try:
        return isinstance(value, (int, float, Decimal)) and value == Decimal(text)
    except InvalidOperation:  # no number
        return False


def _to_number(value: Any) -> float | None:
    """None for what is no number, NaN included."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or number != number else number


def survey(rows: Iterator[Row], conditions: list[Condition], choose: Callable[[list[Row]], Found]) -> Found:
    """What `choose` makes of the first rows that meet the conditions.

    ValueError, with the fields there are, for a condition on a field that no row has, and `choose`'s FieldError. Where
    a field that the user named is not in the first rows, all are searched before that is reported.
    """
    unseen, there = {condition.field for condition in conditions}, {}

    def note(row: Row) -> None:
        unseen.difference_update({field for field in unseen if find_field(row.fields, field) is not None})
        if unseen:
            there.update(dict.fromkeys(row.fields))

    def select() -> Iterator[Row]:
        for row in rows:
            note(row)
            if all(condition.judge(row)[0] for condition in conditions):
                yield row

    selected, wanted = select(), ()
    sample = list(islice(selected, GUESS))
    while True:
        try:
            choice = choose(sample)
            break
        except FieldError as error:
            if error.wanted == wanted:  # the row added last does not help
                sample.pop()
            wanted = error.wanted
            having = (row for row in selected if any(_is_there(row, name) for name in wanted))
            if not wanted or (row := next(having, None)) is None:
                raise
            sample.append(row)
    while unseen and (row := next(rows, None)) is not None:
        note(row)
    if unseen and there:
        wrong = next(condition for condition in conditions if condition.field in unseen)
        fields = list_fields([Row("", there, None)])
        raise ValueError(f"where: {str(wrong)!r}: no row has a field {wrong.field!r}; they have {fields}")
    return choice
