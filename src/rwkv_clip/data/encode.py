"""One row of a source -> the bytes of one training record, or the reason why it is skipped.

JPEGs that are stored upright and that every decoder reads alike are kept byte for byte; other pictures are encoded
anew as JPEG, turned as their orientation tag (EXIF) says and without metadata, so that all readers of the records see
the same.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import OutsideError, find_below, read_bytes
from ..tokenizer import CLIP_BPE, READ, Tokenizer, make_tokenizer, prepare_texts
from .fields import IMAGE_FIELDS, Choice, find_field, find_tokens, first_text
from .image import MAX_BYTES, ImageError, encode_jpeg, inspect_image, open_image, scale_down
from .recordio import Header, pack
from .records import EXACT, checksum
from .rows import MAX_TEXT_BYTES, Problem, Row

if TYPE_CHECKING:
    import torch

OUTSIDE = "image outside the image folder"
NO_RAW = "no raw text"
NUMBERS = "numbers in "  # before the name of a field that holds no texts
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the file: the next one would fail as well


class Record(NamedTuple):
    """A row that became a record.

    labels: float32 (texts * context,). fallbacks: texts that were missing and are the raw text instead. cut: texts
    longer than the context. unused: fields with texts that are not taken, once for each text. reencoded: whether
    `image` is a new JPEG. seen: as `Picture` has it.
    """

    name: str
    labels: np.ndarray
    image: bytes = b""
    fallbacks: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reencoded: bool = False
    seen: str = ""

    def pack(self, key: int) -> bytes:
        """Record bytes under `key`, which is also the header's id; id2 is the checksum."""
        content = self.labels.astype("<f4").tobytes() + self.image
        return pack(Header(0, self.labels, key, checksum(content)), self.image)


class Skipped(NamedTuple):
    """A row that did not, and the reason under which it is counted."""

    name: str
    reason: str
    seen: str = ""


class RowError(ValueError):
    """A row cannot become a record; the message is the reason it is counted under."""


class Picture(NamedTuple):
    """The picture of a row: its bytes, the file that has them, or the problem.

    seen: JSON of the name in the row with the file's size and time of change in ns, or with the problem: what a later
    run compares to learn whether the pictures are still the same. "" where the row names no file.
    """

    data: bytes = b""
    file: Path | None = None
    problem: str | None = None
    seen: str = ""

    def read(self) -> bytes:
        """The bytes, at most MAX_BYTES. RowError."""
        if self.problem:
            raise RowError(self.problem)
        if self.file is None:
            return self.data
        try:
            return read_bytes(self.file, MAX_BYTES)
        except OSError as error:
            if error.errno in _PASSING:
                raise
            raise RowError("image too large" if error.errno == errno.EFBIG else "unreadable image") from None


def find_text(fields: dict[str, Any], field: str) -> str | None:
    """The stripped text at `field`, of a list the first one; None if there is none."""
    value = first_text(find_field(fields, field))
    if isinstance(value, Problem):
        raise RowError(str(value))
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError("text is not a string")
    if len(value) > MAX_TEXT_BYTES:
        raise RowError("text too long")
    return value.strip()


