"""Rows of a job from whatever holds pictures and texts: read once, in order, into parts.

The input may grow: then it is read again, and what was made of its former rows is kept.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rwkv_clip.data.encode import RowError, find_text
from rwkv_clip.data.fields import (
    IMAGE_FIELDS,
    Choice,
    Condition,
    FieldError,
    Texts,
    choose_fields,
    find_field,
    find_tokens,
    list_fields,
    survey,
)
from rwkv_clip.data.rows import IMAGE_ENDINGS, Row
from rwkv_clip.data.sources import PAIRS, Source
from rwkv_clip.files import hash_file, hold, sync_folder

from .cleaning import clean
from .job import ROWS, Job, Stage
from .parquet import write_parquet
from .settings import InputSettings
from .token_texts import CONTEXT, Decoder

COLUMNS = {
    "row": "int",
    "image": "str",
    "raw": "str",
    "clean": "str",
    "flags": "str list",
    "grade": "str",
    "caption": "str",
    "caption_source": "str",
    "tags": "str list",
    "tag_scores": "float list",
    "tag_source": "str",
    "ocr": "str",
    "license": "str",
    "url": "str",
}
# Fields by their usual names; a name that the user gives comes first.
TAGS = ("tags", "detection_tags", "det_tags", "ram_tags")
SCORES = ("tag_scores", "tags_scores")
OCR = ("ocr", "ocr_text")
IDS = ("id", "key", "uid", "image_id")
LICENSES = ("license", "licence")
URLS = ("url", "source_url")
FROM_INPUT = "input"
MOST_TAGS = 256
MOST_TEXT = 1 << 14  # characters of a text that are kept: a part of rows is held in memory
NO_TEXTS = Choice(Texts(("raw",), ("raw",)))
FRESH = "reading"  # folder of rows that are being read
VERSION = 1  # of what is made of a row; a change makes earlier jobs' rows others


def make_stage(settings: InputSettings) -> Stage:
    """The stage that reads."""
    fields = {
        name: getattr(settings, name)
        for name in ("texts", "tags_field", "ocr_field", "id_field", "image_field", "where")
    }
    return Stage(ROWS, COLUMNS, (), (), {**fields, "rows_version": VERSION})


def open_source(spec: str, images: str | None) -> Source:
    """What rows and their pictures are read from; pictures need no texts."""
    return Source(spec, images, alone=True)


def ingest(job: Job, settings: InputSettings, new_run: bool = False) -> dict[str, Any]:
    """Read the input into the job's rows, if that has not been done; returns `Job.find_input`.

    ValueError for an input that cannot be read, or that has fewer rows than before. InUse where another process reads.
    """
    stage, source = make_stage(settings), open_source(settings.input or "", settings.images)
    with hold(job.folder / "rows.lock", f"the rows of {job.folder}", "wait until it has read them"):
        job.agree(stage, new_run)
        before = job.find_input()
        fingerprint = [*source.fingerprint(), settings.limit]  # a higher limit is an input that has grown
        if before.get("fingerprint") == fingerprint and before.get("sha256") == _hash_parts(job, before["parts"]):
            return before
        return _read(job, stage, source, settings, fingerprint)


def _hash_parts(job: Job, parts: int) -> str | None:
    """SHA-256 of the parts of the rows, None where one is missing."""
    files = [job.part(ROWS, number) for number in range(parts)]
    if not all(file.exists() for file in files):
        return None
    return hashlib.sha256(" ".join(map(hash_file, files)).encode()).hexdigest()


def _read(job: Job, stage: Stage, source: Source, settings: InputSettings, fingerprint: list) -> dict[str, Any]:
    began, before, notes = time.monotonic(), job.find_input(), []
    conditions = list(map(Condition.parse, settings.where))

    def choose(sample: list[Row]) -> Choice:
        _check_names(sample, settings)
        try:
            return choose_fields(sample, settings.texts, None, CONTEXT)
        except FieldError as error:
            if settings.texts:
                raise
            notes.append(f"{error}; pictures without texts need --captions or --captioner")
            return NO_TEXTS  # pictures that are to be captioned first

    folder = source.files[0] if source.kind == PAIRS and len(source.files) == 1 else None
    reader = Reader(survey(source.rows(), conditions, choose), settings, folder)
    bar = tqdm(source.rows(), total=source.count(), unit="row", disable=None, desc="reading")
    skipped: Counter[str] = Counter()
    have: Counter[str] = Counter(raw=0, caption=0, tags=0)
    rows = islice(_select(bar, conditions, reader, skipped), settings.limit)
    count = part = 0
    fresh = job.folder / ROWS / FRESH  # what was read before stays until all has been read
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    while batch := list(islice(rows, job.part_rows)):
        file = fresh / job.part(ROWS, part).name
        write_parquet(file, {"id": "str", "inputs": "str", **COLUMNS}, [batch], {"failed": "0"})
        count, part = count + len(batch), part + 1
        have.update(name for row in batch for name in ("raw", "caption", "tags") if row[name])
    if not count:
        reasons = "; ".join(f"{reason}: {n}" for reason, n in skipped.most_common(3))
        raise ValueError(f"input: {settings.input} has no row with a text or a picture ({reasons or 'it is empty'})")
    if count < before.get("rows", 0):
        shutil.rmtree(fresh)
        raise ValueError(
            f"input: {settings.input} has {count} rows, the job was begun with {before['rows']}; give all of them, or "
            f"another --output"
        )
    _replace_parts(job, fresh, part)
    about = {"fingerprint": fingerprint, "parts": part, "rows": count, "skipped": dict(skipped)}
    about["sha256"] = _hash_parts(job, part)
    job.note_input({**about, "have": have, "notes": notes, "input": settings.input, "images": settings.images})
    job.note_time(ROWS, rows=count, seconds=round(time.monotonic() - began, 3))
    return job.find_input()


def _check_names(sample: list[Row], settings: InputSettings) -> None:
    """ValueError for a field that was named and that no row of the sample has."""
    for setting in ("tags_field", "ocr_field", "id_field", "image_field"):
        name = getattr(settings, setting)
        if name and all(find_field(row.fields, name) is None for row in sample):
            raise ValueError(f"{setting}: no row has a field {name!r}; they have {list_fields(sample)}")


def _replace_parts(job: Job, fresh: Path, parts: int) -> None:
    """The parts that were read take the place of former ones. A kill in between: all is read again."""
    job.forget_input()
    for number in range(parts):
        file = job.part(ROWS, number)
        os.replace(fresh / file.name, file)
    fresh.rmdir()
    sync_folder(job.folder / ROWS)


def _select(
    rows: Iterator[Row], conditions: Sequence[Condition], reader: Callable[[int, Row], dict], skipped: Counter
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if not all(condition.judge(row)[0] for condition in conditions):
            skipped["left out by --where"] += 1
            continue
        try:
            yield reader(number, row)
        except RowError as error:
            skipped[str(error)] += 1


class Reader:
    """Row of a source -> row of a job."""

    def __init__(self, choice: Choice, settings: InputSettings, folder: Path | None = None):
        self.folder = folder  # of pictures, whose names the rows do not say
        names = dict(zip(choice.texts.names, choice.texts.fields))
        self.raw, self.caption = names.get("raw"), names.get("synthetic")
        self.tokens = choice.token_field
        self._decoder = Decoder() if self.tokens else None
        self._named = {
            "tags": _put_first(settings.tags_field, TAGS),
            "ocr": _put_first(settings.ocr_field, OCR),
            "id": _put_first(settings.id_field, IDS),
            "image": _put_first(settings.image_field, IMAGE_FIELDS),
        }

    def __call__(self, number: int, row: Row) -> dict[str, Any]:
        """RowError for a row that has nothing to make a text of."""
        raw, caption = (text[:MOST_TEXT] for text in self._find_texts(row))
        tags = parse_tags(_find(row, self._named["tags"]))
        ocr = _to_text(_find(row, self._named["ocr"]))
        image = self._name_picture(row)
        if not (raw or caption or tags or ocr or image or isinstance(row.image, bytes)):
            raise RowError("neither a text nor a picture")
        cleaned, found = clean(raw), _find(row, self._named["id"])
        return {
            "id": str(found) if isinstance(found, (str, int)) and str(found) else row.name,
            "inputs": "",
            "row": number,
            "image": image,
            "raw": raw,
            "clean": cleaned.text,
            "flags": list(cleaned.flags),
            "grade": cleaned.grade,
            "caption": caption or None,
            "caption_source": FROM_INPUT if caption else None,
            "tags": tags,
            "tag_scores": parse_scores(_find(row, SCORES), tags),
            "tag_source": FROM_INPUT if tags else None,
            "ocr": ocr or None,
            "license": _to_text(_find(row, LICENSES)) or None,
            "url": _to_text(_find(row, URLS)) or None,
        }

    def _find_texts(self, row: Row) -> tuple[str, str]:
        """(raw, caption), decoded where they are token ids."""
        if self._decoder is not None:
            texts = self._decoder(find_tokens(row.fields, self.tokens or ""))
            return texts[0], texts[1] if len(texts) > 1 else ""
        raw = find_text(row.fields, self.raw) if self.raw else None
        caption = find_text(row.fields, self.caption) if self.caption else None
        return _repair(raw or ""), _repair(caption or "")

    def _name_picture(self, row: Row) -> str | None:
        """The file of the picture as the row or its folder names it, None where the picture came with the row."""
        if self.folder is not None:
            stem = row.name.removeprefix(f"{self.folder.name}/")
            names = (f"{stem}.{change(ending)}" for ending in IMAGE_ENDINGS for change in (str.lower, str.upper))
            return next((name for name in names if (self.folder / name).is_file()), None)
        if row.image is not None:
            return None
        value = _find(row, self._named["image"])
        if isinstance(value, dict):
            value = None if value.get("bytes") else value.get("path")
        return _repair(value).strip() or None if isinstance(value, str) else None


def parse_tags(value: Any) -> list[str] | None:
    """Tags of a list, or of a text in which RAM++ (" | "), commas or semicolons separate them; None for none."""
    if isinstance(value, dict):
        value = list(value)
    if isinstance(value, str):
        value = value.split("|") if "|" in value else value.replace(";", ",").split(",")
    if not isinstance(value, (list, tuple)):
        return None
    names = [item.get("name") if isinstance(item, dict) else item for item in value[:MOST_TAGS]]
    tags = [" ".join(_repair(name).split())[:100] for name in names if isinstance(name, str)]
    return list(dict.fromkeys(filter(None, tags))) or None


def parse_scores(value: Any, tags: list[str] | None) -> list[float] | None:
    """A finite score for each tag; None where they do not match."""
    if not tags or not isinstance(value, (list, tuple)) or len(value) != len(tags):
        return None
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in value):
        return None
    return [float(x) for x in value]


def _put_first(name: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if name else usual


def _find(row: Row, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := find_field(row.fields, name)) is not None), None)


def _to_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = " ".join(item for item in value if isinstance(item, str))
    return _repair(value[:MOST_TEXT]).strip() if isinstance(value, str) else ""


def _repair(text: str) -> str:
    """Half surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
