"""Parquet files, and .npy arrays of token ids beside an ordered list of their images.

What a file says about sizes is compared with its bytes before anything is unpacked: pages that say they grow a
thousandfold, lists of a billion equal numbers and headers of impossible shapes are refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .image import MAX_BYTES
from .readers import SHORT, Row, Skip, SourceError, iterate_lines, row_maker, take_pictures

ROWS = 64  # read at a time
BATCH = 1 << 25  # bytes that they should not grow beyond; then fewer are read at a time
GROWTH = 100  # bytes unpacked, or numbers in lists, per byte stored; small pages and lists may have more
MAX_DICTIONARY = 1 << 21  # of texts: programs write a megabyte
MAX_PAGE = MAX_BYTES + (1 << 20)
MAX_LIST = 1 << 20


def import_parquet():
    """pyarrow with its parquet, an optional package. ImportError that names the extra."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("parquet input needs pyarrow: pip install -e '.[parquet]'") from None
    return pyarrow


def _open_parquet(arrow, file: Path):
    try:
        return arrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)  # pages, not whole row groups
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise SourceError(f"{file}: not a parquet file ({_line(error)})") from None


def count_parquet(file: Path) -> int:
    """Number of rows."""
    return _open_parquet(import_parquet(), file).metadata.num_rows


def read_parquet(file: Path, skip: Skip, columns: set[str] | None = None) -> Iterator[Row]:
    """Rows of one file; `columns` None reads all. Row groups that are passed over are not read."""
    arrow = import_parquet()
    table = _open_parquet(arrow, file)
    names = table.schema_arrow.names
    if len(set(names)) != len(names):
        raise SourceError(f"{file}: several columns have one name ({', '.join(names)}); rename them")
    names = None if columns is None else [name for name in names if name in columns]
    number, make = 0, row_maker(file)
    with open(file, "rb") as stream:
        for group in range(table.num_row_groups):
            size, end = table.metadata.row_group(group).num_rows, number
            if size < 0:
                raise SourceError(f"{file}: row group {group} has {size} rows; damaged")
            end += size
            if skip.pass_over(size):
                number = end
                continue
            try:
                rows = _count_together(file, stream, table, group, names)
                for batch in table.iter_batches(rows, row_groups=[group], columns=names):
                    entries, long = _list_entries(batch)
                    for fields in entries:
                        if not skip():
                            row = make(f"row {number}", fields)
                            yield take_pictures(row) if long else row
                        number += 1
            except SourceError:
                raise
            except (OSError, ValueError, OverflowError, arrow.ArrowException) as error:
                raise SourceError(f"{file}: row group {group} is damaged ({_line(error)})") from None
            if number != end:
                raise SourceError(f"{file}: row group {group} ends at row {number}, not {end}; damaged")


