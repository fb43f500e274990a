"""Caption files as evaluation wants them: every entry names a picture and has all its texts, or is an error.

The files are those that records are built from (`manifests`); building skips and counts an entry that it cannot use, a
benchmark must not.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .fields import CAPTION_FIELDS, IMAGE_FIELDS
from .manifests import load_json_file, read_jsonl
from .rows import Row, Skip, SourceError

ENDINGS = (".json", ".jsonl", ".ndjson")


class Captioned(NamedTuple):
    """One entry. `where` names file and entry for messages, `image` is the picture's name as written."""

    where: str
    image: str
    captions: list[str]
    split: str | None


def read_captions(file: Path) -> tuple[str | None, list[Captioned]]:
    """Read JSON lines, a JSON list, COCO's captions or a Karpathy file -> (the name it gives itself, its entries).

    Captions are texts that are not empty; only a picture of COCO may have none. SourceError names the entry and the
    field of whatever is wrong. OSError.
    """
    if file.suffix.lower() != ".json":
        return None, [_read_entry(file, row) for row in read_jsonl(file, Skip(0))]
    content = load_json_file(file)
    return content.name, [_read_entry(file, row, content.form == "coco") for row in content.rows(Skip(0))]


def _read_entry(file: Path, row: Row, may_lack: bool = False) -> Captioned:
    where, fields = str(file.parent / row.name), row.fields
    has = f"the entry has {', '.join(fields)[:200] or 'no field'}"
    if row.image is not None:
        raise SourceError(f"{where}: {row.image if isinstance(row.image, str) else 'a picture inside the file'}; {has}")
    name = _find(fields, IMAGE_FIELDS) or "image"
    image = fields.get(name)
    if not isinstance(image, str) or not image:
        raise SourceError(f"{where}: field {name!r} is {image!r:.80}; give a path as text ({has})")
    name = _find(fields, CAPTION_FIELDS)
    if name is None:
        also = ", ".join(CAPTION_FIELDS[2:])
        raise SourceError(
            f"{where}: no field 'caption' or 'captions' (also read: {also}); {has}; add the picture's text or texts"
        )
    captions = fields[name] if isinstance(fields[name], list) else [fields[name]]
    if not captions and not may_lack:
        raise SourceError(f"{where}: field {name!r} is empty; give at least one text or remove the entry")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise SourceError(
                f"{where}: field {name!r} holds {caption!r:.80}; every caption is a text that is not empty"
            )
    split = fields.get("split")
    if split is not None and not isinstance(split, str):
        raise SourceError(f"{where}: field 'split' is {split!r:.80}; give a name such as 'test'")
    return Captioned(where, image, captions, split)


def _find(fields: dict, names: tuple[str, ...]) -> str | None:
    """The first of the names that has a value, else the first that is there."""
    return next((n for n in names if fields.get(n)), next((n for n in names if n in fields), None))
