"""A job's folder: stages of parts, each with the same rows in the same order and only its own columns.

    OUT/job.json                     rows in a part
    OUT/rows/part-00000.parquet ..   what was read; the other stages have parts of the same rows
    OUT/compose/settings.json        every setting that decided a row of that stage
    OUT/compose/part-00003.journal   finished rows of a part that is being made, one JSON line each

A part is there when it is whole. It says of which parts it was made, by their SHA-256, so that a later run makes anew
what depends on something that has changed, and nothing else. In a stage that waits for others, a row that was finished
is never asked for again as long as its own inputs are the same; one that failed is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_clip.errors import SETTING
from rwkv_clip.files import DamagedError, hash_file, hold, parse_json, read_bytes, sync_folder, write_json

from .parquet import read_metadata, read_parquet, write_parquet

ROWS = "rows"  # the first stage: what was read
ORDER = (ROWS, "caption", "tags", "compose", "verify", "scores", "dedup")
KEYS = {"id": "str", "inputs": "str"}  # of every row of every stage: its id, and a hash of what it was made of
MOST = 1 << 24  # bytes of a JSON file of ours
FSYNC = 5.0  # seconds of journal that a power cut may cost; a kill costs nothing


class Changed(ValueError):
    """A setting differs from the one that earlier rows were made with; names it."""

    exit_code = SETTING


@dataclass(frozen=True)
class Stage:
    """What one stage adds to every row.

    columns: {name: kind}, its own. reads: the stages whose columns it is given, where they are there. needs: those of
    them that have to be there. inputs: the columns that decide its result. decides: the settings that do, by their
    names on the command line. status: the column that says `failed` for a row that is to be tried again. journaled:
    every finished row is kept at once. whole: a part of it depends on all parts of the stages it reads.
    """

    name: str
    columns: dict[str, str]
    reads: tuple[str, ...]
    inputs: tuple[str, ...]
    decides: dict[str, Any]
    status: str | None = None
    journaled: bool = False
    whole: bool = False
    needs: tuple[str, ...] = ()

    def key(self, row: dict[str, Any]) -> str:
        """Hash of the row's inputs."""
        values = [row.get(name) for name in self.inputs]
        return hashlib.sha256(json.dumps(values, ensure_ascii=True).encode()).hexdigest()[:16]

    def has_failed(self, result: dict[str, Any]) -> bool:
        """Whether the row is to be tried again."""
        return self.status is not None and result.get(self.status) == "failed"