@dataclass(frozen=True)
class Encoder:
    """Row -> Record or Skipped. Picklable; every process makes its own tokenizer.

    `max_side` 0 keeps every size. `allow_outside`: names may lead out of the image folder `images`.
    """

    choice: Choice
    tokenizer: str = CLIP_BPE
    context: int = 77
    images: Path | None = None
    image_field: str | None = None
    max_side: int = 0
    quality: int = 95
    allow_outside: bool = False

    @cached_property
    def tokenize(self) -> Tokenizer:
        """The tokenizer, made on first use."""
        return make_tokenizer(self.tokenizer, self.context)

    def __call__(self, row: Row) -> Record | Skipped:
        picture = self.find_picture(row)
        try:
            record = self.take_labels(row)
            image, reencoded = self._encode_image(picture.read(), row.name)
        except RowError as error:
            return Skipped(row.name, str(error), picture.seen)
        except ImageError as error:
            reason = "unreadable image" if "unreadable" in error.reason else error.reason
            return Skipped(row.name, reason, picture.seen)
        return record._replace(image=image, reencoded=reencoded, seen=picture.seen)

    # ---- texts

    def take_labels(self, row: Row) -> Record:
        """The token ids of a row's texts, without its picture. RowError where they are of no use."""
        return self._take_texts(row) if self.choice.token_field is None else self._take_tokens(row)

    def _take_texts(self, row: Row) -> Record:
        names, fields = self.choice.texts.names, self.choice.texts.fields
        texts = [find_text(row.fields, field) for field in fields]
        if not texts[0]:
            raise RowError(NO_RAW if texts[0] is None else "empty text")
        ids, cut = self._tokenize([text or texts[0] for text in texts])
        if self.context > 2 and not ids[0, 2:].any():  # characters that stand for nothing, NUL for example
            raise RowError("empty text")
        return Record(
            row.name,
            ids.numpy().astype(np.float32).reshape(-1),
            fallbacks=tuple(name for name, text in zip(names, texts) if not text),
            cut=tuple(name for name, text, is_cut in zip(names, texts, cut) if is_cut and text),
            unused=tuple(self._find_unused(row.fields, texts)),
        )

    def _tokenize(self, texts: list[str]) -> tuple[torch.Tensor, list[bool]]:
        """Ids (texts, context), and whether each text was cut: given one more place, it fills that as well.

        A text that is cut keeps EOT as its last token, so the ids follow from those of one more place. Texts so long
        that the tokenizer reads only their beginning, which depends on the context, are tokenized again.
        """
        texts = prepare_texts(self.tokenize, texts)
        longer = self.tokenize(texts, self.context + 1)
        cut = longer[:, -1] != 0
        if any(len(text) > READ * self.context for text in texts):
            return self.tokenize(texts), cut.tolist()
        ids = longer[:, :-1]
        ids[cut, -1] = longer[cut, -1]
        return ids, cut.tolist()

    def _find_unused(self, fields: dict[str, Any], used: list[str | None]) -> list[str]:
        found = []
        for field in self.choice.texts.fields:
            value = find_field(fields, field)
            if isinstance(value, (list, tuple)):
                found += [f"{field}[1:]"] * sum(bool(text) for text in value[1:])
        for name in self.choice.aside:
            text = first_text(value := fields.get(name))
            if isinstance(text, str):
                if text.strip() and text.strip() not in used and not isinstance(text, Problem):
                    found.append(name)
            elif isinstance(value, (list, np.ndarray)) and len(value):  # not taken for token ids
                found.append(f"{NUMBERS}{name}")
        return found

    def _take_tokens(self, row: Row) -> Record:
        tokens = find_tokens(row.fields, self.choice.token_field)
        if tokens is None:
            raise RowError("no token ids")
        shape = (len(self.choice.texts.names), self.context)
        if tokens.ndim > 1 and tokens.shape != shape:
            raise RowError(f"token ids of shape {tokens.shape}, should be {shape}")
        if tokens.size != shape[0] * shape[1]:
            raise RowError("wrong number of token ids")
        vocab = min(self.tokenize.vocab_size, EXACT)
        if not (tokens.min() >= 0 and tokens.max() < vocab) or (tokens != np.floor(tokens)).any():
            raise RowError("token ids out of range")
        return Record(row.name, tokens.astype(np.float32).reshape(-1))

    # ---- pictures

    def find_picture(self, row: Row) -> Picture:
        """Where the picture of a row is. Nothing of a file is read, so that a later run can ask again, quickly."""
        value = self._name_picture(row)
        if isinstance(value, Problem):
            return Picture(problem=str(value))
        if isinstance(value, (bytes, bytearray)):
            return Picture(bytes(value))
        if not isinstance(value, str) or not value.strip():
            return Picture(problem="missing image")
        try:
            file, about = self._find_file(value, row.folder)
        except RowError as error:
            return Picture(problem=str(error), seen=json.dumps([value, str(error)]))
        return Picture(file=file, seen=json.dumps([value, about.st_size, about.st_mtime_ns]))

    def _name_picture(self, row: Row) -> Any:
        if row.image is not None and not self.image_field:
            return row.image
        names = (self.image_field,) if self.image_field else IMAGE_FIELDS
        value = next((found for name in names if (found := find_field(row.fields, name)) is not None), None)
        if isinstance(value, dict):  # how Hugging Face stores images
            value = value.get("bytes") or value.get("path")
        return value

    def _find_file(self, name: str, folder: Path | None) -> tuple[Path, os.stat_result]:
        """RowError where there is no such file, where it lies outside, or where it cannot be read."""
        if self.images:
            folders = (self.images,)
        else:
            folders = (folder, folder / "images") if folder else ()
        try:
            for place in folders:
                if (file := find_below(place, name, self.allow_outside)) is not None:
                    if not os.access(file, os.R_OK):
                        raise RowError("unreadable image")
                    return file, os.stat(file)
            if any((place / name).exists() for place in folders):
                raise RowError("image is not a regular file")
        except OutsideError:
            raise RowError(OUTSIDE) from None
        except FileNotFoundError:  # it was there a moment ago
            raise RowError("missing image") from None
        except RowError:
            raise
        except (OSError, ValueError):  # a name with NUL or too long, a folder that may not be entered
            raise RowError("unreadable image") from None
        raise RowError("missing image")

    def _encode_image(self, data: bytes, name: str) -> tuple[bytes, bool]:
        """(JPEG bytes, whether they are new). The picture is decoded in any case: a header proves nothing."""
        plain = inspect_image(data, name).plain
        picture = open_image(data)
        scaled = scale_down(picture, self.max_side)
        if plain and scaled is picture:
            return data, False
        return encode_jpeg(scaled, self.quality), True
