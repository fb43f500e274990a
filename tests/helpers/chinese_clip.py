"""Chinese-CLIP's files: TSV and JSONL of a split, and LMDB folders as the released builder writes them."""

import base64
import json
import pickle
from pathlib import Path

import lmdb

RELEASED = Path(__file__).resolve().parents[1] / "parity" / "cn_clip" / "lmdb_set"  # made by the released builder


def write_files(folder: Path, name: str, images: dict, texts: list[tuple[int, str, list[int]]]) -> None:
    """NAME_imgs.tsv of {id: bytes of a picture, or what stands in its place as str} and NAME_texts.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{i}\t{x if isinstance(x, str) else base64.b64encode(x).decode()}\n" for i, x in images.items()]
    (folder / f"{name}_imgs.tsv").write_text("".join(lines))
    rows = [{"text_id": number, "text": text, "image_ids": ids} for number, text, ids in texts]
    (folder / f"{name}_texts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def write_environment(folder: Path, items: dict[bytes, bytes]) -> None:
    """An LMDB with exactly these items; it replaces one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)


def write_split(folder: Path, images: dict, pairs: list[tuple], **change: bytes | None) -> Path:
    """A split as the released builder writes it. change: items of `pairs` or `imgs` (num_images and ids as `i_ID`) that
    it has instead; None: that it lacks."""
    kinds = {"imgs": {str(i).encode(): x if isinstance(x, bytes) else x.encode() for i, x in images.items()}}
    kinds["imgs"][b"num_images"] = b"%d" % len(images)
    kinds["pairs"] = {b"%d" % i: pickle.dumps(pair, 4) for i, pair in enumerate(pairs)}
    kinds["pairs"][b"num_samples"] = b"%d" % len(pairs)
    for key, value in change.items():
        items = kinds["imgs" if key.startswith(("i_", "num_images")) else "pairs"]
        key = key.removeprefix("i_").removeprefix("p_").encode()
        if value is None:
            items.pop(key)
        else:
            items[key] = value
    for name, items in kinds.items():
        write_environment(folder / name, items)
    return folder


def dump(folder: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    """All items of `imgs` and `pairs`, in the order of their keys."""
    found = {}
    for name in ("imgs", "pairs"):
        with (
            lmdb.open(str(folder / name), readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            found[name] = list(transaction.cursor())
    return found
