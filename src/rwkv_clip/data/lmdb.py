"""Chinese-CLIP's LMDB folders: read as records, and written by `python -m rwkv_clip.data.lmdb`.

A split is a folder of two LMDB environments, `imgs` and `pairs`. `pairs` has the keys "0", "1", .. and "num_samples";
its values are pickled tuples, which `pair_pickle` reads without unpickling. `imgs` has the picture in base64 under its
id, and "num_images". They are opened read-only, without locks, so that a folder may lie on read-only storage and be
read by any number of processes; each process opens its own, also after a fork. LMDB has no checksums: a file that was
cut is found when it is opened, but a flipped bit in the header of a page can kill the process that reads it.
"""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
import json
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

try:  # 1 us for a picture of 15 kB instead of 20, and just as strict
    from pybase64 import b64decode
except ImportError:
    from base64 import b64decode

from ..files import allow_open_files
from ..tokenizer import Tokenizer, prepare_texts
from .image import MAX_BYTES, ImageError
from .pair_pickle import Pair, PairError, parse_pair
from .recordio import RecordError, spread
from .records import LOOKED_AT, Layout, Records, split_names

SAMPLES, IMAGES = b"num_samples", b"num_images"
STANDARD = bytes.maketrans(b"-_", b"+/")  # the url-safe alphabet of base64 -> the standard one
DIGESTED = 1 << 20  # pairs, and ids of images, that a digest reads at most
BEGUN = 256  # images whose beginning it reads
BEGINNING = 1 << 14  # bytes of it
FIRST_MAP = 1 << 24  # bytes that a new environment may grow to at first
AGAIN = "build it again: python -m rwkv_clip.data.lmdb --data_dir FOLDER --splits NAME"

# By process and folder: LMDB forbids to open an environment twice in a process.
_opened: WeakValueDictionary[tuple[int, str], Split] = WeakValueDictionary()
_opening = threading.Lock()


def _renew_lock() -> None:
    """In a forked process, whose parent may have been opening a split in another thread."""
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def import_lmdb() -> Any:
    """The package lmdb, which is optional."""
    try:
        import lmdb
    except ImportError:
        raise ImportError("Chinese-CLIP's LMDB folders need lmdb: pip install -e '.[chinese]'") from None
    return lmdb


def _decode(value: bytes | memoryview) -> bytes:
    """Base64 of the standard alphabet -> bytes. ValueError for anything else."""
    if b64decode is base64.b64decode and sys.version_info >= (3, 11):
        return binascii.a2b_base64(value, strict_mode=True)  # the same without a copy: in half the time
    return b64decode(value, validate=True)


# ---- a split ---------------------------------------------------------------------------------------------------------


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """RecordError with the place for what LMDB reports."""
    try:
        yield
    except import_lmdb().Error as error:
        raise _damaged(place, error) from None


def _damaged(place: Path, error: Exception) -> RecordError:
    return RecordError(f"{place}: {error}; the LMDB is damaged, {AGAIN}")


def _open_environment(folder: Path) -> Any:
    """Read-only. RecordError where the file ends before its pages do: reading on would kill the process (SIGBUS)."""
    size = (folder / "data.mdb").stat().st_size
    with _naming(folder):
        environment = import_lmdb().open(
            str(folder),
            map_size=max(size, 1 << 16),  # without it the size that the writer allowed, often 1 TiB, would be mapped
            readonly=True,
            create=False,
            lock=False,
            readahead=False,
            meminit=False,
        )
        pages = environment.info()["last_pgno"] + 1
        if size < pages * environment.stat()["psize"]:
            raise RecordError(f"{folder}: data.mdb was cut at {size:,} bytes, it has {pages:,} pages; {AGAIN}")
    return environment


