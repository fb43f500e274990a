"""Chinese-CLIP's files, NAME_imgs.tsv (id, picture in base64) and NAME_texts.jsonl (text_id, text, image_ids): what a
line holds, or why it is of no use; and its data sets as rows of a source: a row for each text and picture, as in the
LMDB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .image import ImageError, inspect_image
from .lmdb import decode_base64, open_split
from .recordio import RecordError
from .rows import MISSING, Problem, Row, Skip, SourceError, iterate_lines, load_json

IMAGES_ENDING, TEXTS_ENDING = "_imgs.tsv", "_texts.jsonl"
BOM = b"\xef\xbb\xbf"  # which some editors put at the beginning of UTF-8
_ID = re.compile(rb"0|-?[1-9][0-9]{0,18}")

NO_ID = Problem("the image id is not a whole number")
NO_COLUMNS = Problem("a line is not an id, a tab and a picture in base64")
NO_BASE64 = Problem("the picture is not complete base64")
NO_PICTURE = Problem("the picture cannot be read")
LARGE = Problem("the picture is too large")
NO_OBJECT = Problem("a line is not a JSON object with text_id, text and image_ids")
NO_TEXT_ID = Problem("text_id is not a whole number")
NO_TEXT = Problem("the text is empty or no text")
NO_IMAGE_IDS = Problem("image_ids is not a list of whole numbers")
NO_PAIR = Problem("a pair of the LMDB is damaged")


class ImageLine(NamedTuple):
    """A picture as the TSV has it, and decoded. end: bytes of the file up to the end of the line."""

    number: int
    end: int
    image_id: bytes = b""
    encoded: bytes = b""
    picture: bytes = b""
    problem: Problem | None = None


class TextLine(NamedTuple):
    """A text with the ids of its images."""

    number: int
    text_id: int = 0
    text: str = ""
    image_ids: tuple[int, ...] = ()
    problem: Problem | None = None


def find_pair(file: Path) -> tuple[Path, Path]:
    """(NAME_imgs.tsv, NAME_texts.jsonl) for either of them."""
    ending = IMAGES_ENDING if file.name.endswith(IMAGES_ENDING) else TEXTS_ENDING
    name = file.name.removesuffix(ending)
    return file.with_name(name + IMAGES_ENDING), file.with_name(name + TEXTS_ENDING)


def is_texts_file(file: Path) -> bool:
    """Whether this is NAME_texts.jsonl with NAME_imgs.tsv beside it."""
    return file.name.endswith(TEXTS_ENDING) and file.is_file() and find_pair(file)[0].is_file()


def read_images(file: Path, start: int = 0, number: int = 0) -> Iterator[ImageLine]:
    """The lines of a TSV from byte `start`, before which there are `number` lines; blank lines are none."""
    with open(file, "rb") as stream:
        stream.seek(start)
        for more, line in iterate_lines(stream, file):
            start += len(line)
            if content := (line if number + more > 1 else line.removeprefix(BOM)).strip():
                yield _read_image(content, ImageLine(number + more, start))


def _read_image(content: bytes, line: ImageLine) -> ImageLine:
    columns = content.split(b"\t")
    if len(columns) != 2:
        return line._replace(problem=NO_COLUMNS)
    image_id, encoded = columns
    if not _ID.fullmatch(image_id):
        return line._replace(problem=NO_ID)
    line = line._replace(image_id=image_id, encoded=encoded)
    try:
        picture = decode_base64(encoded, "")
        inspect_image(picture)
    except RecordError:
        return line._replace(problem=NO_BASE64)
    except ImageError as error:
        return line._replace(problem=LARGE if "large" in error.reason else NO_PICTURE)
    return line._replace(picture=picture)


def read_texts(file: Path) -> Iterator[TextLine]:
    """The lines of a JSONL; blank lines are none."""
    with open(file, "rb") as stream:
        for number, content in iterate_lines(stream, file):
            if content.strip():
                yield _read_text(content, file, TextLine(number))


def _read_text(content: bytes, file: Path, line: TextLine) -> TextLine:
    try:
        fields = load_json(content, file, "")
    except SourceError:
        return line._replace(problem=NO_OBJECT)
    if not isinstance(fields, dict) or not {"text_id", "text", "image_ids"} <= fields.keys():
        return line._replace(problem=NO_OBJECT)
    text_id, text, image_ids = fields["text_id"], fields["text"], fields["image_ids"]
    if not _is_id(text_id):
        return line._replace(problem=NO_TEXT_ID)
    if not isinstance(text, str) or not text.strip():
        return line._replace(text_id=text_id, problem=NO_TEXT)
    if not isinstance(image_ids, list) or not all(map(_is_id, image_ids)):
        return line._replace(text_id=text_id, problem=NO_IMAGE_IDS)
    return TextLine(line.number, text_id, text, tuple(image_ids))


def _is_id(value: object) -> bool:
    return type(value) is int and abs(value) < 10**19


# ---- pictures at random ----------------------------------------------------------------------------------------------


class ImageFile:
    """The pictures of a TSV by their ids; the file is gone through once, and a picture is read when it is asked for."""

    def __init__(self, file: Path):
        self.file, self._places, at = file, {}, 0
        with open(file, "rb") as stream:
            for _, line in iterate_lines(stream, file):
                image_id, tab, _ = line.partition(b"\t")
                if tab:
                    self._places[image_id.removeprefix(b"" if at else BOM).strip().decode("utf-8", "replace")] = (
                        at + len(image_id) + 1,
                        len(line),
                    )
                at += len(line)

    @property
    def ids(self) -> list[str]:
        """As written, in the order of the file."""
        return list(self._places)

    def __contains__(self, image_id: object) -> bool:
        return str(image_id) in self._places

    def picture(self, image_id: int | str) -> bytes:
        """The encoded picture. RecordError for what is no base64; ImageError for one too large."""
        start, size = self._places[str(image_id)]
        with open(self.file, "rb") as stream:
            stream.seek(start)
            encoded = stream.read(size).partition(b"\n")[0]
        return decode_base64(encoded, f"{self.file.name} image {image_id}")


# ---- rows of a source ------------------------------------------------------------------------------------------------


def read_text_rows(file: Path, skip: Skip) -> Iterator[Row]:
    """NAME_texts.jsonl with NAME_imgs.tsv beside it: text by text, a row for each of its pictures."""
    images = ImageFile(find_pair(file)[0])
    with open(file, "rb") as stream:
        for number, content in iterate_lines(stream, file):
            if not content.strip():
                continue
            place = f"{file.name} line {number}"
            fields = load_json(content, file, f"line {number}")
            if not isinstance(fields, dict) or not isinstance(image_ids := fields.get("image_ids"), list):
                raise SourceError(f"{file}: line {number} is not an object with text_id, text and image_ids")
            for image_id in image_ids:
                if not skip():
                    row = {**fields, "image_id": image_id}
                    row.pop("image_ids")
                    yield Row(f"{place} image {image_id}", row, None, _find_picture(images, image_id))


def _find_picture(images: ImageFile, image_id: object) -> bytes | Problem:
    if not isinstance(image_id, int | str) or image_id not in images:
        return MISSING
    try:
        return images.picture(image_id)
    except RecordError:
        return NO_BASE64
    except ImageError as error:
        return LARGE if "large" in error.reason else NO_PICTURE


def read_lmdb_rows(folder: Path, skip: Skip) -> Iterator[Row]:
    """A split folder of an LMDB: a row for each pair."""
    split = open_split(folder)
    for number in range(split.count):
        if skip():
            continue
        name = f"{folder.name} pair {number}"
        try:
            pair = split.pair(number)
        except RecordError:
            yield Row(name, {"text": NO_PAIR}, None, NO_PAIR)
            continue
        try:
            picture: bytes | Problem = split.picture(pair.image_id)
        except RecordError as error:
            picture = MISSING if "is not in imgs" in str(error) else NO_BASE64
        except ImageError:
            picture = LARGE
        yield Row(name, pair._asdict(), None, picture)


def count_pairs(folder: Path) -> int:
    """Pairs of a split folder."""
    return open_split(folder).count
