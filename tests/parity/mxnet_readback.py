"""Two halves of one comparison, run by mxnet_readback.sh in two environments.

`write FOLDER` (with this package): files by our writer, and what is in them. `read FOLDER` (with mxnet):
reads them with the real mx.recordio, writes the same records with it, and compares them byte by byte.
"""

import hashlib
import json
import random
import struct
import sys
from pathlib import Path

MAGIC = struct.pack("<I", 0xCED7230A)


def make_records() -> list[tuple[float | list[float], int, bytes]]:
    """(label, id, payload): scalars, vectors, magic words at every alignment, sizes around the padding."""
    rng = random.Random(0)
    records = []
    for number in range(500):
        label = (
            rng.uniform(-9, 9)
            if rng.random() < 0.3
            else [float(rng.randrange(49408)) for _ in range(rng.choice([1, 3, 77, 154, 231]))]
        )
        pieces = [MAGIC if rng.random() < 0.3 else rng.randbytes(rng.randrange(9)) for _ in range(rng.randrange(12))]
        records.append((label, number + 1, b"".join(pieces)))
    return records


def write(folder: Path) -> None:
    from rwkv_clip.data.records import Header, RecordWriter, pack

    hashes = []
    with RecordWriter(folder / "ours") as integers, RecordWriter(folder / "ours_text") as texts:
        for number, (label, id, payload) in enumerate(make_records()):
            packed = pack(Header(label=label, id=id), payload)
            integers.write(number * 3, packed)
            texts.write(f"key-{number}", packed)
            hashes.append(hashlib.sha256(packed).hexdigest())
    (folder / "ours.sha256").write_text(json.dumps(hashes))


def read(folder: Path) -> None:
    import mxnet as mx
    import numpy as np

    hashes = json.loads((folder / "ours.sha256").read_text())
    ours = mx.recordio.MXIndexedRecordIO(str(folder / "ours.idx"), str(folder / "ours.rec"), "r")
    texts = mx.recordio.MXIndexedRecordIO(
        str(folder / "ours_text.idx"), str(folder / "ours_text.rec"), "r", key_type=str
    )
    walk = mx.recordio.MXRecordIO(str(folder / "ours.rec"), "r")
    theirs = mx.recordio.MXIndexedRecordIO(str(folder / "theirs.idx"), str(folder / "theirs.rec"), "w")
    records = make_records()
    assert len(ours.keys) == len(texts.keys) == len(hashes) == len(records)
    for number, ((label, id, payload), digest) in enumerate(zip(records, hashes)):
        for packed in (ours.read_idx(number * 3), texts.read_idx(f"key-{number}"), walk.read()):
            assert hashlib.sha256(packed).hexdigest() == digest, f"record {number} reads differently"
        header, content = mx.recordio.unpack(packed)
        assert content == payload and header.id == id
        assert np.array_equal(np.float32(header.label), np.float32(label)), f"record {number}: label"
        theirs.write_idx(number * 3, mx.recordio.pack(mx.recordio.IRHeader(0, label, id, 0), payload))
    assert walk.read() is None
    theirs.close()
    for ending in ("rec", "idx"):
        same = (folder / f"ours.{ending}").read_bytes() == (folder / f"theirs.{ending}").read_bytes()
        assert same, f".{ending}: mxnet writes other bytes"
    print(f"mxnet {mx.__version__}: {len(records)} records read equal by key, by text key and in sequence;")
    print("the .rec and .idx that mxnet writes from the same records equal ours byte for byte")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
