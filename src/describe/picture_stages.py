"""The stages that need pictures, or columns that exist already: captions, tags, CLIP scores.

What a row has is kept: a file fills what is missing, and a captioner or tagger what is missing then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_clip.data.sources import Source
from rwkv_clip.files import hash_file

from .columns import Column, read_column
from .composers import make_vision_captioner
from .ingest import open_source
from .job import ROWS, Job, Stage
from .pictures import PictureReader, PictureSettings
from .sources import FROM_TEXT
from .vision_captioner import VisionCaptioner
from .words import find_nouns
from .work import Row, Task

if TYPE_CHECKING:
    from .tagger import Tagger
    from .transformers_captioner import TransformersCaptioner

CAPTION = {"caption": "str", "caption_source": "str", "caption_status": "str", "caption_reason": "str"}
TAGS = {
    "tags": "str list",
    "tag_scores": "float list",
    "tag_source": "str",
    "tag_status": "str",
    "tag_reason": "str",
}
PICTURE = ("row", "image")
CHUNK = 64  # pictures at a time
IN_MEMORY = 512  # pictures that are held while a server is asked about them


class Pictures:
    """Pictures of a job's rows, from what it was read from."""

    def __init__(self, settings: Any):
        job = Job(settings.output).find_input()
        spec, images = settings.input or str(job.get("input")), settings.images or job.get("images")
        self.source: Source = open_source(spec, images)
        folder = images if images and Path(images).is_dir() else None
        self.settings = PictureSettings(
            images=folder, image_field=settings.image_field, allow_outside=settings.allow_outside
        )
        self.read = PictureReader(self.source, self.settings).read

    def find(self, row: Mapping[str, Any]) -> bytes | None:
        """The picture of one row. ValueError with the reason where there is none."""
        (found,) = self.read([row])
        if found.reason:
            raise ValueError(found.reason)
        return found.data


# ---- captions and tags -----------------------------------------------------------------------------------------------

Ask = Callable[[Sequence[Row]], AsyncIterator[tuple[int, Row]]]


def fill(column: Column | None, ask: Ask | None, have: Callable[[Row], Row | None]) -> Ask:
    """Rows that have the columns keep them, then the file's are taken, then `ask` is asked about the others."""

    async def work(rows: Sequence[Row]) -> AsyncIterator[tuple[int, Row]]:
        missing = []
        for place, row in enumerate(rows):
            if (found := have(row)) is not None:
                yield place, found
            elif column is not None and (taken := column.find(row)) is not None:
                yield place, taken
            else:
                missing.append(place)
        if ask is None:
            for place in missing:
                yield place, {}
        else:
            async for place, result in ask([rows[place] for place in missing]):
                yield missing[place], result

    return work


def make_tag_task(settings: Any) -> Task:
    """Tags of every row."""
    column = read_column(settings.tags, "tags") if settings.tags else None
    decides: dict[str, Any] = {"tagger": settings.tagger, "tags": _hash(settings.tags)}
    ask: Ask | None = None
    if settings.tagger == "checkpoint":
        from .tagger import Tagger

        tagger, pictures = Tagger.load(settings), Pictures(settings)
        job = Job(settings.output)
        tagger.calibrate(pictures.read(_take(job, settings.background)), job.folder / "tagger")
        decides |= tagger.decides
        ask = partial(_tag, tagger, pictures)
    elif settings.tagger == "text":
        ask = _tag_by_text
    stage = Stage(
        "tags", TAGS, (ROWS, "caption"), (*PICTURE, "id", "tags", "clean", "caption"), decides, "tag_status", True
    )
    return Task(stage, ask=fill(column, ask, _tags_of), tell=column.tell if column is not None else None)


