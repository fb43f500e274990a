"""The tiny run's rows in every form that training reads directly."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

TEXTS = ("raw", "synthetic", "generated")
KINDS = ("jsonl", "csv", "tsv", "webdataset", "parquet", "datasets")


def rows_of(folder: Path) -> list[dict]:
    """Of `tiny.make_tiny`."""
    return [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]


def write_tar(path: Path, samples: list[dict]) -> Path:
    """Each sample is {"key": .., ending: bytes or str, ..}."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for ending, content in sample.items():
                if ending != "key":
                    data = content.encode() if isinstance(content, str) else content
                    member = tarfile.TarInfo(f"{sample['key']}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def write_csv(path: Path, rows: list[dict], separator: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)
    return path


def save_kind(kind: str, folder: Path, rows: list[dict], images: Path) -> Path:
    """Write rows {"image": name, text: ..} as a kind, with the pictures of `images` inside or beside."""
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    if kind in ("csv", "tsv"):
        return write_csv(folder / f"rows.{kind}", rows, "," if kind == "csv" else "\t")
    inside = [(images / row["image"]).read_bytes() for row in rows]
    if kind == "webdataset":
        endings = [{f"{name}.txt": text for name, text in row.items() if name != "image"} for row in rows]
        samples = [{"key": f"{i:04}", "jpg": data, **texts} for i, (data, texts) in enumerate(zip(inside, endings))]
        half = len(samples) // 2
        for number, part in enumerate((samples[:half], samples[half:])):
            write_tar(folder / f"rows-{number:03}.tar", part)
        return folder / "rows-{000..001}.tar"
    arrow = pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "image"}
    pictures = [{"bytes": data, "path": row["image"]} for data, row in zip(inside, rows)]
    table = arrow.table({"image": pictures, **columns})
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, folder / "rows.parquet", row_group_size=17)
        return folder / "rows.parquet"
    return save_dataset(arrow, folder / "saved", table)


def save_dataset(arrow, folder: Path, table, shards: int = 2) -> Path:
    """As `datasets` lays a folder out (save_to_disk); test_direct_datasets compares it with the package's own."""
    folder.mkdir()
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for name, part in zip(names, np.array_split(np.arange(len(table)), shards)):
        with arrow.OSFile(str(folder / name), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(int(part[0]), len(part)), max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0" * 16, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
