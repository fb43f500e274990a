"""Readers: every row is used or says why not, every damage is named, and nothing hostile fills memory or time."""

import base64
import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from rwkv_clip.data import samples, tar
from rwkv_clip.data.rows import MAX_LINE, Problem, SourceError
from rwkv_clip.data.sources import Source

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) + b"\xff\xd9"  # nothing is decoded here
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(255, 0, -1))
BOM = b"\xef\xbb\xbf"


def read(path, **options) -> list:
    return list(Source(path, **options).rows())


def save(folder, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def outcome(row) -> str | bytes | None:
    """The picture of a row, or the reason in its place."""
    return str(row.image) if isinstance(row.image, Problem) else row.image


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_quotation_mark_in_a_tab_separated_table_is_only_that(tmp_path):
    captions = ['"unbalanced caption', "foo", 'says hi"', 'six " tall', '"a" and "b"', '""', '"', "it's, so"]
    lines = [f"{i}.jpg\t{caption}" for i, caption in enumerate(captions)]
    save(tmp_path, {"c.tsv": "filepath\tcaption\n" + "\n".join(lines)})
    rows = read(tmp_path / "c.tsv")
    assert [row.fields["filepath"] for row in rows] == [f"{i}.jpg" for i in range(len(captions))]
    expected = [caption if caption != '""' else "" for caption in captions]
    assert [row.fields["caption"] for row in rows] == expected
    assert [row.name for row in rows] == [f"c.tsv line {i + 2}" for i in range(len(captions))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["c.tsv", "c.csv"])
def test_what_pandas_quotes_is_unquoted(tmp_path, name, end):
    text = f'"filepath"\t"title"{end}"a.jpg"\t"so ""quoted"" it, was"{end}{end}b.jpg\t{end}'
    save(tmp_path, {name: BOM + text.encode()})
    rows = [row.fields for row in read(tmp_path / name)]
    assert rows == [{"filepath": "a.jpg", "title": 'so "quoted" it, was'}, {"filepath": "b.jpg", "title": ""}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\tcaption\na.jpg\tx\nb.jpg\ty\tz\n", "line 3 has 3 columns, not 2"),
        ("image\tcaption\na.jpg\n", "line 2 has 1 columns, not 2"),
        ('image\tcaption\na.jpg\t"x\ny"\n', "line 3 has 1 columns, not 2"),
        ("image\tcaption\tcaption\n", "'caption' more than once"),
        ("image,caption\na.jpg,x\n", "has one column; separate columns by tabs"),
        ("image\tcaption\ra.jpg\tx\r", "carriage return only"),
        (b"image\tcaption\na.jpg\tx\n\xff.jpg\ty\n", "line 3 is not valid UTF-8"),
        (f"1\t{base64.b64encode(JPEG).decode()}\n", "a picture instead of the names of the columns"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, text, message):
    save(tmp_path, {"c.tsv": text})
    with pytest.raises(SourceError, match=rf"c\.tsv: .*{message}"):
        read(tmp_path / "c.tsv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption,image\n", "'image' more than once"),
        ("image;caption\n", "one column; separate columns by commas or tabs"),
        ('image,caption\na.jpg,"open\n', "not valid CSV"),
        ("image,caption\na.jpg,x,y\n", "line 2 has 3 columns, not 2"),
        ("a.jpg,x\nb.jpg,y\n", "begins with a row instead of the names"),
        (
            'image,raw\na.jpg,"open\nb.jpg,x\nc.jpg,end"\nd.jpg,y\n',
            "line 2 begins a quoted text that goes on to line 4",
        ),
        (
            'raw,image\n"open,a.jpg\nx,b.jpg\nend",c.jpg\nd.jpg,y\n',
            "line 2 begins a quoted text that goes on to line 4",
        ),
    ],
)
def test_a_comma_separated_table_that_cannot_be_read_is_named(tmp_path, text, message):
    save(tmp_path, {"c.csv": text})
    with pytest.raises(SourceError, match=rf"c\.csv: .*{message}"):
        read(tmp_path / "c.csv")


