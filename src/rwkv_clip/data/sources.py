"""Where records are made from: files with images and captions -> one Row after the other, in the same order.

What a file is follows from its ending, see `KINDS`; a folder may also hold pictures with texts of the same name beside
them. Nothing is decoded here. To add a source, write its reader and add its row to `KINDS`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .chinese_clip import TEXTS_ENDING, count_pairs, find_pair, is_texts_file, read_lmdb_rows, read_text_rows
from .manifests import count_lines, find_texts, read_json, read_jsonl, read_table
from .parquet import count_parquet, read_parquet
from .rows import MAX_TEXT_BYTES, Row, Skip
from .samples import group_files, is_picture, is_text, read_pairs, read_tar, walk
from .token_arrays import count_ids, read_ids


class Kind(NamedTuple):
    """One kind of input."""

    endings: tuple[str, ...]
    read: Callable[..., Iterator[Row]]  # of a path and a Skip, and of the attribute of Source that `needs` names
    count: Callable[[Path], int] | None = None  # number of rows, where it is known without reading everything
    needs: str | None = None


PAIRS = "pictures with texts"  # the kind of a folder
LMDB = "lmdb"  # of another
KINDS = {
    "texts.jsonl": Kind((TEXTS_ENDING,), read_text_rows),  # where NAME_imgs.tsv is beside it
    "jsonl": Kind((".jsonl", ".ndjson"), read_jsonl, count_lines),
    "json": Kind((".json",), read_json),
    "csv": Kind((".csv", ".tsv"), read_table),
    "tar": Kind((".tar", ".tgz", ".tar.gz"), read_tar),
    "parquet": Kind((".parquet",), read_parquet, count_parquet),
    "npy": Kind((".npy",), read_ids, count_ids, needs="images"),
    PAIRS: Kind((), read_pairs, needs="outside"),
    LMDB: Kind((), read_lmdb_rows, count_pairs),
}
ENDINGS = " ".join(ending for kind in KINDS.values() for ending in kind.endings if ending != TEXTS_ENDING)

MAX_RANGE = 1_000_000  # files that {000..999} may stand for
WHOLE = 1 << 26  # bytes of a file that is hashed as a whole


class Source:
    """The rows of all input files that `spec` names: file, folder, glob, a{00..09}.tar range or comma list.

    `images`: for an .npy of token ids, the text file or manifest that lists the images in order. `outside`: links in a
    folder of pictures with texts may lead out of it. `alone`: a folder may hold pictures without any text.
    """

    def __init__(self, spec: str | Path, images: str | Path | None = None, outside: bool = False, alone: bool = False):
        self.kind, self.files = _find_inputs(spec, alone)
        self.images = Path(images) if images else None
        self.outside = outside
        if self.kind == "npy" and (len(self.files) > 1 or not self.images or not self.images.is_file()):
            raise ValueError(f"{self.files[0]}: token ids need --images FILE, one file that lists the images in order")

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Rows from number `start` on; what lies before is passed over without reading images."""
        kind, skip = KINDS[self.kind], Skip(start)
        more = [getattr(self, kind.needs)] if kind.needs else []
        for file in self.files:
            yield from kind.read(file, skip, *more)

    def count(self) -> int | None:
        """Number of rows where it is known without reading everything, else None."""
        count = KINDS[self.kind].count
        return sum(map(count, self.files)) if count else None

    def fingerprint(self) -> list[list]:
        """Identifies the input, with an entry for every file: [name, bytes, SHA-256], of files larger than WHOLE
        [name, bytes, time of change, SHA-256 of both ends]; for a folder of pictures and texts [name, files, SHA-256
        of their names, sizes and times].
        """
        if self.kind == PAIRS:
            return [_fingerprint_folder(folder) for folder in self.files]
        return [fingerprint(file) for file in self._list_files()]

    def _list_files(self) -> list[Path]:
        if self.kind == LMDB:
            return [folder / name / "data.mdb" for folder in self.files for name in ("imgs", "pairs")]
        files = self.files + ([self.images] if self.kind == "npy" else [])
        if self.kind == "texts.jsonl":
            return files + [find_pair(file)[0] for file in files]
        return files + [texts for file in files if (texts := find_texts(file))]

    def holds(self, file: Path) -> bool:
        """Whether rows are read from the existing file `file`."""
        if self.kind == PAIRS:
            group = group_files(os.listdir(file.parent)).get(file.stem, [])
            inside = any(file.resolve().is_relative_to(folder.resolve()) for folder in self.files)
            return inside and any(is_picture(ending) for ending, _ in group)
        return any(os.path.samestat(file.stat(), own.stat()) for own in self._list_files())


# ---- what a spec names -----------------------------------------------------------------------------------------------


def _find_inputs(spec: str | Path, alone: bool = False) -> tuple[str, list[Path]]:
    text, found = str(spec), []
    if os.path.exists(text):
        found = _find(text, alone)
    else:
        pieces = [piece for piece in re.split(r",(?![^{]*\})", text) if piece.strip()]
        while pieces:
            # A name may have commas itself.
            for count in range(1, 1 + min(len(pieces), 8)):
                names = [x for piece in expand_braces(",".join(pieces[:count]).strip()) for x in _glob(piece)]
                if all(map(os.path.exists, names)):
                    break
            else:
                names, count = expand_braces(pieces[0].strip()), 1
            found += [item for name in names for item in _find(name, alone)]
            pieces = pieces[count:]
    if not found:
        raise ValueError(f"source: {text!r} names nothing; give a manifest, tar, parquet, npy or a folder of them")
    return _one_kind(text, found), [file for _, file in found]