def _read_count(environment: Any, folder: Path, key: bytes) -> int:
    with environment.begin() as transaction:
        found = transaction.get(key)
    if found is None:
        raise RecordError(f"{folder}: has no {key.decode()}: it was not finished; {AGAIN}")
    if not found.isdigit() or len(found) > 18:
        raise RecordError(f"{folder}: {key.decode()} is {found[:40]!r}, not a number; {AGAIN}")
    return int(found)


class Split:
    """The pairs and images of a folder, opened in this process; `open_split` makes one."""

    def __init__(self, folder: Path):
        self.folder, self._error = folder, import_lmdb().Error
        self._pairs, self._images = (_open_environment(folder / name) for name in ("pairs", "imgs"))
        with _naming(folder):
            self.count = _read_count(self._pairs, folder / "pairs", SAMPLES)
            self.listed = _read_count(self._images, folder / "imgs", IMAGES)
            stored = self._pairs.stat()["entries"] - 1
        if not self.count <= stored:
            raise RecordError(f"{folder}: num_samples is {self.count:,}, but there are {stored:,} pairs; {AGAIN}")

    def close(self) -> None:
        """Give up both environments; nothing can be read any more."""
        self._pairs.close()
        self._images.close()

    def pair(self, i: int) -> Pair:
        """RecordError where there is no such pair, or the value is no pickle of one."""
        try:
            with self._pairs.begin(buffers=True) as transaction:
                if (value := transaction.get(b"%d" % i)) is None:
                    raise RecordError(f"{self.folder} pair {i}: is missing; {AGAIN}")
                return parse_pair(value)
        except PairError as error:
            raise RecordError(f"{self.folder} pair {i}: not a pickled (image_id, text_id, text): {error}") from None
        except self._error as error:
            raise _damaged(self.folder, error) from None

    def picture(self, image_id: int | str) -> bytes:
        """The encoded picture. RecordError where there is none; ImageError for one too large."""
        where = f"{self.folder} image {str(image_id)[:40]}"
        key = str(image_id).encode("utf-8", "surrogatepass")
        try:
            with self._images.begin(buffers=True) as transaction:
                value = transaction.get(key) if 0 < len(key) < 512 and key != IMAGES else None  # as long as keys can be
                if value is None:
                    raise RecordError(f"{where}: is not in imgs; {AGAIN}")
                return decode_base64(value, where)
        except self._error as error:
            raise _damaged(self.folder, error) from None

    def image_ids(self) -> Iterator[tuple[str, int]]:
        """(id as text, bytes of the value) of every image, in the order of the keys, which is that of their bytes."""
        with _naming(self.folder), self._images.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                if key != IMAGES:
                    yield str(key, "utf-8", "replace"), len(value)

    def add_to(self, total: Any) -> None:
        """Update a hash with what identifies the split, see `LmdbSet.digest`."""
        total.update(json.dumps([self.count, self.listed]).encode())
        if self._images.stat()["entries"] <= DIGESTED:
            for image_id, size in self.image_ids():
                total.update(f"{image_id}\0{size}\0".encode("utf-8", "surrogatepass"))
        with _naming(self.folder), self._pairs.begin(buffers=True) as transaction:
            for i in range(self.count) if self.count <= DIGESTED else spread(self.count, DIGESTED):
                total.update(transaction.get(b"%d" % i) or b"")
        for i in spread(self.count, BEGUN):
            with suppress(RecordError, ImageError):  # counted and replaced when its turn comes
                total.update(self.picture(self.pair(i).image_id)[:BEGINNING])


def decode_base64(value: bytes | memoryview, where: str) -> bytes:
    """The bytes of a picture in base64 of either alphabet. RecordError for anything else; ImageError where too large.

    The released builder takes what the TSV has, usually of the standard alphabet, and the released reader takes both.
    """
    if len(value) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(f"{where}: {len(value):,} characters of base64; store it smaller", reason="image too large")
    try:
        return _decode(value)
    except ValueError:
        try:  # the other alphabet, or white space around it
            return _decode(bytes(value).strip().translate(STANDARD))
        except ValueError:
            raise RecordError(f"{where}: the picture is not complete base64; repair its line in the TSV") from None


