"""Indices: what is found out about a file once, written beside it or into the folder that the user names.

An index is a line of JSON and an array of int64 after it, which is mapped, so that all processes share it. It appears
whole or not at all, and belongs to one state of its file: of another size or content, the file is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...files import parse_json, write_whole
from ..rows import SourceError
from .storage import Stored

SCHEMA = 1
ENDING = ".index"
MAX_HEAD = 1 << 24
log = logging.getLogger(__name__)


class Index:
    """facts: JSON of the file, with "digest", which identifies its content. numbers: int64 (n,). Can be pickled: a
    copy maps the index again."""

    def __init__(self, path: Path, facts: dict[str, Any], numbers: np.ndarray):
        self.path, self.facts, self.numbers = path, facts, numbers

    def __getstate__(self) -> dict:
        return {"path": self.path, "digest": self.facts["digest"]}

    def __setstate__(self, state: dict) -> None:
        found = read_index_file(state["path"])
        if found is None or found.facts["digest"] != state["digest"]:
            raise SourceError(f"{state['path']}: this index has changed since it was opened; start again")
        vars(self).update(vars(found))


Make = Callable[[Stored], tuple[dict[str, Any], np.ndarray]]


def open_index(stored: Stored, folder: str | None, make: Make) -> Index:
    """The index of a file; made and written where there is none. make: gives facts and numbers.

    SourceError where the file has changed since its index was made; ValueError where an index cannot be written.
    """
    path = place_index(stored, folder)
    found = read_index_file(path)
    state = {"schema": SCHEMA, "size": stored.size, "changed": stored.changed}
    if found is None:
        return _write(path, stored, state, *make(stored))
    if found.facts["size"] != stored.size:
        raise _changed(stored, path, f"has {stored.size:,} bytes, but had {found.facts['size']:,}")
    if found.facts["changed"] != stored.changed:  # copied, or written anew: of the same content?
        facts, numbers = make(stored)
        if facts["digest"] != found.facts["digest"]:
            raise _changed(stored, path, "holds something else than")
        return _write(path, stored, state, facts, numbers, must=False)
    return found


def _changed(stored: Stored, path: Path, words: str) -> SourceError:
    return SourceError(
        f"{stored.name}: {words} when its index {path} was made: cut or changed; bring it back, or remove the index if "
        f"the change is meant"
    )


def place_index(stored: Stored, folder: str | None) -> Path:
    """Where the index of a file is. ValueError where none can be."""
    if folder:
        if not Path(folder).is_dir():
            raise ValueError(f"index: {folder} is no folder; make it first")
        where = hashlib.sha256(str(stored.where).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return Path(folder) / f"{Path(stored.name).name}.{where}{ENDING}"
    if stored.path is None:
        raise ValueError(f"index: {stored.name} is read through a URL; say where its index goes, --index FOLDER")
    return stored.path.with_name(stored.path.name + ENDING)


def read_index_file(path: Path) -> Index | None:
    """None where there is none, or one that is damaged or of another version."""
    try:
        with open(path, "rb") as file:
            head = file.readline(MAX_HEAD)
            start = len(head)
            facts = parse_json(head, str(path))
            count = facts["count"]
            if facts["schema"] != SCHEMA or path.stat().st_size != start + 8 * count:
                raise ValueError("of another version, or cut short")
            numbers = np.memmap(file, np.int64, "r", start, (count,)) if count else np.empty(0, np.int64)
        if zlib.crc32(numbers) != facts["crc32"] or not {"size", "changed", "digest"} <= facts.keys():
            raise ValueError("damaged")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s: is made anew (%s)", path, error)
        return None
    return Index(path, facts, numbers)


def _write(
    path: Path, stored: Stored, state: dict[str, Any], facts: dict[str, Any], numbers: np.ndarray, must: bool = True
) -> Index:
    numbers = np.ascontiguousarray(numbers, "<i8")
    facts = {**facts, **state, "count": len(numbers), "crc32": zlib.crc32(numbers)}
    head = json.dumps(facts).encode()
    head += b" " * (-(len(head) + 1) % 8) + b"\n"  # so that the numbers are aligned
    try:
        write_whole(path, [head, numbers.data])
    except OSError as error:
        if must:
            raise ValueError(
                f"index: {path} cannot be written ({error.strerror}); name a folder for indices, --index FOLDER"
            ) from None
        return Index(path, facts, numbers)
    found = read_index_file(path)
    assert found is not None, path
    return found