def _list_entries(batch) -> tuple[list[dict], bool]:
    """The rows of a batch, and whether there is a text that may be a picture in base64."""
    names = batch.schema.names
    columns = [column.to_pylist() for column in batch.columns]
    texts = (column for column, field in zip(columns, batch.schema) if str(field.type) in ("string", "large_string"))
    long = any(max(map(len, filter(None, column)), default=0) > SHORT // 2 for column in texts)
    return [dict(zip(names, values)) for values in zip(*columns)], long


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _count_together(file: Path, stream: BinaryIO, table, group: int, names: list[str] | None) -> int:
    """How many rows of a row group are unpacked together. SourceError for what would fill the memory."""
    about = table.metadata.row_group(group)
    most = about.total_byte_size // max(1, about.num_rows)
    for number in range(about.num_columns):
        chunk = about.column(number)
        if names is not None and chunk.path_in_schema.split(".")[0] not in names:
            continue
        where = f"{file}: row group {group}, column {chunk.path_in_schema}"
        lists = table.schema.column(number).max_repetition_level > 0
        if lists and chunk.num_values > max(MAX_LIST, GROWTH * chunk.total_compressed_size):
            raise SourceError(
                f"{where}: {chunk.num_values:,} numbers in {chunk.total_compressed_size:,} bytes, more than "
                f"{GROWTH} per byte; store smaller row groups, or leave the column out"
            )
        shared = any(name.startswith("DELTA_BYTE") for name in chunk.encodings)  # values begin with the one before
        for dictionary, size, stored in _read_pages(where, stream, chunk):
            if size > max(MAX_PAGE, GROWTH * stored):
                raise SourceError(
                    f"{where}: a page of {stored:,} bytes grows to {size:,}, more than {GROWTH} times its size; "
                    f"store it with smaller pages, or leave the column out"
                )
            # Any row may be the largest value. Pictures lie in dictionaries as well, but do not shrink.
            repeated = dictionary and size > max(MAX_DICTIONARY, 4 * stored)
            most = max(most, size if repeated or shared else 1)
    return max(1, min(ROWS, BATCH // most))


def _read_pages(where: str, stream: BinaryIO, chunk) -> Iterator[tuple[bool, int, int]]:
    """(whether it is a dictionary, bytes unpacked, bytes stored) of every page, from the pages' own headers."""
    starts = [chunk.data_page_offset]
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        starts.append(chunk.dictionary_page_offset)
    at = min(starts)
    end = at + chunk.total_compressed_size
    while at < end:
        stream.seek(at)
        for length in (1 << 12, 1 << 16, 1 << 22):  # statistics in it may be long
            stream.seek(at)
            try:
                (kind, size, stored), used = _parse_page(stream.read(length))
                break
            except IndexError:
                continue
        else:
            raise SourceError(f"{where}: no page at byte {at:,}; damaged")
        if size < 0 or stored < 0:
            raise SourceError(f"{where}: a page of {size} bytes at byte {at:,}; damaged")
        yield kind == 2, size, stored
        at += used + stored


def _parse_page(data: bytes) -> tuple[list[int], int]:
    """([page type, bytes unpacked, bytes stored], length) of a page header: a struct of Thrift's compact protocol.

    IndexError if the data end before it does, or it has another form.
    """
    first, at, field = [0, -1, -1], 0, 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if not step:
            raise IndexError
        field += step
        if field <= 3:
            value, at = _varint(data, at)
            first[field - 1] = (value >> 1) ^ -(value & 1)
        else:
            at = _pass_value(data, at, kind, 0)
    return first, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise IndexError
    return value | data[at] << shift, at + 1


def _pass_value(data: bytes, at: int, kind: int, depth: int) -> int:
    """Where the value ends: 1, 2 truth in the kind itself; 3 a byte; 4-6 numbers; 7 double; 8 bytes; 12 a struct."""
    if kind in (1, 2):
        return at
    if kind == 3:
        return at + 1
    if kind in (4, 5, 6):
        return _varint(data, at)[1]
    if kind == 7:
        return at + 8
    if kind == 8:
        size, at = _varint(data, at)
        return at + size
    if kind != 12 or depth > 8:  # lists and maps are nothing that a page header has
        raise IndexError
    while data[at]:
        inner, step = data[at] & 15, data[at] >> 4
        at += 1
        if not step:
            _, at = _varint(data, at)
        at = _pass_value(data, at, inner, depth + 1)
    return at + 1


# ---- token ids -------------------------------------------------------------------------------------------------------


def open_ids(file: Path) -> np.ndarray:
    """The array of an .npy file, on disk: numbers (N, views * context) or (N, views, context); else SourceError."""
    try:
        with open(file, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            width = 2 if version == (1, 0) else 4
            length = int.from_bytes(stream.read(width), "little")
            if length > 1 << 16:
                raise ValueError(f"a header of {length:,} bytes")
        with np.errstate(over="ignore"):  # of sizes that cannot be
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is read with Python's own parser: TokenError, RecursionError, ...
        raise SourceError(f"{file}: not an .npy array ({_line(error)})") from None
    if not isinstance(ids, np.memmap):
        raise SourceError(f"{file}: not an .npy array")
    form = "token ids are whole numbers of shape (images, views * context) or (images, views, context)"
    if ids.ndim not in (2, 3) or ids.dtype.kind not in "iuf" or (ids.dtype.kind == "f" and ids.dtype.itemsize < 4):
        raise SourceError(f"{file}: {ids.dtype} of shape {ids.shape}; {form}")
    if ids.ndim == 3 and ids.shape[1] > ids.shape[2]:
        raise SourceError(f"{file}: shape {ids.shape} has more views than tokens; {form}: transpose it")
    rest = os.stat(file).st_size - ids.offset - ids.nbytes
    if rest:
        raise SourceError(f"{file}: {rest:,} bytes more than shape {ids.shape} has; damaged, or not written to its end")
    return ids


def read_ids(file: Path, listed: list[Row], images: Path) -> Iterator[Row]:
    """Each row of the list with "tokens": (views * context,), or (views, context) where the array has three axes."""
    ids = open_ids(file)
    if len(listed) != len(ids):
        raise SourceError(
            f"{file} has {len(ids)} rows, but {images} lists {len(listed)} images; they must agree (its shape is "
            f"{ids.shape}; should be (images, views * context) or (images, views, context))"
        )
    for row, tokens in zip(listed, ids):
        yield row._replace(fields={**row.fields, "tokens": np.array(tokens)})


def list_images(images: Path) -> Iterator[Row]:
    """One row for each line of a text file; blank lines are none."""
    with open(images, "rb") as stream:
        for number, line in iterate_lines(stream, images):
            try:
                name = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8").strip()
            except UnicodeDecodeError:
                raise SourceError(f"{images}: line {number} is not UTF-8; save it as UTF-8") from None
            if name:
                yield Row(name, {"image": name}, images.parent)
