"""Manifests: JSON lines, JSON (a list, COCO's, Karpathy's), comma- and tab-separated tables, Chinese-CLIP's."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..files import read_bytes
from .rows import (
    IMAGE_NAME,
    MAX_LINE,
    PICTURE_PATH,
    SHORT,
    UNLISTED,
    Problem,
    Row,
    Skip,
    SourceError,
    decode_picture,
    iterate_lines,
    load_json,
    make_row,
    take_pictures,
)

MAX_JSON = 1 << 30  # a .json is parsed as a whole
ROW_INSIDE = re.compile(r"\n[^\n]*" + IMAGE_NAME + r'"?\s*(?:,|\n|$)', re.IGNORECASE)  # in a text of several lines

# ---- JSON ------------------------------------------------------------------------------------------------------------


def read_jsonl(file: Path, skip: Skip) -> Iterator[Row]:
    """One object per line; blank lines are no rows."""
    with open(file, "rb") as stream:
        for number, line in iterate_lines(stream, file):
            if not line.strip() or skip():
                continue
            place = f"line {number}"
            row = make_row(file, place, load_json(line, file, place))
            yield row if len(line) <= SHORT else take_pictures(row)


def read_json(file: Path, skip: Skip) -> Iterator[Row]:
    """A list of objects, COCO's {"images", "annotations"} or Karpathy's {"images": [{"sentences"}]}."""
    yield from load_json_file(file).rows(skip)


class JsonFile(NamedTuple):
    """A .json that is parsed: its form, (fields, problem of the picture) of every entry, and the name it gives
    itself."""

    file: Path
    form: str  # "list", "coco" or "karpathy"
    entries: Iterable[tuple[Any, Problem | None]]
    name: str | None = None

    def rows(self, skip: Skip) -> Iterator[Row]:
        """A row for each entry; the entries can be gone through once."""
        for number, (fields, problem) in enumerate(self.entries):
            if not skip():
                row = make_row(self.file, f"entry {number}", fields)
                yield row._replace(image=problem) if problem else take_pictures(row)


def load_json_file(file: Path) -> JsonFile:
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
        return JsonFile(file, "list", ((entry, None) for entry in content))
    images = content.get("images")
    if isinstance(images, list) and all(isinstance(entry, dict) for entry in images):
        if isinstance(content.get("annotations"), list):
            return JsonFile(file, "coco", _join_coco(file, images, content["annotations"]))
        if images and all(isinstance(entry.get("sentences"), list) for entry in images):
            joined = ((_join_karpathy(file, number, entry), None) for number, entry in enumerate(images))
            return JsonFile(file, "karpathy", joined, str(content.get("dataset") or "") or None)
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

    A table has tabs if it ends in .tsv or its first line has more tabs than commas.
    """
    with open(file, "rb") as stream:
        lines = _decode_lines(stream, file)
        number, head = next(((n, line) for n, line in lines if line.strip()), (1, ""))
        head = head.removeprefix("\ufeff")
        lines = chain([(number, head)], lines)
        tabs = has_tabs(file, head)
        rows = _split_at_tabs(lines) if tabs else _split_csv(file, lines)
        number, names = next(rows, (1, []))
        if tabs and is_numbered_picture(names):
            yield from _read_numbered_pictures(file, chain([(number, names)], rows), skip)
            return
        check_names(file, names, tabs)
        for number, values in rows:
            if len(values) != len(names):
                hint = "; save a table with tabs or line ends in its texts as .csv" if tabs else ""
                raise SourceError(
                    f"{file}: line {number} has {len(values)} columns, not {len(names)} columns as the first line{hint}"
                )
            if not skip():
                row = make_row(file, f"line {number}", dict(zip(names, values)))
                yield row if max(map(len, values)) <= SHORT else take_pictures(row)


def has_tabs(file: Path, head: str) -> bool:
    """Whether the columns of a table are separated by tabs, from its name and its first line."""
    return file.suffix.lower() == ".tsv" or head.count("\t") > head.count(",")


def is_numbered_picture(values: list[str]) -> bool:
    """Whether a line is one of Chinese-CLIP's NAME_imgs.tsv, which has no names of columns."""
    return len(values) == 2 and len(values[1]) > SHORT // 2 and decode_picture(values[1]) is not None


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
            yield number, [unquote(value) for value in values] if '"' in line else values


def unquote(value: str) -> str:
    """What a writer of CSV has quoted: in quotation marks, those inside doubled. Everything else as it is."""
    if len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1].replace('""', ""):
        return value[1:-1].replace('""', '"')
    return value


def _split_csv(file: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(MAX_LINE)
    table, before = csv.reader((line for _, line in lines), strict=True), 0
    try:
        for values in table:
            if table.line_num - before > 1 and (value := next(filter(ROW_INSIDE.search, values), None)):
                raise SourceError(
                    f"{file}: line {before + 1} begins a quoted text that goes on to line {table.line_num} and holds "
                    f"what looks like rows ({value[:60]!r}); double the quotation marks inside texts"
                )
            before = table.line_num
            if values:
                yield table.line_num, values
    except csv.Error as error:
        raise SourceError(f"{file}: line {table.line_num} or the next is not valid CSV ({error})") from None


def check_names(file: Path, names: list[str], tabs: bool) -> None:
    """SourceError where the first line of a table does not name its columns, each once."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise SourceError(f"{file}: the first line names {', '.join(map(repr, twice))} more than once; rename columns")
    if any("\r" in name for name in names):
        raise SourceError(f"{file}: its lines end with a carriage return only; save it with ordinary line ends")
    if any(map(PICTURE_PATH.search, names)):
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


def count_lines(file: Path) -> int:
    """Number of line ends."""
    with open(file, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def find_texts(file: Path) -> Path | None:
    """The NAME_texts.jsonl beside Chinese-CLIP's NAME_imgs.tsv."""
    beside = file.with_name(file.name.removesuffix("_imgs.tsv") + "_texts.jsonl")
    return beside if file.name.endswith("_imgs.tsv") and beside.is_file() else None


READERS = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_table, ".tsv": read_table}
