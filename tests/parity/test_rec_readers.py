"""What we write is what NVIDIA DALI reads. For mxnet itself see mxnet_readback.sh."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import Header, RecordFile, RecordSet, RecordWriter, pack

dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")

MAGIC = b"\x0a\x23\xd7\xce"


def read_with_dali(prefix, count: int, decode: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """(payload bytes or RGB pixels, labels) of all records as DALI's MXNet reader gives them."""

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        data, labels = dali.fn.readers.mxnet(path=[f"{prefix}.rec"], index_path=[f"{prefix}.idx"], device="cpu")
        return (dali.fn.decoders.image(data, device="cpu") if decode else data), labels

    pipe = pipeline()
    pipe.build()
    outputs = (pipe.run() for _ in range(count))
    return [(np.array(data.at(0)), np.array(labels.at(0))) for data, labels in outputs]


def test_dali_reads_what_the_builder_wrote(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
        rows.append(
            {
                "image": f"{i}.jpg",
                "raw": f"picture {i}",
                "synthetic": f"noise {i}",
                "generated": f"pixels {i}",
            }
        )
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_records(str(tmp_path / "c.jsonl"), str(tmp_path / "train"))
    records = RecordSet(tmp_path / "train")
    for i, (data, labels) in enumerate(read_with_dali(tmp_path / "train", 7)):
        image, tokens = records.sample(i)
        assert data.tobytes() == image and (labels == tokens.reshape(-1)).all() and labels.dtype == np.float32
    for i, (pixels, _) in enumerate(read_with_dali(tmp_path / "train", 7, decode=True)):
        expected = np.asarray(Image.open(io.BytesIO(records.sample(i)[0]))).astype(int)
        assert pixels.shape == expected.shape and abs(pixels - expected).max() <= 3  # two JPEG decoders


def test_dali_reads_label_vectors_and_keys_with_gaps(tmp_path):
    records = {
        0: pack(Header(label=np.arange(231), id=1), b"\xff\xd8 some bytes"),
        7: pack(Header(label=[3.5, -1], id=2), b"1234"),
        9: pack(Header(label=np.arange(5000), id=3), b"x" * 4097),
        20: pack(Header(label=[1, 2, 3], id=4), b"y"),
    }
    with RecordWriter(tmp_path / "x") as writer:
        for key, packed in records.items():
            writer.write(key, packed)
    file = RecordFile(tmp_path / "x")
    for i, (data, labels) in enumerate(read_with_dali(tmp_path / "x", len(records))):
        packed = file.read(i)
        assert packed == records[file.key(i)] and packed == packed[:24] + labels.tobytes() + data.tobytes()


def test_dali_reads_records_that_were_split(tmp_path):
    payloads = [b"abcd" + MAGIC + b"efgh", MAGIC, b"12345678" + MAGIC * 2 + b"tail", b"x" + MAGIC]
    with RecordWriter(tmp_path / "x") as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, pack(Header(label=[1, 2]), payload))
    for (data, labels), payload in zip(read_with_dali(tmp_path / "x", len(payloads)), payloads):
        assert data.tobytes() == payload and labels.tolist() == [1, 2]
