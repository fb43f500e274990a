"""RecordIO: files of mxnet 1.9.1 read and written bit for bit; damage gives RecordError and nothing else."""

import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from rwkv_clip.data import recordio
from rwkv_clip.data.records import (
    Header,
    RecordError,
    RecordFile,
    RecordSet,
    RecordWriter,
    checksum,
    find_record_files,
    pack,
    unpack,
)

REFERENCE = Path(__file__).resolve().parents[1] / "parity" / "rec"
CONTENTS = json.loads((REFERENCE / "contents.json").read_text())
MAGIC = struct.pack("<I", 0xCED7230A)


def sha(data) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def write(prefix: Path, records: dict) -> RecordFile:
    with RecordWriter(prefix) as writer:
        for key, packed in records.items():
            writer.write(key, packed)
    return RecordFile(prefix)


def write_samples(prefix: Path, count: int, views=("raw",), context=4, vocab=100, side=True) -> None:
    with RecordWriter(prefix) as writer:
        for key in range(count):
            labels = np.arange(len(views) * context, dtype=np.float32) + key
            image = b"image %d" % key
            writer.write(key, pack(Header(label=labels, id=key, id2=checksum(labels.tobytes() + image)), image))
    if side:
        content = {"schema": 1, "views": list(views), "context": context, "tokenizer": "clip-bpe"}
        content |= {"vocab_size": vocab, "count": count, "checksum": "crc32"}
        Path(f"{prefix}.json").write_text(json.dumps(content))


# ---- files written by mxnet


@pytest.mark.parametrize("row", range(len(CONTENTS["items"])), ids=[item["name"] for item in CONTENTS["items"]])
def test_reads_mxnet_record(row):
    file, item = RecordFile(REFERENCE / "a.rec"), CONTENTS["items"][row]
    packed = file.read(row)
    assert (file.key(row), len(packed), sha(packed)) == (
        item["index"],
        item["packed_len"],
        item["packed_sha256"],
    )
    header, payload = unpack(packed)
    assert (header.flag, header.id, header.id2) == (item["flag"], item["id"], item["id2"])
    assert sha(payload) == item["payload_sha256"]
    if item["label_is_scalar"]:
        assert header.label == item["label"]
    else:
        assert header.label.shape == (header.flag,) and header.label.dtype == np.float32
    assert pack(header, payload) == packed


def test_writes_the_bytes_of_mxnet(tmp_path):
    for name in ("a", "upstream_data2rec"):
        file = RecordFile(REFERENCE / name)
        write(tmp_path / name, {key: file.read(i) for i, key in enumerate(file.keys)})
        for ending in (".rec", ".idx"):
            assert (tmp_path / (name + ending)).read_bytes() == (REFERENCE / (name + ending)).read_bytes()


def test_record_set_reads_files_of_the_released_code():
    records = RecordSet(REFERENCE / "upstream_data2rec")
    assert (len(records), records.text_names, records.context) == (4, ("raw", "synthetic", "generated"), 77)
    assert records.tokenizer is None and records.vocab_size is None
    for i, item in enumerate(CONTENTS["upstream_data2rec"]):
        image, tokens = records.sample(i)
        assert tokens.shape == (3, 77) and tokens.dtype == np.int64 and image[:2] == b"\xff\xd8"
        assert sha(tokens.astype("<f4").tobytes()) == item["label_sha256"]


# ---- round trips


def test_random_records_with_magic_words_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    records = {}
    for key in range(300):
        pieces = [
            MAGIC if rng.random() < 0.4 else rng.bytes(int(rng.integers(0, 9))) for _ in range(rng.integers(0, 9))
        ]
        records[key] = b"".join(pieces)
    records |= {
        300: b"",
        301: MAGIC,
        302: MAGIC * 3,
        303: b"\0" + MAGIC,
        304: MAGIC[:3],
        305: b"1234" + MAGIC,
    }
    file = write(tmp_path / "x", records)
    assert file.keys == list(records)
    assert [file.read(i) for i in range(len(file))] == list(records.values())
    # No aligned magic word may be left inside a frame: sequential readers synchronise on it.
    data = (tmp_path / "x.rec").read_bytes()
    words = np.frombuffer(data, "<u4")
    frames = sum(1 + packed_magics(packed) for packed in records.values())
    assert int((words == 0xCED7230A).sum()) == frames


