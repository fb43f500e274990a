"""Rows of .jsonl, .csv and .tsv files by their number, as `manifests.py` reads them in order.

A file is scanned once when it is opened, for the places where rows begin; of these only every 16th is kept (fewer rows
where they are long), so ten million rows take ten megabytes, in one array. A row is found by splitting the few
kilobytes from the place before it.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..manifests import ROW_INSIDE, check_names, has_tabs, is_numbered_picture, unquote
from ..recordio import RecordError
from ..rows import MAX_LINE, SHORT, Row, SourceError, load_json, make_row, take_pictures
from .storage import Stored

PIECE = 1 << 22  # bytes that are scanned at a time
TOGETHER, NEAR = 16, 1 << 12  # rows from one kept place to the next, at most, and about how many bytes
BLANK = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))  # by byte

Found = tuple[np.ndarray, np.ndarray, int, int]  # where rows begin; their line numbers; bytes, lines that were used


class Lines:
    """How rows lie in a file; `split` finds them in any piece that begins with one."""

    def split(self, piece: bytes, last: bool) -> Found:
        """The rows of a piece: int64 (rows,) bytes from its beginning, int64 (rows,) lines from 0, and how much of the
        piece these are; the rest is the beginning of a row. last: nothing follows, so all is used."""
        end = len(piece) if last else piece.rfind(b"\n") + 1
        piece = piece[:end]
        starts = _line_starts(piece)
        lines = np.arange(len(starts))
        kept = ~self.blank(piece, starts)
        return starts[kept], lines[kept], end, len(starts)

    def blank(self, piece: bytes, starts: np.ndarray) -> np.ndarray:
        """Which lines are no rows: bool (lines,)."""
        found = BLANK[np.frombuffer(piece, np.uint8)[starts]]
        ends = np.append(starts[1:], len(piece))
        for i in np.flatnonzero(found).tolist():
            found[i] = not piece[starts[i] : ends[i]].strip()
        return found

    def parse(self, file: Path, place: str, data: bytes) -> Row:
        """The row in `data`. SourceError."""
        row = make_row(file, place, load_json(data, file, place))
        return row if len(data) <= SHORT else take_pictures(row)


def _line_starts(piece: bytes) -> np.ndarray:
    """int64 (lines,): the byte at which each line begins."""
    if not piece:
        return np.empty(0, np.int64)
    ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == 10) + 1
    starts = np.empty(len(ends) + 1, np.int64)
    starts[0], starts[1:] = 0, ends
    return starts[:-1] if len(ends) and ends[-1] == len(piece) else starts


class Columns(Lines):
    """A table whose first line names the columns. separator: a tab (no quotation but of whole values), or one that
    separates quoted values as CSV has it."""

    def __init__(self, separator: str, names: list[str]):
        self.separator, self.names = separator, names
        sign = re.escape(separator.encode())
        value = b'(?:"[^"]*(?:""[^"]*)*"|[^"%b]*)' % sign
        self._ends = re.compile(b"%b(?:%b%b)*\r?" % (value, sign, value))  # a row that ends with its line

    def split(self, piece: bytes, last: bool) -> Found:
        if self.separator == "\t" or b'"' not in piece or self._are_lines(piece, last):
            return super().split(piece, last)
        return self._split_quoted(piece, last)

    def _are_lines(self, piece: bytes, last: bool) -> bool:
        """Whether every row with quotation marks ends with its line."""
        end = len(piece) if last else piece.rfind(b"\n") + 1
        starts = _line_starts(piece[:end])
        quotes = np.flatnonzero(np.frombuffer(piece[:end], np.uint8) == ord('"'))
        lines = np.unique(np.searchsorted(starts, quotes, "right")) - 1
        ends = np.append(starts[1:] - 1, end - piece.endswith(b"\n", 0, end))
        match = self._ends.fullmatch
        return all(match(piece, *places) for places in zip(starts[lines].tolist(), ends[lines].tolist()))

    def _split_quoted(self, piece: bytes, last: bool) -> Found:
        """Lines with quotation marks go through Python's reader of CSV, which knows where such a row ends."""
        lines = piece.split(b"\n")
        if not lines[-1] or not last:
            rest = len(lines.pop())
        else:
            rest = 0
        starts, numbers, at, i = [], [], 0, 0
        while i < len(lines):
            count = self._count(lines, i) if b'"' in lines[i] else 1
            if not count and not last:
                rest = len(piece) - at
                break
            count = count or 1  # what does not end is an error when it is read
            size = sum(map(len, lines[i : i + count])) + count
            if lines[i].strip(b"\r"):
                starts.append(at)
                numbers.append(i)
            at, i = at + size, i + count
        return np.array(starts, np.int64), np.array(numbers, np.int64), len(piece) - rest, i

    def _count(self, lines: list[bytes], first: int) -> int:
        """How many lines the row at line `first` has; 0 where it does not end in these."""
        csv.field_size_limit(MAX_LINE)
        feed = (lines[i].decode("latin-1") + "\n" for i in range(first, len(lines)))
        table = csv.reader(feed, strict=True, delimiter=self.separator)
        try:
            values = next(table)
        except csv.Error:
            ended = next(feed, None) is not None  # else more lines may end it
            return 1 if ended else 0
        found = next(filter(ROW_INSIDE.search, values), None) if table.line_num > 1 else None
        if found is not None:
            raise SourceError(
                f"a quoted text goes on over {table.line_num} lines and holds what looks like rows "
                f"({found[:60]!r}); double the quotation marks inside texts"
            )
        return table.line_num

    def blank(self, piece: bytes, starts: np.ndarray) -> np.ndarray:
        at = np.frombuffer(piece + b"\n\n", np.uint8)  # what the last line may lack
        first, second = at[starts], at[starts + 1]
        return (first == 10) | ((first == 13) & (second == 10))

    def parse(self, file: Path, place: str, data: bytes) -> Row:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{file}: {place} is not valid UTF-8 ({error}); save it as UTF-8") from None
        values = split_values(text, self.separator, file, place)
        if len(values) != len(self.names):
            raise SourceError(f"{file}: {place} has {len(values)} columns, not {len(self.names)} as the first line")
        row = make_row(file, place, dict(zip(self.names, values)))
        return row if max(map(len, values)) <= SHORT else take_pictures(row)


