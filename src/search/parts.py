"""What is known of pictures while an index is brought up to date: the vectors of the index before, and the parts of
this run, which are kept as they are made.

A part is work/000001.npy, its vectors, and 000001.jsonl, written last: {"hash", "stamp", "kept"} of each. Copies of
pictures that came inside other files are records in pictures/, one file for each part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_clip.data.recordio import Header, RecordWriter, pack
from rwkv_clip.files import DamagedError, parse_json, read_bytes, write_json, write_whole

from .rows import MAX_JSON, Lines
from .vectors import ROWS, encode_array, map_matrix

WORK, PICTURES = "work", "pictures"


class Known(NamedTuple):
    """A picture whose vector is known: where that is, and the place of its copy, {} for none."""

    matrix: np.ndarray
    row: int
    kept: dict[str, Any]


class New(NamedTuple):
    """A picture that was encoded. copy: what is to be kept of it, b"" for nothing."""

    hash: str
    stamp: str
    copy: bytes


class Store:
    """Known pictures by the hash of their bytes, and those hashes by stamp. One process writes.

    identity: of the model; vectors of another one are not taken. before: the folder of the data of the index so far.
    """

    def __init__(self, output: Path, identity: dict[str, Any], before: Path | None, same_model: bool):
        self.output, self.work, self.pictures = output, output / WORK, output / PICTURES
        self.known: dict[str, Known] = {}
        self.stamps: dict[str, str] = {}
        self._last = 0
        self._used: set[str] = set()  # names of files of copies
        if before is not None:
            self._read_rows(before, same_model)
        self._begin(identity)
        self._read_parts()
        self.remove_unused(self._used)

    def _read_rows(self, folder: Path, same_model: bool) -> None:
        full = map_matrix(folder / "vectors.npy")
        for number, row in enumerate(Lines(folder / "rows.jsonl")):
            kept = row["place"] if "kept" in row["place"] else {}
            self._note(row.get("hash", ""), row.get("stamp", ""), full, number, kept, same_model)

    def _note(self, key: str, stamp: str, matrix: np.ndarray, row: int, kept: dict[str, Any], take: bool) -> None:
        if kept:
            name = kept["kept"][0]
            self._used.add(name)
            self._last = max(self._last, int(name.removeprefix("part-")))
        if take and key and row < len(matrix):
            if kept or key not in self.known:
                self.known[key] = Known(matrix, row, kept)
            if stamp:
                self.stamps[stamp] = key

    def _begin(self, identity: dict[str, Any]) -> None:
        about = self.work / "model.json"
        with suppress(OSError, DamagedError):
            if parse_json(read_bytes(about, MAX_JSON), str(about)) == identity:
                return
        self._drop_work()
        self.work.mkdir(parents=True)
        write_json(about, identity)

    def _drop_work(self) -> None:
        """Remove all parts at once: what is removed file by file may be left half."""
        aside = self.work.with_suffix(".part")
        shutil.rmtree(aside, ignore_errors=True)
        if self.work.exists():
            os.replace(self.work, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _read_parts(self) -> None:
        for path in sorted(self.work.glob("*.jsonl")):
            try:
                rows = [parse_json(line, str(path)) for line in path.read_bytes().splitlines()]
                matrix = map_matrix(path.with_suffix(".npy"))
            except (DamagedError, FileNotFoundError):  # lost power: the pictures are encoded again
                path.unlink()
                continue
            self._last = max(self._last, int(path.stem))
            for number, row in enumerate(rows):
                self._note(row["hash"], row["stamp"], matrix, number, row["kept"], True)

    def add(self, pictures: Sequence[New], vectors: np.ndarray) -> None:
        """Keep a part: float32 (n, C) of these pictures. OSError where it cannot be written."""
        self._last += 1
        number, name = f"{self._last:06d}", f"part-{self._last:06d}"
        kept: list[dict[str, Any]] = [{} for _ in pictures]
        if any(picture.copy for picture in pictures):
            copies = [place for place, picture in enumerate(pictures) if picture.copy]
            with RecordWriter(self.pictures / f"{name}.rec") as writer:
                for record, place in enumerate(copies):
                    writer.write(record, pack(Header(0, 0.0, record, 0), pictures[place].copy))
                    kept[place] = {"kept": [name, record]}
            self._used.add(name)
        write_whole(self.work / f"{number}.npy", encode_array(vectors))
        lines = [
            json.dumps({"hash": picture.hash, "stamp": picture.stamp, "kept": place}) + "\n"
            for picture, place in zip(pictures, kept)
        ]
        write_whole(self.work / f"{number}.jsonl", [line.encode() for line in lines])
        matrix = map_matrix(self.work / f"{number}.npy")
        for row, (picture, copy) in enumerate(zip(pictures, kept)):
            self._note(picture.hash, picture.stamp, matrix, row, copy, True)

    def blocks(self, hashes: Sequence[str]) -> Iterator[np.ndarray]:
        """The vectors of these pictures in order, float32 (some, C) at a time."""
        for start in range(0, len(hashes), ROWS):
            found = (self.known[key] for key in hashes[start : start + ROWS])
            yield np.stack([known.matrix[known.row] for known in found])

    def remove_unused(self, used: set[str]) -> None:
        """Remove all files of copies but these, and what a writer left behind."""
        for path in self.pictures.glob("part-*"):
            if path.name.partition(".")[0] not in used or path.suffix == ".tmp":
                path.unlink(missing_ok=True)

    def finish(self, used: set[str]) -> None:
        """Remove what only a run that goes on would need."""
        self._drop_work()
        for path in self.output.glob("*.part"):
            path.unlink(missing_ok=True)
        self.remove_unused(used)
