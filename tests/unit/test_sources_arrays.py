"""Arrays of token ids and Parquet: every damage is named, and nothing hostile fills the memory."""

import base64
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from source_files import JPEG, measure, read, save

from rwkv_clip.data.rows import SourceError
from rwkv_clip.data.sources import Source

# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "inner"),
    [((4, 154), np.int32, (154,)), ((4, 2, 77), np.uint16, (2, 77)), ((4, 1, 77), np.float32, (1, 77))],
)
def test_token_ids_keep_their_axes(tmp_path, shape, dtype, inner):
    ids = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    save(tmp_path, {"list.txt": "a\nb\nc\nd\n"})
    source = Source(tmp_path / "ids.npy", tmp_path / "list.txt")
    rows = list(source.rows(1))
    assert source.count() == 4 and [row.fields["tokens"].shape for row in rows] == [inner] * 3
    assert all((row.fields["tokens"] == ids[i]).all() for i, row in enumerate(rows, 1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((4, 77, 3), np.int32),
            r"shape \(4, 77, 3\) has more texts than tokens; .*\(images, texts, context\)",
        ),
        (np.zeros((3, 4, 77), np.int32), r"has 3 rows, but .* lists 4 images; .*\(3, 4, 77\); should be \(images, te"),
        (np.zeros((12, 77), np.int32), r"has 12 rows, but"),
        (np.zeros(4, np.int32), r"int32 of shape \(4,\)"),
        (np.zeros((4, 77), np.float16), r"float16 of shape"),
        (np.zeros((4, 77), "U3"), r"<U3 of shape"),
        (np.array([[{}]], object), "not an .npy array"),
    ],
)
def test_arrays_of_another_form_are_named(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    save(tmp_path, {"list.txt": "a\nb\nc\nd\n"})
    with pytest.raises(SourceError, match=rf"ids\.npy.*{message}"):
        read(tmp_path / "ids.npy", images=tmp_path / "list.txt")


def npy(form: str, version=1, length=None, data=bytes(616)) -> bytes:
    text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {form}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy("(1000000000000, 77)"), "not an .npy array"),
        (npy("(-2, 77)"), "not an .npy array|bytes more"),
        (npy("(0, 77)"), "not an .npy array|616 bytes more"),
        (npy("(10000000000, 10000000000, 10000000000)"), "not an .npy array"),
        (npy("(2, 77)", 2, 3 << 30), "a header of 3,221,225,472 bytes"),
        (npy("(" * 5000), "not an .npy array"),
        (npy("(1, 77)"), "308 bytes more than shape"),
        (npy("(2, 77)", data=bytes(600)), "not an .npy array"),
        (b"PK\3\4" + bytes(100), "not an .npy array"),
        (b"", "not an .npy array"),
    ],
)
def test_damaged_arrays_are_named(tmp_path, data, message):
    save(tmp_path, {"ids.npy": data, "list.txt": "a\nb\n"})
    with pytest.raises(SourceError, match=rf"ids\.npy: .*({message})"):
        read(tmp_path / "ids.npy", images=tmp_path / "list.txt")


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def save_parquet(path, columns: dict, **options) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, **options)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_are_read_as_they_are(tmp_path, compression, version):
    columns = {
        "raw": [f"text {i % 7} " * (i % 50) for i in range(3000)],
        "tokens": [[i, 2] * (i % 9) for i in range(3000)],
    }
    options = {"compression": compression, "data_page_version": version, "data_page_size": 2000, "row_group_size": 1100}
    save_parquet(tmp_path / "c.parquet", columns, write_page_checksum=True, **options)
    rows = [row.fields for row in read(tmp_path / "c.parquet")]
    assert rows == [dict(zip(columns, values)) for values in zip(*columns.values())]


def test_pictures_in_a_parquet_file(tmp_path):
    code = base64.b64encode(JPEG).decode()
    save_parquet(tmp_path / "c.parquet", {"image": [None] * 70 + [code], "raw": ["x"] * 71})
    rows = read(tmp_path / "c.parquet")
    assert rows[70].image == JPEG and rows[69].image is None and rows[70].folder == tmp_path


