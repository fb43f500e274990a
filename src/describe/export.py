"""The result of a job as files: Parquet for `data2rec.py`, JSON lines, webdataset tars. The three texts stay apart.

Every file is written whole or not at all; `export.json` is written last, so it marks a finished export. A text that
is missing is null: `data2rec.py` takes the raw one in its place, and counts that.
"""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal

from rwkv_clip.config import ranged
from rwkv_clip.data.image import ImageError
from rwkv_clip.data.sources import Source
from rwkv_clip.errors import DATA
from rwkv_clip.files import write_json, write_whole

from .parquet import write_parquet
from .pictures import PictureReader, PictureSettings, encode_upright
from .select import TEXTS, Selection

Row = dict[str, Any]
Read = Callable[[], Iterator[Row]]  # the merged rows of a job, from the first one, as often as it is called
COLUMNS = ("id", "image", *TEXTS, "engine", "license", "url")
PARQUET, JSONL, TARS, DONE = "texts.parquet", "texts.jsonl", "webdataset", "export.json"
LENGTH = "__len__"  # without an ending, so that the folder holds tars only for `data2rec.py`
BATCH = 1024
_TAR = re.compile(r"\d{5,}\.tar")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written."""

    to: tuple[Literal["parquet", "jsonl", "webdataset"], ...] = ("parquet",)
    """Files to write: texts.parquet, texts.jsonl, and webdataset/00000.tar with the pictures."""
    raw: Literal["found", "clean"] = "found"
    """The raw text as it was found, or without what cleaning took out."""
    txt: Literal["raw", "synthetic", "generated"] = "generated"
    """The text in a tar's .txt, for programs that read one; its .json has all three."""
    shard_size: int = ranged(10_000, minimum=1)
    """Pictures per tar."""

    def problems(self) -> list[str]:
        """Nothing to write."""
        return [] if self.to else ["to: nothing to write; give parquet, jsonl or webdataset"]


class ExportError(ValueError):
    """The rows were not the same ones twice."""

    exit_code = DATA


@dataclass
class ExportReport:
    """What became of the rows: rows = written + all of `dropped`.

    missing: texts, and names of pictures, that are null. left_out: rows that are written, but in no tar, by reason.
    """

    rows: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    in_tars: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    next: str = ""

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows: {self.written:,} written, {self.dropped.total():,} dropped{_list(self.dropped)}"]
        if self.missing:
            lines.append(f"missing (null):{_list(self.missing)}")
        if self.engines:
            lines.append(f"written by:{_list(self.engines)}")
        if self.in_tars or self.left_out:
            lines.append(f"{self.in_tars:,} in tars, {self.left_out.total():,} not{_list(self.left_out)}")
        return "\n".join([*lines, *self.files, *([self.next] if self.next else [])])

    def to_json(self) -> dict[str, Any]:
        """As export.json has it."""
        return {**vars(self), **{name: dict(value) for name, value in vars(self).items() if isinstance(value, Counter)}}


def _list(counts: Counter[str]) -> str:
    return "".join(f"\n  {count:>9,} {name}" for name, count in counts.most_common())


