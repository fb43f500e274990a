"""Manifests and their rows: JSON lines, JSON (a list, COCO's, Karpathy's), comma- and tab-separated tables.

Every reader takes a file and a `Skip`, and yields a `Row` for each entry, in the file's order. What a picture or text
is good for is judged later: here a row is used, or holds a `Problem` in its place, or SourceError names the place.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import DATA
from ..files import parse_json, read_bytes
from .image import MAX_BYTES

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
MAX_TEXT_BYTES = 1 << 20
MAX_LINE = 48 << 20  # the largest picture in base64, and some text
MAX_JSON = 1 << 30  # a .json is parsed as a whole
MAX_DEPTH = 100  # of lists in lists; what is nested deeper cannot be handed to a worker process
SHORT = 200  # bytes that hold neither a picture nor anything so deep

# How pictures begin in base64: JPEG, PNG, GIF, RIFF (WebP), BMP, TIFF (both byte orders), AVIF.
_BASE64 = re.compile(
    r"(?:data:image/[\w.+-]+;base64,)?(?=[/_]9j[/_]|iVBORw0KGg|R0lGOD|UklGR|Qk[0-3]|SUkq|TU0AK|AAAA..Z0eXBhdml)"
)
_ENDING = r"\.(?:" + "|".join(IMAGE_ENDINGS) + ")"
_PATH = re.compile(_ENDING + r"\s*$", re.IGNORECASE)
_ROW_INSIDE = re.compile(r"\n[^\n]*" + _ENDING + r'"?\s*(?:,|\n|$)', re.IGNORECASE)  # in a text of several lines


class SourceError(ValueError):
    """An input file is missing, damaged or not of a known kind; names file and place."""

    exit_code = DATA


class Problem(str):
    """In place of a value that could not be had: the reason, by which the row is counted as skipped."""


MISSING = Problem("missing image")
UNLISTED = Problem("captions of a picture that is not listed")


class Row(NamedTuple):
    """One image with its texts, as found: `fields` by name.

    folder: that names of files in the fields are relative to; None: they are not names of files here.
    image: the picture that came with the row, which no field replaces; None: a field names or holds it.
    """

    name: str
    fields: dict[str, Any]
    folder: Path | None
    image: bytes | Problem | None = None


def row_maker(file: Path) -> Callable[[str, Any], Row]:
    """(place, fields) -> the row at that place of a manifest. SourceError if the fields are no object."""
    name, folder = file.name, file.parent

    def make(place: str, fields: Any) -> Row:
        if not isinstance(fields, dict):
            raise SourceError(f"{file}: {place} is a {type(fields).__name__}, not an object with named fields")
        return Row(f"{name} {place}", fields, folder)

    return make


class Skip:
    """Counts down the rows to pass over, across files."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def pass_over(self, rows: int) -> bool:
        """Whether all of so many rows are to be passed over; then they are counted."""
        if self.left < rows:
            return False
        self.left -= rows
        return True


