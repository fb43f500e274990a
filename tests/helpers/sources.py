"""Images and texts on disk, as the record builder and the evaluation are given them."""

import io
import json
import tarfile
from pathlib import Path

from helpers.pictures import picture

TEXTS = ("raw", "synthetic", "generated")


def make_rows(count: int) -> list[dict]:
    """Rows of `count` pictures with three texts each."""
    return [{"image": f"{i}.jpg", **{text: f"{text} text {i}" for text in TEXTS}} for i in range(count)]


def save_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture(i))


def save_jsonl(path: Path, rows: list[dict]) -> str:
    """Write one row per line; returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contents(prefix) -> dict[str, bytes]:
    """Every file of a prefix by its name."""
    folder = Path(prefix).parent
    return {path.name: path.read_bytes() for path in sorted(folder.glob(Path(prefix).name + "*"))}


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