def split_values(text: str, separator: str, file: Path, place: str) -> list[str]:
    """The values of the first row in `text`. SourceError where it is no CSV."""
    if separator == "\t":
        line = text.partition("\n")[0].rstrip("\r")
        return [unquote(value) for value in line.split("\t")] if '"' in line else line.split("\t")
    csv.field_size_limit(MAX_LINE)
    try:
        return next(csv.reader((f"{line}\n" for line in text.split("\n")), strict=True, delimiter=separator), [])
    except csv.Error as error:
        raise SourceError(f"{file}: {place} or the next is not valid CSV ({error})") from None


class Places(NamedTuple):
    """Where the rows of a file begin. every: rows from one place to the next. places: int64 (n + 1,), bytes, the end of
    the last row included. lines: int64 (n,), numbers from 1. sha256: of the file, hexadecimal."""

    rows: int
    every: int
    places: np.ndarray
    lines: np.ndarray
    sha256: str


def scan(stored: Stored, lines: Lines, start: int, line: int) -> Places:
    """Find all rows from byte `start` on, in which line number `line` begins. SourceError for a line beyond
    MAX_LINE."""
    digest, rows, every = hashlib.sha256(), 0, 0
    places, numbers, rest, at = [], [], b"", start
    with stored.stream() as stream:
        digest.update(stream.read(start))
        last = False
        while not last:
            piece = stream.read(PIECE)
            digest.update(piece)
            last, piece = not piece, rest + piece
            try:
                begins, counted, used, passed = lines.split(piece, last)
            except SourceError as error:
                raise SourceError(f"{stored.name}: after line {line}: {error}") from None
            ends = np.append(begins[1:], used)
            if len(piece) - used > MAX_LINE or (ends - begins).max(initial=0) > 2 * MAX_LINE:
                raise SourceError(f"{stored.name}: after line {line}: a line of more than {MAX_LINE:,} bytes")
            if not every and (len(begins) or last):
                every = int(np.clip(NEAR * len(begins) // max(1, used), 1, TOGETHER))
            if len(begins):
                kept = np.arange(-rows % every, len(begins), every)
                places.append(at + begins[kept])
                numbers.append(line + counted[kept])
                rows += len(begins)
            at, line, rest = at + used, line + passed, piece[used:]
    found = np.concatenate([*places, np.array([at])]).astype(np.int64)
    return Places(rows, every, found, np.concatenate([*numbers, np.array([], np.int64)]), digest.hexdigest())


class LineTable:
    """Rows of one file by number. Can be pickled: of the rows it holds the kept places only."""

    def __init__(self, stored: Stored, separator: str | None = None, json: bool = True):
        self.stored, self.name = stored, stored.name
        self._file = Path(stored.name)
        self._lines, start, line = (Lines(), 0, 1) if json else self._read_head(separator)
        self._places = scan(stored, self._lines, start, line)

    def _read_head(self, separator: str | None) -> tuple[Lines, int, int]:
        """How its columns lie, and byte and line number of what follows their names."""
        head = self.stored.read(0, min(self.stored.size, 1 << 20))
        start = line = 0
        while start < len(head) and not head[start:].partition(b"\n")[0].strip():
            start, line = start + len(head[start:].partition(b"\n")[0]) + 1, line + 1
        end = head.find(b"\n", start) + 1 or len(head)
        try:
            text = head[start:end].decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.name}: line {line + 1} is not valid UTF-8 ({error}); save it as UTF-8") from None
        sign = separator or ("\t" if has_tabs(self._file, text) else ",")
        names = split_values(text, sign, self._file, f"line {line + 1}")
        if sign == "\t" and is_numbered_picture(names):
            raise SourceError(f"{self.name}: pictures of Chinese-CLIP without columns; make an LMDB or records of them")
        if separator and len(names) == 1:
            raise SourceError(
                f"{self.name}: csv_separator: {separator!r} separates nothing in the first line, {text.strip():.80}"
            )
        check_names(self._file, names, sign == "\t")
        return Columns(sign, names), end, line + 2

    def __len__(self) -> int:
        return self._places.rows

    def row(self, i: int) -> Row:
        """Row `i`. SourceError or RecordError, with file and line, where it cannot be parsed or read any more."""
        data, line = self._find(i)
        return self._lines.parse(self._file, f"line {line}", data)

    def _find(self, i: int) -> tuple[bytes, int]:
        block, place = divmod(i, self._places.every)
        piece = self.stored.read(*self._places.places[block : block + 2].tolist())
        begins, lines, used, _ = self._lines.split(piece, True)
        if place >= len(begins):
            raise RecordError(f"{self.name}: row {i} is gone; the file was changed while it was read")
        end = begins[place + 1] if place + 1 < len(begins) else used
        return piece[begins[place] : end], int(self._places.lines[block] + lines[place])

    def size_of_state(self) -> int:
        """Bytes that are held for all rows."""
        return self._places.places.nbytes + self._places.lines.nbytes

    def add_to(self, total: Any) -> None:
        """Update a hash with what identifies the rows: all bytes of the file, and how they are taken apart."""
        columns = getattr(self._lines, "separator", "")
        total.update(f"lines\0{self._places.sha256}\0{columns}\0".encode())

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))