def packed_magics(packed: bytes) -> int:
    return int((np.frombuffer(packed[: len(packed) // 4 * 4], "<u4") == 0xCED7230A).sum())


@pytest.mark.parametrize("label", [0.5, [1, 2, 3], np.zeros(0), np.arange(4.0), np.frombuffer(MAGIC * 2, "<f4")])
def test_header_round_trip(label):
    packed = pack(Header(label=label, id=2**64 - 1, id2=7), b"payload")
    header, payload = unpack(packed)
    assert bytes(payload) == b"payload" and (header.id, header.id2) == (2**64 - 1, 7)
    expected = np.asarray(label, np.float32)
    assert header.flag == (expected.size if expected.ndim else 0)
    assert np.asarray(header.label, np.float32).tobytes() == (expected.tobytes() or struct.pack("<f", 0))


def test_bad_headers_are_refused():
    with pytest.raises(RecordError, match="64 unsigned bits"):
        pack(Header(id=-1), b"")
    with pytest.raises(RecordError, match="shorter"):
        unpack(b"x" * 23)
    with pytest.raises(RecordError, match="announces 9 labels"):
        unpack(struct.pack("<IfQQ", 9, 0, 0, 0) + b"x" * 35)


# ---- keys and index


def test_string_keys(tmp_path):
    records = {"a": b"1", "b c": b"2", "007": b"3", "ü": b"4", "-0": b"5"}
    file = write(tmp_path / "x", records)
    assert file.keys == list(records) and [file.read(i) for i in range(len(file))] == list(records.values())
    assert write(tmp_path / "z", {"007": b"1", "8": b"2"}).keys == ["007", "8"]
    assert write(tmp_path / "y", {"1": b"1", "2": b"2"}).keys == [1, 2]  # the file cannot tell "1" from 1


def test_integer_keys_in_any_order(tmp_path):
    file = write(tmp_path / "x", {5: b"5", -3: b"-3", 10**17: b"big", 0: b"0"})
    assert file.keys == [5, -3, 10**17, 0] and file.read(1) == b"-3"
    lines = (tmp_path / "x.idx").read_text().splitlines()
    (tmp_path / "x.idx").write_text("\r\n".join(reversed(lines)))
    shuffled = RecordFile(tmp_path / "x")
    assert shuffled.keys == [0, 10**17, -3, 5]
    assert [shuffled.read(i) for i in range(4)] == [b"0", b"big", b"-3", b"5"]


@pytest.mark.parametrize("key", ["", "a\tb", "a\n", " a", True, 1.5, None, 10**18])
def test_impossible_keys_are_refused(tmp_path, key):
    with pytest.raises(RecordError, match="key"), RecordWriter(tmp_path / "x") as writer:
        writer.write(key, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keys", [(1, 1), (2, 1, 2), ("a", "a"), (1, "1"), (3, 2, 1, 3)])
def test_repeated_keys_are_refused(tmp_path, keys):
    with pytest.raises(RecordError, match="already written"), RecordWriter(tmp_path / "x") as writer:
        for key in keys:
            writer.write(key, b"")


def test_index_may_leave_records_out(tmp_path):
    write(tmp_path / "x", {key: b"%d" % key for key in range(5)})
    lines = (tmp_path / "x.idx").read_text().splitlines(keepends=True)
    (tmp_path / "x.idx").write_text("".join(lines[1:4:2]))
    file = RecordFile(tmp_path / "x")
    assert file.keys == [1, 3] and file.read(1) == b"3"


def test_large_index_is_parsed_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "INDEX_BLOCK", 50)
    expected = RecordFile(REFERENCE / "a")
    path = tmp_path / "many.idx"
    path.write_text("".join(f"{n}\t{n * n * 4}\n" for n in range(1000)))
    keys, offsets = recordio.read_index(path)
    assert keys.tolist() == list(range(1000)) and offsets.tolist() == [n * n * 4 for n in range(1000)]
    assert recordio.read_index(REFERENCE / "a.idx")[0].tolist() == expected.keys


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("0\t0\n1\n", "line 2"),
        ("0 0\n", "line 1"),
        ("0\t\n", "line 1"),
        ("\t0\n", "line 1"),
        ("0\t0\n\n1\t36\n", "line 2"),
        ("0\tx\n", "line 1"),
        ("0\t1e3\n", "line 1"),
        ("0\t-4\n", "can start here"),
        ("0\t2\n", "can start here"),
        ("0\t999999999\n", "can start here"),
        ("0\t99999999999999999999\n", "line 1"),
        ("0\t0\n1\t0\n", "two index lines"),
        ("0\t4\n", "magic"),
        ("", "empty"),
        ("\xff\t0\n", "UTF-8"),
    ],
)
def test_bad_index_is_refused(tmp_path, index, message):
    write(tmp_path / "x", {0: b"0" * 24, 1: b"1" * 24})
    (tmp_path / "x.idx").write_bytes(index.encode("latin-1"))
    with pytest.raises(RecordError, match=message) as error:
        RecordFile(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


# ---- damage


def test_cut_and_overwritten_files_are_refused_when_opened(tmp_path):
    whole = (REFERENCE / "a.rec").read_bytes()
    shutil.copy(REFERENCE / "a.idx", tmp_path / "a.idx")
    for damaged in (whole[:-4], whole[:-600], whole[:100], b"", whole + b"junk", whole + b"\0" * 8):
        (tmp_path / "a.rec").write_bytes(damaged)
        with pytest.raises(RecordError, match=r"a\.rec"):
            RecordFile(tmp_path / "a")
    (tmp_path / "a.rec").unlink()
    with pytest.raises(RecordError, match="no such file"):
        RecordFile(tmp_path / "a")


@pytest.mark.parametrize("step", [1, 3])
def test_flipped_bits_in_frames_are_found_without_a_checksum(tmp_path, step, monkeypatch):
    """Every bit of every frame. What is not found gave the record a byte or two of its zero padding. step: how many
    records the index goes on at a time; records that it leaves out are no excuse."""
    monkeypatch.setattr(recordio, "_SPOT_CHECKS", 0)  # or opening so small a file looks at every frame
    random = np.random.default_rng(0)
    records = {}
    for key in range(24):
        picture = random.bytes(60 + key) + (MAGIC * 2 + b"12" if key in (4, 8, 12) else b"") + b"\xff\xd9"
        records[key] = pack(Header(label=random.integers(0, 90, 8), id=key), picture)
    write(tmp_path / "x", records)
    data = (tmp_path / "x.rec").read_bytes()
    lines = (tmp_path / "x.idx").read_text().splitlines(keepends=True)
    (tmp_path / "x.idx").write_text("".join(lines[1::step]))
    indexed = [records[key] for key in range(1, 24, step)]
    assert [*map(RecordFile(tmp_path / "x").read, range(len(indexed)))] == indexed
    extended = refused = 0
    for line in lines[1::step]:
        for bit in range(64):
            damaged = bytearray(data)
            damaged[int(line.split("\t")[1]) + bit // 8] ^= 1 << bit % 8
            (tmp_path / "x.rec").write_bytes(damaged)
            try:
                file = RecordFile(tmp_path / "x")
                read = [file.read(i) for i in range(len(file))]
            except RecordError:
                refused += 1
                continue
            wrong = [(one, good) for one, good in zip(read, indexed) if one != good]
            assert len(wrong) == 1 and wrong[0][0] in (wrong[0][1] + b"\0", wrong[0][1] + b"\0\0")
            extended += 1
    assert extended == sum(len(record) % 4 in (1, 2) for record in indexed)
    assert refused == 64 * len(indexed) - extended


def test_error_names_file_key_and_offset(tmp_path):
    write(tmp_path / "x", {f"k{n}": b"%d" % n * 20 for n in range(1000)})
    offset = int((tmp_path / "x.idx").read_text().splitlines()[101].split("\t")[1])
    whole = (tmp_path / "x.rec").read_bytes()
    for place, what in ((0, "magic word"), (4, r"\d+ bytes announced"), (7, "continuation flag")):
        data = bytearray(whole)
        data[offset + place] ^= 0x40
        (tmp_path / "x.rec").write_bytes(data)
        file = RecordFile(tmp_path / "x")  # record 101 is not one of those looked at here
        with pytest.raises(RecordError, match=rf"x\.rec: record 101 \(key 'k101'\), byte {offset}: {what}"):
            file.read(101)
        assert file.read(100) == b"100" * 20 and file.read(102) == b"102" * 20
    with pytest.raises(IndexError):
        file.read(1000)


def test_fuzzed_files_give_the_record_or_record_error(tmp_path):
    rng = np.random.default_rng(1)
    rec, idx = (REFERENCE / "a.rec").read_bytes(), (REFERENCE / "a.idx").read_bytes()
    places = [offset for item in CONTENTS["items"] for offset, _, _ in item["parts_offset_cflag_len"]]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(2000):
        data, index, what = bytearray(rec), bytearray(idx), int(rng.integers(0, 7))
        frame = int(rng.choice(places))
        if what == 0:  # magic word, length, continuation flag or header
            data[frame + int(rng.integers(0, 32)) % (len(data) - frame)] ^= 1 << int(rng.integers(0, 8))
        elif what == 1:
            data[frame + 4 : frame + 8] = rng.bytes(4)
        elif what == 2:
            del data[int(rng.integers(0, len(data))) :]
        elif what == 3:
            index[int(rng.integers(0, len(index)))] = int(rng.integers(0, 256))
        elif what == 4:
            del index[int(rng.integers(0, len(index))) :]
        elif what == 5:
            start = int(rng.integers(0, len(data) // 4)) * 4
            data[start : start + 4] = MAGIC
        else:
            data[int(rng.integers(0, len(data)))] ^= int(rng.integers(1, 256))
        (tmp_path / "a.rec").write_bytes(data)
        (tmp_path / "a.idx").write_bytes(index)
        try:
            file = RecordFile(tmp_path / "a")
        except RecordError:
            outcomes["refused"] += 1
            continue
        for i in range(len(file)):
            try:
                unpack(file.read(i))
                outcomes["read"] += 1
            except RecordError:
                outcomes["refused"] += 1
    assert outcomes["read"] > 1000 and outcomes["refused"] > 1000


def test_fuzzed_samples_give_ids_in_range_or_record_error(tmp_path):
    rng = np.random.default_rng(2)
    write_samples(tmp_path / "x", 8, views=("raw", "synthetic"))
    clean, rec = RecordSet(tmp_path / "x"), (tmp_path / "x.rec").read_bytes()
    found = 0
    for _ in range(300):
        data = bytearray(rec)
        data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "y.rec").write_bytes(data)
        for ending in (".idx", ".json"):
            shutil.copy(tmp_path / f"x{ending}", tmp_path / f"y{ending}")
        try:
            records = RecordSet(tmp_path / "y")
        except RecordError:
            found += 1
            continue
        for i in range(8):
            try:
                image, tokens = records.sample(i)
            except RecordError:
                found += 1
                continue
            # The checksum covers labels and picture: what is returned is what was written.
            assert image == clean.sample(i)[0] and (tokens == clean.sample(i)[1]).all()
    assert found > 200


# ---- writer


def test_writer_publishes_only_complete_files(tmp_path):
    write(tmp_path / "x", {0: b"old"})
    with pytest.raises(RuntimeError), RecordWriter(tmp_path / "x") as writer:
        writer.write(0, b"new")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.idx", "x.rec"]
    assert RecordFile(tmp_path / "x").read(0) == b"old"
    with pytest.raises(RecordError, match="at most"), RecordWriter(tmp_path / "y") as writer:
        writer.write(0, _Long())


def test_crash_while_publishing_leaves_no_index_of_another_file(tmp_path, monkeypatch):
    write(tmp_path / "x", {0: b"old1", 1: b"old2"})
    replace = os.replace

    def crash_before_index(source, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash_before_index)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", {0: b"new1", 1: b"new2"})
    with pytest.raises(RecordError, match="no such index"):
        RecordFile(tmp_path / "x")


class _Long(bytes):
    def __len__(self) -> int:
        return 1 << 29


def test_pickle_reopens_and_notices_changes(tmp_path):
    file = write(tmp_path / "x", {0: b"zero", 1: b"one"})
    frozen = pickle.dumps(file)
    assert len(frozen) < 1000 and pickle.loads(frozen).read(1) == b"one"
    write(tmp_path / "x", {0: b"other"})
    with pytest.raises(RecordError, match="changed"):
        pickle.loads(frozen)
    assert file.read(1) == b"one"  # an open file keeps what it mapped


# ---- record sets


def test_find_record_files(tmp_path):
    for name in ("b", "a", "s-00000", "s-00001", "odd.name"):
        write_samples(tmp_path / name, 1, side=False)
    names = lambda spec: [path.name for path in find_record_files(spec)]  # noqa: E731
    assert names(tmp_path / "a") == names(f"{tmp_path}/a.rec") == ["a.rec"]
    assert names(tmp_path / "odd.name") == ["odd.name.rec"]
    assert names(tmp_path / "s") == names(f"{tmp_path}/s-*") == ["s-00000.rec", "s-00001.rec"]
    assert names(f"{tmp_path}/b,{tmp_path}/a.rec") == names([f"{tmp_path}/b", f"{tmp_path}/a"]) == ["a.rec", "b.rec"]
    assert len(names(tmp_path)) == 5
    for spec in ("", tmp_path / "none", f"{tmp_path}/z*", f"{tmp_path}/a,{tmp_path}/c"):
        with pytest.raises(ValueError, match="records: "):
            find_record_files(spec)
    write_samples(tmp_path / "s", 1, side=False)
    with pytest.raises(ValueError, match="name the one you want"):
        find_record_files(tmp_path / "s")
    (tmp_path / "a.idx").unlink()
    with pytest.raises(ValueError, match=r"no \.idx"):
        find_record_files(tmp_path / "a")


def test_record_set_joins_shards_in_order(tmp_path):
    for name, count in (("s-00000", 3), ("s-00001", 2)):
        write_samples(tmp_path / name, count, views=("raw", "synthetic"))
    records = RecordSet(f"{tmp_path}/s-*")
    assert len(records) == 5 and records.vocab_size == 100 and records.tokenizer == "clip-bpe"
    assert [records.sample(i)[0] for i in range(5)] == [
        b"image 0",
        b"image 1",
        b"image 2",
        b"image 0",
        b"image 1",
    ]
    assert records.sample(4)[1].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert records.name(4) == f"{tmp_path}/s-00001.rec key 1"
    assert pickle.loads(pickle.dumps(records)).sample(3)[0] == b"image 0"
    for i in (-1, 5):
        with pytest.raises(IndexError):
            records.sample(i)


@pytest.mark.parametrize(
    "extra",
    [
        {"schema": 2},
        {"schema": None},
        {"views": []},
        {"views": ["raw", "raw"]},
        {"views": "raw"},
        {"views": [1]},
        {"context": 0},
        {"context": "77"},
        {"context": True},
        {"vocab_size": -1},
        {"count": 4},
        {"tokenizer": 5},
    ],
)
def test_bad_side_file_is_refused(tmp_path, extra):
    write_samples(tmp_path / "x", 3)
    side = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**side, **extra}))
    with pytest.raises(RecordError, match=r"x\.json: (schema|views|context|vocab_size|says 4 records|tokenizer)"):
        RecordSet(tmp_path / "x")


def test_side_file_that_is_not_json_or_disagrees(tmp_path):
    write_samples(tmp_path / "s-00000", 2)
    write_samples(tmp_path / "s-00001", 2, vocab=99)
    with pytest.raises(RecordError, match=r"s-00001\.rec: .*differs"):
        RecordSet(f"{tmp_path}/s-*")
    for text in ("{", "[]", "\ud800".encode("utf-8", "surrogatepass")):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "s-00000.json").write_bytes(data)
        with pytest.raises(RecordError, match=r"s-00000\.json"):
            RecordSet(tmp_path / "s-00000")


def test_labels_that_are_not_tokens_are_refused(tmp_path):
    bad = {"nan": np.nan, "inf": np.inf, "negative": -1, "vocab": 100, "fraction": 1.5}
    with RecordWriter(tmp_path / "x") as writer:
        for key, value in bad.items():
            writer.write(key, pack(Header(label=[1, 2, 3, value]), b""))
        writer.write("short", pack(Header(label=[1, 2, 3]), b""))
        writer.write("scalar", pack(Header(label=1.0), b""))
        writer.write("tiny", b"123")
        writer.write("good", pack(Header(label=[1, 2, 3, 99]), b"x"))
    side = {"schema": 1, "views": ["raw"], "context": 4, "vocab_size": 100}
    (tmp_path / "x.json").write_text(json.dumps(side))
    records = RecordSet(tmp_path / "x")
    for i in range(len(records) - 1):
        with pytest.raises(RecordError, match=r"labels|token ids"):
            records.sample(i)
    assert records.sample(len(records) - 1)[1].tolist() == [[1, 2, 3, 99]]


def test_width_without_side_file(tmp_path):
    for context, views in ((77, 1), (77, 2), (77, 3)):
        write_samples(tmp_path / "x", 1, views=tuple(range(views)), context=context, side=False)
        assert RecordSet(tmp_path / "x").text_names == ("raw", "synthetic", "generated")[:views]
    for width in (1, 76, 78, 308):
        write_samples(tmp_path / "x", 1, context=width, side=False)
        with pytest.raises(RecordError, match=rf"x\.rec: records have {width} labels"):
            RecordSet(tmp_path / "x")
    write(tmp_path / "x", {})
    with pytest.raises(RecordError, match="no record"):
        RecordSet(tmp_path / "x")


def test_what_is_discarded_leaves_nothing_not_even_its_side_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), RecordWriter(tmp_path / "x") as writer:
        writer.write(0, b"abcd")
        writer.flush({"schema": 1})
        assert len(list(tmp_path.iterdir())) == 3
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
