"""Rows of any source as training records: found by number, tokenized when they are read.

What a row is, which field is the picture and which are the texts, what leads out of a folder and what is too large is
decided by the code that builds records (`fields.py`, `encode.py`), so that data read directly and records built of them
give the same samples. What the builder would leave out is a damaged record here: it is counted, and the next takes its
place. Pictures are read as they are; the builder encodes what is no plain JPEG anew.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...tokenizer import Tokenizer
from ..encode import Encoder, RowError
from ..fields import GUESS, Choice, FieldError, check_image_field, choose_fields, find_field, list_fields, name_text
from ..image import ImageError
from ..recordio import RecordError, spread
from ..records import LOOKED_AT, Layout, Records
from ..rows import Row, SourceError
from .reading import Reading
from .storage import is_url

SEARCHED = 1000  # rows that a field is looked for in
BEGUN, BEGINNING = 256, 1 << 14  # pictures whose beginning a digest reads, and bytes of it


class Table(Protocol):
    """Rows by number. Can be pickled; every process opens its own files."""

    name: str  # of the file

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, i: int) -> Row:
        """Row `i`. SourceError or RecordError where it cannot be read."""

    def add_to(self, total: Any) -> None:
        """Update a hash with what identifies all rows."""

    def size_of_state(self) -> int:
        """Bytes of memory that are held for all rows."""


class BadRow(RecordError):
    """A row is no record. reason: what it is counted under."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class DirectSet(Records):
    """The rows of one or more tables, one after the other, as records."""

    several = True

    def __init__(self, tables: list[Table], tokenizer: Tokenizer, reading: Reading = Reading()):
        self._tables = [table for table in tables if len(table)]
        self.files = [table.name for table in tables]
        if not self._tables:
            raise SourceError(f"{', '.join(self.files[:5])}: no rows")
        self._ends = list(accumulate(map(len, self._tables)))
        self._last = (-1, "")
        choice = self._choose(tokenizer, reading)
        images = Path(reading.images) if reading.images else None
        choice = choice._replace(aside=())  # nobody asks what is not taken
        self._encoder = Encoder(choice, tokenizer.name, tokenizer.context, images, reading.image_field)
        vars(self._encoder)["tokenize"] = tokenizer  # the model's own, which a name may not lead to
        self._tokenizer = tokenizer
        self.layout = Layout(choice.texts.names, tokenizer.context, tokenizer.name, tokenizer.vocab_size)
        self._check_pictures(reading)

    # ---- which fields

    def _choose(self, tokenizer: Tokenizer, reading: Reading) -> Choice:
        """As data2rec.py chooses, from the first rows. ValueError names a field that is not there, and the nearest."""
        rows = self._read_some(range(min(GUESS, len(self))))
        entries = tuple(f"{name_text(i)}={field}" for i, field in enumerate(reading.text_fields))
        for flag, names in (
            ("csv_img_key", [reading.image_field] if reading.image_field else []),
            ("csv_caption_key", reading.text_fields),
        ):
            for name in names:
                self._find_name(flag, name, rows)
        try:
            check_image_field(rows, reading.image_field)
            return choose_fields(rows, entries, None, tokenizer.context)
        except FieldError as error:
            words = str(error).replace("--image-field FIELD", "--csv-img-key FIELD")
            words = words.replace("--texts raw=FIELD", "--csv-caption-key FIELD").replace(
                "image_field:", "csv_img_key:"
            )
            raise ValueError(f"{self.files[0]}: {words}") from None

    def _read_some(self, numbers: Iterable[int]) -> list[Row]:
        """The rows that can be read. SourceError of the first where none can."""
        rows, fault = [], None
        for i in numbers:
            try:
                rows.append(self._row(i))
            except (SourceError, RecordError) as error:
                fault = fault or error
        if not rows and fault:
            raise fault
        return rows

    def _find_name(self, flag: str, name: str, rows: list[Row]) -> None:
        """ValueError where no row has a field of this name; else some row that has it is in `rows`."""
        if any(find_field(row.fields, name) is not None for row in rows):
            return
        for row in self._read_some(spread(len(self), SEARCHED)):
            if find_field(row.fields, name) is not None:
                rows.append(row)
                return
        fields = list(dict.fromkeys(str(key) for row in rows for key in row.fields))
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{flag}: {name!r} is in no row of {self.files[0]}; {hint}they have {list_fields(rows)}")

    def _check_pictures(self, reading: Reading) -> None:
        """ValueError where none of some rows has its picture: then it is not the rows that are at fault."""
        rows = self._read_some(spread(len(self), LOOKED_AT))
        problems = [(row, self._encoder.find_picture(row).problem) for row in rows]
        if rows and all(problem for _, problem in problems):
            row, problem = problems[0]
            where = f"; they are looked up in {reading.images}" if reading.images else " in its folder"
            raise ValueError(
                f"{self.files[0]}: none of {len(rows)} rows has its picture{where}: {row.name}: {problem}; say where "
                f"names of pictures begin, --image-folder FOLDER (. for the current one, / for names from the root)"
            )

    # ---- records

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 that identifies these records, whatever their folder and time of writing.

        Over what each table says of its content, the fields that are taken, and sizes and beginnings of some pictures.
        """
        own, choice = self._tokenizer, self._encoder.choice
        about = [own.context, own.name, own.vocab_size, list(choice.texts.names), list(choice.texts.fields)]
        total = hashlib.sha256(json.dumps([*about, choice.token_field]).encode())
        for table in self._tables:
            total.update(f"{len(table)}\0".encode())
            table.add_to(total)
        for i in spread(len(self), BEGUN):
            with suppress(RecordError, SourceError, RowError, ImageError):  # counted and replaced when its turn comes
                picture = self._encoder.find_picture(self._row(i)).read()
                total.update(f"{len(picture)}\0".encode() + picture[:BEGINNING])
        return total.hexdigest()

    def limit_vocab(self, vocab: int) -> int:
        """As `RecordSet.limit_vocab`."""
        self.layout, largest = replace(self.layout, vocab_size=vocab), 0
        for i in spread(len(self), LOOKED_AT):
            with suppress(RecordError, SourceError, RowError, ValueError):
                largest = max(largest, int(self._encoder.take_labels(self._row(i)).labels.max()))
        return largest if largest >= vocab else 0

    def name(self, i: int) -> str:
        """How messages name record `i`: 'path/train.csv line 18'."""
        last, name = self._last
        if last != i:
            table, number = self._locate(i)
            try:
                self._row(i)
                name = self._last[1]
            except (SourceError, RecordError):
                name = f"{table.name} row {number}"
        return name

    def sample(self, i: int) -> tuple[bytes, np.ndarray]:
        """As `draw_sample`, with the first of several captions."""
        return self.draw_sample(i, None)

    def draw_sample(self, i: int, drawn: float | None) -> tuple[bytes, np.ndarray]:
        """(encoded image, token ids int64 (texts, context)) of row `i`. drawn: which of several captions a text is, in
        [0, 1); None for the first. RecordError if the row holds anything else."""
        try:
            row = self._row(i)
        except SourceError as error:
            raise RecordError(str(error)) from None
        if drawn is not None:
            row = draw_captions(row, self._encoder.choice.texts.fields, drawn)
        try:
            labels = self._encoder.take_labels(row).labels
            image = self._encoder.find_picture(row).read()
        except RowError as error:
            raise BadRow(f"{self.name(i)}: {error}", str(error)) from None
        except ValueError as error:  # of the tokenizer
            raise BadRow(f"{self.name(i)}: {error}", "text of no use") from None
        tokens = labels.astype(np.int64).reshape(len(self.text_names), self.context)
        vocab = self.layout.vocab_size or 0
        if vocab < self._tokenizer.vocab_size and not (tokens < vocab).all():
            raise RecordError(f"{self.name(i)}: token ids must be below {vocab}, found {tokens.max()}")
        return image, tokens

    def size_of_state(self) -> int:
        """Bytes of memory that are held for all rows, in this process and in each that gets a copy."""
        return sum(table.size_of_state() for table in self._tables)

    def _row(self, i: int) -> Row:
        table, number = self._locate(i)
        row = table.row(number)
        if is_url(table.name):  # there are no pictures beside it that could be opened
            row = row._replace(folder=None)
        self._last = i, f"{table.name.removesuffix(Path(table.name).name)}{row.name}"
        return row

    def _locate(self, i: int) -> tuple[Table, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"record {i} of {self._ends[-1]}")
        number = bisect_right(self._ends, i)
        return self._tables[number], i - (self._ends[number - 1] if number else 0)


def draw_captions(row: Row, fields: Iterable[str], drawn: float) -> Row:
    """The row with one caption in place of a list of several, for each of the fields: number `drawn * n` of the n
    that hold something."""
    chosen = {}
    for field in fields:
        value = find_field(row.fields, field)
        if isinstance(value, (list, tuple)):
            captions = [text for text in value if not (text is None or (isinstance(text, str) and not text.strip()))]
            if captions:
                chosen[field] = captions[min(int(drawn * len(captions)), len(captions) - 1)]
    return row._replace(fields={**row.fields, **chosen}) if chosen else row
