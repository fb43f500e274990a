"""What a build makes, and how much of it an earlier run has made.

A shard is kept when its .idx is there, which is published last, and its .json says that it was made with the same
settings from the same input: see `Source.fingerprint`, and pictures of the same names, sizes and times of change, which
are looked up again, not read. The folders that hold all of it do not matter.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..files import parse_json, read_bytes
from ..tokenizer import make_tokenizer
from .encode import Encoder
from .fields import Condition
from .recordio import RecordError, beside, read_index
from .records import CHECKSUM, SCHEMA
from .report import BuildReport
from .rows import Row
from .sources import Source

log = logging.getLogger(__name__)

RULES = 2  # how rows become records; 2: pictures are upright, the fields of the texts are the same for all rows
MAX_SIDE = 1 << 26  # bytes of a .json that names up to 100,000 shards
ENDINGS = (".idx", ".rec", ".json")
OVERWRITE = "give --overwrite to replace it, or another prefix"


class Pictures:
    """A digest of a sequence of pictures, by what `encode.Picture` has `seen`."""

    def __init__(self, sha256: Any = None):
        self._sha256 = sha256 or hashlib.sha256()

    def add(self, seen: str) -> None:
        """The picture of the next row."""
        if seen:
            self._sha256.update(seen.encode() + b"\n")

    def digest(self) -> str | None:
        """Of all pictures so far; None while no row has named a file."""
        digest = self._sha256.hexdigest()
        return None if digest == hashlib.sha256().hexdigest() else digest

    def copy(self) -> Pictures:
        """As it is now."""
        return Pictures(self._sha256.copy())


@dataclass(frozen=True)
class Plan:
    """The rows of `source` that meet all conditions, encoded into PREFIX.rec or, `shard_size` records each, into
    PREFIX-00000.rec and so on."""

    source: Source
    where: tuple[Condition, ...]
    encoder: Encoder
    prefix: Path
    shard_size: int

    def __post_init__(self):
        self.heading  # noqa: B018 - describes the input as it is now, before its rows are read

    @cached_property
    def heading(self) -> dict:
        """How the .json of every shard begins. input and digest: SHA-256 of the input alone, and of everything that
        determines the bytes of the output except the pictures. The names of the keys are part of both formats."""
        encoder, texts = self.encoder, self.encoder.choice.texts
        settings = {key: value for key, value in asdict(encoder).items() if key not in ("images", "choice")}
        settings |= {"views": asdict(texts), "token_field": encoder.choice.token_field, "aside": encoder.choice.aside}
        found, where = self.source.fingerprint(), [asdict(condition) for condition in self.where]
        return {
            "schema": SCHEMA,
            "views": list(texts.names),
            "fields": list(texts.fields),
            "context": encoder.context,
            "tokenizer": encoder.tokenizer,
            "vocab_size": make_tokenizer(encoder.tokenizer, encoder.context).vocab_size,
            "checksum": CHECKSUM,
            "input": _hash_json(found),
            "digest": _hash_json([SCHEMA, RULES, found, settings, where, self.shard_size]),
        }

    def name(self, number: int) -> Path:
        """Prefix of a shard."""
        return beside(self.prefix, f"-{number:05d}") if self.shard_size else self.prefix

    def takes(self, row: Row) -> bool:
        """Whether the row meets all conditions."""
        return all(condition.judge(row)[0] for condition in self.where)

    def read_own(self, name: Path) -> dict | None:
        """The .json of `name` if it is of this build."""
        side = _read_side(name)
        return side if side is not None and side.get("digest") == self.heading["digest"] else None


def _hash_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Progress:
    """How far a build is. report, pictures: of the rows so far. outdated: files to remove in the end."""

    report: BuildReport
    pictures: Pictures = field(default_factory=Pictures)
    complete: bool = False
    outdated: set[Path] = field(default_factory=set)


class Stage(NamedTuple):
    """A shard that is complete, or the summary of all: its prefix, its .json, and the rows up to its end."""

    name: Path
    side: dict
    end: int


def find_progress(plan: Plan, overwrite: bool) -> Progress:
    """What an earlier run has finished. Removes what it left half written.

    ValueError where files that are not of this build are in the way, or were made of other pictures, unless
    `overwrite`.
    """
    _remove_unfinished(plan.prefix)
    progress = Progress(BuildReport(plan.encoder.choice.texts, plan.encoder.context))
    report = progress.report
    stages = _find_stages(plan, report.damaged)
    made, progress.pictures = _check_pictures(plan, stages, overwrite)
    summary = next((stage for stage in stages[:made] if "shards" in stage.side), None)
    shards = [stage for stage in stages[:made] if stage is not summary]
    for stage in [summary] if summary else shards:
        report.add(BuildReport.from_json(stage.side))
    report.shards = [beside(shard.name, ".rec") for shard in shards]
    report.kept = len(shards)
    progress.complete = bool(stages) and made == len(stages) and (not plan.shard_size or summary is not None)
    kept = {beside(shard.name, ending) for shard in shards for ending in ENDINGS}
    kept |= {beside(plan.prefix, ".json")} if summary else set()
    progress.outdated = _find_outdated(plan, kept, overwrite)
    return progress


def _remove_unfinished(prefix: Path) -> None:
    """Remove files that still have their temporary names: their process was killed."""
    names = rf"{re.escape(prefix.name)}(-[0-9]{{5}})?\.(rec|idx|json)(\.tmp|(\.tmp)?\.[0-9]+\.part)"
    for file in prefix.parent.iterdir():
        if re.fullmatch(names, file.name):
            file.unlink()


def _find_stages(plan: Plan, damaged: list[str]) -> list[Stage]:
    """The shards that are complete and, if it lists them, the summary."""
    stages, end = [], 0
    while (plan.shard_size or not stages) and (side := _read_finished(plan, plan.name(len(stages)), damaged)):
        end += side["rows"]
        stages.append(Stage(plan.name(len(stages)), side, end))
    summary = plan.read_own(plan.prefix) if plan.shard_size else None
    if summary and _is_whole(summary) and summary["rows"] >= end and len(summary.get("shards", ())) == len(stages):
        stages.append(Stage(plan.prefix, summary, summary["rows"]))
    return stages


def _read_finished(plan: Plan, name: Path, damaged: list[str]) -> dict | None:
    """The .json of a shard of this build that is complete."""
    rec, index, side = beside(name, ".rec"), beside(name, ".idx"), plan.read_own(name)
    if side is None or not rec.is_file() or not index.is_file():
        return None
    size, count = rec.stat().st_size, side.get("count")
    if _is_whole(side) and size == side.get("bytes") and _is_complete(index, count, size):
        return side
    damage = f"{rec}: it or its .idx or .json is damaged ({size} bytes, not {side.get('bytes')}, of {count} records)"
    log.warning("%s; it is built again", damage)
    damaged.append(damage)
    return None


def _read_side(name: Path) -> dict | None:
    """The .json of `name`; None if there is none that can be read."""
    try:
        side = parse_json(read_bytes(beside(name, ".json"), MAX_SIDE), "")
    except (OSError, ValueError):
        return None
    return side if isinstance(side, dict) else None


def _is_whole(side: dict) -> bool:
    """Whether it has what a later run needs."""
    try:
        BuildReport.from_json(side)
        return isinstance(side["pictures"], str | None) and isinstance(side.get("shards", []), list)
    except (KeyError, TypeError, ValueError):
        return False


def _is_complete(index: Path, count: int, size: int) -> bool:
    """Whether `index` has the keys 0, 1, .. of `count` records, one after the other in a file of `size` bytes."""
    try:
        keys, offsets = read_index(index)
    except RecordError:
        return False
    ends = np.append(offsets, size)
    return len(keys) == count and np.array_equal(keys, np.arange(count)) and not ends[0] and (np.diff(ends) > 0).all()


def _check_pictures(plan: Plan, stages: list[Stage], overwrite: bool) -> tuple[int, Pictures]:
    """(how many of the stages were made of the pictures that are there now, the digest of these). ValueError if not
    all, unless `overwrite`."""
    known = Pictures()
    if not stages or stages[-1].side["pictures"] is None:  # all pictures were in the input itself
        return len(stages), known
    rows, start = plan.source.rows(), 0
    with tqdm(total=stages[-1].end, unit="row", disable=None, desc="checking pictures", delay=1) as bar:
        for number, stage in enumerate(stages):
            pictures = known.copy()
            for row in islice(rows, stage.end - start):
                bar.update()
                if plan.takes(row):
                    pictures.add(plan.encoder.find_picture(row).seen)
            if pictures.digest() != stage.side["pictures"]:
                if overwrite:
                    return number, known
                raise ValueError(
                    f"{beside(stage.name, '.json')}: made of other pictures than there are now"
                    f"{_name_changed(plan, stage, start)}; give --overwrite to build it and what follows anew, or "
                    f"another prefix"
                )
            known, start = pictures, stage.end
    return len(stages), known


def _name_changed(plan: Plan, stage: Stage, start: int) -> str:
    """The first picture of a stage that was changed after its .json was written, or else is not there."""
    written, absent = beside(stage.name, ".json").stat().st_mtime_ns, ""
    for row in filter(plan.takes, islice(plan.source.rows(start), stage.end - start)):
        picture = plan.encoder.find_picture(row)
        if picture.file is None:
            absent = absent or (f" ({row.name}: {picture.problem})" if picture.problem else "")
        elif max((about := picture.file.stat()).st_mtime_ns, about.st_ctime_ns) > written:
            return f" ({picture.file} was changed or put there since)"
    return absent


def _find_outdated(plan: Plan, kept: set[Path], overwrite: bool) -> set[Path]:
    """Files that the output replaces: those that this build left unfinished, others only with `overwrite`."""
    outdated: set[Path] = set()
    for name in sorted({plan.prefix, *_find_shards(plan.prefix)}):
        files = {file for ending in ENDINGS if (file := beside(name, ending)).exists()} - kept
        if own := sorted(filter(plan.source.holds, files)):
            raise ValueError(f"{own[0]}: a file of the input, which the output would replace; give another prefix")
        if files and not overwrite and not plan.read_own(name):
            raise ValueError(f"{min(files)}: exists, but {_explain_difference(plan, name)}; {OVERWRITE}")
        outdated |= files
    return outdated


def _find_shards(prefix: Path) -> Iterator[Path]:
    for file in prefix.parent.glob(glob.escape(prefix.name) + "-[0-9][0-9][0-9][0-9][0-9].*"):
        yield file.with_suffix("")


def _explain_difference(plan: Plan, name: Path) -> str:
    """Why a file is not of this build."""
    side = _read_side(name)
    if side is None or "digest" not in side:
        return "is not of this program"
    if "input" not in side:
        return "was made by an earlier release, which did not note all that it was made of"
    if side["input"] != plan.heading["input"]:
        return "was made from other input, or the input has changed since"
    return "was made with other settings"
