"""Builds training records: rows of a source -> shards of .rec/.idx with a .json that says what they hold.

The output depends on the input and the settings only, not on the number of workers or on interruptions: rows are
encoded in parallel but written in order, and a shard appears under its name when it is complete. A later run keeps the
shards that are there (`plan`) and goes on after them. One process at a time writes a prefix.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..files import hold, write_json
from ..processes import map_ordered
from ..tokenizer import CLIP_BPE
from .encode import Encoder, Record, Skipped
from .fields import Choice, Condition, check_image_field, choose_fields, survey
from .image import ImageError, open_image
from .plan import ENDINGS, Plan, Progress, find_progress
from .recordio import HEADER, RecordError, RecordWriter, beside, split_path
from .records import RecordSet
from .report import BuildReport
from .rows import Row
from .sources import Source

log = logging.getLogger(__name__)

BAD_NAMED = 10  # bad records that a message names
LIMITS = {"context": (2, 1 << 31), "quality": (1, 100), "workers": (1, 1 << 31)}
LIMITS |= {"shard_size": (0, 1 << 31), "max_side": (0, 1 << 31)}


@dataclass(frozen=True)
class BuildSettings:
    """What records are built from, and how.

    Args:
        source: manifest (.jsonl .json .csv .tsv), webdataset .tar, .parquet, .npy of token ids; a folder,
            glob, shard-{000..011}.tar range or comma list of these. Of Chinese-CLIP: NAME_imgs.tsv (a record for each
            picture, its texts are captions.0, captions.1 ..), or NAME_texts.jsonl or an LMDB folder lmdb/NAME (a record
            for each text of a picture).
        prefix: output name; PREFIX.rec, or PREFIX-00000.rec and so on with --shard-size.
        images: folder of the images (default: that of the manifest, or images/ in it); for an .npy the file
            that lists the images in order.
        texts: texts of a record, raw first: NAME, NAME=FIELD or FIELD.NUMBER, for example raw=caption
            synthetic=blip, or captions.0 captions.1 captions.2. Default: raw, synthetic, generated as far as
            the first rows have them; raw is also found as caption, captions, text or txt.
        where: rows to take, for example split=train, license!=unknown or score>=0.3 (also > <= <); all must hold.
        image_field: field with the image or its path, if it has none of the usual names.
        token_field: field with ready token ids, if it is not tokens or texts.
        tokenizer: name of the tokenizer: clip-bpe, or bert-chinese with --context 52 for Chinese-CLIP.
        context: tokens per text.
        shard_size: records per shard; 0 writes one file.
        max_side: scale larger pictures down to this many pixels; 0 keeps their size.
        quality: JPEG quality of pictures that are encoded anew.
        workers: processes that decode and tokenize; the output does not depend on it.
        verify: read everything back at the end and decode every picture.
        overwrite: replace files that were made from other input or with other settings.
        allow_outside: names in the input may lead out of the folder of the images (.., absolute, links).
    """

    source: str
    prefix: str
    images: str | None = None
    texts: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    image_field: str | None = None
    token_field: str | None = None
    tokenizer: str = CLIP_BPE
    context: int = 77
    shard_size: int = 0
    max_side: int = 0
    quality: int = 95
    workers: int = 1
    verify: bool = False
    overwrite: bool = False
    allow_outside: bool = False

    def check(self) -> None:
        """ValueError for a number out of range, and for output in the folder that is the input: the next run would
        read it."""
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: {getattr(self, name)} is not from {least} to {most}")
        prefix, folder = split_path(self.prefix), Path(self.source)
        str(prefix).encode()  # what is not UTF-8 has no place in a .json
        if folder.is_dir() and prefix.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"prefix: {prefix} lies in the input {self.source!r}, and would be input itself; give another place"
            )


def build_records(source: str, prefix: str, **options) -> BuildReport:
    """Images + captions -> PREFIX.rec/.idx/.json. `options`: the other fields of `BuildSettings`.

    ValueError: bad settings, damaged input, nothing to write. InUse: another process writes PREFIX. WorkerDied: memory
    ran out, most likely. OSError.
    """
    began, settings = time.monotonic(), BuildSettings(source, prefix, **options)
    settings.check()
    rows = Source(source, settings.images, settings.allow_outside)
    conditions = tuple(map(Condition.parse, settings.where))
    images, name = _find_folder(settings.images, rows), split_path(prefix)
    with _own(name):
        encoder = Encoder(
            _choose(settings, rows, conditions),
            settings.tokenizer,
            settings.context,
            images,
            settings.image_field,
            settings.max_side,
            settings.quality,
            settings.allow_outside,
        )
        report = write_records(
            Plan(rows, conditions, encoder, name, settings.shard_size), settings.workers, settings.overwrite
        )
        if settings.verify:
            report.verified = verify_records([str(shard) for shard in report.shards], settings.workers)
    report.seconds = time.monotonic() - began
    return report


def _find_folder(images: str | None, source: Source) -> Path | None:
    if not images or source.kind == "npy":
        return None
    if not (folder := Path(images)).is_dir():
        what = "a file" if folder.exists() else "not there"
        raise ValueError(f"--images: {images!r} is {what}; name the folder that the names of the images start from")
    return folder


def _choose(settings: BuildSettings, source: Source, conditions: tuple[Condition, ...]) -> Choice:
    """The fields to take, from the first rows."""

    def choose(sample: list[Row]) -> Choice:
        check_image_field(sample, settings.image_field)
        return choose_fields(sample, settings.texts, settings.token_field, settings.context)

    return survey(
        iter(tqdm(source.rows(), unit="row", disable=None, desc="looking at fields", delay=2)), conditions, choose
    )


@contextmanager
def _own(prefix: Path) -> Iterator[None]:
    """One process at a time writes PREFIX. PREFIX-00000 may be written beside PREFIX-00001, but not beside PREFIX, of
    which it may be a shard."""
    remedy = "wait until it has ended, or give another prefix"
    family = re.fullmatch(r"(.+)-[0-9]{5}", prefix.name)
    with ExitStack() as locks:
        if family:
            lock = prefix.with_name(f"{family[1]}.lock")
            locks.enter_context(hold(lock, str(prefix.with_name(family[1])), remedy, shared=True))
        locks.enter_context(hold(beside(prefix, ".lock"), str(prefix), remedy))
        yield


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_records(plan: Plan, workers: int, overwrite: bool) -> BuildReport:
    """Write what is missing. ValueError if files that were made otherwise are in the way, or no row was usable."""
    progress = find_progress(plan, overwrite)
    report, summary = progress.report, beside(plan.prefix, ".json")
    if not progress.complete:
        with closing(_encode_rows(plan, report.rows, workers)) as outcomes:
            while _write_shard(plan, progress, outcomes):
                pass
        if not report.count:
            raise ValueError(f"{plan.prefix}: {report.explain_nothing(plan.where)}")
    outputs = {beside(split_path(shard), ending) for shard in report.shards for ending in ENDINGS}
    for file in progress.outdated - outputs - {summary}:
        file.unlink()
    if plan.shard_size and not progress.complete:
        shards = [split_path(shard).name for shard in report.shards]
        numbers = {**report.to_json(), "pictures": progress.pictures.digest()}
        write_json(summary, {**plan.heading, "shards": shards, **numbers})
    return report


def _encode_rows(plan: Plan, start: int, workers: int) -> Iterator[tuple[int, Counter, Record | Skipped | None]]:
    """(rows read since the last outcome, what --where remarks about them, outcome) for every row from `start` on that
    the conditions select; at the end None, for the rows after the last one."""
    waiting: deque[tuple[int, Counter]] = deque()  # of the rows that are being encoded
    rows, remarks = 0, Counter()

    def select(bar: tqdm) -> Iterator[Row]:
        nonlocal rows, remarks
        for row in plan.source.rows(start):
            rows += 1
            bar.update()
            verdicts = [condition.judge(row) for condition in plan.where]
            remarks.update(remark for _, remark in verdicts if remark)
            if all(taken for taken, _ in verdicts):
                waiting.append((rows, remarks))
                rows, remarks = 0, Counter()
                yield row

    with (
        tqdm(total=plan.source.count(), initial=start, unit="row", disable=None, desc=plan.prefix.name) as bar,
        closing(map_ordered(plan.encoder, select(bar), workers)) as outcomes,
    ):
        for outcome in outcomes:
            yield *waiting.popleft(), outcome
    yield rows, remarks, None


def _write_shard(plan: Plan, progress: Progress, outcomes: Iterator[tuple]) -> bool:
    """Write the next shard, if there is a record left. Returns whether there may be more."""
    counts, content, writer, outcome = BuildReport(), hashlib.sha256(), None, None
    with ExitStack() as stack:
        for rows, remarks, outcome in outcomes:
            counts.rows += rows
            counts.where.update(remarks)
            if outcome is None:
                break
            counts.note(outcome)
            progress.pictures.add(outcome.seen)
            if isinstance(outcome, Skipped):
                log.info("skipped %s: %s", outcome.name, outcome.reason)
                continue
            if writer is None:
                writer = stack.enter_context(RecordWriter(plan.name(len(progress.report.shards))))
            packed = outcome.pack(len(writer))
            content.update(HEADER.unpack_from(packed)[3].to_bytes(4, "little"))
            writer.write(len(writer), packed)
            if len(writer) == plan.shard_size:
                break
        if writer is not None:
            made_of = {"content": content.hexdigest(), "pictures": progress.pictures.digest()}
            _publish(plan, writer, {**plan.heading, **counts.to_json(), "bytes": writer.size, **made_of})
            progress.report.shards.append(writer.path)
    progress.report.add(counts)
    return outcome is not None


def _publish(plan: Plan, writer: RecordWriter, side: dict) -> None:
    """Give a shard its names. What was there before stays until everything is on the disk."""
    writer.flush(side)
    if plan.shard_size and not beside(plan.prefix, ".rec").exists():  # a summary of shards that are replaced
        beside(plan.prefix, ".json").unlink(missing_ok=True)
    writer.close()


# ---- reading back ----------------------------------------------------------------------------------------------------


def _find_fault(records: RecordSet, i: int) -> str | None:
    """What is wrong with record `i`: its structure, checksum, token ids or picture."""
    try:
        open_image(records.sample(i)[0], records.name(i))
    except (RecordError, ImageError) as error:
        return str(error)
    return None


def verify_records(files: str | list[str], workers: int = 1) -> int:
    """Read every record, decode every picture -> number of records. RecordError lists the first bad."""
    records = RecordSet(files)
    count = len(records)
    numbers = tqdm(range(count), unit="record", disable=None, desc="verify")
    bad = [fault for fault in map_ordered(partial(_find_fault, records), numbers, workers) if fault]
    if bad:
        raise RecordError(f"{len(bad)} of {count} records are bad:\n  " + "\n  ".join(bad[:BAD_NAMED]))
    return count
