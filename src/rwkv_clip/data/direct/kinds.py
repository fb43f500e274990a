"""Which data a spec names, and their tables: told by endings and folders, or by what the user says they are."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable

from ...files import allow_open_files
from ...tokenizer import Tokenizer
from ..records import split_names
from ..rows import SourceError
from ..sources import Source, expand_braces
from .arrow_rows import ArrowTable, list_saved
from .direct_set import DirectSet, Table
from .lines import LineTable
from .parquet_table import ParquetTable
from .reading import KINDS, SEPARATORS, Reading
from .storage import Stored, expand_url, is_url
from .tar_table import TarTable

ENDINGS = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "webdataset": (".tar",),
}
FILE = "file://"  # before the path of a file that is here
OWN_NAMES = {"tar": "webdataset"}  # of kinds that `sources` names otherwise


def open_direct(spec: str | list[str], tokenizer: Tokenizer, reading: Reading) -> DirectSet:
    """The records in the files that `spec` names. ValueError, SourceError; ImportError that names an extra."""
    names = [spec] if isinstance(spec, str) else spec
    found = [item for name in names for item in find_files(name, reading.kind)]
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        shown = ", ".join(f"{kind} ({next(name for k, name in found if k == kind)})" for kind in sorted(kinds))
        raise ValueError(f"train_data: {spec!r} holds {shown}; give files of one kind, or say --dataset-type")
    allow_open_files(len(found))
    make = _openers(reading)[kinds.pop()]
    return DirectSet([make(Stored(name)) for _, name in found], tokenizer, reading)


def _openers(reading: Reading) -> dict[str, Callable[[Stored], Table]]:
    separator = SEPARATORS.get(reading.separator or "", reading.separator)
    return {
        "csv": lambda stored: LineTable(stored, separator, json=False),
        "jsonl": lambda stored: LineTable(stored),
        "webdataset": lambda stored: TarTable(stored, reading.index),
        "parquet": lambda stored: ParquetTable(stored, reading.index),
        "datasets": ArrowTable,
    }


def names_direct(spec: str | list[str]) -> bool:
    """Whether these are data that are read directly, by their endings or what a folder holds; no file is opened."""
    names = [spec] if isinstance(spec, str) else spec
    try:
        return any(map(is_url, names)) or all(find_files(name, "auto") for name in names)
    except SourceError:
        raise
    except ValueError as error:
        if any(name.lower().endswith(ending) for name in names for endings in ENDINGS.values() for ending in endings):
            raise ValueError(str(error).replace("source:", "train_data:", 1)) from None
        return False
    except OSError:
        return False


def find_files(spec: str, kind: str) -> list[tuple[str, str]]:
    """(kind, path or URL) of every file that a spec names: file, folder, glob, URL, a{00..09}.tar range or comma list;
    of `datasets` every folder. ValueError; [] where these are data of another kind and `kind` is "auto"."""
    spec = spec.replace(FILE, "")
    if is_url(spec):
        pieces = spec.split(",") if all(map(is_url, spec.split(","))) else [spec]
        names = [url for piece in pieces for brace in expand_braces(piece) for url in expand_url(brace)]
        return [(_kind_of(name, kind), name) for name in names]
    names = split_names(spec, os.path.exists)
    if kind == "datasets" or any(map(is_saved, names)):
        return [("datasets", file) for name in names for file in list_saved(name)]
    if kind != "auto" and os.path.isfile(spec):
        return [(kind, spec)]
    if kind == "auto" and any(glob.glob(os.path.join(glob.escape(name), "*.rec")) for name in names):
        return []
    source = Source(spec)
    found = [(OWN_NAMES.get(source.kind, source.kind), str(file)) for file in source.files]
    if kind not in ("auto", found[0][0]):
        raise ValueError(f"dataset_type: {kind}, but {found[0][1]} is {found[0][0]}; name other data, or leave it out")
    return found if found[0][0] in KINDS else []


def is_saved(name: str) -> bool:
    """Whether `datasets` saved a folder, or several parts in one."""
    return any(os.path.isfile(os.path.join(name, mark)) for mark in ("state.json", "dataset_dict.json"))


def _kind_of(name: str, kind: str) -> str:
    found = next((one for one, endings in ENDINGS.items() if name.lower().endswith(endings)), None)
    if kind != "auto":
        return kind
    if found is None:
        raise ValueError(f"{name}: not a known kind of data; say --dataset-type {'|'.join(KINDS)}")
    return found