def export(
    read: Read,
    output: Path,
    settings: ExportSettings,
    selection: Selection,
    source: Source | None = None,
    pictures: PictureSettings | None = None,
    about: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write the rows that `selection` keeps into the folder `output`; returns and records what became of all rows.

    read: is called for each kind of file. source, pictures: for tars, what the job's rows were read from. about: goes
    into the Parquet file's metadata. ConfigError and ValueError for settings, OSError when a file cannot be written.
    """
    if "webdataset" in settings.to and source is None:
        raise ValueError("to: webdataset needs the source of the rows, for their pictures; give the job's input")
    output.mkdir(parents=True, exist_ok=True)
    (output / DONE).unlink(missing_ok=True)
    reports: list[ExportReport] = []
    files = []
    for kind in dict.fromkeys(settings.to):
        reports.append(report := ExportReport())
        kept = _keep(read(), settings, selection, report)
        if kind == "parquet":
            write_parquet(output / PARQUET, dict.fromkeys(COLUMNS, "str"), _batch(kept), dict(about or {}))
            files.append(str(output / PARQUET))
        elif kind == "jsonl":
            write_whole(output / JSONL, (_to_line(record) + b"\n" for _, record in kept))
            files.append(str(output / JSONL))
        elif source is not None:
            samples = _take_pictures(kept, source, pictures or PictureSettings(), settings, report)
            files += _write_tars(output / TARS, samples, settings.shard_size)
    report = next((report for report in reports if report.in_tars or report.left_out), reports[0])
    for other in reports:
        if (other.rows, other.written) != (report.rows, report.written):
            raise ExportError(f"{output}: the rows changed while they were written; run the export again, by itself")
    report.files, report.next = files, _say_next(output, settings, pictures, report)
    write_json(output / DONE, report.to_json())
    return report


def _keep(
    rows: Iterable[Row], settings: ExportSettings, selection: Selection, report: ExportReport
) -> Iterator[tuple[Row, Row]]:
    """(row, what is written of it) of the rows that are kept; counts all."""
    for row in rows:
        report.rows += 1
        if reason := selection.judge(row):
            report.dropped[reason] += 1
            continue
        record = _to_record(row, settings)
        report.written += 1
        report.missing.update(name for name in ("image", *TEXTS) if record[name] is None)
        report.engines[record["engine"] or "nothing"] += 1
        yield row, record


def _batch(kept: Iterator[tuple[Row, Row]]) -> Iterator[list[Row]]:
    while batch := [record for _, record in islice(kept, BATCH)]:
        yield batch


def _to_record(row: Row, settings: ExportSettings) -> Row:
    record = {name: row.get(name) for name in COLUMNS}
    for name, column in TEXTS.items():
        record[name] = (row.get(column) or "").strip() or None
    if settings.raw == "clean":
        record["raw"] = (row.get("clean") or "").strip() or None
    return record


def _to_line(record: Row) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")  # half of a surrogate pair becomes "?"


def _say_next(output: Path, settings: ExportSettings, pictures: PictureSettings | None, report: ExportReport) -> str:
    """How records are made of what was written: with the pictures of the folder, or with those in the tars."""
    named, texts = report.missing["image"] < report.written, [t for t in TEXTS if report.missing[t] < report.written]
    if not report.written:
        return "no row is left; see why above"
    if not texts:
        return "no row has a text, so there is nothing to train on; see what `rows:` says above"
    if texts[0] != "raw":  # which stands in for a missing text, so data2rec.py wants one
        texts[0] = f"raw={texts[0]}"
    if "webdataset" in settings.to and not (named and "parquet" in settings.to):
        return f"records: python data2rec.py {shlex.quote(str(output / TARS))} PREFIX --texts {' '.join(texts)}"
    if "parquet" not in settings.to:
        return ""
    if not named and report.written:
        return "records: no row names a picture; if they came with the rows, export --to webdataset, for data2rec.py"
    folder = shlex.quote(pictures.images) if pictures is not None and pictures.images else "FOLDER"
    file = shlex.quote(str(output / PARQUET))
    return f"records: python data2rec.py {file} PREFIX --images {folder} --texts {' '.join(texts)}"


# ---- tars ------------------------------------------------------------------------------------------------------------


def _take_pictures(
    kept: Iterator[tuple[Row, Row]],
    source: Source,
    pictures: PictureSettings,
    settings: ExportSettings,
    report: ExportReport,
) -> Iterator[list[tuple[str, bytes]]]:
    """The members (name, content) of each sample: picture, .json with all that is known, .txt with one text."""
    rows, ahead = tee(kept)
    found = PictureReader(source, pictures).read(row for row, _ in ahead)
    for (row, record), picture in zip(rows, found):
        text = record[settings.txt] or record["raw"]
        try:
            data, ending = encode_upright(picture, pictures.max_side)
        except ImageError as error:
            report.left_out[error.reason] += 1
            continue
        if text is None:
            report.left_out[f"neither {settings.txt} nor raw text"] += 1
            continue
        report.in_tars += 1
        key = f"{row['row']:09d}"
        txt = text.encode("utf-8", "replace")
        yield [(f"{key}.{ending}", data), (f"{key}.json", _to_line(record)), (f"{key}.txt", txt)]


def _write_tars(folder: Path, samples: Iterator[list[tuple[str, bytes]]], size: int) -> list[str]:
    """00000.tar and so on, and __len__ with the number of samples, as open_clip reads it; returns the tars' names.

    Tars of an earlier export that had more of them go.
    """
    folder.mkdir(exist_ok=True)
    sizes: dict[str, int] = {}
    (folder / LENGTH).unlink(missing_ok=True)
    while (first := next(samples, None)) is not None:
        name = f"{len(sizes):05d}.tar"
        sizes[name] = 0
        write_whole(folder / name, _pack(first, samples, size, sizes, name))
    for old in folder.iterdir():
        if _TAR.fullmatch(old.name) and old.name not in sizes:
            old.unlink()
    write_whole(folder / LENGTH, [b"%d\n" % sum(sizes.values())])
    return [str(folder / name) for name in sizes]


def _pack(
    first: list[tuple[str, bytes]],
    more: Iterator[list[tuple[str, bytes]]],
    size: int,
    sizes: dict[str, int],
    name: str,
) -> Iterator[bytes]:
    """The bytes of a tar of at most `size` samples; the same for the same samples, whoever writes them and when."""
    members: list[tuple[str, bytes]] | None = first
    while members is not None:
        for member, content in members:
            header = tarfile.TarInfo(member)
            header.size, header.mode = len(content), 0o644
            yield header.tobuf(tarfile.USTAR_FORMAT)
            yield content + bytes(-len(content) % tarfile.BLOCKSIZE)
        sizes[name] += 1
        members = next(more, None) if sizes[name] < size else None
    yield bytes(2 * tarfile.BLOCKSIZE)