def open_split(folder: Path) -> Split:
    """The split in `folder`, opened once in a process. RecordError, OSError, ImportError."""
    with _opening:
        for (process, _), split in list(_opened.items()):
            if process != os.getpid():  # inherited by a fork
                split.close()
        key = os.getpid(), os.path.realpath(folder)
        split = _opened.get(key)
        if split is None:
            split = _opened[key] = Split(folder)
        return split


def find_splits(spec: str | Path | list[str]) -> list[Path]:
    """The split folders that `spec` names: one, a glob or a comma list of them. ValueError names what to give."""
    found: dict[Path, None] = {}
    for name in split_names(spec, os.path.exists):
        places = (
            sorted(map(Path, glob.glob(name))) if glob.has_magic(name) and not os.path.exists(name) else [Path(name)]
        )
        found.update(dict.fromkeys(_check_split(place) for place in places))
    if not found:
        raise ValueError(f"{spec}: names no folder with imgs and pairs of an LMDB")
    return list(found)


def _check_split(place: Path) -> Path:
    has = {name: (place / name / "data.mdb").is_file() for name in ("imgs", "pairs")}
    if all(has.values()):
        return place
    if (place / "data.mdb").is_file():
        raise ValueError(f"{place}: is one half of a split; give the folder above it, {place.resolve().parent}")
    inner = sorted(
        {str(file.parent.parent) for pattern in ("*", "*/*") for file in place.glob(f"{pattern}/pairs/data.mdb")}
    )
    if inner:
        raise ValueError(f"{place}: holds several parts; give one or more of {', '.join(inner[:5])}")
    if any(has.values()):
        lacks = next(name for name, there in has.items() if not there)
        raise RecordError(f"{place}: has no {lacks}/data.mdb; {AGAIN}")
    raise ValueError(f"{place}: is no folder with imgs and pairs of an LMDB; name records of one kind")


# ---- records ---------------------------------------------------------------------------------------------------------


