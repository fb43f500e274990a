"""Samples made of several files that share a name, 000.jpg 000.txt 000.json: members of a tar, or files of a folder."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..files import OutsideError, find_below, read_bytes
from .image import MAX_BYTES
from .rows import IMAGE_ENDINGS, MAX_TEXT_BYTES, MISSING, Problem, Row, Skip, load_json
from .tar import Member, Tar

MAX_APART = 1 << 18  # samples without picture or text that are remembered
MAX_FILES = 1000  # of one name

NUMBER = re.compile(r"\d{1,9}", re.ASCII)  # a text of several, x.3.txt

TWICE = Problem("one name twice")
MUCH = Problem("files of one name too many or too large")
SEVERAL = Problem("several pictures under one name")
LINKED = Problem("a link that leads out of the folder")
APART = Problem("picture and text of one name lie apart in the tar; sort it by name")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for the system's own use: .ipynb_checkpoints, ._0.jpg, __MACOSX, PaxHeaders."""
    return name == "__MACOSX" or (name.startswith((".", "PaxHeaders")) and name not in (".", ".."))


def is_picture(ending: str) -> bool:
    """Whether the last part of a lower-case ending, jpg or seg.png, is a picture's."""
    return ending.rpartition(".")[2] in IMAGE_ENDINGS


def is_text(ending: str) -> bool:
    """txt, raw.txt, json, caption, text."""
    return ending.endswith("txt") or ending in ("json", "caption", "text")


class Sample:
    """What files of one name hold: x.jpg -> a picture, x.txt -> {"txt": str}, x.raw.txt -> {"raw": str}, x.json -> its
    fields. Others (x.cls) are not read. Where there is no x.txt, x.0.txt, x.1.txt, .. are also one list, "captions"."""

    def __init__(self):
        self.endings: set[str] = set()
        self.fault: Problem | None = None
        self.pictures: dict[str, bytes | Problem] = {}
        self.texts: dict[str, str | Problem] = {}
        self.meta: dict = {}
        self.room = 2 * MAX_BYTES

    def note(self, ending: str) -> int:
        """Register a file of this ending; returns how many bytes of it to read at most, 0 if it is not needed."""
        if ending in self.endings:
            self.fault = TWICE
        elif len(self.endings) == MAX_FILES or not self.room:
            self.fault = MUCH
        else:
            self.endings.add(ending)
            return min(MAX_BYTES if is_picture(ending) else MAX_TEXT_BYTES if is_text(ending) else 0, self.room)
        return 0

    def add(self, ending: str, content: bytes | Problem) -> None:
        """Store what a file of this ending holds, or why it cannot be read."""
        if isinstance(content, bytes):
            self.room -= len(content)
        if is_picture(ending):
            self.pictures[ending] = content
            return
        name = ending.removesuffix(".txt")
        if isinstance(content, Problem):
            self.texts[name] = content
            return
        try:
            if ending != "json":
                self.texts[name] = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
                return
            fields = load_json(content, Path(), "")
            self.meta = fields if isinstance(fields, dict) else {"json": fields}
        except ValueError:
            self.texts[name] = Problem("text is not UTF-8 or JSON")

    def row(self, name: str) -> Row:
        """The row of all files; a file replaces a field of the JSON. The picture is x.jpg; x.mask.png is a field
        only."""
        plain = [content for ending, content in self.pictures.items() if "." not in ending]
        image = MISSING if not plain else plain[0] if len(plain) == 1 else SEVERAL
        fields = {**self.meta, **self.texts, **self.pictures}
        numbered = sorted((int(name), text) for name, text in self.texts.items() if NUMBER.fullmatch(name))
        if numbered and not {"txt", "captions"} & fields.keys():
            fields["captions"] = [text for _, text in numbered]
        return Row(name, fields, None, self.fault or image)

    def lacks(self) -> str | None:
        """picture or text, where it has only the other one."""
        picture, text = any(map(is_picture, self.endings)), any(map(is_text, self.endings))
        return None if picture == text else "text" if picture else "picture"


# ---- webdataset ------------------------------------------------------------------------------------------------------


def read_tar(file: Path, skip: Skip) -> Iterator[Row]:
    """webdataset: neighbouring members that share the name up to the first dot are one row."""
    with open(file, "rb") as raw:
        tar = Tar(file, raw)
        key, sample, passing = None, Sample(), False
        lacking: dict[int, str] = {}
        for member in tar:
            here, ending = split_name(member.name)
            if not here or member.kind == "folder":
                continue
            if here != key:
                if key is not None and not passing:
                    yield finish(file, key, sample, is_apart(key, sample, lacking))
                elif key is not None:
                    is_apart(key, sample, lacking)
                key, sample, passing = here, Sample(), skip()
            if most := sample.note(ending) * (not passing):
                add_member(sample, ending, tar, member, most)
        if key is not None and not passing:
            yield finish(file, key, sample, is_apart(key, sample, lacking))


