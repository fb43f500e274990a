"""Images + captions -> the files that Chinese-CLIP's data sets are made of, with ids made for you.

    python -m rwkv_clip.data.pairs captions.csv OUT --split train --images photos
    python -m rwkv_clip.data.pairs captions.jsonl OUT --split valid --where split=dev --texts captions_zh
    python -m rwkv_clip.data.lmdb --data_dir OUT --splits train,valid

Writes OUT/{split}_imgs.tsv, OUT/{split}_texts.jsonl, and OUT/{split}_names.jsonl, which says what each picture was
called. A table has a line for each picture and text; both may come again. Equal pictures (byte for byte) get one id;
texts that are equal once they are prepared (case, curly quotes) are one text with several image_ids.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ..errors import run_command
from ..files import hold, write_whole
from ..tokenizer import BERT_CHINESE, make_tokenizer, prepare_texts
from .chinese_clip import IMAGES_ENDING, TEXTS_ENDING
from .encode import Encoder, RowError
from .fields import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    Choice,
    Condition,
    FieldError,
    Texts,
    check_image_field,
    find_field,
    list_fields,
    survey,
)
from .image import ImageError, inspect_image
from .rows import MAX_TEXT_BYTES, Problem, Row, SourceError
from .sources import Source

NAMES_ENDING = "_names.jsonl"
EXAMPLES = 10


@dataclass(frozen=True)
class PairsSettings:
    """What is converted.

    Args:
        source: what data2rec.py reads: a manifest (.csv .tsv .json .jsonl), .tar, .parquet, or a folder of pictures
            with texts of the same name.
        output: folder for the files.
        split: name of the split: train, valid, test.
        images: folder of the pictures (default: that of the manifest, or images/ in it).
        texts: fields with the texts, each a text or a list of them; default: the first usual name that there is
            (captions, caption, title, text ..), all texts of a list.
        where: rows to take, for example split=train; all must hold.
        image_field: field with the picture or its path, if it has none of the usual names.
        overwrite: replace files that are there.
        allow_outside: names may lead out of the folder of the images.
    """

    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")]
    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "train"
    images: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD ...")] = ()
    where: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CONDITION ...")] = ()
    image_field: Annotated[str | None, tyro.conf.arg(metavar="FIELD")] = None
    overwrite: bool = False
    allow_outside: bool = False


@dataclass
class Pairs:
    """What was found: texts by what they are once prepared, names of the pictures by their bytes, and what was left
    out."""

    texts: dict[str, tuple[str, dict[int, None]]] = field(default_factory=dict)
    images: dict[bytes, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    rows: int = 0
    repeated: int = 0  # rows whose picture came before
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        pairs = sum(len(ids) for _, ids in self.texts.values())
        shared = sum(len(ids) > 1 for _, ids in self.texts.values())
        lines = [
            f"{len(self.images):,} images, {len(self.texts):,} texts, {pairs:,} pairs from {self.rows:,} rows",
            f"  {self.repeated:,} rows with a picture that came before; {shared:,} texts with several pictures",
        ]
        lines += [f"  {count:,} x {what}" for what, count in sorted(self.skipped.items())]
        return "\n".join(lines + [f"  e.g. {example}" for example in self.examples])

    def skip(self, row: Row, reason: str) -> None:
        """Count a row, or a text of it, that is left out."""
        self.skipped[reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{row.name}: {reason}")


def convert(settings: PairsSettings) -> Pairs:
    """Write the files of a split. ValueError: bad settings, files in the way. SourceError: nothing of use. OSError."""
    folder, split = Path(settings.output), settings.split
    if not split or Path(split).name != split:
        raise ValueError(f"--split: {split!r} is not the name of a split; give one such as train")
    files = [folder / f"{split}{ending}" for ending in (IMAGES_ENDING, TEXTS_ENDING, NAMES_ENDING)]
    if (there := [file for file in files if file.exists()]) and not settings.overwrite:
        raise ValueError(f"{there[0]}: exists; give --overwrite to replace it, or another folder or --split")
    if settings.images is not None and not Path(settings.images).is_dir():
        raise ValueError(
            f"--images: {settings.images!r} is no folder; name the one that the names of the images start from"
        )
    source = Source(settings.source, settings.images, settings.allow_outside)
    if own := [file for file in there if source.holds(file)]:
        raise ValueError(f"{own[0]}: a file of the input, which the output would replace; give another folder")
    conditions = [Condition.parse(text) for text in settings.where]
    fields = survey(source.rows(), conditions, lambda sample: _choose(sample, settings))
    if not fields:
        where = f" that meets {', '.join(settings.where)}" if settings.where else ""
        raise SourceError(f"{settings.source}: has no row{where}")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(
        folder / f".{split}{IMAGES_ENDING}.lock", str(files[0]), "wait until it has ended, or give another folder"
    ):
        return _write(settings, source, conditions, fields, files)


def _choose(sample: list[Row], settings: PairsSettings) -> tuple[str, ...]:
    """The fields of the texts, from the first rows."""
    check_image_field(sample, settings.image_field)
    if not sample:
        return ()
    for name in settings.texts or CAPTION_FIELDS:
        if not any(find_field(row.fields, name) is not None for row in sample):
            if settings.texts:
                raise FieldError(f"--texts: no row has a field {name!r}; they have {list_fields(sample)}", [name])
        elif not settings.texts:
            return (name,)
    if not settings.texts:
        raise FieldError(f"no row has a text; they have {list_fields(sample)}; say where it is, --texts FIELD")
    return settings.texts


def _write(
    settings: PairsSettings, source: Source, conditions: list[Condition], fields: tuple[str, ...], files: list[Path]
) -> Pairs:
    choice = Choice(Texts(("raw",), fields[:1]))
    folder = Path(settings.images) if settings.images else None
    finder = Encoder(choice, images=folder, image_field=settings.image_field, allow_outside=settings.allow_outside)
    found, tokenizer = Pairs(), make_tokenizer(BERT_CHINESE)

    def lines() -> Iterator[bytes]:
        for row in tqdm(source.rows(), total=source.count(), unit="row", disable=None):
            if not all(condition.judge(row)[0] for condition in conditions):
                continue
            found.rows += 1
            texts = list(_find_texts(row, fields, found))
            if not texts:
                continue
            try:
                picture = finder.find_picture(row).read()
                inspect_image(picture, row.name)
            except (RowError, ImageError) as error:
                found.skip(row, getattr(error, "reason", str(error)))
                continue
            key = hashlib.blake2b(picture, digest_size=16).digest()
            number = found.images.get(key)
            found.repeated += number is not None
            if number is None:
                number = found.images[key] = len(found.images) + 1
                found.names.append(_name_of(row, settings.image_field))
                yield b"%d\t%s\n" % (number, base64.b64encode(picture))
            for text, prepared in zip(texts, prepare_texts(tokenizer, texts)):
                found.texts.setdefault(prepared, (text, {}))[1][number] = None
        if not found.images:
            raise SourceError(f"{settings.source}: nothing to write:\n{found}")

    write_whole(files[0], lines())
    texts = (
        {"text_id": number, "text": text, "image_ids": list(ids)}
        for number, (text, ids) in enumerate(found.texts.values(), 1)
    )
    names = ({"image_id": number, "image": name} for number, name in enumerate(found.names, 1))
    for file, rows in zip(files[1:], (texts, names)):
        write_whole(file, (json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for row in rows))
    return found


def _find_texts(row: Row, fields: tuple[str, ...], found: Pairs) -> Iterator[str]:
    """All texts of a row; one that is of no use is counted."""
    count = 0
    for name in fields:
        value = find_field(row.fields, name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, Problem):
                found.skip(row, str(text))
            elif text is None or (isinstance(text, str) and not text.strip()):
                continue
            elif not isinstance(text, str):
                found.skip(row, "a text is not a string")
            elif len(text) > MAX_TEXT_BYTES >> 5:
                found.skip(row, "a text is too long")
            else:
                yield text.strip()
            count += 1
    if not count:
        found.skip(row, "no text")


def _name_of(row: Row, image_field: str | None) -> str:
    """What the picture is called in the source."""
    names = (image_field,) if image_field else IMAGE_FIELDS
    value = next((value for name in names if isinstance(value := find_field(row.fields, name), str)), None)
    return value if row.image is None and value else row.name


def main() -> int:
    """Read the command line and convert; returns the exit code."""
    return run_command(_command, "pairs")


def _command() -> int:
    print(convert(tyro.cli(PairsSettings, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
