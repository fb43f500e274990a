"""Chinese-CLIP's TSV and JSONL: made from other data with ids of their own, and as sources of records."""

import base64
import csv
import json
import shutil

import numpy as np
import pytest

from helpers.chinese_clip import RELEASED, write_files, write_split
from helpers.pictures import picture
from rwkv_clip.data.build import build_records
from rwkv_clip.data.chinese_clip import ImageFile
from rwkv_clip.data.lmdb import LmdbSet
from rwkv_clip.data.lmdb_build import LmdbSettings, build_lmdb
from rwkv_clip.data.pairs import PairsSettings, convert
from rwkv_clip.data.records import RecordSet
from rwkv_clip.data.rows import SourceError
from rwkv_clip.data.sources import Source
from rwkv_clip.errors import run_command
from rwkv_clip.tokenizer import BERT_CHINESE, make_tokenizer

# ---- made from a folder and a table


@pytest.fixture
def table(tmp_path):
    """A folder of pictures, two of them equal, and a CSV with a line for each text."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, seed in (("a.jpg", 1), ("b.jpg", 2), ("copy of a.jpg", 1), ("c.jpg", 3)):
        (photos / name).write_bytes(picture(seed))
    rows = [
        ("a.jpg", "一只猫"),
        ("b.jpg", "“HELLO” 狗"),
        ("a.jpg", "黑猫"),
        ("copy of a.jpg", "猫"),
        ("c.jpg", '"Hello" 狗'),
    ]
    rows += [("a.jpg", "一只猫"), ("c.jpg", " "), ("gone.jpg", "x")]
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *rows])
    return tmp_path


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_folder_and_a_table_become_numbered_files(table):
    found = convert(
        PairsSettings(str(table / "captions.csv"), str(table / "out"), "valid", images=str(table / "photos"))
    )
    rows = [line.split("\t") for line in (table / "out/valid_imgs.tsv").read_text().splitlines()]
    assert [(number, base64.b64decode(code)) for number, code in rows] == [(str(i), picture(i)) for i in (1, 2, 3)]
    assert lines(table / "out/valid_texts.jsonl") == [
        {"text_id": 1, "text": "一只猫", "image_ids": [1]},
        {"text_id": 2, "text": "“HELLO” 狗", "image_ids": [2, 3]},
        {"text_id": 3, "text": "黑猫", "image_ids": [1]},
        {"text_id": 4, "text": "猫", "image_ids": [1]},
    ]
    assert [row["image"] for row in lines(table / "out/valid_names.jsonl")] == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.rows == 8 and found.repeated == 3 and found.skipped == {"no text": 1, "missing image": 1}
    assert "3 images, 4 texts, 5 pairs from 8 rows" in str(found) and "captions.csv line 9: missing image" in str(found)


def test_what_is_made_can_be_built_and_read(table):
    convert(PairsSettings(str(table / "captions.csv"), str(table / "out"), images=str(table / "photos")))
    (report,) = build_lmdb(LmdbSettings(str(table / "out"), "train"))
    assert (report.images, report.pairs) == (3, 5) and not report.remarks
    records = LmdbSet(table / "out/lmdb/train", make_tokenizer(BERT_CHINESE, 12))
    assert [records.sample(i)[0] for i in range(5)] == [picture(i) for i in (1, 2, 3, 1, 1)]


def test_lists_of_texts_conditions_and_fields(table):
    rows = [
        {"image": "a.jpg", "captions": ["x", "y"], "zh": ["猫", "狗"], "split": "train"},
        {"image": "b.jpg", "captions": ["z"], "zh": ["猫", 7], "split": "train"},
        {"image": "c.jpg", "captions": ["w"], "zh": "鸟", "split": "test"},
    ]
    (table / "photos/all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = PairsSettings(str(table / "photos/all.jsonl"), str(table / "one"), where=("split=train",))
    convert(common)
    assert [(r["text"], r["image_ids"]) for r in lines(table / "one/train_texts.jsonl")] == [
        ("x", [1]),
        ("y", [1]),
        ("z", [2]),
    ]
    found = convert(PairsSettings(common.source, str(table / "two"), texts=("zh", "captions.0"), where=common.where))
    texts = [(r["text"], r["image_ids"]) for r in lines(table / "two/train_texts.jsonl")]
    assert texts == [("猫", [1, 2]), ("狗", [1]), ("x", [1]), ("z", [2])]
    assert found.skipped == {"a text is not a string": 1}


@pytest.mark.parametrize(
    "change, code, words",
    [
        ({}, 2, "train_imgs.tsv: exists; give --overwrite"),
        ({"split": "../x"}, 2, "is not the name of a split"),
        ({"split": "new", "texts": ("title",)}, 2, "no row has a field 'title'; they have image, text"),
        ({"split": "new", "image_field": "file"}, 2, "no row has a field 'file'"),
        ({"split": "new", "where": ("split=x",)}, 2, "no row has a field 'split'"),
        ({"split": "new", "where": ("text=x y",)}, 3, "has no row that meets text=x y"),
        ({"split": "new", "images": "nowhere"}, 2, "'nowhere' is no folder"),
        ({"split": "new", "images": None}, 3, "nothing to write"),
    ],
)
def test_what_cannot_be_converted(change, code, words, table, capsys):
    (table / "out").mkdir()
    (table / "out/train_imgs.tsv").write_text("mine")
    settings = {"source": str(table / "captions.csv"), "output": str(table / "out"), "images": str(table / "photos")}
    assert run_command(lambda: convert(PairsSettings(**{**settings, **change})) and 0) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in (table / "out").iterdir()] == ["train_imgs.tsv"]


def test_the_input_is_not_replaced(tmp_path):
    write_files(tmp_path, "train", {1: picture(1)}, [(1, "x", [1])])
    with pytest.raises(ValueError, match="a file of the input"):
        convert(PairsSettings(str(tmp_path / "train_imgs.tsv"), str(tmp_path), overwrite=True))


# ---- as a source of records


@pytest.mark.parametrize("kind", ["train_texts.jsonl", "lmdb/train"])
def test_a_record_for_each_text_of_a_picture(kind, tmp_path):
    report = build_records(str(RELEASED / kind), str(tmp_path / "t"), tokenizer=BERT_CHINESE, context=52, workers=1)
    records, pairs = RecordSet(tmp_path / "t"), LmdbSet(RELEASED / "lmdb/train", make_tokenizer(BERT_CHINESE, 52))
    assert report.count == len(records) == len(pairs) == 10 and not report.skipped
    assert (records.tokenizer, records.vocab_size, records.context) == (BERT_CHINESE, 21128, 52)
    for i in range(10):
        assert (records.sample(i)[1] == pairs.sample(i)[1]).all()
        assert pairs.sample(i)[0][:2] != b"\xff\xd8" or records.sample(i)[0] == pairs.sample(i)[0]


def test_a_record_for_each_picture_with_its_texts(tmp_path):
    build_records(
        str(RELEASED / "valid_imgs.tsv"),
        str(tmp_path / "t"),
        texts=("captions.0", "captions.1"),
        tokenizer=BERT_CHINESE,
        context=24,
    )
    records, tokenizer = RecordSet(tmp_path / "t"), make_tokenizer(BERT_CHINESE, 24)
    texts = lines(RELEASED / "valid_texts.jsonl")
    order = [int(line.partition("\t")[0]) for line in (RELEASED / "valid_imgs.tsv").read_text().splitlines()]
    for i, image_id in enumerate(order):
        own = [tokenizer.prepare(row["text"]) for row in texts if image_id in row["image_ids"]]
        assert (records.sample(i)[1] == tokenizer((own * 2)[:2]).numpy()).all()


def test_rows_of_no_use_are_counted(tmp_path):
    images = {1: picture(1), 2: "x%", 3: base64.b64encode(b"junk" * 30).decode()}
    write_files(
        tmp_path, "train", images, [(1, "a", [1, 9]), (2, "b", [2]), (3, "c", [3]), (4, " ", [1]), (5, "e", [])]
    )
    report = build_records(str(tmp_path / "train_texts.jsonl"), str(tmp_path / "t"))
    assert (
        report.count == 1
        and report.rows == 5
        and report.skipped
        == {
            "missing image": 1,
            "the picture is not complete base64": 1,
            "unreadable image": 1,
            "empty text": 1,
        }
    )
    split = write_split(
        tmp_path / "s", {1: base64.b64encode(picture(1))}, [(1, 1, "a"), (2, 2, "b")], p_2=b"x", num_samples=b"3"
    )
    assert build_records(str(split), str(tmp_path / "u")).skipped == {
        "missing image": 1,
        "a pair of the LMDB is damaged": 1,
    }


def test_rows_can_be_passed_over_and_a_change_is_noticed(tmp_path):
    shutil.copytree(RELEASED, tmp_path / "set")
    for kind, changed in (("train_texts.jsonl", "train_imgs.tsv"), ("lmdb/train", "lmdb/train/imgs/data.mdb")):
        source = Source(tmp_path / "set" / kind)
        rows = list(source.rows())
        assert [row.name for row in source.rows(4)] == [row.name for row in rows[4:]] and len(rows) == 10
        assert source.count() in (None, 10) and source.holds(tmp_path / "set" / changed)
        before = source.fingerprint()
        data = bytearray((tmp_path / "set" / changed).read_bytes())
        data[-100] ^= 1
        (tmp_path / "set" / changed).write_bytes(data)
        assert Source(tmp_path / "set" / kind).fingerprint() != before


def test_texts_without_their_pictures_are_a_manifest(tmp_path):
    (tmp_path / "my_texts.jsonl").write_text('{"image": "a.jpg", "text": "x"}\n')
    assert Source(tmp_path / "my_texts.jsonl").kind == "jsonl"
    with pytest.raises(SourceError, match="line 1 is not an object"):
        write_files(tmp_path, "my", {1: picture(1)}, [])
        (tmp_path / "my_texts.jsonl").write_text("[]\n")
        list(Source(tmp_path / "my_texts.jsonl").rows())


def test_pictures_at_random(tmp_path):
    write_files(tmp_path, "t", {i: picture(i) for i in (5, 3)}, [])
    with open(tmp_path / "t_imgs.tsv", "a") as file:
        file.write(
            f"\r\n 5\t{base64.b64encode(picture(8)).decode()}\r\n7\t{base64.urlsafe_b64encode(picture(7)).decode()}"
        )
    images = ImageFile(tmp_path / "t_imgs.tsv")
    assert images.ids == ["5", "3", "7"] and 5 in images and "9" not in images
    assert [images.picture(i) for i in (7, 3, "5")] == [picture(7), picture(3), picture(8)]
    assert np.unique(images.ids).size == 3
