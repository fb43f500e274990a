"""Builds training records: rows of a source -> shards of .rec/.idx with a .json that says what they hold.

The output depends on the input and the settings only, not on the number of workers or on interruptions: rows
are encoded in parallel but written in order, and a shard appears under its name when it is complete. The .idx
comes last; a run that finds it, made with the same settings from the same input, keeps the shard and goes on behind it.

The same input: see `Source.fingerprint`, and pictures of the same names, sizes and times of change, which are asked for
again, not read. Where all of it lies does not count. One process at a time writes a prefix.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from .counts import BuildReport, Counts, Pictures
from .encode import Encoded, Encoder
from .fields import Choice, Condition, check_image_field, choose_fields, survey
from ..files import hold, naming, parse_json, read_bytes, write_json
from .image import ImageError, open_image
from ..processes import map_ordered
from .recordio import HEADER, RecordWriter, beside, split_path
from .recordindex import is_complete
from .records import CHECKSUM, SCHEMA, RecordError, RecordSet
from .sources import Row, Source
from ..tokenizer import CLIP_BPE, make_tokenizer

log = logging.getLogger(__name__)

RULES = 2  # how rows become records; 2: pictures are upright, the fields of the texts are the same for all rows
EXAMPLES = 10  # bad records that a message names
MAX_SIDE = 1 << 26  # bytes of a .json that names up to 100,000 shards
ENDINGS = (".idx", ".rec", ".json")
OVERWRITE = "give --overwrite to replace it, or another prefix"


def build_records(
    source: str,
    prefix: str,
    *,
    images: str | None = None,
    views: tuple[str, ...] = (),
    where: tuple[str, ...] = (),
    image_field: str | None = None,
    token_field: str | None = None,
    tokenizer: str = CLIP_BPE,
    context: int = 77,
    shard_size: int = 0,
    max_side: int = 0,
    quality: int = 95,
    workers: int = 1,
    verify: bool = False,
    overwrite: bool = False,
    allow_outside: bool = False,
) -> BuildReport:
    """Images + captions -> PREFIX.rec/.idx/.json.

    ValueError: bad settings, damaged input, nothing to write. InUse: another process writes PREFIX. WorkerDied: memory
    ran out, most likely. OSError.

    Args:
        source: manifest (.jsonl .json .csv .tsv), webdataset .tar, .parquet, .npy of token ids; a folder,
            glob, shard-{000..011}.tar range or comma list of these.
        prefix: output name; PREFIX.rec, or PREFIX-00000.rec and so on with --shard-size.
        images: folder of the images (default: that of the manifest, or images/ in it); for an .npy the file
            that lists the images in order.
        views: texts of a record, raw first: NAME, NAME=FIELD or FIELD.NUMBER, for example raw=caption
            synthetic=blip, or captions.0 captions.1 captions.2. Default: raw, synthetic, generated as far as
            the first rows have them; raw is also found as caption, captions, text or txt.
        where: rows to take, for example split=train, license!=unknown or score>=0.3 (also > <= <); all must hold.
        image_field: field with the image or its path, if it has none of the usual names.
        token_field: field with ready token ids, if it is not tokens or texts.
        tokenizer: name of the tokenizer.
        context: tokens per text.
        shard_size: records per shard; 0 writes one file.
        max_side: scale larger pictures down to this many pixels; 0 keeps their size.
        quality: JPEG quality of pictures that are encoded anew.
        workers: processes that decode and tokenize; the output does not depend on it.
        verify: read everything back at the end and decode every picture.
        overwrite: replace files that were made from other input or with other settings.
        allow_outside: names in the input may lead out of the folder of the images (.., absolute, links).
    """
    began, name = time.monotonic(), split_path(prefix)
    _check_numbers(context=context, quality=quality, workers=workers, shard_size=shard_size, max_side=max_side)
    str(name).encode()  # what is not UTF-8 has no place in a .json
    _check_place(source, name)
    rows = Source(source, images, outside=allow_outside)
    conditions = [Condition.parse(text) for text in where]
    folder = _find_folder(images, rows)

    def choose(sample: list[Row]) -> Choice:
        check_image_field(sample, image_field)
        return choose_fields(sample, views, token_field, context)

    with _own(name):
        looked_at = tqdm(rows.rows(), unit="row", disable=None, desc="looking at fields", delay=2)
        chosen, token_field, aside = survey(iter(looked_at), conditions, choose)
        encoder = Encoder(
            chosen, tokenizer, context, folder, image_field, token_field, max_side, quality, aside, allow_outside
        )
        report = Build(rows, conditions, encoder, name, shard_size).run(workers, overwrite)
        if verify:
            report.verified = verify_records([str(shard) for shard in report.shards], workers)
    report.seconds = time.monotonic() - began
    return report


def _check_numbers(**numbers: int) -> None:
    least = {"shard_size": 0, "max_side": 0, "context": 2}
    most = {"quality": 100}
    for name, value in numbers.items():
        if not least.get(name, 1) <= value <= most.get(name, 1 << 31):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: {value} is not from {least.get(name, 1)} to {most.get(name, 1 << 31)}")


def _check_place(source: str, prefix: Path) -> None:
    """ValueError for output in the folder that is the input: the next run would read it."""
    folder = Path(source)
    if folder.is_dir() and prefix.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"prefix: {prefix} lies in the input {source!r}, and would be input itself; give another place"
        )


def _find_folder(images: str | None, source: Source) -> Path | None:
    if not images or source.kind == "npy":
        return None
    if not (folder := Path(images)).is_dir():
        what = "a file" if folder.exists() else "not there"
        raise ValueError(f"--images: {images!r} is {what}; name the folder that the names of the images start from")
    return folder


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


class Build:
    """One build: the shards, one after the other, and the counts."""

    def __init__(self, source: Source, where: list[Condition], encoder: Encoder, prefix: Path, size: int):
        self.source, self.where, self.encoder = source, where, encoder
        self.prefix, self.size = prefix, size
        views = encoder.views
        self.heading = {
            "schema": SCHEMA,
            "views": list(views.names),
            "fields": list(views.fields),
            "context": encoder.context,
            "tokenizer": encoder.tokenizer,
            "vocab_size": make_tokenizer(encoder.tokenizer, encoder.context).vocab_size,
            "checksum": CHECKSUM,
            **self._digests(),
        }
        self.report = BuildReport(views.names, views.fields, encoder.context)
        self._pictures = Pictures()  # of all rows up to the one that was written last
        self._content = hashlib.sha256()  # of the shard that is being written
        self._waiting: deque[tuple[int, Counter]] = deque()  # rows being encoded: number, remarks since the last
        self._read, self._remarks = 0, Counter()

    def run(self, workers: int, overwrite: bool) -> BuildReport:
        """Write what is missing. ValueError if files made otherwise are in the way, or no row was usable."""
        report = self.report
        self._remove_rests()
        complete, old = self._keep_finished(overwrite)
        if not complete:
            with (
                tqdm(total=self.source.count(), unit="row", disable=None, desc=self.prefix.name) as bar,
                closing(map_ordered(self.encoder, self._select(bar), workers)) as results,
            ):
                self._write_shards(results)
            if not report.count:
                raise ValueError(self._say_nothing())
        outputs = {beside(split_path(shard), ending) for shard in report.shards for ending in ENDINGS}
        for file in old - outputs - {beside(self.prefix, ".json")}:
            file.unlink()
        if self.size and not complete:
            shards = [split_path(shard).name for shard in report.shards]
            numbers = {**report.counts.to_json(), "pictures": self._pictures.digest()}
            write_json(beside(self.prefix, ".json"), {**self.heading, "shards": shards, **numbers})
        return report

    def _digests(self) -> dict[str, str]:
        """SHA-256 of all that decides about the bytes of the output, except the pictures, and of the input alone.

        Where the pictures are does not count, but what they are, see `Pictures`: a set that was moved is the same.
        """
        encoder = {key: value for key, value in asdict(self.encoder).items() if key != "images"}
        where = [asdict(condition) for condition in self.where]
        found = self.source.fingerprint()
        parts = {"input": found, "digest": [SCHEMA, RULES, found, encoder, where, self.size]}
        return {
            name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()
        }

    def _name(self, number: int) -> Path:
        return beside(self.prefix, f"-{number:05d}") if self.size else self.prefix

    def _say_nothing(self) -> str:
        reasons = self.report.explain_skipped() or [f"no row was selected by --where {' '.join(map(str, self.where))}"]
        if not self.report.counts.rows:
            reasons = ["the input has no rows; no row was selected"]
        text = "; ".join(reason.strip() for reason in reasons)
        return f"{self.prefix}: none of {self.report.counts.rows} rows became a record: {text}"

    # ---- what an earlier run left

    def _keep_finished(self, overwrite: bool) -> tuple[bool, set[Path]]:
        """Count in what an earlier run finished -> (whether nothing is left to do, files to remove in the end)."""
        report, kept = self.report, set()
        stages = self._find_stages()
        good = self._check_pictures(stages, overwrite)
        for name, side, _ in stages[:good]:
            if "shards" in side:
                kept.add(beside(name, ".json"))
                report.counts = Counts.from_json(side)
            else:
                kept |= {beside(name, ending) for ending in ENDINGS}
                report.shards.append(beside(name, ".rec"))
                report.counts.add(Counts.from_json(side))
        report.kept = len(report.shards)
        complete = bool(stages) and good == len(stages) and (not self.size or "shards" in stages[-1][1])
        return complete, self._find_old(kept, overwrite)

    def _find_stages(self) -> list[tuple[Path, dict, int]]:
        """(name, its .json, rows up to its end) of the shards that are complete and, if it lists them, the summary."""
        stages: list[tuple[Path, dict, int]] = []
        while (side := self._finished(name := self._name(len(stages)))) and (self.size or not stages):
            stages.append((name, side, side["rows"] + (stages[-1][2] if stages else 0)))
        summary = self._ours(self.prefix) if self.size else None
        last = stages[-1][2] if stages else 0
        known = summary is not None and _is_whole(summary) and summary["rows"] >= last
        if known and len(summary.get("shards", ())) == len(stages):
            stages.append((self.prefix, summary, summary["rows"]))
        return stages

    def _finished(self, name: Path) -> dict | None:
        """The .json of a shard of this build that is complete: the .idx is published last."""
        rec, index = beside(name, ".rec"), beside(name, ".idx")
        side = self._ours(name)
        if side is None or not rec.is_file() or not index.is_file():
            return None
        size, count = rec.stat().st_size, side.get("count")
        if _is_whole(side) and size == side.get("bytes") and is_complete(index, count, size):
            return side
        damage = (
            f"{rec}: it or its .idx or .json is damaged ({size} bytes, not {side.get('bytes')}, of {count} records)"
        )
        log.warning("%s; it is built again", damage)
        self.report.damaged.append(damage)
        return None

    def _ours(self, name: Path) -> dict | None:
        """The .json of `name` if it is of this build."""
        side = _read_side(name)
        return side if side is not None and side.get("digest") == self.heading["digest"] else None

    def _check_pictures(self, stages: list[tuple[Path, dict, int]], overwrite: bool) -> int:
        """How many of the stages have the pictures that are there now. ValueError if not all, unless to `overwrite`."""
        if not stages or stages[-1][1]["pictures"] is None:  # all pictures were in the input itself
            return len(stages)
        start, rows = 0, self.source.rows()
        with tqdm(total=stages[-1][2], unit="row", disable=None, desc="checking pictures", delay=1) as bar:
            for number, (name, side, end) in enumerate(stages):
                pictures = self._pictures.copy()
                for row in islice(rows, end - start):
                    bar.update()
                    if all(condition.judge(row)[0] for condition in self.where):
                        pictures.add(self.encoder.find_picture(row).seen)
                if pictures.digest() != side["pictures"]:
                    if overwrite:
                        return number
                    raise ValueError(
                        f"{beside(name, '.json')}: made of other pictures than there are now"
                        f"{self._name_changed(name, start, end)}; give --overwrite to build it and what follows anew, "
                        f"or another prefix"
                    )
                self._pictures, start = pictures, end
        return len(stages)

    def _name_changed(self, name: Path, start: int, end: int) -> str:
        """The first picture of these rows that was changed after the .json was written, or else is not there."""
        written, absent = beside(name, ".json").stat().st_mtime_ns, ""
        for row in islice(self.source.rows(start), end - start):
            if all(condition.judge(row)[0] for condition in self.where):
                picture = self.encoder.find_picture(row)
                if picture.file is None:
                    absent = absent or (f" ({row.name}: {picture.problem})" if picture.problem else "")
                elif max((about := picture.file.stat()).st_mtime_ns, about.st_ctime_ns) > written:
                    return f" ({picture.file} was changed or put there since)"
        return absent

    def _find_old(self, kept: set[Path], overwrite: bool) -> set[Path]:
        """Files in the way: those that this build left unfinished, others only if the user says so."""
        shards = self.prefix.parent.glob(glob.escape(self.prefix.name) + "-[0-9][0-9][0-9][0-9][0-9].*")
        old = set()
        for name in sorted({self.prefix, *(shard.with_suffix("") for shard in shards)}):
            files = {file for ending in ENDINGS if (file := beside(name, ending)).exists()} - kept
            if own := sorted(filter(self.source.holds, files)):
                raise ValueError(f"{own[0]}: a file of the input, which the output would replace; give another prefix")
            if files and not overwrite and not self._ours(name):
                raise ValueError(f"{min(files)}: exists, but {self._differ(name)}; {OVERWRITE}")
            old |= files
        return old

    def _differ(self, name: Path) -> str:
        """In what a file is not of this build."""
        side = _read_side(name)
        if side is None or "digest" not in side:
            return "is not of this program"
        if "input" not in side:
            return "was made by an earlier release, which did not note all that it was made of"
        if side["input"] != self.heading["input"]:
            return "was made from other input, or the input has changed since"
        return "was made with other settings"

    def _remove_rests(self) -> None:
        """Files under the names that they have while they are written; their process was killed."""
        names = rf"{re.escape(self.prefix.name)}(-[0-9]{{5}})?\.(rec|idx|json)(\.tmp|(\.tmp)?\.[0-9]+\.part)"
        for file in self.prefix.parent.iterdir():
            if re.fullmatch(names, file.name):
                file.unlink()

    # ---- writing

    def _select(self, bar: tqdm) -> Iterator[Row]:
        self._read = self.report.counts.rows
        bar.update(self._read)
        for row in self.source.rows(self._read):
            self._read += 1
            bar.update()
            verdicts = [condition.judge(row) for condition in self.where]
            self._remarks.update(remark for _, remark in verdicts if remark)
            if all(taken for taken, _ in verdicts):
                self._waiting.append((self._read, self._remarks))
                self._remarks = Counter()
                yield row

    def _write_shards(self, results: Iterable[Encoded]) -> None:
        writer, counts, start = None, Counts(), self.report.counts.rows
        try:
            for encoded in results:
                stop, remarks = self._waiting.popleft()  # rows up to and with this one
                counts.where.update(remarks)
                self._note(encoded, counts)
                if encoded.problem:
                    continue
                if writer is None:
                    writer = RecordWriter(self._name(len(self.report.shards)))
                packed = encoded.pack(len(writer))
                self._content.update(HEADER.unpack_from(packed)[3].to_bytes(4, "little"))
                with naming(beside(writer.prefix, ".rec")):
                    writer.write(len(writer), packed)
                if len(writer) == self.size:
                    counts.rows = stop - start
                    self._finish(writer, counts)
                    writer, counts, start = None, Counts(), stop
            counts.rows = self._read - start
            counts.where.update(self._remarks)
            if writer is not None:
                self._finish(writer, counts)
            else:  # rows behind the last full shard
                self.report.counts.add(counts)
        except BaseException:
            if writer is not None:
                writer.discard()
            raise

    def _note(self, encoded: Encoded, counts: Counts) -> None:
        counts.note(encoded)
        self.report.note(encoded)
        self._pictures.add(encoded.seen)
        if encoded.problem:
            log.info("skipped %s: %s", encoded.name, encoded.problem)

    def _finish(self, writer: RecordWriter, counts: Counts) -> None:
        """Publish a shard. What was there before stays until everything is on the disk."""
        side, name = beside(writer.prefix, ".json"), beside(writer.prefix, ".json.tmp")
        with naming(beside(writer.prefix, ".rec")):
            size = writer.flush()
        made_of = {"bytes": size, "content": self._content.hexdigest(), "pictures": self._pictures.digest()}
        write_json(name, {**self.heading, **counts.to_json(), **made_of})
        if self.size and not beside(self.prefix, ".rec").exists():  # a summary of shards that go
            beside(self.prefix, ".json").unlink(missing_ok=True)
        beside(writer.prefix, ".idx").unlink(missing_ok=True)  # from here on an older shard counts as unfinished
        os.replace(name, side)
        writer.close()
        self._content = hashlib.sha256()
        self.report.shards.append(beside(writer.prefix, ".rec"))
        self.report.counts.add(counts)


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
        Counts.from_json(side)
        return isinstance(side["pictures"], str | None) and isinstance(side.get("shards", []), list)
    except (KeyError, TypeError, ValueError):
        return False


class Verifier:
    """Record number -> None, or what is wrong with that record: structure, checksum, token ids, picture."""

    def __init__(self, files: list[str]):
        self.records = RecordSet(files)

    def __call__(self, i: int) -> str | None:
        try:
            open_image(self.records.sample(i)[0], self.records.name(i))
        except (RecordError, ImageError) as error:
            return str(error)
        return None


def verify_records(files: str | list[str], workers: int = 1) -> int:
    """Read every record, decode every picture -> number of records. RecordError lists the first bad."""
    verifier = Verifier(files)
    count = len(verifier.records)
    numbers = tqdm(range(count), unit="record", disable=None, desc="verify")
    bad = [problem for problem in map_ordered(verifier, numbers, workers) if problem]
    if bad:
        raise RecordError(f"{len(bad)} of {count} records are bad:\n  " + "\n  ".join(bad[:EXAMPLES]))
    return count