def add_member(sample: Sample, ending: str, tar: Tar, member: Member, most: int) -> None:
    """Store what the current member of a tar holds, of at most `most` bytes, or why it cannot be read."""
    if member.kind != "file":
        sample.add(ending, Problem("a link in the tar, not a file"))
    elif member.size > most:
        sample.add(ending, Problem("image too large" if is_picture(ending) else "text too long"))
    else:
        sample.add(ending, tar.read(member.size))


def split_name(name: str) -> tuple[str, str]:
    """("a/000", "seg.png") for "./a/000.seg.PNG"; ("", "") for what is hidden or has no ending."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or not ending:
        return "", ""
    if ("/." in name or "__MACOSX" in name or "PaxHeaders" in name or name[0] == ".") and any(
        map(is_hidden, name.split("/"))
    ):
        return "", ""
    return folder + slash + stem, ending.lower()


def finish(file: Path, key: str, sample: Sample, apart: bool) -> Row:
    """The row of a sample in a tar. apart: whether its picture and text lie apart."""
    row = sample.row(f"{file.name} {key}")
    return row._replace(fields={"txt": APART, **row.fields}, image=APART) if apart else row


def is_apart(key: str, sample: Sample, lacking: dict[int, str]) -> bool:
    """Whether an earlier sample of this name has what this one lacks."""
    lacks = sample.lacks()
    if lacks is None:
        return False
    before = lacking.get(hash(key))
    if before is None and len(lacking) < MAX_APART:
        lacking[hash(key)] = lacks
    return before is not None and before != lacks


# ---- folders of files ------------------------------------------------------------------------------------------------


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(path of a folder, sorted names of its files) of `folder` and all below it, in order; nothing hidden, linked
    folders once."""
    seen = set()
    waiting = [str(folder)]
    while waiting:
        place = waiting.pop()
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(place) as entries:
            visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
        # An entry knows what it is without being asked, but of a link in a circle it raises; os.path says no.
        folders = [os.path.isdir(e) if e.is_symlink() else e.is_dir() for e in visible]
        files = [os.path.isfile(e) if e.is_symlink() else e.is_file() for e in visible]
        waiting += [entry.path for entry, is_it in zip(reversed(visible), reversed(folders)) if is_it]
        yield place, [entry.name for entry, is_it in zip(visible, files) if is_it]


def group_files(names: list[str]) -> dict[str, list[tuple[str, str]]]:
    """{stem: [(ending, file name)]} of the pictures and texts among the names of one folder.

    A picture's stem is its name without the last ending; a text's is that of a picture, else the name up to .txt.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    texts = []
    for name in names:
        stem, _, ending = name.rpartition(".")
        ending = ending.lower()
        if stem and is_picture(ending):
            groups.setdefault(stem, []).append((ending, name))
        elif stem and is_text(ending) and not name.endswith("_stats.json"):  # img2dataset's, about a whole shard
            texts.append((stem, ending, name))
    pictures = set(groups)
    for stem, ending, name in texts:
        shorter, _, text = stem.rpartition(".")
        if stem not in pictures and ending == "txt" and shorter in pictures:  # 000.raw.txt beside 000.jpg
            stem, ending = shorter, f"{text.lower()}.txt"
        groups.setdefault(stem, []).append((ending, name))
    return dict(sorted(groups.items()))


def read_pairs(folder: Path, skip: Skip, outside: bool = False) -> Iterator[Row]:
    """Pictures with texts of the same name beside them; one without the other is a row as well, to be counted.
    Links that lead out of the folder are not followed unless `outside`."""
    for place, names in walk(folder):
        for stem, files in group_files(names).items():
            if skip():
                continue
            sample = Sample()
            for ending, name in files:
                if most := sample.note(ending):
                    sample.add(ending, _read_file(folder, Path(place, name), ending, most, outside))
            inside = os.path.relpath(os.path.join(place, stem), folder)
            yield sample.row(f"{folder.name}/{inside}")


def _read_file(folder: Path, path: Path, ending: str, most: int, outside: bool) -> bytes | Problem:
    try:
        find_below(folder, os.path.relpath(path, folder), outside)
        return read_bytes(path, most)
    except OutsideError:
        return LINKED
    except OSError as error:
        if error.errno == errno.EFBIG:
            return Problem("image too large" if is_picture(ending) else "text too long")
        return Problem(f"file cannot be read ({error.strerror})")