def _glob(name: str) -> list[str]:
    """The sorted names that match; `name` itself if it exists, is no pattern or matches nothing."""
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    return sorted(glob.glob(name, recursive=True)) or [name]


def expand_braces(text: str) -> list[str]:
    """shard-{000..011}.tar as webdataset writes it, and {one,other}."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    first, last, several = match.groups()
    if several is not None:
        names = several.split(",")
    elif int(last) - int(first) >= MAX_RANGE:
        raise ValueError(f"source: {match[0]} stands for more than {MAX_RANGE:,} files; give a folder or a glob")
    else:
        names = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [text[: match.start()] + name + rest for name in names for rest in expand_braces(text[match.end() :])]


def _find(name: str, alone: bool) -> list[tuple[str, Path]]:
    """(kind, path) of a file, or of all in a folder."""
    if os.path.isdir(name):
        split = all(os.path.isfile(os.path.join(name, half, "data.mdb")) for half in ("imgs", "pairs"))
        return [(LMDB, Path(name))] if split else _look_into(Path(name), alone)
    if not os.path.isfile(name):
        raise ValueError(f"source: {name!r} names no file; give a manifest, tar, parquet, npy or a folder of them")
    kind = _kind(name)
    if kind is None:
        raise ValueError(f"{name}: not a known kind of input; known endings: {ENDINGS}")
    return [(kind, Path(name))]


def _kind(name: str) -> str | None:
    """Of a file, from its name and for Chinese-CLIP's texts from what lies beside it."""
    if name.endswith(TEXTS_ENDING) and not is_texts_file(Path(name)):
        return "jsonl"
    return next((kind for kind, about in KINDS.items() if name.lower().endswith(about.endings)), None)


def _look_into(folder: Path, alone: bool) -> list[tuple[str, Path]]:
    """What a folder holds, nothing hidden: manifests or shards; or the folder itself, of pictures with texts.

    img2dataset's tables about a shard (NAME.parquet, NAME_stats.json beside NAME.tar or NAME/) are no input.
    """
    found, loose, pictures, pairs, places = [], [], 0, 0, set()
    for place, names in walk(folder):
        places.add(place)
        for files in group_files(names).values():
            has_picture = any(is_picture(ending) for ending, _ in files)
            pictures += has_picture
            pairs += has_picture and any(is_text(ending) for ending, _ in files)
            loose += [Path(place, name) for ending, name in files if ending == "json" and not has_picture]
        found += [
            (kind, Path(place, name))
            for name in names
            if (kind := _kind(os.path.join(place, name))) not in (None, "json")
        ]
    about = {str(file.parent / file.name.partition(".")[0]) for kind, file in found if kind == "tar"}
    if pairs or (alone and pictures and not found and not loose):
        about |= places
        loose = [file for file in loose if _lists_entries(file)]
        found.append((PAIRS, folder))
    found = [item for item in found if item[0] != "parquet" or str(item[1].with_suffix("")) not in about]
    found += [("json", file) for file in loose]
    if not found:
        raise ValueError(
            f"source: {str(folder)!r} names no file of a known kind, but {pictures} pictures, none with a .txt or "
            f".json of its name; known endings: {ENDINGS}"
        )
    return sorted(found, key=lambda item: item[1])


def _lists_entries(file: Path) -> bool:
    """Whether a .json among pictures with texts is a manifest, not the text of a picture that is missing."""
    with open(file, "rb") as stream:
        start = stream.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] == b"[" or os.stat(file).st_size > MAX_TEXT_BYTES


def _one_kind(spec: str, found: list[tuple[str, Path]]) -> str:
    kinds: dict[str, list[str]] = {}
    for kind, file in found:
        kinds.setdefault(kind, []).append(file.name)
    if len(kinds) > 1:
        held = (
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for kind, names in kinds.items()
        )
        raise ValueError(f"source: {spec!r} holds {'; '.join(held)}; give files of one kind, by name or by a glob")
    return next(iter(kinds))


# ---- what it held ----------------------------------------------------------------------------------------------------


def fingerprint(file: Path) -> list:
    about, span = file.stat(), 1 << 16
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        if about.st_size <= WHOLE:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
            return [file.name, about.st_size, digest.hexdigest()]
        digest.update(stream.read(span))
        stream.seek(about.st_size - span)
        digest.update(stream.read(span))
    return [file.name, about.st_size, about.st_mtime_ns, digest.hexdigest()]


def _fingerprint_folder(folder: Path) -> list:
    digest, count = hashlib.sha256(), 0
    for place, names in walk(folder):
        for name in names:
            about = os.stat(os.path.join(place, name))
            line = f"{os.path.relpath(place, folder)}/{name}\0{about.st_size}\0{about.st_mtime_ns}\0"
            digest.update(line.encode("utf-8", "surrogateescape"))
            count += 1
    return [folder.name, count, digest.hexdigest()]
