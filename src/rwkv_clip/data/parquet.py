"""Parquet files.

What a file says about sizes is compared with its bytes before anything is unpacked: pages that say they grow a
thousandfold, lists of a billion equal numbers and headers of impossible shapes are refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .image import MAX_BYTES
from .rows import SHORT, Row, Skip, SourceError, first_line, make_row, take_pictures

ROWS = 64  # read at a time
BATCH = 1 << 25  # bytes that they should not grow beyond; then fewer are read at a time
GROWTH = 100  # bytes unpacked, or numbers in lists, per byte stored; small pages and lists may have more
MAX_DICTIONARY = 1 << 21  # of texts: programs write a megabyte
MAX_PAGE = MAX_BYTES + (1 << 20)
MAX_FOOTER, MAX_VALUES = 1 << 25, 1 << 16  # bytes of a footer, and what a list in it may hold
MAX_LIST = 1 << 20


def import_parquet(what: str = "parquet input", extra: str = "parquet"):
    """pyarrow with its parquet, an optional package. ImportError that names the extra."""
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{what} needs pyarrow: pip install -e '.[{extra}]'") from None
    return pyarrow


def _open_parquet(arrow, file: Path, stream: BinaryIO | None = None):
    try:  # pages, not whole row groups
        return arrow.parquet.ParquetFile(stream or file, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise SourceError(f"{file}: not a parquet file ({first_line(error)})") from None


def count_parquet(file: Path) -> int:
    """Number of rows."""
    return _open_parquet(import_parquet(), file).metadata.num_rows


def read_parquet(file: Path, skip: Skip) -> Iterator[Row]:
    """Rows of one file. Row groups that are passed over are not read."""
    with open(file, "rb") as stream:
        parquet = Parquet(file, stream)
        number = 0
        for place, group in enumerate(parquet.groups):
            if skip.pass_over(group[NUM_ROWS]):
                number += group[NUM_ROWS]
                continue
            for entries, long in parquet.read(place, _list_entries):
                for fields in entries:
                    if not skip():
                        row = make_row(file, f"row {number}", fields)
                        yield take_pictures(row) if long else row
                    number += 1


class Parquet:
    """A file that is opened, with its sizes checked. `stream`: another handle of it, or of what is read for it.
    SourceError where it is damaged."""

    def __init__(self, file: Path, stream: BinaryIO, remote: bool = False):
        self.file, self.stream, self._arrow = file, stream, import_parquet()
        self.groups = _read_footer(file, stream)
        self.table = _open_parquet(self._arrow, file, stream if remote else None)
        names = self.table.schema_arrow.names
        if len(set(names)) != len(names):
            raise SourceError(f"{file}: several columns have one name ({', '.join(names)}); rename them")

    def read(self, place: int, convert: Callable = lambda batch: batch) -> Iterator:
        """The record batches of row group `place`, small enough to be unpacked, as `convert` makes them: where a value
        is no text, it is the first to know."""
        group, where, count = self.groups[place], f"{self.file}: row group {place}", 0
        try:
            rows = _count_together(where, self.stream, self.table.schema, group)
            for batch in self.table.iter_batches(rows, row_groups=[place]):
                yield convert(batch)
                count += len(batch)
        except SourceError:
            raise
        except (OSError, ValueError, OverflowError, self._arrow.ArrowException) as error:
            raise SourceError(f"{where} is damaged ({first_line(error)})") from None
        if count != group[NUM_ROWS]:
            raise SourceError(f"{where} ends after {count} rows, not {group[NUM_ROWS]}; damaged")


def _list_entries(batch) -> tuple[list[dict], bool]:
    """The rows of a batch, and whether there is a text that may be a picture in base64."""
    names = batch.schema.names
    columns = [column.to_pylist() for column in batch.columns]
    texts = (column for column, field in zip(columns, batch.schema) if str(field.type) in ("string", "large_string"))
    long = any(max(map(len, filter(None, column)), default=0) > SHORT // 2 for column in texts)
    return [dict(zip(names, values)) for values in zip(*columns)], long


def _count_together(where: str, stream: BinaryIO, schema, group: dict) -> int:
    """How many rows of a row group are unpacked together. SourceError for what would fill the memory."""
    if len(group[COLUMNS]) != len(schema):
        raise SourceError(f"{where} has {len(group[COLUMNS])} columns, not {len(schema)}; damaged")
    most = group[TOTAL_BYTES] // max(1, group[NUM_ROWS])
    for number, column in enumerate(group[COLUMNS]):
        chunk = column[META]
        path = ".".join(name.decode("utf-8", "backslashreplace") for name in chunk[PATH])
        lists = schema.column(number).max_repetition_level > 0
        if lists and chunk[NUM_VALUES] > max(MAX_LIST, GROWTH * chunk[STORED]):
            raise SourceError(
                f"{where}, column {path!r}: {chunk[NUM_VALUES]:,} numbers in {chunk[STORED]:,} bytes, more than "
                f"{GROWTH} per byte; write it anew with smaller row groups, or without the column"
            )
        shared = not DELTA_BYTES.isdisjoint(chunk[ENCODINGS])
        for dictionary, size, stored in _read_pages(f"{where}, column {path!r}", stream, chunk):
            check_growth(f"{where}, column {path!r}", size, stored)
            # Any row may be the largest value. Pictures lie in dictionaries as well, but do not shrink.
            repeated = dictionary and size > max(MAX_DICTIONARY, 4 * stored)
            most = max(most, size if repeated or shared else 1)
    return max(1, min(ROWS, BATCH // max(1, most)))


def check_growth(where: str, size: int, stored: int) -> None:
    """SourceError for a page that says it is unpacked to much more than there can be in it."""
    if size > max(MAX_PAGE, GROWTH * stored):
        raise SourceError(
            f"{where}: a page of {stored:,} bytes grows to {size:,}, more than {GROWTH} times its size; write it anew "
            f"with smaller pages, or without the column"
        )


def _read_pages(where: str, stream: BinaryIO, chunk: dict) -> Iterator[tuple[bool, int, int]]:
    """(whether it is a dictionary, bytes unpacked, bytes stored) of every page, from the pages' own headers."""
    for page, _ in read_page_headers(where, stream, chunk):
        yield page[1] == DICTIONARY, page[2], page[3]