def load_json(data: bytes, file: Path, place: str) -> Any:
    """The JSON value in `data`. SourceError names file and place."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        try:
            value = parse_json(data, f"{file}: {place}")  # says what is wrong
        except ValueError as error:
            raise SourceError(str(error)) from None
    if len(data) > SHORT and data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise SourceError(f"{file}: {place}: JSON nested more than {MAX_DEPTH} deep; flatten it or leave it out")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


# ---- pictures in base64 ----------------------------------------------------------------------------------------------


def decode_picture(text: str) -> bytes | Problem | None:
    """The picture that `text` holds in base64, with or without `data:image/...;base64,`; None if it holds none."""
    start = _BASE64.match(text)
    if not start:
        return None
    text = text[start.end() :].strip()
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        return Problem("image too large")
    try:
        return base64.b64decode(text, altchars=b"-_" if "-" in text or "_" in text else None, validate=True)
    except (binascii.Error, ValueError):
        return Problem("image is not complete base64")


def take_pictures(row: Row) -> Row:
    """`row` with its base64 decoded. The only picture is the row's own, unless a field names a file of a picture."""
    long = [field for field, value in row.fields.items() if type(value) is str and len(value) > SHORT // 2]
    found = {field: picture for field in long if (picture := decode_picture(row.fields[field])) is not None}
    if not found:
        return row
    named = any(type(value) is str and len(value) < 4096 and _PATH.search(value) for value in row.fields.values())
    own = next(iter(found.values())) if len(found) == 1 and not named else None
    return row._replace(fields={**row.fields, **found}, image=own)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def iterate_lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of a file. SourceError for a line beyond MAX_LINE, before it is read whole."""
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise SourceError(f"{file}: line {number} has more than {MAX_LINE:,} bytes; is it a text file?")
        yield number, line


def read_jsonl(file: Path, skip: Skip) -> Iterator[Row]:
    """One object per line; blank lines are no rows."""
    make = row_maker(file)
    with open(file, "rb") as stream:
        for number, line in iterate_lines(stream, file):
            if not line.strip() or skip():
                continue
            place = f"line {number}"
            row = make(place, load_json(line, file, place))
            yield row if len(line) <= SHORT else take_pictures(row)


def read_json(file: Path, skip: Skip, content: Entries | None = None) -> Iterator[Row]:
    """A list of objects, COCO's {"images", "annotations"} or Karpathy's {"images": [{"sentences"}]}.

    content: what `load_entries` gave, where that is known already.
    """
    make = row_maker(file)
    for number, (fields, problem) in enumerate((content or load_entries(file)).entries):
        if not skip():
            row = make(f"entry {number}", fields)
            yield row._replace(image=problem) if problem else take_pictures(row)


class Entries(NamedTuple):
    """A .json: (fields, problem of the picture) of every entry, and the name that the file gives itself."""

    form: str  # "list", "coco" or "karpathy"
    entries: Iterable[tuple[Any, Problem | None]]
    name: str | None = None


def load_entries(file: Path) -> Entries:
    """Parse a .json of any of the three forms. SourceError for anything else."""
    with open(file, "rb") as stream:
        start = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] not in (b"[", b"{"):
        raise SourceError(f"{file}: not JSON: begins with {start[:20]!r} instead of a list or an object")
    try:
        data = read_bytes(file, MAX_JSON)
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}; write one object per line and call it .jsonl") from None
    content = load_json(data, file, "the whole file")
    if isinstance(content, list):
        return Entries("list", ((entry, None) for entry in content))
    images = content.get("images")
    if isinstance(images, list) and all(isinstance(entry, dict) for entry in images):
        if isinstance(content.get("annotations"), list):
            return Entries("coco", _join_coco(file, images, content["annotations"]))
        if images and all(isinstance(entry.get("sentences"), list) for entry in images):
            joined = ((_join_karpathy(file, number, entry), None) for number, entry in enumerate(images))
            return Entries("karpathy", joined, content.get("dataset"))
    raise SourceError(
        f"{file}: an object with {', '.join(map(repr, list(content)[:8])) or 'nothing'}; should be a list of objects, "
        f"COCO's images and annotations, or Karpathy's images with sentences; for one object per line call it .jsonl"
    )


def _join_coco(file: Path, images: list[dict], annotations: list) -> Iterator[tuple[dict, Problem | None]]:
    """One entry per picture, in the order of `images`, with all of its captions; captions of no picture come last."""
    texts: dict[Any, list] = {}
    for number, entry in enumerate(annotations):
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            raise SourceError(
                f"{file}: annotation {number} has no image_id and caption; COCO's captions are in captions_*.json"
            )
        texts.setdefault(_key(file, entry["image_id"]), []).append(entry["caption"])
    if images and not texts:
        raise SourceError(f"{file}: no annotation has a caption; COCO's captions are in captions_*.json")
    seen = set()
    for number, entry in enumerate(images):
        key = _key(file, entry.get("id"))
        if key in seen:
            raise SourceError(f"{file}: image {number} has the id {key!r} of an earlier one; ids must differ")
        seen.add(key)
        yield {**entry, "image": entry.get("file_name"), "captions": texts.pop(key, [])}, None
    for key, captions in texts.items():
        yield {"image_id": key, "captions": captions}, UNLISTED


def _key(file: Path, value: Any) -> int | str:
    if isinstance(value, (int, str)):
        return value
    raise SourceError(f"{file}: {value!r:.80} is not the id of a picture; give a number or text")


def _join_karpathy(file: Path, number: int, entry: dict) -> dict:
    """The entry with "image" (filepath/filename) and "captions" (the raw sentences)."""
    place, name = entry.get("filepath") or "", entry.get("filename")
    sentences = entry["sentences"]
    if not isinstance(name, str) or not isinstance(place, str) or not all(isinstance(x, dict) for x in sentences):
        raise SourceError(f'{file}: image {number} is not {{"filename", "filepath", "sentences": [{{"raw"}}]}}')
    return {**entry, "image": f"{place}/{name}" if place else name, "captions": [x.get("raw") for x in sentences]}


# ---- tables ----------------------------------------------------------------------------------------------------------


def read_table(file: Path, skip: Skip) -> Iterator[Row]:
    """A table whose first line names the columns, separated by commas (quoted as CSV has it) or by tabs.

    Tabs are told by the ending .tsv, or by a first line that has more tabs than commas.
    """
    with open(file, "rb") as stream:
        lines = _decode_lines(stream, file)
        number, head = next(((n, line) for n, line in lines if line.strip()), (1, ""))
        head = head.removeprefix("\ufeff")
        lines = chain([(number, head)], lines)
        tabs = file.suffix.lower() == ".tsv" or head.count("\t") > head.count(",")
        rows = _split_at_tabs(lines) if tabs else _split_csv(file, lines)
        number, names = next(rows, (1, []))
        if tabs and len(names) == 2 and len(names[1]) > SHORT // 2 and decode_picture(names[1]) is not None:
            yield from _read_numbered_pictures(file, chain([(number, names)], rows), skip)
            return
        _check_names(file, names, tabs)
        make = row_maker(file)
        for number, values in rows:
            if len(values) != len(names):
                hint = "; save a table with tabs or line ends in its texts as .csv" if tabs else ""
                raise SourceError(
                    f"{file}: line {number} has {len(values)} columns, not {len(names)} columns as the first line{hint}"
                )
            if not skip():
                row = make(f"line {number}", dict(zip(names, values)))
                yield row if max(map(len, values)) <= SHORT else take_pictures(row)


def _decode_lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, str]]:
    for number, line in iterate_lines(stream, file):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{file}: line {number} is not valid UTF-8 ({error}); save it as UTF-8") from None


def _split_at_tabs(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Line by line: captions in such files are hardly ever quoted, and a quotation mark means itself."""
    for number, line in lines:
        line = line.rstrip("\r\n")
        if line:
            values = line.split("\t")
            yield number, [_unquote(value) for value in values] if '"' in line else values


def _unquote(value: str) -> str:
    """What a writer of CSV has quoted: in quotation marks, those inside doubled. Everything else as it is."""
    if len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1].replace('""', ""):
        return value[1:-1].replace('""', '"')
    return value


