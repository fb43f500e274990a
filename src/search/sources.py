"""The pictures of whatever holds some, one `Item` after the other, always in the same order.

A folder of pictures needs no texts; what lies beside a picture under its name (.txt, .json) is its text and its fields.
Records, tars, Parquet files and manifests are read as for training. Addresses are not followed.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_clip.data.encode import Encoder, Picture, RowError
from rwkv_clip.data.fields import CAPTION_FIELDS, IMAGE_FIELDS, Choice, Texts, find_field, first_text
from rwkv_clip.data.image import MAX_BYTES
from rwkv_clip.data.records import RecordError, RecordSet, find_record_files
from rwkv_clip.data.rows import MAX_TEXT_BYTES, Problem, Row
from rwkv_clip.data.samples import Sample, group_files, is_picture, walk
from rwkv_clip.data.sources import PAIRS, Source
from rwkv_clip.files import OutsideError, find_below, read_bytes

IDS = ("id", "key", "uid", "image_id")
LINKED = "a link that leads out of the folder"
FOLDER, RECORDS, ROWS = "folder", "records", "rows"


class Item(NamedTuple):
    """A picture of a source, not yet read.

    place: where `Pictures` finds it again; {} where it came inside another file. stamp: what tells a changed picture
    from the same one without reading it (name, bytes, time of change); "" where only its bytes tell. read: gives its
    bytes, or raises RowError with the reason why there are none.
    """

    id: str
    text: str
    fields: dict[str, Any]
    place: dict[str, Any]
    stamp: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class PictureSource:
    """kind: FOLDER, RECORDS or ROWS. roots: folders that names of files start from. records: what `RecordSet` takes.
    outside: names may lead out of their folder. count: of pictures, None where it is not known."""

    kind: str
    items: Callable[[], Iterator[Item]]
    roots: list[Path]
    records: str | None = None
    outside: bool = False
    count: int | None = None


def open_source(
    spec: str, root: str | None = None, image_field: str | None = None, outside: bool = False
) -> PictureSource:
    """The `PictureSource` that `spec` names: a picture, a folder, a glob, records, or any input of the record builder.

    A folder with pictures in it means these, whatever else it holds; one without, the files of the builder's kinds in
    it. root: folder of the pictures that a manifest names, where it is not the manifest's. ValueError where there is
    none.
    """
    if files := _list_pictures(spec):
        names: dict[Path, list[str]] = {}
        for file in files:
            names.setdefault(Path(os.path.abspath(file)).parent, []).append(os.path.basename(file))
        single = _Folder(list(names), outside, names)
        return PictureSource(FOLDER, single.items, single.folders, outside=outside, count=len(files))
    if os.path.isdir(spec) and (count := (folder_source := _Folder([Path(spec).absolute()], outside)).count()):
        return PictureSource(FOLDER, folder_source.items, folder_source.folders, outside=outside, count=count)
    if _names_records(spec):
        records = RecordSet(os.path.abspath(spec) if os.path.exists(spec) else spec)
        spec = os.path.abspath(spec)
        return PictureSource(RECORDS, lambda: _record_items(records), [], spec, count=len(records))
    source = Source(spec, root, outside, alone=True)
    if source.kind == PAIRS:  # a list of folders
        several = _Folder([file.absolute() for file in source.files], outside)
        return PictureSource(FOLDER, several.items, several.folders, outside=outside, count=several.count())
    rows = _Rows(source, root, image_field, outside)
    return PictureSource(ROWS, rows.items, rows.roots, outside=outside, count=source.count())


def _list_pictures(spec: str) -> list[str]:
    """Files of pictures that a name or a glob means, sorted; [] where it means anything else."""
    files = [spec] if os.path.exists(spec) or not glob.has_magic(spec) else sorted(glob.glob(spec, recursive=True))
    return files if all(os.path.isfile(file) and _is_picture(file) for file in files) else []


def _is_picture(name: str) -> bool:
    return is_picture(name.rpartition(".")[2].lower())


def _names_records(spec: str) -> bool:
    if os.path.isfile(spec) and not spec.endswith(".rec"):
        return False
    try:
        return bool(find_record_files(spec))
    except RecordError:
        raise
    except ValueError:
        return False


# ---- folders ---------------------------------------------------------------------------------------------------------


class _Folder:
    """Every picture file of these folders and those below, nothing hidden; id: the path in its folder. only: those
    files of each folder, and nothing below."""

    def __init__(self, folders: list[Path], outside: bool, only: dict[Path, list[str]] | None = None):
        self.folders, self._outside, self._only = folders, outside, only

    def count(self) -> int:
        """How many files look like pictures."""
        return sum(_is_picture(name) for folder in self.folders for _, names in walk(folder) for name in names)

    def items(self) -> Iterator[Item]:
        """In the order of `walk`, those of a folder by name."""
        for number, folder in enumerate(self.folders):
            for place, names in walk(folder):
                owners = {name: files for files in group_files(names).values() for _, name in files}
                for name in names if self._only is None else self._only[folder]:
                    if name in owners and _is_picture(name):
                        path = Path(place, name)
                        yield self._item(number, folder, path, [pair for pair in owners[name] if pair[1] != name])
                if self._only is not None:
                    break

    def _item(self, number: int, folder: Path, path: Path, others: list[tuple[str, str]]) -> Item:
        name = os.path.relpath(path, folder)
        place = {"file": name} if not number else {"file": name, "root": number}
        stamp = ""
        try:
            find_below(folder, name, self._outside)
            about = os.stat(path)
            stamp = json.dumps([str(path), about.st_size, about.st_mtime_ns])
        except OutsideError:
            return Item(name, "", {}, place, "", _refuse(LINKED))
        except (OSError, ValueError):
            return Item(name, "", {}, place, "", _refuse("unreadable image"))
        sample = Sample()
        for ending, other in others:
            if not is_picture(ending) and (most := sample.note(ending)):
                try:
                    find_below(folder, os.path.relpath(path.with_name(other), folder), self._outside)
                    sample.add(ending, read_bytes(path.with_name(other), min(most, MAX_TEXT_BYTES)))
                except (OSError, ValueError):  # a picture is found without its text
                    continue
        told = {**sample.meta, **sample.texts}
        fields = {name: value for name, value in told.items() if not isinstance(value, Problem)}
        text = find_caption(fields)
        return Item(name, text, _other_fields(fields), place, stamp, Picture(file=path).read)


def _refuse(reason: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise RowError(reason)

    return read


# ---- records ---------------------------------------------------------------------------------------------------------


def _record_items(records: RecordSet) -> Iterator[Item]:
    for number in range(len(records)):
        name = records.name(number)

        def read(number: int = number) -> bytes:
            try:
                return records.sample(number)[0]
            except RecordError:
                raise RowError("damaged record") from None

        yield Item(f"{os.path.basename(name)}", "", {}, {"record": number}, "", read)


# ---- rows of manifests, tars, Parquet --------------------------------------------------------------------------------


class _Rows:
    """Rows as `Source` reads them; rows that name the same file again are left out, their texts with them."""

    def __init__(self, source: Source, root: str | None, image_field: str | None, outside: bool):
        self._source = source
        images = Path(root) if root and source.kind != "npy" else None
        choice = Choice(Texts(("raw",), ("raw",)))  # its texts are not asked for
        self._find = Encoder(choice, images=images, image_field=image_field, allow_outside=outside).find_picture
        folders = [images] if images else [file.parent for file in source.files]
        self.roots = list(dict.fromkeys(folder.absolute() for folder in folders))

    def items(self) -> Iterator[Item]:
        """One for each row, or file that rows name."""
        seen: set[str] = set()
        for row in self._source.rows():
            picture = self._find(row)
            place = self._place(picture)
            if "file" in place:
                if (key := json.dumps(place)) in seen:
                    continue
                seen.add(key)
            fields = {name: value for name, value in row.fields.items() if not isinstance(value, (bytes, Problem))}
            name = next((str(v) for n in IDS if isinstance(v := find_field(row.fields, n), (str, int)) and str(v)), "")
            stamp = ""
            if picture.file is not None:
                shown, size, changed = json.loads(picture.seen)
                name, stamp = name or shown, json.dumps([str(picture.file.absolute()), size, changed])
            yield Item(
                name or row.name, find_caption(fields), _other_fields(fields), place, stamp, self._reader(picture, row)
            )

    def _place(self, picture: Picture) -> dict[str, Any]:
        if picture.file is None:
            return {}
        file = os.path.abspath(picture.file)
        for number, root in enumerate(self.roots):
            inside = os.path.relpath(file, root)
            if not inside.startswith(os.pardir):
                return {"file": inside, "root": number} if number else {"file": inside}
        return {"file": file}

    @staticmethod
    def _reader(picture: Picture, row: Row) -> Callable[[], bytes]:
        if len(picture.data) > MAX_BYTES:
            return _refuse("image too large")
        return picture.read


def find_caption(fields: dict[str, Any]) -> str:
    """The first text of the field that usually holds captions; "" where there is none."""
    for name in CAPTION_FIELDS:
        text = first_text(find_field(fields, name))
        if isinstance(text, str) and not isinstance(text, Problem) and text.strip():
            return text.strip()
    return ""


def _other_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in (*CAPTION_FIELDS, *IMAGE_FIELDS, *IDS)}
