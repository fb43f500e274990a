"""Tars: every member is used or says why not, every damage is named, and nothing hostile fills memory or time."""

import gzip
import json
import tarfile

import numpy as np
import pytest
from source_files import DEEP, JPEG, PNG, measure, outcome, pack, read, save

from rwkv_clip.data import samples, tar
from rwkv_clip.data.rows import Problem, SourceError
from rwkv_clip.data.sources import Source

SAMPLES = [(f"{i:03d}.{ending}", content) for i in range(3) for ending, content in (("jpg", JPEG), ("txt", b"text"))]


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
    return info


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["a/0.jpg", "a/0.txt", "b/0.jpg", "b/0.txt"], {"a/0": JPEG, "b/0": JPEG}),
        (["./0.JPG", "./0.TXT", "1.v2.jpg", "1.txt"], {"0": JPEG, "1": "missing image"}),
        (["0.jpg", "0.png", "0.txt"], {"0": "several pictures under one name"}),
        (["0.jpg", "0.mask.png", "0.txt"], {"0": JPEG}),
        (["0.jpg", "0.txt", "0.jpg", "0.txt", "1.jpg", "1.txt"], {"0": "one name twice", "1": JPEG}),
        (["0.jpg", "0.jpg", "0.txt", "0.txt"], {"0": "one name twice"}),
        (["0.jpg", "1.jpg", "0.txt", "1.txt"], {"0": str(samples.APART), "1": str(samples.APART)}),
        (["0.txt", "1.txt", "0.jpg", "1.jpg"], {"0": str(samples.APART), "1": str(samples.APART)}),
        (["0.txt", "1.jpg", "1.txt"], {"0": "missing image", "1": JPEG}),
        (["0.heic", "1.jpg", "1.txt"], {"0": "missing image", "1": JPEG}),
        (["._0.jpg", "__MACOSX/0.jpg", "PaxHeaders.7/0.jpg", ".x/0.jpg", ".DS_Store", "LICENSE", "0.jpg"], {"0": JPEG}),
        ([link("0.jpg"), "0.txt"], {"0": "a link in the tar, not a file"}),
        (["d/", "d/0.jpg", "0/1.jpg"], {"d/0": JPEG, "0/1": JPEG}),
    ],
)
def test_members_of_one_name_are_one_row_or_counted(tmp_path, members, expected):
    content = {"jpg": JPEG, "png": PNG, "eic": b"x", "txt": b"text", "jso": b"{}"}
    members = [m if isinstance(m, tarfile.TarInfo) else (m, content.get(m.lower()[-3:], b"")) for m in members]
    save(tmp_path, {"s.tar": pack(members)})
    source = Source(tmp_path / "s.tar")
    rows = list(source.rows())
    assert {row.name.split()[1]: outcome(row) for row in rows} == expected
    assert all(row.folder is None for row in rows)
    for start in range(len(rows) + 1):
        assert [(row.name, outcome(row)) for row in source.rows(start)] == [
            (row.name, outcome(row)) for row in rows[start:]
        ]


def test_the_picture_in_the_tar_is_that_of_the_row(tmp_path):
    about = {field: "other.jpg" for field in ("image", "path", "filename", "file_name", "jpg", "txt", "caption")}
    save(tmp_path, {"s.tar": pack([("0.jpg", JPEG), ("0.json", json.dumps(about).encode()), ("0.txt", b"mine")])})
    (row,) = read(tmp_path / "s.tar")
    assert row.image == JPEG and row.fields["jpg"] == JPEG and row.fields["txt"] == "mine"
    assert row.fields["caption"] == "other.jpg" and row.folder is None


def test_texts_that_cannot_be_read_are_problems_of_their_row(tmp_path):
    texts = {"0": b"\xff", "1": DEEP.encode(), "2": b"{", "3": bytes((1 << 20) + 1)}
    members = [x for key, text in texts.items() for x in ((f"{key}.jpg", JPEG), (f"{key}.json", text))]
    save(tmp_path, {"s.tar": pack(members)})
    reasons = [row.fields["json"] for row in read(tmp_path / "s.tar")]
    assert reasons == ["text is not UTF-8 or JSON"] * 3 + ["text too long"]
    assert all(isinstance(reason, Problem) for reason in reasons)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_every_length_and_kind(tmp_path, form):
    names = ["short", "a" * 90 + "/" + "b" * 90] + ["ü" * 120] * (form != tarfile.USTAR_FORMAT)
    save(tmp_path, {"s.tar": pack([(f"{name}.jpg", JPEG) for name in names], format=form)})
    assert [row.name for row in read(tmp_path / "s.tar")] == [f"s.tar {name}" for name in names]