def read_page_headers(where: str, stream: BinaryIO, chunk: dict) -> Iterator[tuple[dict, int]]:
    """(header, where its content begins) of every page: the fields 1 kind, 2 bytes unpacked, 3 bytes stored, and those
    of its kind."""
    at = min(chunk[DATA_PAGE], chunk.get(DICTIONARY_PAGE) or chunk[DATA_PAGE])
    end = at + chunk[STORED]
    while at < end:
        for length in (1 << 12, 1 << 16, 1 << 22):  # statistics in it may be long
            stream.seek(at)
            try:
                page, used = _read_value(stream.read(length), 0, STRUCT)
                break
            except IndexError:
                continue
        else:
            raise SourceError(f"{where}: no page at byte {at:,}; damaged")
        kind, size, stored = (_whole(page.get(field)) for field in (1, 2, 3))
        if min(kind, size, stored) < 0:
            raise SourceError(f"{where}: no page at byte {at:,}; damaged")
        yield page, at + used
        at += used + stored


# What is read of a footer, by the numbers of parquet.thrift. pyarrow ends the process where some of it is damaged.
ROW_GROUPS = 4
COLUMNS, TOTAL_BYTES, NUM_ROWS = 1, 2, 3
META = 3
ENCODINGS, PATH, NUM_VALUES, STORED, DATA_PAGE, DICTIONARY_PAGE = 2, 3, 5, 7, 9, 11
DELTA_BYTES = {6, 7}  # encodings in which a value begins with the one before
DICTIONARY = 2  # the type of a page
LIST, SET, STRUCT = 9, 10, 12


def _read_footer(file: Path, stream: BinaryIO) -> list[dict]:
    """The row groups, as {field: value}, with the fields that are used here. SourceError if there are none."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - 8, 0))
    end = stream.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or length > size - 12:
        raise SourceError(f"{file}: not a parquet file, or cut short")
    if length > MAX_FOOTER:
        raise SourceError(f"{file}: a footer of {length:,} bytes, more than {MAX_FOOTER:,}; use larger row groups")
    stream.seek(size - 8 - length)
    try:
        groups = _read_value(stream.read(length), 0, STRUCT)[0].get(ROW_GROUPS, [])
        for group in groups:
            numbers = [group[NUM_ROWS], group[TOTAL_BYTES]]
            for column in group[COLUMNS]:
                chunk = column[META]
                numbers += [chunk[field] for field in (NUM_VALUES, STORED, DATA_PAGE)]
                numbers += [chunk.get(DICTIONARY_PAGE, 0), *chunk[ENCODINGS], *map(len, chunk[PATH])]
            if min(map(_whole, numbers)) < 0:
                raise ValueError("negative numbers")
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{file}: not a parquet file (its footer is damaged: {first_line(error)})") from None
    return groups


def _whole(value: object) -> int:
    return value if isinstance(value, int) else -1


def _read_value(data: bytes, at: int, kind: int, depth: int = 0) -> tuple[object, int]:
    """(value, where the next begins) in Thrift's compact protocol; a struct is {field: value}.

    IndexError if the data end before it does, or have another form.
    """
    if kind in (1, 2):  # true, false: a field has them in its type
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        value, at = _read_varint(data, at)
        return (value >> 1) ^ -(value & 1), at
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _read_varint(data, at)
        return data[at : at + size], at + size
    if depth > 16 or kind not in (LIST, SET, STRUCT):
        raise IndexError("not in Thrift's compact protocol")
    if kind == STRUCT:
        fields, field = {}, 0
        while head := data[at]:
            at, step = at + 1, head >> 4
            if not step:
                step, at = _read_varint(data, at)
                step = (step >> 1) - field
            field += step
            fields[field], at = _read_value(data, at, head & 15, depth + 1)
        return fields, at + 1
    count, inner, at = data[at] >> 4, data[at] & 15, at + 1
    if count == 15:
        count, at = _read_varint(data, at)
    if inner in (1, 2):
        inner = 3  # in a list they have a byte of their own
    if count > MAX_VALUES:
        raise IndexError(f"a list of {count:,} values")
    values = []
    for _ in range(count):
        value, at = _read_value(data, at, inner, depth + 1)
        values.append(value)
    return values, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
    return value | data[at] << shift, at + 1