def test_texts_of_several_lines_are_those_of_csv(tmp_path):
    save(tmp_path, {"c.csv": 'image,raw\na.jpg,"one,\ntwo, two\n\nthree"\nb.jpg,four\n'})
    assert [row.fields["raw"] for row in read(tmp_path / "c.csv")] == ["one,\ntwo, two\n\nthree", "four"]


def test_tables_without_rows_and_with_a_nameless_column(tmp_path):
    save(tmp_path, {"empty.csv": "image,raw\n", "index.csv": ",image,raw\n0,a.jpg,x\n"})
    assert read(tmp_path / "empty.csv") == []
    assert read(tmp_path / "index.csv")[0].fields == {"": "0", "image": "a.jpg", "raw": "x"}


# ---- byte order marks, base64, JSON ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.jsonl", '{"image": "a.jpg"}\n'),
        ("c.json", ' [{"image": "a.jpg"}]'),
        ("c.csv", "image,raw\na.jpg,x\n"),
        ("c.tsv", "image\traw\na.jpg\tx\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, name, text):
    save(tmp_path, {name: BOM + text.encode()})
    assert next(iter(read(tmp_path / name)[0].fields.items())) == ("image", "a.jpg")


def test_a_byte_order_mark_before_a_list_of_images(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((2, 77), np.int32))
    save(tmp_path, {"list.txt": BOM + b"a.jpg\r\n\nb.jpg\r\n"})
    rows = read(tmp_path / "ids.npy", images=tmp_path / "list.txt")
    assert [row.fields["image"] for row in rows] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("kind", ["c.tsv", "c.csv", "c.jsonl", "c.json"])
@pytest.mark.parametrize("style", ["plain", "data", "urlsafe"])
def test_pictures_in_base64(tmp_path, kind, style):
    code = base64.urlsafe_b64encode(JPEG).decode() if style == "urlsafe" else base64.b64encode(JPEG).decode()
    code = f"data:image/jpeg;base64,{code}" if style == "data" else code
    entries = [{"picture": code, "raw": "x"}, {"picture": code[:80] + "????" + code[84:], "raw": "y"}]
    if kind == "c.jsonl":
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
    elif kind == "c.json":
        text = json.dumps(entries)
    else:
        sign = "\t" if kind == "c.tsv" else ","
        quote = '"' if sign == "," else ""
        text = "".join(f"{quote}{a}{quote}{sign}{b}\n" for a, b in [("picture", "raw"), *(e.values() for e in entries)])
    save(tmp_path, {kind: text})
    rows = read(tmp_path / kind)
    assert [outcome(row) for row in rows] == [JPEG, "image is not complete base64"] and rows[1].fields["raw"] == "y"


def test_a_picture_of_megabytes_in_a_table(tmp_path):
    picture = b"\xff\xd8\xff" + bytes(3_000_000)
    code = base64.b64encode(picture).decode()
    save(tmp_path, {"c.csv": f"image,raw\n{code},x\n", "c.tsv": f"image\traw\n{code}\tx\n"})
    assert [read(tmp_path / name)[0].image == picture for name in ("c.csv", "c.tsv")] == [True, True]


def test_a_thumbnail_does_not_replace_the_picture_that_a_row_names(tmp_path):
    code = base64.b64encode(PNG).decode()
    save(tmp_path, {"c.jsonl": json.dumps({"image": "a.jpg", "thumbnail": code}) + "\n"})
    row = read(tmp_path / "c.jsonl")[0]
    assert row.image is None and row.fields == {"image": "a.jpg", "thumbnail": PNG} and row.folder == tmp_path


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = "[" * 150 + "]" * 150  # Python reads it, but cannot hand it to a worker process everywhere


@pytest.mark.parametrize("value", [DEEP, NESTED, "9" * 5000, '"\\x"', "{" * 100_000])
@pytest.mark.parametrize("name", ["c.jsonl", "c.json"])
def test_json_that_cannot_be_read_is_named(tmp_path, name, value):
    good, bad = '{"image": "a.jpg"}', f'{{"image": "b.jpg", "z": {value}}}'
    save(tmp_path, {name: f"{good}\n{bad}\n" if name == "c.jsonl" else f"[{good}, {bad}]"})
    place = r"line 2: " if name == "c.jsonl" else r"the whole file: "
    with pytest.raises(SourceError, match=rf"c\.jsonl?: {place}.*JSON"):
        read(tmp_path / name)


COCO = {
    "images": [{"id": 7, "file_name": "7.jpg", "height": 3}, {"id": 5, "file_name": "5.jpg"}, {"id": 9}],
    "annotations": [
        {"image_id": 5, "caption": "five"},
        {"image_id": 7, "caption": "seven"},
        {"image_id": 5, "caption": "fünf"},
        {"image_id": 8, "caption": "eight"},
    ],
}


def test_coco(tmp_path):
    save(tmp_path, {"captions_val.json": json.dumps(COCO)})
    rows = read(tmp_path / "captions_val.json")
    assert [(row.fields.get("image"), row.fields["captions"]) for row in rows] == [
        ("7.jpg", ["seven"]),
        ("5.jpg", ["five", "fünf"]),
        (None, []),
        (None, ["eight"]),
    ]
    assert rows[0].fields["height"] == 3 and rows[0].folder == tmp_path
    assert [outcome(row) for row in rows] == [None, None, None, "captions of a picture that is not listed"]
    assert [row.name for row in Source(tmp_path / "captions_val.json").rows(2)] == [row.name for row in rows][2:]


def test_karpathy(tmp_path):
    sentences = [{"raw": "one", "tokens": ["one"]}, {"raw": "two"}]
    images = [
        {"filename": "a.jpg", "filepath": "val2014", "split": "restval", "sentences": sentences},
        {"filename": "b.jpg", "split": "test", "sentences": []},
    ]
    save(tmp_path, {"dataset.json": json.dumps({"images": images, "dataset": "coco"})})
    rows = [row.fields for row in read(tmp_path / "dataset.json")]
    assert [(row["image"], row["captions"], row["split"]) for row in rows] == [
        ("val2014/a.jpg", ["one", "two"], "restval"),
        ("b.jpg", [], "test"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "object with nothing; should be a list of objects"),
        ({"image": {"0": "a.jpg"}, "raw": {"0": "x"}}, "object with 'image', 'raw'; should be a list"),
        ({"images": [{"id": 1}], "annotations": []}, "no annotation has a caption"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}, "annotation 0 has no image_id and cap"),
        ({"images": [{"id": 1}] * 2, "annotations": [{"image_id": 1, "caption": "x"}]}, "id 1 of an earlier one"),
        ({"images": [{"id": [1]}], "annotations": [{"image_id": 1, "caption": "x"}]}, "is not the id of a picture"),
        ({"images": [{"filename": 3, "sentences": []}]}, "image 0 is not"),
        ([["a.jpg", "x"]], "entry 0 is a list"),
    ],
)
def test_json_of_another_form_is_named(tmp_path, content, message):
    save(tmp_path, {"c.json": json.dumps(content)})
    with pytest.raises(SourceError, match=rf"c\.json: .*{message}"):
        read(tmp_path / "c.json")