class LmdbSet(Records):
    """The pairs of one or more split folders as records of one text: record i is pair i, read at random.

    Texts are prepared and tokenized when they are read, so a split serves any tokenizer. What data2rec.py would leave
    out (an empty text, a missing image) is a damaged record here.
    """

    def __init__(self, spec: str | Path | list[str], tokenizer: Tokenizer):
        folders = find_splits(spec)
        allow_open_files(2 * len(folders))
        self._folders, self._tokenizer, self._process = folders, tokenizer, -1
        self._splits: list[Split] = []
        for split in self._open():
            if not split.count:  # texts without images, as hidden test sets have them, are no records
                raise RecordError(f"{split.folder}: num_samples is 0: no text has an image; name another split")
        self._ends = list(accumulate(split.count for split in self._open()))
        self.files = [folder / name / "data.mdb" for folder in folders for name in ("imgs", "pairs")]
        self.layout = Layout(("raw",), tokenizer.context, tokenizer.name, tokenizer.vocab_size)

    def _open(self) -> list[Split]:
        """The splits as this process has them."""
        if self._process != os.getpid():
            self._splits, self._process = [open_split(folder) for folder in self._folders], os.getpid()
        return self._splits

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_splits": [], "_process": -1}

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 that identifies these records, whatever their folder and time of writing.

        Over all pairs, the ids and sizes of all images and the beginnings of some of them; of more than a million, over
        a million pairs evenly spread. An image replaced by another of its length may go unnoticed.
        """
        own = self._tokenizer
        about = [self.text_names, own.context, own.name, own.vocab_size]
        total = hashlib.sha256(json.dumps(about).encode())
        for split in self._open():
            split.add_to(total)
        return total.hexdigest()

    def limit_vocab(self, vocab: int) -> int:
        """As `RecordSet.limit_vocab`."""
        self.layout, largest = replace(self.layout, vocab_size=vocab), 0
        for i in spread(len(self), LOOKED_AT):
            with suppress(RecordError):
                split, row = self._locate(i)
                largest = max(largest, int(self._encode(split.pair(row).text, i).max()))
        return largest if largest >= vocab else 0

    def name(self, i: int) -> str:
        """How messages name record `i`: 'path/lmdb/train pair 17'."""
        split, row = self._locate(i)
        return f"{split.folder} pair {row}"

    def sample(self, i: int) -> tuple[bytes, np.ndarray]:
        """(encoded image, token ids int64 (1, context)) of pair `i`. RecordError if it holds anything else."""
        split, row = self._locate(i)
        pair = split.pair(row)
        tokens = self._encode(pair.text, i)
        if (vocab := self.layout.vocab_size or 0) < self._tokenizer.vocab_size and not (tokens < vocab).all():
            raise RecordError(f"{self.name(i)}: token ids must be below {self.layout.vocab_size}, found {tokens.max()}")
        try:
            return split.picture(pair.image_id), tokens
        except RecordError as error:
            raise RecordError(f"{self.name(i)}: {error}") from None

    def _encode(self, text: str, i: int) -> np.ndarray:
        """As data2rec.py tokenizes: white space at the ends does not count, and a text must hold something."""
        text, tokenizer = text.strip(), self._tokenizer
        try:
            ids = tokenizer(prepare_texts(tokenizer, [text])).numpy() if text else None
        except ValueError as error:  # too long, or no UTF-8
            raise RecordError(f"{self.name(i)}: {error}") from None
        if ids is None or (tokenizer.context > 2 and not ids[0, 2:].any()):
            raise RecordError(f"{self.name(i)}: empty text")
        return ids

    def _locate(self, i: int) -> tuple[Split, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"record {i} of {self._ends[-1]}")
        number = bisect_right(self._ends, i)
        return self._open()[number], i - (self._ends[number - 1] if number else 0)


# ---- writing ---------------------------------------------------------------------------------------------------------


class Store:
    """An environment that is being written. It grows as needed: the file is as large as its content."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "data.mdb"
        size = max(FIRST_MAP, 2 * file.stat().st_size if file.exists() else 0)
        self._lmdb, self.folder = import_lmdb(), folder
        with self._reporting():
            self._environment = self._lmdb.open(str(folder), map_size=size, meminit=False)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """An OSError for storage that takes no more; RecordError for damage."""
        try:
            yield
        except self._lmdb.DiskError as error:
            raise OSError(28, str(error), str(self.folder)) from None
        except self._lmdb.Error as error:
            raise RecordError(f"{self.folder}: {error}; remove the folder and start again") from None

    def put(self, items: Iterable[tuple[bytes, bytes]], removed: Iterable[bytes] = ()) -> None:
        """Store all items, or none of them if this process dies meanwhile. items: taken again where the map was
        full."""
        items, removed = list(items), list(removed)
        while True:
            try:
                with self._reporting_full(), self._environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(items, overwrite=True)
                    for key in removed:
                        transaction.delete(key)
                return
            except _MapFull:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])

    @contextmanager
    def _reporting_full(self) -> Iterator[None]:
        with self._reporting():
            try:
                yield
            except self._lmdb.MapFullError:
                raise _MapFull from None

    def get(self, key: bytes) -> bytes | None:
        """A copy of the value."""
        with self._reporting(), self._environment.begin() as transaction:
            return transaction.get(key)

    def has(self, key: bytes) -> bool:
        """Whether there is a value; its pages are not read."""
        with self._reporting(), self._environment.begin(buffers=True) as transaction:
            return transaction.get(key) is not None

    def __len__(self) -> int:
        return self._environment.stat()["entries"]

    def close(self) -> None:
        """Flush to disk and give up the lock."""
        with self._reporting():
            self._environment.sync(True)
            self._environment.close()


class _MapFull(Exception):
    pass


def main() -> int:
    """Command line of the builder, `lmdb_build`."""
    from .lmdb_build import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
