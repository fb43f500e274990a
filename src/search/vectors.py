"""Vectors on disk, to be searched: half precision for the one pass over all, float32 for the few that come near.

A folder holds vectors.npy, float32 (n, C), half.npy, the same in float16, and vectors.json, written last: how many,
their width, and the largest distance of a half-precision row from its vector, which `rwkv_clip.nearest` needs to be
exact. Both matrices are memory-mapped. A search reads all of half.npy, which should fit into memory (1.2 GiB for a
million of 640), and a few rows of vectors.npy.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from rwkv_clip.files import DamagedError, parse_json, read_bytes, write_json, write_whole
from rwkv_clip.nearest import Gallery, measure_loss, search

SCHEMA = 1
SMALLEST = 1e-6  # length of a sum of two unit vectors that still has a direction
ROWS = 8192  # that are written and compared at a time
MAX_JSON = 1 << 16
AGAIN = "index the pictures again"


class Vectors:
    """Unit vectors, n of C numbers, and the exact search among them."""

    def __init__(self, gallery: Gallery):
        self._gallery = gallery

    @classmethod
    def open(cls, folder: str | Path) -> Vectors:
        """Those that `write_vectors` wrote. DamagedError for files that do not belong together."""
        folder = Path(folder)
        where = folder / "vectors.json"
        about = parse_json(read_bytes(where, MAX_JSON), str(where))
        lost = about.get("lost") if isinstance(about, dict) and about.get("schema") == SCHEMA else None
        if not isinstance(lost, float) or not math.isfinite(lost) or lost < 0:
            raise DamagedError(f"{where}: is not of schema {SCHEMA}; {AGAIN}")
        half, full = map_matrix(folder / "half.npy"), map_matrix(folder / "vectors.npy")
        shape = (about.get("rows"), about.get("width"))
        if half.shape != shape or full.shape != shape or (half.dtype, full.dtype) != (np.float16, np.float32):
            raise DamagedError(f"{folder}: half.npy and vectors.npy do not fit vectors.json; {AGAIN}")
        return cls(Gallery([half], lambda rows: full[rows], lost))

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], name: str = "vectors") -> Vectors:
        """Those of matrices (n_i, C) in float16 or float32, one after the other, which stay as they are; of float32
        ones a copy in half precision is made in memory. ValueError for vectors that are not finite or longer than 1."""
        if len({part.shape[1] for part in parts}) != 1:
            raise ValueError(f"{name}: matrices of widths {[part.shape[1] for part in parts]}; give one width")
        coarse, lost = [], 0.0
        for part in parts:
            half = part if part.dtype == np.float16 else np.empty(part.shape, np.float16)
            for start in range(0, len(part), ROWS):
                rows = slice(start, start + ROWS)
                if half is not part:
                    half[rows] = part[rows]
                lost = max(lost, measure_loss(np.asarray(part[rows], np.float32), half[rows], name))
            coarse.append(half)
        ends = np.array([0, *accumulate(map(len, parts))])

        def exact(rows: np.ndarray) -> np.ndarray:
            places = np.searchsorted(rows, ends)
            pairs = zip(parts, ends, places, places[1:])
            found = [np.asarray(part[rows[a:b] - end], np.float32) for part, end, a, b in pairs]
            return found[0] if len(found) == 1 else np.concatenate(found)

        return cls(Gallery(coarse, exact, lost))

    def __len__(self) -> int:
        return len(self._gallery)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self._gallery.width

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The vectors of these rows, float32 (m, C). IndexError beyond the end."""
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {int(wanted.min())} to {int(wanted.max())} of {len(self)}")
        rows, back = np.unique(wanted, return_inverse=True)
        return np.array(self._gallery.exact(rows), np.float32)[back]

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 (q, k) of the k nearest of each query, and their similarities float64 (q, k), best first, ties in
        the order of the rows; fewer where fewer rows are allowed.

        queries: float32 (q, C) of length 1. allowed: bool (n,); default: all. The same as
        `rwkv_clip.metrics.nearest_items`, to the last bit.
        """
        return search(self._gallery, queries, k, allowed)

    def warm(self) -> None:
        """Read all that a search reads, so that the first one takes no longer than others."""
        if len(self):
            self.search(np.eye(1, self.width, dtype=np.float32), 1)

    def blocks(self) -> Iterator[np.ndarray]:
        """All vectors in order, float32 (some, C) at a time."""
        for start in range(0, len(self), ROWS):
            yield np.array(self._gallery.exact(np.arange(start, min(start + ROWS, len(self)))), np.float32)


def write_vectors(folder: Path, blocks: Iterable[np.ndarray], count: int, width: int) -> None:
    """Write what `Vectors.open` reads into an existing folder, vectors.json last. blocks: float32 (some, C), `count`
    rows in all. ValueError for vectors that are not finite or longer than 1; OSError where they cannot be written."""
    write_whole(folder / "vectors.npy", _pieces(blocks, (count, width)))
    full, lost = map_matrix(folder / "vectors.npy"), 0.0

    def halves() -> Iterator[bytes | memoryview]:
        nonlocal lost
        yield _header(full.shape, np.float16)
        for start in range(0, len(full), ROWS):
            half = full[start : start + ROWS].astype(np.float16)
            lost = max(lost, measure_loss(full[start : start + ROWS], half, "vectors"))
            yield half.data.cast("B") if half.size else b""

    write_whole(folder / "half.npy", halves())
    write_json(folder / "vectors.json", {"schema": SCHEMA, "rows": count, "width": width, "lost": float(lost)})


def _pieces(blocks: Iterable[np.ndarray], shape: tuple[int, int]) -> Iterator[bytes | memoryview]:
    yield _header(shape, np.float32)
    rows = 0
    for block in blocks:
        assert block.dtype == np.float32 and block.shape[1:] == shape[1:], f"{block.dtype} {block.shape}"
        rows += len(block)
        yield np.ascontiguousarray(block).data.cast("B") if block.size else b""
    assert rows == shape[0], f"{rows} rows of {shape[0]}"


def encode_array(array: np.ndarray) -> list[bytes | memoryview]:
    """The content of a .npy file."""
    array = np.ascontiguousarray(array)
    return [_header(array.shape, array.dtype.type), array.data.cast("B") if array.size else b""]


def _header(shape: tuple[int, ...], dtype: type) -> bytes:
    stream = io.BytesIO()
    about = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def map_matrix(path: Path) -> np.ndarray:
    """A matrix of a .npy file in float16 or float32, memory-mapped. DamagedError for anything else."""
    try:
        # "c": private, so that nothing is ever written back, and torch does not warn about memory that is read-only
        found = np.lib.format.open_memmap(path, mode="c")
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python, which has many errors
        raise DamagedError(f"{path}: is not a readable .npy file ({error}); {AGAIN}") from None
    if found.ndim != 2 or found.dtype not in (np.float16, np.float32) or not found.flags.c_contiguous:
        raise DamagedError(f"{path}: holds {found.dtype} {found.shape}; a matrix of float16 or float32 is read")
    return np.asarray(found)


def mix(text: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray | None:
    """(1 - weight) text + weight other of unit vectors (C,), at length 1 again, float32; None of opposite ones, whose
    mixture has no direction."""
    total = (1 - weight) * text.astype(np.float64) + weight * other.astype(np.float64)
    length = float(np.linalg.norm(total))
    return None if length < SMALLEST else (total / length).astype(np.float32)
