"""One row of a source -> the bytes of one training record, or the reason why it is skipped.

JPEGs that every decoder reads alike are kept byte for byte; other pictures are encoded anew as JPEG, without
metadata and with their pixels as stored (rotation tags are not applied: training ignores them, too).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .image import ImageError, inspect_image, open_image
from .recordfile import Header, pack
from .recordio import EXACT, VIEWS, checksum
from .sources import IMAGE_ENDINGS, MAX_TEXT_BYTES, Problem, Row
from .tokenizer import CLIP_BPE, Tokenizer, make_tokenizer

# Other names of the two texts. `caption` is the raw text where it is the first of these, else the synthetic one.
RAW_FIELDS = ("raw", "raw_caption", "caption", "captions", "text", "txt")
SYNTHETIC_FIELDS = ("synthetic", "ofa", "caption")
IMAGE_FIELDS = ("image", "images", "image_path", "filepath", "file_name", "filename", "path", *IMAGE_ENDINGS)
TOKEN_FIELDS = ("tokens", "texts")  # `texts` is what the published YFCC15M calls them


class Encoded(NamedTuple):
    """Result for one row: `labels` and `image`, or `problem`; `fallbacks`: views that took the raw text."""

    name: str
    problem: str | None = None
    labels: np.ndarray | None = None
    image: bytes = b""
    fallbacks: tuple[str, ...] = ()
    reencoded: bool = False

    def pack(self, key: int) -> bytes:
        """Record bytes under `key`, which is also the header's id; id2 is the checksum."""
        content = self.labels.astype("<f4").tobytes() + self.image
        return pack(Header(0, self.labels, key, checksum(content)), self.image)