class Job:
    """The folder of a job; made where it is not there. ValueError for a folder of something else."""

    def __init__(self, folder: str | Path, part_rows: int | None = None):
        self.folder = Path(folder)
        about = self.folder / "job.json"
        if about.exists():
            found = _load(about)
            self.part_rows = found["part_rows"] if isinstance(found.get("part_rows"), int) else 0
            if self.part_rows < 1:
                raise DamagedError(f"{about}: has no part_rows; it is not the file of a job")
            if part_rows not in (None, self.part_rows):
                raise Changed(
                    f"part_rows: was {self.part_rows}, now {part_rows}; leave it out, or give another --output"
                )
            return
        if part_rows is None:
            raise ValueError(f"output: {self.folder} holds no job; begin one with `run --input ROWS --output DIR`")
        others = self.folder.is_dir() and any(not file.name.startswith("job.") for file in self.folder.iterdir())
        if others and not about.exists():  # of several commands that begin at once another may have been first
            raise ValueError(f"output: {self.folder} holds other files and no job; give an empty or new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part_rows = part_rows
        write_json(about, {"part_rows": part_rows})

    # ---- what is there

    def part(self, stage: str, number: int) -> Path:
        """The file of a part."""
        return self.folder / stage / f"part-{number:05d}.parquet"

    def count_parts(self) -> int:
        """Parts of the rows. ValueError before all of them have been read."""
        return self._need_input()["parts"]

    def is_read(self) -> bool:
        """Whether all rows of the input are here."""
        return bool(self.find_input())

    def find_input(self) -> dict[str, Any]:
        """What was read: fingerprint, parts, rows, skipped; {} before all of it was."""
        file = self.folder / ROWS / "input.json"
        found = _load(file) if file.exists() else {}
        if found and not all(isinstance(found.get(name), int) and found[name] > 0 for name in ("parts", "rows")):
            raise DamagedError(f"{file}: has no parts and rows; remove it, and the command with --input reads it anew")
        return found

    def note_input(self, about: dict[str, Any]) -> None:
        """All of the input has been read. `about`: what `find_input` gives from now on."""
        write_json(self.folder / ROWS / "input.json", about)

    def forget_input(self) -> None:
        """The rows are about to change: until `note_input` they count as not read."""
        file = self.folder / ROWS / "input.json"
        file.unlink(missing_ok=True)
        sync_folder(file.parent)

    def has(self, stage: str) -> bool:
        """Whether all parts of a stage are there."""
        return self.is_read() and all(self.part(stage, k).exists() for k in range(self.count_parts()))

    def stages(self) -> list[str]:
        """The stages that are there as a whole."""
        return [stage for stage in ORDER if self.has(stage)]

    def check(self, stages: Sequence[str], numbers: Sequence[int] | None = None) -> None:
        """ValueError where one of these parts (default: all) of the stages is missing, or was made of other rows than
        those that are there now."""
        for number in range(self.count_parts()) if numbers is None else numbers:
            now = hash_file(self._find_rows(number))
            for stage in stages:
                file = self.part(stage, number)
                if not file.exists():
                    raise ValueError(f"{stage}: part {number} of {self.folder} is not made yet; run {stage} first")
                if read_metadata(file).get("rows", now) != now:
                    raise ValueError(_tell_stale(stage, number, self.folder))

    def check_begun(self) -> None:
        """As `check`, for every stage of which a part has been made."""
        self.check([stage for stage in ORDER if self.has_begun(stage, range(self.count_parts()))])

    def has_begun(self, stage: str, numbers: Iterable[int]) -> bool:
        """Whether any of these parts of a stage that follows the rows is there."""
        return stage != ROWS and any(self.part(stage, number).exists() for number in numbers)

    def _find_rows(self, number: int) -> Path:
        """The file of a part of the rows. DamagedError."""
        file = self.part(ROWS, number)
        if not file.exists():
            raise DamagedError(f"{file}: is missing; the command with --input reads it anew")
        return file

    def count_rows(self) -> int:
        """Rows of the job."""
        return self._need_input()["rows"]

    def _need_input(self) -> dict[str, Any]:
        found = self.find_input()
        if not found:
            raise ValueError(f"{self.folder}: its input has not been read to the end; `run --input ..` goes on")
        return found

    def read_part(self, number: int, stages: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Rows of a part with the columns of `stages` (default: all there are); later stages win."""
        return list(self._merge(number, self.stages() if stages is None else stages))

    def read(self, *stages: str) -> Iterator[dict[str, Any]]:
        """All rows in order, streaming, with the columns of `stages` (default: all that are there as a whole)."""
        chosen = [stage for stage in ORDER if stage in stages] if stages else self.stages()
        return chain.from_iterable(self._merge(k, chosen) for k in range(self.count_parts()))

    def _merge(self, number: int, stages: Sequence[str]) -> Iterator[dict[str, Any]]:
        self._find_rows(number)
        present = [stage for stage in stages if self.part(stage, number).exists()]
        if not present:
            raise ValueError(f"{stages[0]}: part {number} of {self.folder} is not made yet; run {stages[0]} first")
        for rows in zip_longest(*(read_parquet(self.part(stage, number)) for stage in present)):
            merged: dict[str, Any] = {}
            for stage, row in zip(present, rows):
                if row is None or rows[0] is None or row["id"] != rows[0]["id"]:
                    raise DamagedError(_tell_stale(stage, number, self.folder))
                merged.update(row)
            yield merged

    # ---- settings

    def find_settings(self, stage: str) -> dict[str, Any]:
        """The settings that a stage was made with; {} where there are none."""
        file = self.folder / stage / "settings.json"
        return _load(file) if file.exists() else {}

    def agree(self, stage: Stage, new_run: bool = False) -> None:
        """Note the settings that decide the rows of a stage. Changed, naming each that differs, where rows were made
        with others; with `new_run` those rows, and what depends on them, are put aside instead."""
        now = json.loads(json.dumps(stage.decides))
        before = self.find_settings(stage.name)
        differing = sorted(key for key in {*now, *before} if now.get(key) != before.get(key)) if before else []
        if differing and not new_run:
            told = "; ".join(f"{key}: was {_show(before.get(key))}, now {_show(now.get(key))}" for key in differing)
            raise Changed(
                f"{stage.name}: {told}; rows of {self.folder} were made with the former: give those, another --output, "
                f"or --new-run, which puts the former rows aside"
            )
        if differing:
            self.put_aside(stage.name)
        if differing or not before:
            (self.folder / stage.name).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / stage.name / "settings.json", now)

    def put_aside(self, first: str) -> None:
        """Move a stage and all that come after it into OUT/before-1 (or -2, ..); nothing is deleted."""
        number = next(n for n in range(1, 1 << 20) if not (self.folder / f"before-{n}").exists())
        aside = self.folder / f"before-{number}"
        aside.mkdir()
        for stage in reversed(ORDER[ORDER.index(first) :]):
            if (self.folder / stage).exists():
                os.replace(self.folder / stage, aside / stage)
        sync_folder(self.folder)

    # ---- making parts

    @contextlib.contextmanager
    def own_part(self, stage: Stage, number: int) -> Iterator[None]:
        """One process at a time makes a part. InUse."""
        lock = self.part(stage.name, number).with_suffix(".lock")
        with hold(lock, f"part {number} of {stage.name} in {self.folder}", "wait for it, or give each its own --shard"):
            yield

    def made_of(self, stage: Stage, number: int) -> str:
        """SHA-256 of the parts that a part is made of, and of the settings."""
        digest = hashlib.sha256(json.dumps(stage.decides, sort_keys=True).encode())
        for other in stage.reads:
            for k in range(self.count_parts()) if stage.whole else [number]:
                if (file := self.part(other, k)).exists():
                    digest.update(f"{other} {hash_file(file)}\n".encode())
        return digest.hexdigest()

    def is_made(self, stage: Stage, number: int, retry_failed: bool = True, made_of: str | None = None) -> bool:
        """Whether a part is there, made of what is there now (`made_of`, where it is known), and without rows to try
        again."""
        file = self.part(stage.name, number)
        if not file.exists():
            return False
        about = read_metadata(file)
        made = about.get("made_of") == (made_of or self.made_of(stage, number))
        made = made and about.get("rows") == hash_file(self._find_rows(number))
        return made and not (retry_failed and stage.status and about.get("failed") != "0")

    def write_part(
        self, stage: Stage, number: int, rows: Sequence[dict], results: Sequence[dict], made_of: str | None = None
    ) -> None:
        """Write a part whole: the results of its rows, in their order; its journal goes."""
        made = [
            {"id": row["id"], "inputs": stage.key(row), **result} for row, result in zip(rows, results, strict=True)
        ]
        about = {
            "made_of": made_of or self.made_of(stage, number),
            "rows": hash_file(self._find_rows(number)),
            "failed": str(sum(map(stage.has_failed, results))),
        }
        file = self.part(stage.name, number)
        write_parquet(file, {**KEYS, **stage.columns}, [made], about)
        sync_folder(file.parent)
        file.with_suffix(".journal").unlink(missing_ok=True)

    def find_results(self, stage: Stage, number: int, retry_failed: bool = True) -> dict[tuple[str, str], dict]:
        """{(id, inputs): result} of the rows of a part that are finished: from the part itself, if it was made once,
        and from its journal. Failed ones only where they are not to be tried again."""
        found: dict[tuple[str, str], dict] = {}
        file = self.part(stage.name, number)
        if file.exists():
            found.update({(row.pop("id"), row.pop("inputs")): row for row in read_parquet(file)})
        for entry in _read_journal(file.with_suffix(".journal")):
            key = entry["id"], entry["inputs"]
            if not (key in found and stage.has_failed(entry["row"]) and not stage.has_failed(found[key])):
                found[key] = entry["row"]  # success beats failure
        if retry_failed:
            found = {key: row for key, row in found.items() if not stage.has_failed(row)}
        return found

    def note_time(self, stage: str, **numbers: Any) -> None:
        """Append what a piece of work took to the stage's log of times, which decides nothing."""
        with open(self.folder / stage / "times.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def read_times(self, stage: str) -> list[dict[str, Any]]:
        """What `note_time` was told, in order."""
        file = self.folder / stage / "times.jsonl"
        entries = (entry for entry in _read_lines(file) if isinstance(entry, dict))
        return [entry for entry in entries if all(isinstance(value, (int, float)) for value in entry.values())]


class Journal:
    """Finished rows of a part that is being made, appended one line each; what a kill tore off is cut away first."""

    def __init__(self, file: Path):
        self._file: BinaryIO = open(file, "ab")  # noqa: SIM115 - closed by close()
        whole = _whole_lines(file)
        if whole != file.stat().st_size:
            self._file.truncate(whole)
        self._synced = time.monotonic()

    def note(self, row_id: str, inputs: str, result: dict[str, Any]) -> None:
        """Keep a finished row. OSError."""
        line = json.dumps({"id": row_id, "inputs": inputs, "row": result}) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        if time.monotonic() - self._synced > FSYNC:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def _whole_lines(file: Path) -> int:
    """Bytes up to and including the last line end."""
    with open(file, "rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            stream.seek(start)
            place = stream.read(end - start).rfind(b"\n")
            if place >= 0:
                return start + place + 1
            end = start
    return 0


def _read_journal(file: Path) -> Iterator[dict[str, Any]]:
    for entry in _read_lines(file):
        if isinstance(entry, dict) and {"id", "inputs", "row"} <= entry.keys() and isinstance(entry["row"], dict):
            yield entry


def _read_lines(file: Path) -> Iterator[Any]:
    """The values of a file of JSON lines; a torn line, which only a kill leaves, is passed over."""
    if not file.exists():
        return
    with open(file, "rb") as stream:
        for line in stream:
            with contextlib.suppress(ValueError):
                yield parse_json(line, str(file))


def _load(file: Path) -> dict[str, Any]:
    found = parse_json(read_bytes(file, MOST), str(file))
    if not isinstance(found, dict):
        raise DamagedError(f"{file}: holds no settings; remove it, and start the command again")
    return found


def _tell_stale(stage: str, number: int, folder: Path) -> str:
    return f"{stage}: part {number} of {folder} was made of other rows than those there now; run {stage} again"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_shard(text: str | None) -> tuple[int, int]:
    """(which, of how many) of "3/16", counted from 0; (0, 1) for None. ValueError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", "0/1" if text is None else text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"shard: {text!r} is not i/n with i from 0 to n - 1, for example 0/16 to 15/16")
    return int(match[1]), int(match[2])
