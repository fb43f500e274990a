"""Builds training records: rows of a source -> shards of .rec/.idx with a .json that says what they hold.

The output depends on the input and the settings only, not on the number of workers or on interruptions: rows
are encoded in parallel but written in order, and a shard appears under its name when it is complete. The .idx
comes last; a run that finds it, made with the same settings, keeps the shard and goes on behind it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from .encoder import Condition, Encoded, Encoder, Views, find_tokens, find_view, guess_views
from .image import ImageError, open_image
from .pool import map_ordered
from .recordfile import RecordWriter, beside, split_path
from .recordio import CHECKSUM, SCHEMA, RecordError, RecordSet
from .sources import Row, Source
from .tokenizer import CLIP_BPE, make_tokenizer

log = logging.getLogger(__name__)

GUESS = 100  # rows looked at to find out which views there are
EXAMPLES = 10  # skipped rows and bad records that a message names
ENDINGS = (".idx", ".rec", ".json")


@dataclass
class Counts:
    """Rows read, by what became of them. `fallbacks` counts views that took the raw text."""

    rows: int = 0
    count: int = 0
    reencoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def filtered(self) -> int:
        """Rows that the conditions left out."""
        return self.rows - self.count - self.skipped.total()

    def note(self, encoded: Encoded) -> None:
        """Count one row that was not left out."""
        if encoded.problem:
            self.skipped[encoded.problem] += 1
        else:
            self.count += 1
            self.reencoded += encoded.reencoded
            self.fallbacks.update(encoded.fallbacks)

    def add(self, other: Counts) -> None:
        """Sum up."""
        for item in ("rows", "count", "reencoded"):
            setattr(self, item, getattr(self, item) + getattr(other, item))
        self.skipped.update(other.skipped)
        self.fallbacks.update(other.fallbacks)

    def to_json(self) -> dict:
        """As it stands in the .json of a shard."""
        sums = {
            "skipped": dict(sorted(self.skipped.items())),
            "fallbacks": dict(sorted(self.fallbacks.items())),
        }
        return {"count": self.count, "rows": self.rows, "reencoded": self.reencoded, **sums}

    @classmethod
    def from_json(cls, side: dict) -> Counts:
        """The inverse of to_json."""
        sums = Counter(side["skipped"]), Counter(side["fallbacks"])
        return cls(side["rows"], side["count"], side["reencoded"], *sums)


@dataclass
class BuildReport:
    """What a build did; `examples` names the first skipped rows, `kept` counts files of an earlier run."""

    views: tuple[str, ...]
    shards: list[Path] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    examples: list[str] = field(default_factory=list)
    kept: int = 0
    verified: int = 0
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of records."""
        return self.counts.count

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> rows."""
        return dict(self.counts.skipped)

    @property
    def fallbacks(self) -> dict[str, int]:
        """View -> records in which it took the raw text."""
        return dict(self.counts.fallbacks)

    def __str__(self) -> str:
        counts = self.counts
        lines = [f"{counts.count} records with views {', '.join(self.views)} in {len(self.shards)} file(s)"]
        lines += [f"  {shard}" for shard in self.shards[:3]] + ["  ..."] * (len(self.shards) > 3)
        left_out, skipped = counts.filtered, counts.skipped.total()
        lines.append(f"{counts.rows} rows read, {left_out} left out by --where, {skipped} skipped")
        lines += [f"  {reason}: {n}" for reason, n in sorted(counts.skipped.items())]
        lines += [f"    {example}" for example in self.examples]
        lines += [f"no {view} text, raw taken instead: {n}" for view, n in sorted(counts.fallbacks.items())]
        if counts.reencoded:
            lines.append(f"{counts.reencoded} pictures encoded anew as JPEG, the others kept byte for byte")
        if self.kept:
            lines.append(f"{self.kept} file(s) were complete already and kept")
        if self.verified:
            lines.append(f"{self.verified} records read back and decoded without error")
        return "\n".join([*lines, f"{self.seconds:.1f} s"])


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
) -> BuildReport:
    """Images + captions -> PREFIX.rec/.idx/.json. ValueError: bad settings, damaged input, nothing to write.

    Args:
        source: manifest (.jsonl .json .csv .tsv), webdataset .tar, .parquet, .npy of token ids; a folder,
            glob, shard-{000..011}.tar range or comma list of these.
        prefix: output name; PREFIX.rec, or PREFIX-00000.rec and so on with --shard-size.
        images: folder of the images (default: that of the manifest, or images/ in it); for an .npy the file
            that lists the images in order.
        views: texts of a record, raw first: NAME, NAME=FIELD or FIELD.NUMBER, for example raw=caption
            synthetic=blip, or captions.0 captions.1 captions.2. Default: raw, synthetic, generated as far as
            the first rows have them; raw is also found as caption, captions, text or txt.
        where: rows to take, for example split=train or license!=unknown; all must hold.
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
    """
    began = time.monotonic()
    _check_numbers(context=context, quality=quality, workers=workers, shard_size=shard_size, max_side=max_side)
    rows = Source(source, images)
    conditions = [Condition.parse(text) for text in where]
    sample = _first(rows, conditions)
    chosen = Views.parse(views) if views else guess_views(sample, token_field, context)
    if not any(find_tokens(row.fields, token_field) is not None for row in sample):
        _check_views(chosen, sample)
    folder = Path(images) if images and rows.kind != "npy" else None
    encoder = Encoder(chosen, tokenizer, context, folder, image_field, token_field, max_side=max_side, quality=quality)
    report = Build(rows, conditions, encoder, split_path(prefix), shard_size).run(workers, overwrite)
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


def _check_views(views: Views, sample: list[Row]) -> None:
    """ValueError for a text that no row has: all records would hold the raw one in its place."""
    for name, path in list(zip(views.names, views.fields))[1:]:
        if sample and not any(find_view(row.fields, path) for row in sample):
            there = ", ".join(dict.fromkeys(str(key) for row in sample for key in row.fields))
            raise ValueError(
                f"views: none of the first {len(sample)} rows has a text {path!r}; they have {there}; say where it "
                f"is, {name}=FIELD, or leave {name} out"
            )


def _first(source: Source, conditions: list[Condition]) -> list[Row]:
    rows = (row for row in source.rows() if all(condition(row) for condition in conditions))
    return list(islice(rows, GUESS))


class Build:
    """One build: the shards, one after the other, and the counts."""

    def __init__(self, source: Source, where: list[Condition], encoder: Encoder, prefix: Path, size: int):
        self.source, self.where, self.encoder = source, where, encoder
        self.prefix, self.size = prefix, size
        self.heading = {
            "schema": SCHEMA,
            "views": list(encoder.views.names),
            "fields": list(encoder.views.fields),
            "context": encoder.context,
            "tokenizer": encoder.tokenizer,
            "vocab_size": make_tokenizer(encoder.tokenizer, encoder.context).vocab_size,
            "checksum": CHECKSUM,
            "digest": self._digest(),
        }
        self.report = BuildReport(encoder.views.names)
        self._numbers: deque[int] = deque()  # of the rows that are being encoded
        self._read = 0

    def run(self, workers: int, overwrite: bool) -> BuildReport:
        """Write what is missing. ValueError if files made otherwise are in the way, or no row was usable."""
        report = self.report
        if self._keep_finished(overwrite):
            return report
        with tqdm(total=self.source.count(), unit="row", disable=None, desc=self.prefix.name) as bar:
            self._write_shards(map_ordered(self.encoder, self._select(bar), workers))
        if not report.count:
            reasons = [f"{reason}: {n}" for reason, n in report.skipped.items()] or ["no row was selected"]
            raise ValueError(
                f"{self.prefix}: none of {report.counts.rows} rows became a record "
                f"({', '.join(reasons)}) {'; '.join(report.examples[:3])}"
            )
        if self.size:
            shards = [split_path(shard).name for shard in report.shards]
            summary = {**self.heading, "shards": shards, **report.counts.to_json()}
            _write_json(beside(self.prefix, ".json"), summary)
        return report

    def _digest(self) -> str:
        """SHA-256 of everything that decides about the bytes of the output."""
        encoder = {key: value for key, value in asdict(self.encoder).items() if key != "images"}
        where = [asdict(condition) for condition in self.where]
        parts = [SCHEMA, self.source.fingerprint(), encoder, where, self.size]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _name(self, number: int) -> Path:
        return beside(self.prefix, f"-{number:05d}") if self.size else self.prefix

    def _keep_finished(self, overwrite: bool) -> bool:
        """Count in the shards that an earlier run finished; True if nothing is left to do."""
        report, kept, complete = self.report, set(), False
        while not complete and (side := self._finished(self._name(len(report.shards)))):
            name = self._name(len(report.shards))
            kept |= {beside(name, ending) for ending in ENDINGS}
            report.shards.append(beside(name, ".rec"))
            report.counts.add(Counts.from_json(side))
            complete = not self.size
        summary = self._ours(self.prefix)
        if self.size and summary and len(summary.get("shards", ())) == len(report.shards):
            kept.add(beside(self.prefix, ".json"))
            report.counts, complete = Counts.from_json(summary), True
        report.kept = len(report.shards)
        self._clear(kept, overwrite)
        return complete

    def _ours(self, name: Path) -> dict | None:
        """The .json of `name` if it is of this build."""
        try:
            side = json.loads(beside(name, ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return side if isinstance(side, dict) and side.get("digest") == self.heading["digest"] else None

    def _finished(self, name: Path) -> dict | None:
        """The .json of a shard of this build that is complete: the .idx is published last."""
        return self._ours(name) if all(beside(name, ending).is_file() for ending in ENDINGS) else None

    def _clear(self, kept: set[Path], overwrite: bool) -> None:
        """Make room: what this build left unfinished goes, other files only if the user says so."""
        shards = self.prefix.parent.glob(glob.escape(self.prefix.name) + "-[0-9][0-9][0-9][0-9][0-9].*")
        for name in sorted({self.prefix, *(shard.with_suffix("") for shard in shards)}):
            files = [file for ending in ENDINGS if (file := beside(name, ending)).exists() and file not in kept]
            if files and not overwrite and not self._ours(name):
                raise ValueError(
                    f"{files[0]}: exists, but is not of this build (other input, other settings or another "
                    f"program); give --overwrite to replace it, or another prefix"
                )
            for file in files:
                file.unlink()

    def _select(self, bar: tqdm) -> Iterator[Row]:
        self._read = self.report.counts.rows
        bar.update(self._read)
        for row in self.source.rows(self._read):
            self._read += 1
            bar.update()
            if all(condition(row) for condition in self.where):
                self._numbers.append(self._read)
                yield row

    def _write_shards(self, results: Iterable[Encoded]) -> None:
        writer, counts, start = None, Counts(), self.report.counts.rows
        try:
            for encoded in results:
                stop = self._numbers.popleft()  # rows up to and with this one
                counts.note(encoded)
                if encoded.problem:
                    self._tell(encoded)
                    continue
                if writer is None:
                    writer = RecordWriter(self._name(len(self.report.shards)))
                writer.write(len(writer), encoded.pack(len(writer)))
                if len(writer) == self.size:
                    counts.rows = stop - start
                    self._finish(writer, counts)
                    writer, counts, start = None, Counts(), stop
            counts.rows = self._read - start
            if writer is not None:
                self._finish(writer, counts)
            else:  # rows behind the last full shard
                self.report.counts.add(counts)
        except BaseException:
            if writer is not None:
                writer.discard()
            raise

    def _tell(self, encoded: Encoded) -> None:
        log.info("skipped %s: %s", encoded.name, encoded.problem)
        if len(self.report.examples) < EXAMPLES:
            self.report.examples.append(f"{encoded.name}: {encoded.problem}")

    def _finish(self, writer: RecordWriter, counts: Counts) -> None:
        _write_json(beside(writer.prefix, ".json"), {**self.heading, **counts.to_json()})
        writer.close()
        self.report.shards.append(beside(writer.prefix, ".rec"))
        self.report.counts.add(counts)


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
