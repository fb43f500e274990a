"""Parquet files with named, typed columns: the parts of a job and its results. The one place that knows pyarrow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from rwkv_clip.files import DamagedError, naming

KINDS = ("str", "int", "float", "bool", "str list", "float list")
ROWS = 4096  # of a row group, and read at a time


def import_arrow() -> ModuleType:
    """pyarrow with its parquet. ImportError that names the extra."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("describe keeps its rows in Parquet: pip install -e '.[describe]'") from None
    return pyarrow


def make_schema(columns: dict[str, str], metadata: dict[str, str] | None = None) -> Any:
    """The Arrow schema of columns {name: one of KINDS}; every value may be missing."""
    arrow = import_arrow()
    single = {"str": arrow.string(), "int": arrow.int64(), "float": arrow.float64(), "bool": arrow.bool_()}
    kinds = {**single, **{f"{name} list": arrow.list_(single[name]) for name in ("str", "float")}}
    return arrow.schema([(name, kinds[kind]) for name, kind in columns.items()], metadata=metadata)


def write_parquet(
    path: Path,
    columns: dict[str, str],
    batches: Iterable[Sequence[dict[str, Any]]],
    metadata: dict[str, str] | None = None,
) -> int:
    """Write rows, given in batches of dicts, into a file that appears under its name when all of it is on disk.

    columns: {name: one of KINDS}; a column that a row lacks is missing (null) there; others of its fields are left out.
    Returns the number of rows. OSError when it cannot be written.
    """
    arrow = import_arrow()
    schema = make_schema(columns, metadata)
    part, count = path.with_name(f"{path.name}.{os.getpid()}.part"), 0
    try:
        with naming(path), open(part, "wb") as file:
            with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                for rows in _regroup(batches):
                    writer.write_table(_make_table(arrow, schema, rows))
                    count += len(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _regroup(batches: Iterable[Sequence[dict]]) -> Iterator[list[dict]]:
    """Batches of at least ROWS rows, so that a file does not depend on how its rows came."""
    rows: list[dict] = []
    for row in chain.from_iterable(batches):
        rows.append(row)
        if len(rows) == ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def _make_table(arrow: ModuleType, schema: Any, rows: list[dict]) -> Any:
    columns = {field.name: [row.get(field.name) for row in rows] for field in schema}
    try:
        return arrow.Table.from_pydict(columns, schema)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return arrow.Table.from_pydict({name: _repair(values) for name, values in columns.items()}, schema)


def _repair(value: Any) -> Any:
    if isinstance(value, list):
        return [_repair(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a file that `write_parquet` wrote, in order, ROWS at a time. DamagedError names the file."""
    with _open(path) as file:
        with _explaining(path):
            batches = file.iter_batches(ROWS, columns=list(columns) if columns is not None else None)
        while True:
            with _explaining(path):
                batch = next(batches, None)
                if batch is None:
                    return
                lists = [column.to_pylist() for column in batch.columns]
                names = batch.schema.names
            for values in zip(*lists) if lists else [()] * batch.num_rows:
                yield dict(zip(names, values))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_parquet` was given as metadata. DamagedError names the file."""
    with _open(path) as file:
        found = file.schema_arrow.metadata or {}
        return {key.decode(): value.decode("utf-8", "replace") for key, value in found.items()}


def count_rows(path: Path) -> int:
    """Number of rows. DamagedError names the file."""
    with _open(path) as file:
        return file.metadata.num_rows


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    arrow = import_arrow()
    with open(path, "rb") as stream:
        with _explaining(path):
            file = arrow.parquet.ParquetFile(stream)
        yield file


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    arrow = import_arrow()
    try:
        yield
    except (arrow.ArrowException, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedError(
            f"{path}: not a whole Parquet file ({reason}); remove it, and the same command makes it anew"
        ) from None
