"""20,000 mutations of record files and their indices: the record, or an error of ours; no crash, hang or large memory.

The files are small and mutated in place, so that a case costs a tenth of a millisecond's writing. Everything runs in a
process of its own: a crash ends that one and fails the test.
"""

import json
import os
import resource
import shutil
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rwkv_clip.data.records import Header, RecordError, RecordFile, RecordSet, RecordWriter, checksum, pack

MAGIC = b"\x0a\x23\xd7\xce"
COUNT, CONTEXT = 6, 4


def write(prefix: Path, checked: bool) -> None:
    """Six records with three texts; pictures of odd lengths, two of them with the magic word inside."""
    random = np.random.default_rng(0)
    with RecordWriter(prefix) as writer:
        for i in range(COUNT):
            labels = random.integers(0, 90, 3 * CONTEXT if checked else 77).astype("<f4")
            image = random.bytes(30 + 7 * i) + (MAGIC * 2 + b"12" if i in (2, 4) else b"")
            content = labels.tobytes() + image
            writer.write(i, pack(Header(0, labels, i, checksum(content) if checked else 0), image))
    if checked:
        side = {"schema": 1, "views": ["raw", "synthetic", "generated"], "context": CONTEXT, "vocab_size": 90}
        Path(f"{prefix}.json").write_text(json.dumps({**side, "count": COUNT, "checksum": "crc32"}))


def mutate(random: np.random.Generator, rec: bytearray, idx: bytearray, starts: list[int]) -> str:
    """Change one of the two in place; returns what was done."""
    kinds = ["magic", "length", "cflag", "header", "label", "payload", "bit", "bits", "words", "cut", "swap"]
    kind = [*kinds, "index byte", "index line", "index cut", "index swap"][random.integers(15)]
    start = starts[random.integers(len(starts))]
    inside = {"magic": (0, 4), "length": (4, 8), "cflag": (7, 8), "header": (8, 32), "label": (32, 80)}
    if kind in inside:
        low, high = inside[kind]
        rec[start + int(random.integers(low, high))] = int(random.integers(256))
    elif kind in ("payload", "bit"):
        rec[int(random.integers(len(rec)))] ^= 1 << int(random.integers(8))
    elif kind == "bits":
        for at in random.integers(0, len(rec), 20):
            rec[at] ^= 1 << int(random.integers(8))
    elif kind == "words":
        at = int(random.integers(len(rec) // 4)) * 4
        rec[at : at + 4] = [MAGIC, b"\xff" * 4, bytes(4), random.bytes(4)][random.integers(4)]
    elif kind == "cut":
        del rec[int(random.integers(len(rec))) :]
    elif kind == "swap":
        one, other = sorted(random.choice(len(starts), 2, replace=False))
        a, b = starts[one], starts[other]
        rec[a : a + 40], rec[b : b + 40] = rec[b : b + 40], rec[a : a + 40]
    elif kind == "index byte":
        idx[int(random.integers(len(idx)))] = int(random.integers(256))
    elif kind == "index cut":
        del idx[int(random.integers(len(idx))) :]
    else:
        lines = bytes(idx).split(b"\n")
        at = int(random.integers(len(lines)))
        if kind == "index swap":
            lines[at], lines[0] = lines[0], lines[at]
        else:
            lines[at] = [b"", b"x\ty", b"1\t-4", b"1\t99999999999999999999", b"7\t8", lines[0]][random.integers(6)]
        idx[:] = b"\n".join(lines)
    return kind


def fuzz(folder: Path, cases: int, checked: bool) -> Counter:
    """Outcomes. Any exception but RecordError and ValueError goes up."""
    write(folder / "good", checked)
    clean = RecordSet(folder / "good")
    expected = {clean.files[0].key(i): clean.sample(i) for i in range(COUNT)}
    rec, idx = ((folder / f"good{ending}").read_bytes() for ending in (".rec", ".idx"))
    starts = [int(line.split(b"\t")[1]) for line in idx.split(b"\n")[:-1]]
    if checked:
        shutil.copy(folder / "good.json", folder / "bad.json")
    random, outcomes = np.random.default_rng(int(checked)), Counter()
    for _ in range(cases):
        data, index = bytearray(rec), bytearray(idx)
        kind = mutate(random, data, index, starts)
        (folder / "bad.rec").write_bytes(data)
        (folder / "bad.idx").write_bytes(index)
        begin = time.perf_counter()
        try:
            records = RecordSet(folder / "bad")
        except (RecordError, ValueError):
            outcomes["refused"] += 1
            continue
        for i in range(len(records)):
            try:
                image, tokens = records.sample(i)
            except RecordError:
                outcomes["damaged"] += 1
                continue
            outcomes["read"] += 1
            assert tokens.min() >= 0 and tokens.dtype == np.int64
            if checked:  # whatever comes is one of the records that were written
                assert any(image == one and (tokens == other).all() for one, other in expected.values()), kind
        assert time.perf_counter() - begin < 1, kind
    return outcomes


@pytest.mark.parametrize("checked", [True, False], ids=["ours", "released format"])
def test_ten_thousand_mutations(checked, tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            fuzz(tmp_path, 100, checked)  # warm
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            outcomes = fuzz(tmp_path, 10_000, checked)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            said = json.dumps({**outcomes, "grown": grown})
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0, "crashed"
    assert said.startswith("{"), said
    found = json.loads(said)
    assert found["refused"] > 2000 and found["damaged"] > 1000 and found["read"] > 10_000
    assert found["grown"] < 64_000


def test_every_flip_in_checked_bytes_is_detected(tmp_path):
    """Each bit of labels and picture of one record, as it lies in the file."""
    write(tmp_path / "x", True)
    file = RecordSet(tmp_path / "x")
    start = file.files[0].offsets[1] + 8 + 24  # behind frame and header
    length = len(file.files[0].read(1)) - 24
    whole, missed = (tmp_path / "x.rec").read_bytes(), []
    for bit in range(8 * length):
        data = bytearray(whole)
        data[start + bit // 8] ^= 1 << bit % 8
        with open(tmp_path / "x.rec", "r+b") as stream:
            stream.write(data)
        try:
            file.sample(1)
            missed.append(bit)
        except RecordError:
            pass
    assert 8 * length > 600 and missed == []


@pytest.mark.parametrize("at", range(12))
def test_a_payload_with_the_magic_word_comes_back(at, tmp_path):
    payloads = [b"x" * at + MAGIC, b"x" * at + MAGIC * 3 + b"tail", MAGIC + b"x" * at + MAGIC]
    with RecordWriter(tmp_path / "x") as writer:
        for i, payload in enumerate(payloads):
            writer.write(i, payload)
    file = RecordFile(tmp_path / "x")
    assert [file.read(i) for i in range(3)] == payloads