class RowError(ValueError):
    """A row cannot become a record; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Views:
    """The texts of a record: names, raw first, and the field that each one is found in."""

    names: tuple[str, ...]
    fields: tuple[str, ...]

    @classmethod
    def parse(cls, entries: tuple[str, ...]) -> Views:
        """'raw', 'raw=captions.0' or 'captions.0' (named by its place: raw, synthetic, generated)."""
        names, fields = [], []
        for place, entry in enumerate(entries):
            name, equals, field = entry.partition("=")
            if not equals:
                field = name
                if "." in name:
                    name = VIEWS[place] if place < len(VIEWS) else f"view{place + 1}"
            if not name or not field:
                raise ValueError(f"views: {entry!r} is not NAME, NAME=FIELD or FIELD.NUMBER")
            names.append(name)
            fields.append(field)
        if not names or names[0] != "raw" or len(set(names)) != len(names):
            raise ValueError(
                f"views: {list(entries)} gives the names {names}; they must differ and begin with raw, the "
                f"text that stands in for a missing one; for example raw=caption synthetic=blip"
            )
        return cls(tuple(names), tuple(fields))


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


def find_view(fields: dict[str, Any], path: str) -> Any:
    """find_field, and for raw and synthetic what has another of their names; of a list of captions the first one."""
    value = find_field(fields, path)
    if value is not None or path not in ("raw", "synthetic"):
        return value
    name = raw = next((name for name in RAW_FIELDS if fields.get(name)), None)
    if path == "synthetic":
        name = next((name for name in SYNTHETIC_FIELDS if fields.get(name) and name != raw), None)
    value = fields.get(name)
    return value[0] if isinstance(value, list) else value


def find_text(fields: dict[str, Any], path: str) -> str:
    """The stripped text at `path`, by `find_view`; "" if there is none."""
    value = find_view(fields, path)
    if isinstance(value, Problem):
        raise RowError(str(value))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("text is not a string")
    if len(value) > MAX_TEXT_BYTES:
        raise RowError("text too long")
    return value.strip()


def find_tokens(fields: dict[str, Any], field: str | None) -> np.ndarray | None:
    """Ready token ids as a flat float64 array; None if the row has none."""
    for name in (field,) if field else TOKEN_FIELDS:
        value = find_field(fields, name)
        if isinstance(value, (list, np.ndarray)) and len(value):
            try:
                return np.asarray(value, np.float64).reshape(-1)
            except (TypeError, ValueError):  # a list of texts, for example
                continue
    return None


@dataclass(frozen=True)
class Encoder:
    """Row -> Encoded. Picklable; every process makes its own tokenizer. `max_side` 0 keeps every size."""

    views: Views
    tokenizer: str = CLIP_BPE
    context: int = 77
    images: Path | None = None
    image_field: str | None = None
    token_field: str | None = None
    max_side: int = 0
    quality: int = 95

    @cached_property
    def tokenize(self) -> Tokenizer:
        """The tokenizer, made on first use."""
        return make_tokenizer(self.tokenizer, self.context)

    def __call__(self, row: Row) -> Encoded:
        try:
            labels, fallbacks = self._label(row.fields)
            image, reencoded = self._encode_image(self._load_image(row), row.name)
        except RowError as error:
            return Encoded(row.name, str(error))
        except ImageError as error:
            return Encoded(row.name, "unreadable image" if "unreadable" in error.reason else error.reason)
        return Encoded(row.name, None, labels, image, fallbacks, reencoded)

    def _label(self, fields: dict[str, Any]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Token ids of all views as float32 (V * context,), and the views that fell back to raw."""
        tokens = find_tokens(fields, self.token_field)
        if tokens is not None:
            if len(tokens) != len(self.views.names) * self.context:
                raise RowError("wrong number of token ids")
            vocab = min(self.tokenize.vocab_size, EXACT)
            if not (tokens.min() >= 0 and tokens.max() < vocab) or (tokens != np.floor(tokens)).any():
                raise RowError("token ids out of range")
            return tokens.astype(np.float32), ()
        texts = [find_text(fields, field) for field in self.views.fields]
        if not texts[0]:
            raise RowError("empty text")
        fallbacks = tuple(name for name, text in zip(self.views.names, texts) if not text)
        ids = self.tokenize([text or texts[0] for text in texts])
        if self.context > 2 and not ids[0, 2:].any():  # characters that stand for nothing, NUL for example
            raise RowError("empty text")
        return ids.numpy().astype(np.float32).reshape(-1), fallbacks

    def _load_image(self, row: Row) -> bytes:
        if isinstance(row.image, Problem) and not self.image_field:
            raise RowError(str(row.image))
        if row.image is not None and not self.image_field:
            return row.image
        names = (self.image_field,) if self.image_field else IMAGE_FIELDS
        value = next((found for name in names if (found := find_field(row.fields, name)) is not None), None)
        if isinstance(value, dict):  # how Hugging Face stores images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Problem):
            raise RowError(str(value))
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str) or not value.strip() or row.folder is None:
            raise RowError("missing image")
        for folder in (self.images,) if self.images else (row.folder, row.folder / "images"):
            path = folder / value
            try:
                if path.is_file():
                    return path.read_bytes()
            except (OSError, ValueError):  # no permission, a name with NUL or too long
                raise RowError("unreadable image") from None
        raise RowError("missing image")

    def _encode_image(self, data: bytes, name: str) -> tuple[bytes, bool]:
        """(JPEG bytes, whether they are new). The picture is decoded in any case: a header proves nothing."""
        info = inspect_image(data, name)
        picture = open_image(data)
        fits = not self.max_side or max(info.width, info.height) <= self.max_side
        if info.plain and fits:
            return data, False
        if not fits:
            scale = self.max_side / max(picture.size)
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize(size, resample=3, reducing_gap=3.0)  # 3: bicubic
        picture.info = {}
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue(), True


@dataclass(frozen=True)
class Condition:
    """`field=value`, `field=one,two` or `field!=value`: which rows to take."""

    field: str
    values: tuple[str, ...]
    equal: bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """ValueError if `text` has another form."""
        field, equals, values = text.partition("=")
        equal = not field.endswith("!")
        field = field.removesuffix("!").strip()
        if not equals or not field:
            raise ValueError(f"where: {text!r} is not FIELD=VALUE, FIELD=VALUE,VALUE or FIELD!=VALUE")
        return cls(field, tuple(value.strip() for value in values.split(",")), equal)

    def __call__(self, row: Row) -> bool:
        value = find_field(row.fields, self.field)
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return (text in self.values) == self.equal


def guess_views(rows: list[Row], token_field: str | None, context: int) -> Views:
    """Views where the user names none: raw, and what else the first rows have by its usual name."""
    for row in rows:
        tokens = find_tokens(row.fields, token_field)
        if tokens is not None:
            views, rest = divmod(len(tokens), context)
            if rest or not 1 <= views <= len(VIEWS):
                raise ValueError(
                    f"{row.name}: {len(tokens)} token ids are not one to three texts of --context {context}"
                )
            return Views.parse(VIEWS[:views])
    names = [name for name in VIEWS[1:] if any(find_view(row.fields, name) for row in rows)]
    return Views.parse(("raw", *names))