def test_chinese_clip(tmp_path):
    code = base64.b64encode(JPEG).decode()
    texts = [{"text_id": 1, "text": "猫", "image_ids": [11, 12]}, {"text_id": 2, "text": "狗", "image_ids": [11, 99]}]
    save(
        tmp_path,
        {
            "train_imgs.tsv": f"11\t{code}\n12\t{code}\n13\tbroken\n",
            "train_texts.jsonl": "".join(json.dumps(text) + "\n" for text in texts),
        },
    )
    source = Source(tmp_path / "train_imgs.tsv")
    rows = list(source.rows())
    assert [row.fields["captions"] for row in rows] == [["猫", "狗"], ["猫"], [], ["狗"]]
    assert [outcome(row) for row in rows] == [
        JPEG,
        JPEG,
        "image is not complete base64",
        "captions of a picture that is not listed",
    ]
    assert [row.name for row in source.rows(3)] == [rows[3].name]
    before = source.fingerprint()
    save(tmp_path, {"train_texts.jsonl": json.dumps(texts[0])})
    assert source.fingerprint() != before


# ---- tar -------------------------------------------------------------------------------------------------------------


def pack(members, **options) -> bytes:
    """A tar of (name, content) or ready TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member in members:
            name, content = (member, b"") if isinstance(member, tarfile.TarInfo) else member
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


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
    with pytest.raises(SourceError, match="behind the end mark"):
        read(tmp_path / "s.tar")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_pictures_with_texts_beside_them(tmp_path):
    files = {
        "d/00000/000.jpg": JPEG,
        "d/00000/000.txt": BOM + b"one",
        "d/00000/000.json": '{"caption": "uno", "path": "/etc/passwd", "jpg": "other.jpg"}',
        "d/00000/001.v2.png": PNG,
        "d/00000/001.v2.raw.txt": "two",
        "d/00001/002.jpg": JPEG,  # a picture without text
        "d/00001/003.txt": "four",  # a text without picture
        "d/00001/004.jpg": JPEG,
        "d/00001/004.png": PNG,
        "d/00001/004.txt": "five",
        "d/00002/005.json": '{"status": "failed"}',
        "d/00000.parquet": "not read",
        "d/00000_stats.json": "{}",
        "d/.ipynb_checkpoints/000.jpg": JPEG,
        "d/.ipynb_checkpoints/000.txt": "hidden",
        "d/__MACOSX/00000/._000.jpg": JPEG,
        "d/00000/._000.jpg": JPEG,
        "d/00000/.DS_Store": "x",
    }
    save(tmp_path, files)
    source = Source(tmp_path / "d")
    rows = list(source.rows())
    assert {row.name: outcome(row) for row in rows} == {
        "d/00000/000": JPEG,
        "d/00000/001.v2": PNG,
        "d/00001/002": JPEG,
        "d/00001/003": "missing image",
        "d/00001/004": "several pictures under one name",
        "d/00002/005": "missing image",
    }
    assert rows[0].fields["txt"] == "one" and rows[0].fields["caption"] == "uno" and rows[0].fields["jpg"] == JPEG
    assert rows[1].fields["raw"] == "two" and rows[3].fields["txt"] == "four"
    assert [row.name for row in source.rows(2)] == [row.name for row in rows[2:]]
    before = source.fingerprint()
    save(tmp_path, {"d/00000/000.txt": "another"})
    assert source.fingerprint() != before and Source(tmp_path / "d").files == [tmp_path / "d"]


@pytest.mark.parametrize("outside", [False, True])
def test_links_lead_out_of_a_folder_of_pairs_only_if_allowed(tmp_path, outside):
    files = {"far/0.jpg": JPEG, "far/0.txt": "secret", "d/1.jpg": JPEG, "d/1.txt": "one"}
    save(tmp_path, files | {f"d/{name}": content for name, content in {"2.txt": "two", "3.jpg": JPEG}.items()})
    (tmp_path / "d" / "2.jpg").symlink_to("../far/0.jpg")
    (tmp_path / "d" / "3.txt").symlink_to(tmp_path / "far" / "0.txt")
    (tmp_path / "d" / "4.jpg").symlink_to("1.jpg")
    (tmp_path / "d" / "4.txt").symlink_to(tmp_path / "d" / "1.txt")
    (tmp_path / "d" / "folder").symlink_to(tmp_path / "far")
    (tmp_path / "e").symlink_to("d")
    found = {row.name: (outcome(row), row.fields["txt"]) for row in Source(tmp_path / "e", outside=outside).rows()}
    wrong = "a link that leads out of the folder"
    assert found == {
        "e/1": (JPEG, "one"),
        "e/2": (JPEG if outside else wrong, "two"),
        "e/3": (JPEG, "secret" if outside else wrong),
        "e/4": (JPEG, "one"),
        "e/folder/0": (JPEG, "secret") if outside else (wrong, wrong),
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "00001.parquet"], ["00000.tar", "00001.tar"]),
        (["a.tar.gz", "a.parquet", "sub/b.tgz"], ["a.tar.gz", "sub/b.tgz"]),
        (["a.parquet", "b.parquet"], ["a.parquet", "b.parquet"]),
        (["c.jsonl", ".ipynb_checkpoints/c-checkpoint.jsonl", "__MACOSX/._c.jsonl", "._c.jsonl"], ["c.jsonl"]),
        (["c.jsonl", "images/0.jpg", "images/1.jpg"], ["c.jsonl"]),
        (["captions.json", "images/0.jpg"], ["captions.json"]),
    ],
)
def test_what_a_folder_holds(tmp_path, files, expected):
    save(tmp_path, dict.fromkeys(files, "[]"))
    assert [str(file.relative_to(tmp_path)) for file in Source(tmp_path).files] == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jsonl", "b.csv", "c.csv"], r"1 jsonl \(a\.jsonl\); 2 csv \(b\.csv, c\.csv\); give files of one kind"),
        (["a.tar", "b.parquet"], r"1 tar \(a\.tar\); 1 parquet \(b\.parquet\)"),
        (["a.jsonl", "0.jpg", "0.txt"], r"1 pictures with texts \(.*\); 1 jsonl \(a\.jsonl\)"),
        (["all.json", "x/0.jpg", "x/0.txt"], r"1 pictures with texts \(.*\); 1 json \(all\.json\)"),
        (["0.jpg", "1.jpg"], "2 pictures, none with a .txt or .json"),
        (["readme.md"], "names no file that is known"),
    ],
)
def test_a_folder_of_several_kinds_or_of_none_says_what_it_holds(tmp_path, files, message):
    save(tmp_path, dict.fromkeys(files, "[]"))
    with pytest.raises(ValueError, match=message):
        Source(tmp_path)


def test_linked_folders_are_walked_once(tmp_path):
    save(tmp_path, {"d/a.tar": "", "far/b.tar": ""})
    (tmp_path / "d" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "d" / "round").symlink_to(tmp_path / "d")
    assert [file.name for file in Source(tmp_path / "d").files] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a,b.jsonl", ["a,b.jsonl"]),
        ("a,b.jsonl,c.jsonl", ["a,b.jsonl", "c.jsonl"]),
        ("c.jsonl, d-{00..01}.jsonl,", ["c.jsonl", "d-00.jsonl", "d-01.jsonl"]),
        ("d-{00..01}.jsonl,c.jsonl", ["d-00.jsonl", "d-01.jsonl", "c.jsonl"]),
        ("{c,d-00}.jsonl", ["c.jsonl", "d-00.jsonl"]),
        ("x,y/*.jsonl", ["x,y/e.jsonl", "x,y/f.jsonl"]),
        ("x,y/{e,f}.jsonl,d-*.jsonl", ["x,y/e.jsonl", "x,y/f.jsonl", "d-00.jsonl", "d-01.jsonl"]),
        ("x,y", ["x,y/e.jsonl", "x,y/f.jsonl"]),
        ("b[1].jsonl", ["b[1].jsonl"]),
    ],
)
def test_lists_ranges_patterns_and_names_with_commas(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    names = ("a,b", "c", "d-00", "d-01", "x,y/e", "x,y/f", "b[1]")
    save(tmp_path, {f"{name}.jsonl": "{}" for name in names})
    assert [str(file) for file in Source(spec).files] == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("d-{00..03}.jsonl", r"'d-02\.jsonl' names no file"),
        ("{000000..9999999}.tar", "stands for more than 1,000,000 files"),
        ("d-{01..00}.jsonl", "names nothing"),
        (",".join(["d-00.jsonl"] * 500) + ",none.jsonl", r"'none\.jsonl' names no file"),
        ("a\0b.jsonl", "names no file"),
    ],
)
def test_what_names_no_file_is_told(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, {"d-00.jsonl": "{}", "d-01.jsonl": "{}"})
    with pytest.raises(ValueError, match=message):
        Source(spec)


def test_names_that_are_not_utf8(tmp_path):
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(place)
    for name, content in {b"0.jpg": JPEG, b"0.txt": b"x", b"\xfe.jpg": JPEG, b"\xfe.txt": b"y"}.items():
        with open(os.fsencode(place) + b"/" + name, "wb") as file:
            file.write(content)
    source = Source(place)
    assert [outcome(row) for row in source.rows()] == [JPEG, JPEG]
    json.dumps(source.fingerprint()).encode()
    member = tarfile.TarInfo(os.fsdecode(b"\xff.jpg"))
    save(tmp_path, {"s.tar": pack([member], format=tarfile.GNU_FORMAT, errors="surrogateescape")})
    assert [row.name for row in read(tmp_path / "s.tar")] == [r"s.tar \xff"]


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_change_in_the_middle_changes_the_fingerprint(tmp_path, monkeypatch):
    text = "".join(json.dumps({"image": f"{i}.jpg", "raw": "a cat"}) + "\n" for i in range(20_000))
    save(tmp_path, {"c.jsonl": text})
    source = Source(tmp_path / "c.jsonl")
    about = os.stat(tmp_path / "c.jsonl")
    before = source.fingerprint()
    changed = text.replace('9999.jpg", "raw": "a cat"', '9999.jpg", "raw": "a dog"', 1)
    save(tmp_path, {"c.jsonl": changed})
    os.utime(tmp_path / "c.jsonl", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert source.fingerprint() != before
    save(tmp_path, {"c.jsonl": text})
    assert source.fingerprint() == before  # of smaller files only the content counts
    monkeypatch.setattr("rwkv_clip.data.sources.WHOLE", 1 << 16)
    large = source.fingerprint()
    os.utime(tmp_path / "c.jsonl", ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert source.fingerprint() != large


def test_the_list_of_images_is_part_of_the_fingerprint(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((1, 77), np.int32))
    save(tmp_path, {"list.txt": "a.jpg\n"})
    source = Source(tmp_path / "ids.npy", tmp_path / "list.txt")
    before = source.fingerprint()
    save(tmp_path, {"list.txt": "b.jpg\n"})
    assert source.fingerprint() != before


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

# Reads everything that each of argv names, and prints the megabytes that this took beyond what the imports took.
MEASURE = """
import resource, sys
from rwkv_clip.data.sources import Source
import pyarrow.parquet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[2:]:
    try:
        print(sum(1 for _ in Source(path, sys.argv[1]).rows()), "rows")
    except ValueError as error:
        print(type(error).__name__, error)
