"""Indices: what is found out about a file once, written beside it or into the folder that the user names.

An index is a line of JSON and data after it, which are mapped, so that all processes share them. It appears whole or
not at all, and belongs to one state of its file: of another size or content, the file is refused by name.
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
MAX_HEAD = 1 << 26
ALIGNED = 64
log = logging.getLogger(__name__)


class Index:
    """facts: JSON of the file, with "digest", which identifies its content. data: uint8 (n,), aligned to 64 bytes. Can
    be pickled: a copy maps the index again."""

    def __init__(self, path: Path, facts: dict[str, Any], data: np.ndarray):
        self.path, self.facts, self.data = path, facts, data

    def __getstate__(self) -> dict:
        return {"path": self.path, "digest": self.facts["digest"]}

    def __setstate__(self, state: dict) -> None:
        found = read_index_file(state["path"])
        if found is None or found.facts["digest"] != state["digest"]:
            raise SourceError(f"{state['path']}: this index has changed since it was opened; start again")
        vars(self).update(vars(found))


Make = Callable[[Stored], tuple[dict[str, Any], bytes | memoryview]]


def open_index(stored: Stored, folder: str | None, make: Make) -> Index:
    """The index of a file; made and written where there is none. make: gives facts, with "digest", and data.

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
        facts, data = make(stored)
        if facts["digest"] != found.facts["digest"]:
            raise _changed(stored, path, "holds something else than")
        return _write(path, stored, state, facts, data, must=False)
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
            if facts["schema"] != SCHEMA or path.stat().st_size != start + count:
                raise ValueError("of another version, or cut short")
            data = np.memmap(file, np.uint8, "r", start, (count,)) if count else np.empty(0, np.uint8)
        if zlib.crc32(data) != facts["crc32"] or not {"size", "changed", "digest"} <= facts.keys():
            raise ValueError("damaged")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s: is made anew (%s)", path, error)
        return None
    return Index(path, facts, data)


def _write(
    path: Path,
    stored: Stored,
    state: dict[str, Any],
    facts: dict[str, Any],
    data: bytes | memoryview,
    must: bool = True,
) -> Index:
    data = memoryview(data).cast("B")
    facts = {**facts, **state, "count": len(data), "crc32": zlib.crc32(data)}
    head = json.dumps(facts).encode()
    head += b" " * (-(len(head) + 1) % ALIGNED) + b"\n"
    try:
        write_whole(path, [head, data])
    except OSError as error:
        found = read_index_file(path)  # another rank may have been quicker
        if found is not None and found.facts == facts:
            return found
        if must:
            raise ValueError(
                f"index: {path} cannot be written ({error.strerror}); name a folder for indices, --index FOLDER"
            ) from None
        return Index(path, facts, np.frombuffer(data, np.uint8))
    found = read_index_file(path)
    assert found is not None, path
    return found