def header(name="x.jpg", kind=b"0", size=b"00000000000\0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)


def pax(*records: bytes, kind=b"x") -> bytes:
    data = b"".join(records)
    return header("pax", kind, b"%011o\0" % len(data)) + data + bytes(-len(data) % 512)


HOSTILE = {
    "negative": (header(size=binary(-1536)), "size that cannot be"),
    "negative octal": (header(size=b"-0000001000\0"), "size that cannot be"),
    "not octal": (header(size=b"00000000009\0"), "size that cannot be"),
    "huge": (header(size=binary(1 << 80)), "cut short"),
    "long name, negative": (header(kind=b"L", size=binary(-512)), "size that cannot be"),
    "long name of gigabytes": (header(kind=b"L", size=binary(3 << 30)), "a header of 3,221,225,472 bytes"),
    "pax of gigabytes": (header(kind=b"x", size=binary(3 << 30)), "a header of 3,221,225,472 bytes"),
    "global pax of gigabytes": (header(kind=b"g", size=binary(3 << 30)), "a header of 3,221,225,472 bytes"),
    "pax, negative size": (pax(b"13 size=-512\n") + header(), "size that cannot be"),
    "pax, huge size": (pax(b"23 size=99999999999999\n") + header(), "cut short"),
    "pax, size of other digits": (pax("11 size=²\n".encode()) + header(), "size that cannot be"),
    "global pax, negative size": (pax(b"13 size=-512\n", kind=b"g") + header(), "size that cannot be"),
    "pax record of no length": (pax(b"0 path=x\n"), "extended header that is not valid"),
    "pax record beyond its header": (pax(b"99 path=x\n"), "extended header that is not valid"),
    "pax without numbers": (pax(b"path=x\n"), "extended header that is not valid"),
    "sparse": (header(kind=b"S"), "stored with holes"),
    "pax, sparse": (pax(b"22 GNU.sparse.major=1\n") + header(), "stored with holes"),
    "rubbish": (b"rubbish " * 64, "no valid header"),
    "other checksum": (header()[:200] + b"x" + header()[201:], "no valid header"),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tgz"])
@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_cannot_be_are_refused_at_once(tmp_path, case, compressed):
    block, message = HOSTILE[case]
    data = pack(SAMPLES[:2])[: 4 * 512] + block + bytes(4096)
    save(tmp_path, {"s.tar": gzip.compress(data) if compressed else data})
    with pytest.raises(SourceError, match=rf"s\.tar: byte [\d,]+ of the tar, after (000\.txt|x\.jpg): .*{message}"):
        read(tmp_path / "s.tar")


def test_old_tars_with_signed_sums(tmp_path):
    block = bytearray(tarfile.TarInfo("0.jpg").tobuf(tarfile.GNU_FORMAT))
    block[100], block[148:156] = 0xB1, b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) - 256)
    save(tmp_path, {"s.tar": bytes(block) + bytes(1024)})
    assert [row.name for row in read(tmp_path / "s.tar")] == ["s.tar 0"]


@pytest.mark.parametrize("magic", [b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_other_compressions_are_named(tmp_path, magic):
    save(tmp_path, {"s.tar": magic + bytes(2000)})
    with pytest.raises(SourceError, match=r"s\.tar: compressed by \w+; unpack it, or use gzip"):
        read(tmp_path / "s.tar")


def test_every_flipped_bit_of_a_tgz_is_found(tmp_path):
    rng = np.random.default_rng(0)
    good = gzip.compress(pack([(f"{i}.{e}", rng.bytes(60)) for i in range(8) for e in ("jpg", "txt")]), 6, mtime=0)
    for _ in range(150):
        bad = bytearray(good)
        bad[int(rng.integers(20, len(bad)))] ^= 1 << int(rng.integers(8))
        save(tmp_path, {"s.tgz": bytes(bad)})
        with pytest.raises(SourceError, match=r"s\.tgz: byte"):
            read(tmp_path / "s.tgz")


def test_a_tgz_is_read_to_its_end(tmp_path):
    tar = pack(SAMPLES)
    good, half = gzip.compress(tar), len(tar) // 2
    whole = {
        "good": good,
        "padded": good + bytes(1000),
        "two members": gzip.compress(tar[:half]) + gzip.compress(tar[half:]),
        "empty member behind": good + gzip.compress(b""),
    }
    damaged = {
        "without trailer": good[:-8],
        "trailer cut": good[:-1],
        "garbage behind": good + b"garbage",
        "another tar behind": good + good,
        "cut": good[: len(good) // 2],
        "other length": good[:-4] + b"\1\0\0\0",
        "other checksum": good[:-8] + bytes(4) + good[-4:],
    }
    for data in whole.values():
        save(tmp_path, {"s.tgz": data})
        assert [outcome(row) for row in read(tmp_path / "s.tgz")] == [JPEG] * 3
    for case, data in damaged.items():
        save(tmp_path, {"s.tgz": data})
        with pytest.raises(SourceError, match=r"s\.tgz"):
            read(tmp_path / "s.tgz")
            pytest.fail(case)


@pytest.mark.parametrize("behind", [b"x", pack(SAMPLES), bytes(tar.MAX_PADDING + (2 << 20))])
def test_only_some_zeros_may_follow_the_end_mark(tmp_path, behind):
    save(tmp_path, {"s.tar": pack(SAMPLES) + behind})
    with pytest.raises(SourceError, match="after the end mark"):
        read(tmp_path / "s.tar")


def test_small_compressed_tars_do_not_fill_the_memory(tmp_path):
    zeros, names = gzip.compress(bytes(1 << 24), 9) * 12, {"L.tgz": b"L", "x.tgz": b"x", "0.tgz": b"0"}
    for name, kind in names.items():
        save(tmp_path, {name: gzip.compress(header(kind=kind, size=binary(3 << 30))) + zeros})
    said, grown = measure(tmp_path, list(names))
    assert grown < 100 and all(said[name].startswith("SourceError") and name in said[name] for name in names), said
