"""Samples of a webdataset tar by their number.

The index has the byte at which each sample's headers begin: 8 bytes per sample, mapped. A sample is read with one call
and taken apart by the code that reads a tar in order, so it is the same row.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..recordio import RecordError
from ..rows import Row, SourceError
from ..samples import Sample, add_member, finish, is_apart, is_text, split_name
from ..tar import Tar
from .index_file import open_index
from .storage import Span, Stored

AT_ONCE = 1 << 22  # bytes of a sample up to which all of it is read, whatever is needed


def index_tar(stored: Stored) -> tuple[dict[str, Any], memoryview]:
    """What the index of a tar holds: facts, and int64 (samples + 1,) bytes, the end of the last sample included.

    The digest is over names and sizes of all members and the contents of texts. Pictures are passed over.
    """
    file, digest = Path(stored.name), hashlib.sha256()
    starts, apart, lacking = [], [], {}
    key, sample = "", Sample()
    with stored.stream() as raw:
        tar = Tar(file, raw)
        if tar.length is None:
            raise SourceError(f"{file}: is compressed, so no sample can be read by itself; unpack it (gunzip)")
        for member in tar:
            here, ending = split_name(member.name)
            if not here or member.kind == "folder":
                continue
            if here != key:
                if starts and is_apart(key, sample, lacking):
                    apart.append(len(starts) - 1)
                starts.append(tar.member_at)
                key, sample = here, Sample()
            digest.update(f"{member.name}\0{member.kind}\0{member.size}\0".encode("utf-8", "surrogateescape"))
            if (most := sample.note(ending)) and is_text(ending) and member.kind == "file" and member.size <= most:
                digest.update(tar.read(member.size))
        if starts and is_apart(key, sample, lacking):
            apart.append(len(starts) - 1)
        if tar.always:
            raise SourceError(f"{file}: a header gives all members one name or size; pack it anew")
        starts.append(tar.member_at)
    return {"digest": digest.hexdigest(), "apart": apart}, np.array(starts, "<i8").data


class TarTable:
    """Rows of one tar by number."""

    def __init__(self, stored: Stored, folder: str | None = None):
        self._stored, self.name, self._file = stored, stored.name, Path(stored.name)
        self._index = open_index(stored, folder, index_tar)
        self._apart = frozenset(self._index.facts.get("apart", ()))
        places = self._places
        if not len(places) or places[0] < 0 or places[-1] > stored.size or (np.diff(places) <= 0).any():
            raise SourceError(f"{self._index.path}: not an index of {self.name}; remove it")

    @property
    def _places(self) -> np.ndarray:
        return self._index.data.view(np.int64)

    def __len__(self) -> int:
        return len(self._places) - 1

    def row(self, i: int) -> Row:
        """Row `i`. SourceError or RecordError where the tar has changed."""
        start, end = self._places[i : i + 2].tolist()
        raw = io.BytesIO(self._stored.read(start, end)) if end - start <= AT_ONCE else self._open(start, end)
        key, sample = "", Sample()
        tar = Tar(self._file, raw, start)
        for member in tar:
            here, ending = split_name(member.name)
            if not here or member.kind == "folder":
                continue
            if key and here != key:
                raise RecordError(f"{self.name}: byte {start:,} is another sample than when it was opened; changed")
            key = here
            if most := sample.note(ending):
                add_member(sample, ending, tar, member, most)
        return finish(self._file, key, sample, i in self._apart)

    def _open(self, start: int, end: int) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(Span(self._stored, start, end), 1 << 16))

    def size_of_state(self) -> int:
        """The index is mapped: nothing."""
        return 0

    def add_to(self, total: Any) -> None:
        """Update a hash with names and sizes of all members and the contents of all texts."""
        total.update(f"tar\0{self._index.facts['digest']}\0".encode())