def make_caption_task(settings: Any) -> Task:
    """Captions of every row."""
    column = read_column(settings.captions, "caption") if settings.captions else None
    decides: dict[str, Any] = {"captioner": settings.captioner, "captions": _hash(settings.captions)}
    ask: Ask | None = None
    close = None
    if settings.captioner == "openai":
        server = make_vision_captioner(settings)
        decides |= {f"captioner_{name}": value for name, value in server.decides.items()}
        ask, close = partial(_ask_server, server, Pictures(settings)), server.close
    elif settings.captioner == "transformers":
        from .transformers_captioner import TransformersCaptioner  # and torch with it

        model = TransformersCaptioner.load(settings)
        decides |= model.decides
        ask = partial(_ask_model, model, Pictures(settings))
    stage = Stage("caption", CAPTION, (ROWS,), (*PICTURE, "id", "caption"), decides, "caption_status", True)
    return Task(
        stage, ask=fill(column, ask, _caption_of), close=close, tell=column.tell if column is not None else None
    )


async def _ask_server(
    server: VisionCaptioner, pictures: Pictures, rows: Sequence[Row]
) -> AsyncIterator[tuple[int, Row]]:
    for start in range(0, len(rows), IN_MEMORY):
        chunk, wanted = [], []
        for place, found in enumerate(pictures.read(rows[start : start + IN_MEMORY]), start):
            if found.reason:
                yield place, {"caption_status": "failed", "caption_reason": found.reason}
            else:
                chunk.append((rows[place]["id"], found.data))
                wanted.append(place)
        async for place, composed in server.caption(chunk):
            told = {"caption_status": composed.status, "caption_reason": composed.reason}
            caption = {"caption": composed.text, "caption_source": server.name} if composed.text else {}
            yield wanted[place], {**caption, **told}


async def _ask_model(
    model: TransformersCaptioner, pictures: Pictures, rows: Sequence[Row]
) -> AsyncIterator[tuple[int, Row]]:
    for start in range(0, len(rows), CHUNK):
        found = list(pictures.read(rows[start : start + CHUNK]))
        for place, columns in enumerate(model.caption(found), start):
            yield place, columns


def _caption_of(row: Row) -> Row | None:
    return {name: row.get(name) for name in ("caption", "caption_source")} if row.get("caption") else None


def _take(job: Job, count: int) -> list[Row]:
    rows = []
    for row in job.read(ROWS):
        rows.append(row)
        if len(rows) == count:
            break
    return rows


def _tags_of(row: Row) -> Row | None:
    return {name: row.get(name) for name in ("tags", "tag_scores", "tag_source")} if row.get("tags") else None


async def _tag(tagger: Tagger, pictures: Pictures, rows: Sequence[Row]) -> AsyncIterator[tuple[int, Row]]:
    for start in range(0, len(rows), CHUNK):
        found = list(pictures.read(rows[start : start + CHUNK]))
        for place, columns in enumerate(tagger.tag(found), start):
            reason = columns["tag_status"]
            status = {"tag_status": "ok"} if reason == "ok" else {"tag_status": "failed", "tag_reason": reason}
            yield place, {**columns, **status}


async def _tag_by_text(rows: Sequence[Row]) -> AsyncIterator[tuple[int, Row]]:
    for place, row in enumerate(rows):
        nouns = find_nouns(f"{row.get('clean') or ''}. {row.get('caption') or ''}")
        tags = list(dict.fromkeys(nouns)) or None
        yield place, {"tags": tags, "tag_source": FROM_TEXT if tags else None, "tag_status": "ok"}


# ---- scores ----------------------------------------------------------------------------------------------------------


def make_score_task(settings: Any) -> Task:
    """How well the three texts of every row fit its picture."""
    from .scores import COLUMNS, VERSION, score
    from .towers import Towers

    towers, pictures = Towers.load(settings), Pictures(settings)
    decides = {**towers.decides, "scores_version": VERSION}
    inputs = (*PICTURE, "raw", "caption", "generated")
    stage = Stage("scores", COLUMNS, (ROWS, "caption", "verify"), inputs, decides, journaled=True, needs=("verify",))

    async def ask(rows: Sequence[Row]) -> AsyncIterator[tuple[int, Row]]:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            for place, columns in enumerate(score(chunk, list(pictures.read(chunk)), towers), start):
                yield place, columns

    return Task(stage, ask=ask)


def _hash(file: str | None) -> str | None:
    """SHA-256 of a file of columns: another content makes other rows."""
    return hash_file(Path(file)) if file else None