print(peak() - before)
"""


def measure(folder, names) -> tuple[dict[str, str], int]:
    """What reading each file came to, and the memory of the largest."""
    pytest.importorskip("pyarrow")
    save(folder, {"list.txt": "a\nb\n"})
    command = [sys.executable, "-c", MEASURE, folder / "list.txt", *(folder / name for name in names)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, grown = done.stdout.splitlines()
    return dict(zip(names, said, strict=True)), int(grown)


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


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_files_of_nothing_but_room_are_refused_unread(tmp_path):
    names = ["c.jsonl", "c.json", "c.csv", "c.tsv", "c.tar", "c.npy", "c.parquet"]
    for name in names:
        with open(tmp_path / name, "wb") as file:
            if name == "c.npy":
                file.write(npy("(2, 77)", 2, 2 << 30, b""))
            file.truncate(3 << 30)
    said, grown = measure(tmp_path, names)
    assert grown < 200 and all(said[name].startswith("SourceError") and name in said[name] for name in names), said


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "c.jsonl", "wb") as file:
        file.write(b'{"image": "a.jpg"}\n')
        file.truncate(MAX_LINE + 100)
    rows = Source(tmp_path / "c.jsonl").rows()
    assert next(rows).fields == {"image": "a.jpg"}
    with pytest.raises(SourceError, match=r"c\.jsonl: line 2 has more than"):
        next(rows)


def test_small_compressed_tars_do_not_fill_the_memory(tmp_path):
    zeros, names = gzip.compress(bytes(1 << 24), 9) * 12, {"L.tgz": b"L", "x.tgz": b"x", "0.tgz": b"0"}
    for name, kind in names.items():
        save(tmp_path, {name: gzip.compress(header(kind=kind, size=binary(3 << 30))) + zeros})
    said, grown = measure(tmp_path, list(names))
    assert grown < 100 and all(said[name].startswith("SourceError") and name in said[name] for name in names), said