def _split_csv(file: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(MAX_LINE)
    table, before = csv.reader((line for _, line in lines), strict=True), 0
    try:
        for values in table:
            if table.line_num - before > 1 and (value := next(filter(_ROW_INSIDE.search, values), None)):
                raise SourceError(
                    f"{file}: line {before + 1} begins a quoted text that goes on to line {table.line_num} and holds "
                    f"what looks like rows ({value[:60]!r}); double the quotation marks inside texts"
                )
            before = table.line_num
            if values:
                yield table.line_num, values
    except csv.Error as error:
        raise SourceError(f"{file}: line {table.line_num} or the next is not valid CSV ({error})") from None


def _check_names(file: Path, names: list[str], tabs: bool) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise SourceError(f"{file}: the first line names {', '.join(map(repr, twice))} more than once; rename columns")
    if any("\r" in name for name in names):
        raise SourceError(f"{file}: its lines end with a carriage return only; save it with ordinary line ends")
    if any(map(_PATH.search, names)):
        raise SourceError(
            f"{file}: begins with a row instead of the names of the columns; write them into the first line"
        )
    if len(names) == 1:
        signs = "tabs" if tabs else "commas or tabs"
        raise SourceError(f"{file}: the first line, {names[0]!r:.80}, has one column; separate columns by {signs}")


def _read_numbered_pictures(file: Path, rows: Iterable[tuple[int, list[str]]], skip: Skip) -> Iterator[Row]:
    """Chinese-CLIP's NAME_imgs.tsv: number, picture in base64; its texts are in NAME_texts.jsonl beside it."""
    beside = find_texts(file)
    if not beside:
        raise SourceError(
            f"{file}: begins with a picture instead of the names of the columns; write them into the first line, or "
            f"name it NAME_imgs.tsv with Chinese-CLIP's NAME_texts.jsonl beside it"
        )
    texts: dict[str, list] = {}
    for row in read_jsonl(beside, Skip(0)):
        numbers = row.fields.get("image_ids")
        if not isinstance(numbers, list) or "text" not in row.fields:
            raise SourceError(f"{beside}: {row.name} has no text and image_ids")
        for number in numbers:
            texts.setdefault(str(number), []).append(row.fields["text"])
    for number, values in rows:
        if len(values) != 2:
            raise SourceError(f"{file}: line {number} has {len(values)} columns, not 2 columns")
        fields = {"image_id": values[0], "captions": texts.pop(values[0], [])}
        if not skip():
            picture = decode_picture(values[1])
            picture = Problem("image is not complete base64") if picture is None else picture
            yield Row(f"{file.name} line {number}", fields, None, picture)
    for key, captions in texts.items():
        if not skip():
            fields = {"image_id": key, "captions": captions}
            yield Row(f"{beside.name} {key}", fields, None, UNLISTED)


def find_texts(file: Path) -> Path | None:
    """The NAME_texts.jsonl beside Chinese-CLIP's NAME_imgs.tsv."""
    beside = file.with_name(file.name.removesuffix("_imgs.tsv") + "_texts.jsonl")
    return beside if file.name.endswith("_imgs.tsv") and beside.is_file() else None
