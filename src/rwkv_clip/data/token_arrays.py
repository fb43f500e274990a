"""Token ids in an .npy array, beside an ordered list of their images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .manifests import READERS
from .rows import Row, Skip, SourceError, first_line, iterate_lines


def open_ids(file: Path) -> np.ndarray:
    """The array of an .npy file, on disk: numbers (N, texts * context) or (N, texts, context); else SourceError."""
    try:
        with open(file, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            width = 2 if version == (1, 0) else 4
            length = int.from_bytes(stream.read(width), "little")
            if length > 1 << 16:
                raise ValueError(f"a header of {length:,} bytes")
        with np.errstate(over="ignore"):  # of sizes that cannot be
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is read with Python's own parser: TokenError, RecursionError, ...
        raise SourceError(f"{file}: not an .npy array ({first_line(error)})") from None
    if not isinstance(ids, np.memmap):
        raise SourceError(f"{file}: not an .npy array")
    form = "token ids are whole numbers of shape (images, texts * context) or (images, texts, context)"
    if ids.ndim not in (2, 3) or ids.dtype.kind not in "iuf" or (ids.dtype.kind == "f" and ids.dtype.itemsize < 4):
        raise SourceError(f"{file}: {ids.dtype} of shape {ids.shape}; {form}")
    if ids.ndim == 3 and ids.shape[1] > ids.shape[2]:
        raise SourceError(f"{file}: shape {ids.shape} has more texts than tokens; {form}: transpose it")
    rest = os.stat(file).st_size - ids.offset - ids.nbytes
    if rest:
        raise SourceError(f"{file}: {rest:,} bytes more than shape {ids.shape} has; damaged, or not written to its end")
    return ids


def count_ids(file: Path) -> int:
    """Number of rows."""
    return len(open_ids(file))


def read_ids(file: Path, skip: Skip, images: Path) -> Iterator[Row]:
    """Each image that the file `images` lists, a manifest or lines of text, with its row of the array as "tokens":
    (texts * context,), or (texts, context) where the array has three axes."""
    ids, reader = open_ids(file), READERS.get(images.suffix.lower())
    listed = list(reader(images, Skip(0)) if reader else _list_images(images))
    if len(listed) != len(ids):
        raise SourceError(
            f"{file} has {len(ids)} rows, but {images} lists {len(listed)} images; they must agree (its shape is "
            f"{ids.shape}; should be (images, texts * context) or (images, texts, context))"
        )
    for row, tokens in zip(listed, ids):
        if not skip():
            yield row._replace(fields={**row.fields, "tokens": np.array(tokens)})


def _list_images(images: Path) -> Iterator[Row]:
    """One row for each line of a text file; blank lines are none."""
    with open(images, "rb") as stream:
        for number, line in iterate_lines(stream, images):
            try:
                name = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8").strip()
            except UnicodeDecodeError:
                raise SourceError(f"{images}: line {number} is not UTF-8; save it as UTF-8") from None
            if name:
                yield Row(name, {"image": name}, images.parent)
