"""Builds the LMDB folders that Chinese-CLIP's own readers and ours read.

    python -m rwkv_clip.data.lmdb --data_dir FOLDER --splits train,valid

FOLDER has {split}_imgs.tsv and {split}_texts.jsonl; LMDB_DIR/{split}/imgs and pairs appear when they are complete.
The same command again goes on where an interrupted one stopped, and keeps splits that are finished.

Keys and values are those of the released builder, byte for byte; lines that are of no use are left out and counted.
NOTE(parity): where an id comes twice in a TSV the later picture counts, as released, but num_images is the number of
images that are there. The released builder writes the number of lines, at which the released reader of images fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ..errors import INTERRUPTED, STOPPED, run_command
from ..files import hold, parse_json, read_bytes, sync_folder, write_json
from .chinese_clip import (
    IMAGES_ENDING,
    LARGE,
    NO_BASE64,
    NO_COLUMNS,
    NO_ID,
    NO_PICTURE,
    TEXTS_ENDING,
    read_images,
    read_texts,
)
from .lmdb import IMAGES, SAMPLES, Store
from .pair_pickle import write_pair
from .rows import SourceError
from .sources import fingerprint

NOTE = "rwkv_clip.json"  # beside imgs and pairs: what a split was made of
SCHEMA = 1
PROGRESS = b"rwkv_clip_progress"  # in an `imgs` that is being written: how far it is, with every commit
COMMIT = 1 << 26  # bytes between two commits
COMMIT_LINES = 1000
EXAMPLES = 10  # lines that the report names

TWICE = "an image id comes twice; the later picture counts"
TEXT_TWICE = "a text_id comes twice; both texts are kept, but evaluation cannot tell them apart"
UNPAIRED = "an image id of a text is not in the TSV, or its picture is of no use"
SAME = "an image id comes twice in one text"
NO_IMAGES = "texts without image_ids, as hidden test sets have them"
LONG = "the text is longer than 63 KiB"
IMAGE_FAULTS = (NO_COLUMNS, NO_ID, NO_BASE64, NO_PICTURE, LARGE)


@dataclass(frozen=True)
class LmdbSettings:
    """What is built.

    Args:
        data_dir: folder with {split}_imgs.tsv and {split}_texts.jsonl.
        splits: names of the splits, separated by commas: train,valid,test.
        lmdb_dir: folder for the result; default: lmdb in data_dir.
        max_bad_fraction: lines of a file that may be of no use before the build ends with an error.
        overwrite: replace splits that were made from other files, or by another program.
    """

    data_dir: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    splits: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")]
    lmdb_dir: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    max_bad_fraction: float = 0.5
    overwrite: bool = False


@dataclass
class SplitReport:
    """What became of the lines of a split. remarks: what was left out or is unusual -> how often."""

    name: str
    images: int = 0
    pairs: int = 0
    lines: int = 0
    texts: int = 0
    remarks: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    kept: bool = False

    def remark(self, what: str, where: str) -> None:
        """Count a line of which something has to be said; the first ones are named."""
        self.remarks[what] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {what}")

    def __str__(self) -> str:
        how = "is complete, kept" if self.kept else f"from {self.lines:,} pictures and {self.texts:,} texts"
        lines = [f"{self.name}: {self.images:,} images and {self.pairs:,} pairs ({how})"]
        lines += [f"  {count:,} x {what}" for what, count in sorted(self.remarks.items())]
        return "\n".join(lines + [f"  e.g. {example}" for example in self.examples])


def build_lmdb(settings: LmdbSettings) -> Iterator[SplitReport]:
    """Build one split after the other, and yield its report.

    ValueError: bad settings, files that are in the way. SourceError: files that are not there, or too bad. InUse.
    OSError.
    """
    names = list(dict.fromkeys(name.strip() for name in settings.splits.split(",") if name.strip()))
    source = Path(settings.data_dir)
    target = Path(settings.lmdb_dir) if settings.lmdb_dir else source / "lmdb"
    if not names:
        raise ValueError(f"--splits: {settings.splits!r} names no split; give names such as train,valid")
    if wrong := [name for name in names if Path(name).name != name or name in (".", "..")]:
        raise ValueError(f"--splits: {wrong[0]!r} is not the name of a split, but leads elsewhere")
    if not 0 <= settings.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction: {settings.max_bad_fraction} is not from 0 to 1")
    for name in names:  # before any of them is built
        for file in (source / f"{name}{ending}" for ending in (IMAGES_ENDING, TEXTS_ENDING)):
            if not file.is_file():
                raise SourceError(f"{file}: no such file; a split has NAME{IMAGES_ENDING} and NAME{TEXTS_ENDING}")
    for name in names:
        with hold(target / f".{name}.lock", str(target / name), "wait until it has ended, or give another --lmdb_dir"):
            yield _Builder(source, target, name, settings).build()


class _Builder:
    """One split. What is unfinished lies in NAME.part; a note in it says that it is whole."""

    def __init__(self, source: Path, target: Path, name: str, settings: LmdbSettings):
        self.images, self.texts = source / f"{name}{IMAGES_ENDING}", source / f"{name}{TEXTS_ENDING}"
        self.place, self.part, self.old = (target / f"{name}{ending}" for ending in ("", ".part", ".old"))
        self.settings, self.report = settings, SplitReport(name)
        self.made_of = [SCHEMA, fingerprint(self.images), fingerprint(self.texts)]

    def build(self) -> SplitReport:
        if self.place.exists() and not self._keep(self.place) and not self.settings.overwrite:
            raise ValueError(f"{self.place}: {self._explain()}; give --overwrite to replace it, or another --lmdb_dir")
        if self.report.kept:
            return self.report
        if not self._keep(self.part):
            self._write()
        self.report.kept = False
        self._publish()
        return self.report

    def _keep(self, folder: Path) -> bool:
        """Whether the folder is whole and of these files; then its numbers are reported."""
        note = _read_note(folder)
        if note is None or note.get("made_of") != self.made_of:
            return False
        try:
            self.report = SplitReport(**{**note["report"], "remarks": Counter(note["report"]["remarks"]), "kept": True})
        except (KeyError, TypeError):
            return False
        return all((folder / name / "data.mdb").is_file() for name in ("imgs", "pairs"))

    def _explain(self) -> str:
        if _read_note(self.place) is None:
            return "exists, and was not made by this program"
        return f"was made from other files than {self.images.name} and {self.texts.name} are now"

    def _write(self) -> None:
        """Fill NAME.part. An `imgs` of an earlier run is continued; `pairs` are quick, and begin anew."""
        shutil.rmtree(self.part / "pairs", ignore_errors=True)
        with closing(self._open_images()) as images:
            if images.get(IMAGES) is None:
                self._write_images(images)
            else:  # an earlier run had all of them
                self._restore(images.get(PROGRESS) or b"")
            with closing(Store(self.part / "pairs")) as pairs:
                useless = self._write_pairs(images, pairs)
            self.report.images = len(images) - 2
            self._check(self.images, self.report.lines, sum(self.report.remarks[fault] for fault in IMAGE_FAULTS))
            self._check(self.texts, self.report.texts, useless)
            if not self.report.images:
                raise SourceError(f"{self.images}: holds no picture; give a TSV that does")
            if not self.report.pairs and not self.report.remarks[NO_IMAGES]:  # as a hidden test set has them
                raise SourceError(
                    f"{self.texts}: no text belongs to a picture of {self.images.name}; are the ids the same?"
                )
            images.put([(IMAGES, b"%d" % self.report.images)], removed=[PROGRESS])
        write_json(self.part / NOTE, {"made_of": self.made_of, "report": {**vars(self.report), "kept": True}})

    def _open_images(self) -> Store:
        store = Store(self.part / "imgs")
        state = parse_json(store.get(PROGRESS) or b"null", str(self.part))
        if len(store) and (not isinstance(state, dict) or state.get("made_of") != self.made_of):
            store.close()
            shutil.rmtree(self.part)
            store = Store(self.part / "imgs")
        return store

    def _restore(self, progress: bytes) -> tuple[int, int]:
        """(bytes of the TSV that are done, its lines up to there); the counts up to there are those of the report."""
        state = parse_json(progress or b"null", str(self.part))
        if state is None:
            return 0, 0
        self.report.lines, self.report.examples = state["lines"], state["examples"]
        self.report.remarks = Counter(state["remarks"])
        return state["end"], state["number"]

    def _write_images(self, store: Store) -> None:
        report, waiting, size = self.report, {}, 0
        end, number = self._restore(store.get(PROGRESS) or b"")

        def commit() -> None:
            state = {"made_of": self.made_of, "end": end, "number": number, "lines": report.lines}
            state |= {"examples": report.examples, "remarks": report.remarks}
            store.put([*waiting.items(), (PROGRESS, json.dumps(state).encode())])
            waiting.clear()

        with tqdm(total=self.images.stat().st_size, initial=end, unit="B", unit_scale=True, disable=None) as bar:
            for line in read_images(self.images, end, number):
                bar.update(line.end - end)
                end, number, report.lines = line.end, line.number, report.lines + 1
                where = f"{self.images.name} line {number}"
                if line.problem:
                    report.remark(line.problem, where)
                    continue
                if line.image_id in waiting or store.has(line.image_id):
                    report.remark(TWICE, where)
                waiting[line.image_id] = line.encoded
                size += len(line.encoded)
                if size > COMMIT or len(waiting) >= COMMIT_LINES:
                    commit()
                    size = 0
            commit()
        # With the number of images all of them are there. Its value is written anew in the end.
        store.put([(IMAGES, b"0")])

    def _write_pairs(self, images: Store, pairs: Store) -> int:
        """Number of texts that are of no use, of which no pair was made though they should have one."""
        report, waiting, seen, useless = self.report, [], set(), 0
        with tqdm(unit="text", disable=None) as bar:
            for line in read_texts(self.texts):
                bar.update()
                report.texts += 1
                where = f"{self.texts.name} line {line.number}"
                if line.problem:
                    report.remark(line.problem, where)
                    useless += 1
                    continue
                before = report.pairs
                if line.text_id in seen:
                    report.remark(TEXT_TWICE, where)
                seen.add(line.text_id)
                if not line.image_ids:
                    report.remark(NO_IMAGES, where)
                for image_id in self._find_images(line.image_ids, images, where):
                    try:
                        value = write_pair(image_id, line.text_id, line.text)
                    except ValueError:
                        report.remark(LONG, where)
                        break
                    waiting.append((b"%d" % report.pairs, value))
                    report.pairs += 1
                useless += bool(line.image_ids) and report.pairs == before
                if len(waiting) >= 5 * COMMIT_LINES:
                    pairs.put(waiting)
                    waiting.clear()
            pairs.put([*waiting, (SAMPLES, b"%d" % report.pairs)])
        return useless

    def _find_images(self, image_ids: tuple[int, ...], images: Store, where: str) -> Iterator[int]:
        """Those that are there, each once."""
        for place, image_id in enumerate(image_ids):
            if image_id in image_ids[:place]:
                self.report.remark(SAME, where)
            elif images.has(b"%d" % image_id):
                yield image_id
            else:
                self.report.remark(UNPAIRED, f"{where}, image {image_id}")

    def _check(self, file: Path, lines: int, bad: int) -> None:
        """SourceError where more lines of a file were of no use than may be."""
        if bad > self.settings.max_bad_fraction * lines:
            raise SourceError(
                f"{file}: {bad:,} of {lines:,} lines are of no use, more than --max-bad-fraction "
                f"{self.settings.max_bad_fraction}: {'; '.join(self.report.examples[:3])}; repair them, or allow more"
            )

    def _publish(self) -> None:
        """Give the folder its name. A death in between leaves NAME.part whole, and the next run goes on here."""
        shutil.rmtree(self.old, ignore_errors=True)
        if self.place.exists():
            os.replace(self.place, self.old)
        os.replace(self.part, self.place)
        sync_folder(self.place.parent)
        shutil.rmtree(self.old, ignore_errors=True)


def _read_note(folder: Path) -> dict | None:
    try:
        note = parse_json(read_bytes(folder / NOTE, 1 << 20), str(folder))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


# ---- command line ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Read the command line and build; returns the exit code."""
    return run_command(_command, "lmdb")


def _command() -> int:
    settings = tyro.cli(LmdbSettings, prog="rwkv_clip.data.lmdb", description=__doc__)
    signal.signal(signal.SIGTERM, _stop)
    try:
        for report in build_lmdb(settings):
            print(report, flush=True)
    except KeyboardInterrupt as stopped:
        print("lmdb: stopped; run the same command again to go on", file=sys.stderr)
        return STOPPED if stopped.args else INTERRUPTED
    return 0


def _stop(number: int, _) -> None:
    raise KeyboardInterrupt(number)
