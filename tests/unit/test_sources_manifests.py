"""Manifests: every row is used or says why not, and every damage is named."""

import base64
import json

import numpy as np
import pytest
from source_files import BOM, DEEP, JPEG, PNG, outcome, read, save

from rwkv_clip.data.rows import MAX_LINE, SourceError
from rwkv_clip.data.sources import Source

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


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "c.jsonl", "wb") as file:
        file.write(b'{"image": "a.jpg"}\n')
        file.truncate(MAX_LINE + 100)
    rows = Source(tmp_path / "c.jsonl").rows()
    assert next(rows).fields == {"image": "a.jpg"}
    with pytest.raises(SourceError, match=r"c\.jsonl: line 2 has more than"):
        next(rows)