BOMBS = """
import sys, pyarrow as pa, pyarrow.parquet as pq
zeros = pa.repeat(pa.scalar(0), 30_000_000)
bombs = {
    "zeros": ([bytes(120_000_000)], {"use_dictionary": False}),
    "dictionary": (pa.DictionaryArray.from_arrays([0] * 100, pa.array([bytes(10_000_000)])), {}),
    "list": (pa.LargeListArray.from_arrays([0, 30_000_000], zeros), {}),
    "prefixes": ([b"x" * 20_000_000] * 16, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
}
for name, (column, options) in bombs.items():
    pq.write_table(pa.table({"tokens": column}), f"{sys.argv[1]}/{name}.parquet", compression="zstd", **options)
"""


def test_small_parquet_files_do_not_fill_the_memory(tmp_path):
    pytest.importorskip("pyarrow")
    subprocess.run([sys.executable, "-c", BOMBS, str(tmp_path)], check=True)
    expected = {
        "zeros.parquet": r"row group 0, column 'tokens': a page of [\d,]+ bytes grows to 120,",
        "list.parquet": r"row group 0, column 'tokens\S*: 30,000,000 numbers in [\d,]+ bytes",
        "dictionary.parquet": "100 rows",
        "prefixes.parquet": "16 rows",
    }
    assert all((tmp_path / name).stat().st_size < 20_000 for name in expected)
    said, grown = measure(tmp_path, list(expected))
    assert grown < 200 and all(re.search(message, said[name]) for name, message in expected.items()), said


def test_damaged_parquet_files_are_named(tmp_path):
    columns = {"raw": [f"text {i}" for i in range(40)], "tokens": [[1, 2] * (i % 3) for i in range(40)]}
    save_parquet(tmp_path / "c.parquet", columns, row_group_size=20)
    good = (tmp_path / "c.parquet").read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    rng, told = np.random.default_rng(0), 0
    for trial in range(400):  # every other bit in the footer, where pyarrow itself ends the process at some
        bad = bytearray(good)
        bad[int(rng.integers(footer if trial % 2 else 4, len(bad)))] ^= 1 << int(rng.integers(8))
        save(tmp_path, {"c.parquet": bytes(bad)})
        try:
            read(tmp_path / "c.parquet")
        except SourceError as error:
            assert "c.parquet" in str(error)
            told += 1
    assert told > 200  # without page checksums a flipped bit may be read as another letter


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PAR1" + bytes(100) + b"PAR1", "not a parquet file"),
        (b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "not a parquet file, or cut short"),
        (b"PAR1" + bytes(40 << 20) + struct.pack("<I", 40 << 20) + b"PAR1", "a footer of 41,943,040 bytes"),
        (b"PAR1\x49\xfc\xff\xff\xff\xff\x0f" + bytes(9) + struct.pack("<I", 16) + b"PAR1", "a list of"),
        (b"", "not a parquet file, or cut short"),
    ],
)
def test_footers_that_cannot_be_are_named(tmp_path, data, message):
    pytest.importorskip("pyarrow")
    save(tmp_path, {"c.parquet": data})
    with pytest.raises(SourceError, match=rf"c\.parquet: .*{message}"):
        read(tmp_path / "c.parquet")


def test_files_of_nothing_but_room_are_refused_unread(tmp_path):
    names = ["c.jsonl", "c.json", "c.csv", "c.tsv", "c.tar", "c.npy", "c.parquet"]
    for name in names:
        with open(tmp_path / name, "wb") as file:
            if name == "c.npy":
                file.write(npy("(2, 77)", 2, 2 << 30, b""))
            file.truncate(3 << 30)
    said, grown = measure(tmp_path, names)
    assert grown < 200 and all(said[name].startswith("SourceError") and name in said[name] for name in names), said
