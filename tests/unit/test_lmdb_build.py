"""The builder of LMDB folders: what it takes, leaves out and says; how it grows, goes on and refuses."""

import base64
import subprocess
import sys

import pytest

from helpers.chinese_clip import RELEASED, dump, write_files, write_split
from helpers.pictures import picture
from rwkv_clip.data import lmdb_build
from rwkv_clip.data.chinese_clip import ImageFile
from rwkv_clip.data.lmdb import LmdbSet, open_split
from rwkv_clip.data.lmdb_build import LmdbSettings, build_lmdb
from rwkv_clip.data.recordio import RecordError
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.data.rows import SourceError
from rwkv_clip.errors import run_command
from rwkv_clip.tokenizer import make_tokenizer

IMAGES = {i: picture(i) for i in (5, 3, 11)}
TEXTS = [(1, "一只猫", [3]), (2, "“狗”", [11, 5]), (9, "鸟", [3, 11])]


def build(folder, **more):
    (report,) = build_lmdb(LmdbSettings(str(folder), "train", **more))
    return report


def pairs_of(folder) -> list:
    records = LmdbSet(folder, make_tokenizer(context=8))
    return [records._open()[0].pair(i) for i in range(len(records))]


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path, "train", IMAGES, TEXTS)
    return tmp_path


def test_pairs_are_in_the_order_of_the_texts(source):
    report = build(source)
    assert (report.images, report.pairs, report.lines, report.texts) == (3, 5, 3, 3) and not report.remarks
    assert pairs_of(source / "lmdb/train") == [(i, number, text) for number, text, ids in TEXTS for i in ids]
    assert dict(dump(source / "lmdb/train")["imgs"])[b"num_images"] == b"3"


BAD_IMAGES = [
    ("12", "an id, a tab"),
    ("12\tx\ty", "an id, a tab"),
    ("a.jpg\t" + "A" * 8, "not a whole number"),
    ("007\t" + "A" * 8, "not a whole number"),
    ("1.0\t" + "A" * 8, "not a whole number"),
    ("12\tAAA", "not complete base64"),
    ("12\tAAA=AAAA", "not complete base64"),
    ("12\tno pictures", "not complete base64"),
    ("12\t" + "A" * 64, "cannot be read"),
    ("12\t" + base64.b64encode(picture(1)[:30]).decode(), "cannot be read"),
]


@pytest.mark.parametrize("line, words", BAD_IMAGES)
def test_lines_of_pictures_that_are_of_no_use(line, words, source):
    file = source / "train_imgs.tsv"
    lines = file.read_text().splitlines()
    file.write_text("\r\n".join([lines[0], line, "", *lines[1:]]))  # without an end of line at the end
    report = build(source)
    assert (report.images, report.pairs, report.lines) == (3, 5, 4)
    assert [words in what for what in report.remarks] == [True] and "train_imgs.tsv line 2: " in report.examples[0]


BAD_TEXTS = [
    ("{", "not a JSON object"),
    ("[1]", "not a JSON object"),
    ('{"text_id": 7, "text": "x"}', "not a JSON object"),
    ('{"text_id": "7", "text": "x", "image_ids": [3]}', "text_id is not"),
    ('{"text_id": true, "text": "x", "image_ids": [3]}', "text_id is not"),
    ('{"text_id": 7, "text": 7, "image_ids": [3]}', "no text"),
    ('{"text_id": 7, "text": " ", "image_ids": [3]}', "text is empty"),
    ('{"text_id": 7, "text": "x", "image_ids": 3}', "image_ids is not"),
    ('{"text_id": 7, "text": "x", "image_ids": ["3"]}', "image_ids is not"),
    ('{"text_id": 7, "text": "x", "image_ids": [3.0]}', "image_ids is not"),
    ('{"text_id": 7, "text": "x", "image_ids": [4]}', "is not in the TSV"),
    ('{"text_id": 7, "text": "x", "image_ids": []}', "texts without image_ids"),
    ('{"text_id": 7, "text": "%s", "image_ids": [3]}' % ("x" * 70_000), "longer than 63 KiB"),
    ('{"text_id": %s, "text": "x", "image_ids": [3]}' % ("9" * 5000), "not a JSON object"),
    ('{"text_id": %s, "text": "x", "image_ids": [3]}' % ("9" * 20), "text_id is not"),
]


@pytest.mark.parametrize("line, words", BAD_TEXTS)
def test_lines_of_texts_that_are_of_no_use(line, words, source):
    file = source / "train_texts.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, "", *lines[1:]]))
    report = build(source)
    assert (report.images, report.pairs, report.texts) == (3, 5, 4)
    assert [words in what for what in report.remarks] == [True] and "train_texts.jsonl line 2" in report.examples[0]
    assert pairs_of(source / "lmdb/train") == [(i, number, text) for number, text, ids in TEXTS for i in ids]


def test_marks_of_utf8_are_no_part_of_the_first_line(source):
    for name in ("train_imgs.tsv", "train_texts.jsonl"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    report = build(source)
    assert (report.images, report.pairs) == (3, 5) and not report.remarks
    assert ImageFile(source / "train_imgs.tsv").ids == ["5", "3", "11"]


def test_ids_that_come_twice(source):
    images, texts = source / "train_imgs.tsv", source / "train_texts.jsonl"
    images.write_text(images.read_text() + f"5\t{base64.b64encode(picture(77)).decode()}\n")
    texts.write_text(texts.read_text() + '{"text_id": 1, "text": "x", "image_ids": [3, 3]}\n')
    report = build(source)
    assert (report.images, report.pairs, report.lines) == (3, 6, 4)
    assert set(report.remarks) == {lmdb_build.TWICE, lmdb_build.TEXT_TWICE, lmdb_build.SAME}
    found = dict(dump(source / "lmdb/train")["imgs"])
    assert base64.b64decode(found[b"5"]) == picture(77) and found[b"num_images"] == b"3"


def test_a_map_grows_by_need(source, monkeypatch):
    from rwkv_clip.data import lmdb

    monkeypatch.setattr(lmdb, "FIRST_MAP", 1 << 14)
    monkeypatch.setattr(lmdb_build, "COMMIT_LINES", 7)
    write_files(source, "train", {i: picture(i, size=(40, 40)) for i in range(60)}, [(1, "x", list(range(60)))])
    report = build(source)
    assert report.images == report.pairs == 60
    assert (source / "lmdb/train/imgs/data.mdb").stat().st_size < 2 << 20


def test_a_finished_split_is_kept_and_other_files_are_refused(source):
    assert not build(source).kept
    place = source / "lmdb/train/imgs/data.mdb"
    before = place.stat().st_ino
    again = build(source)
    assert again.kept and (again.images, again.pairs) == (3, 5) and place.stat().st_ino == before
    write_files(source, "train", IMAGES, TEXTS[:2])
    with pytest.raises(ValueError, match=r"train: was made from other files .* give --overwrite"):
        build(source)
    assert build(source, overwrite=True).pairs == 3 and len(pairs_of(source / "lmdb/train")) == 3
    assert sorted(path.name for path in (source / "lmdb").iterdir()) == ["train"]


def test_a_split_of_another_program_is_not_replaced(source):
    write_split(source / "lmdb/train", {1: b"x"}, [(1, 1, "x")])
    with pytest.raises(ValueError, match="was not made by this program; give --overwrite"):
        build(source)
    assert build(source, overwrite=True).pairs == 5


def test_files_that_are_mostly_bad_end_the_build(source):
    write_files(source, "train", {**IMAGES, 20: "x", 21: "y", 22: "z", 23: "w"}, TEXTS)
    with pytest.raises(SourceError, match=r"train_imgs\.tsv: 4 of 7 lines are of no use, .*line 4: the picture is not"):
        build(source)
    assert not (source / "lmdb/train").exists()
    assert build(source, max_bad_fraction=0.6).images == 3
    write_files(source, "valid", IMAGES, [(1, "x", [99])])
    with pytest.raises(SourceError, match=r"valid_texts\.jsonl: 1 of 1 lines are of no use"):
        list(build_lmdb(LmdbSettings(str(source), "valid")))
    with pytest.raises(SourceError, match="no text belongs to a picture"):
        list(build_lmdb(LmdbSettings(str(source), "valid", max_bad_fraction=1)))


@pytest.mark.parametrize(
    "splits, more, code, words",
    [
        ("train,absent", {}, 3, "absent_imgs.tsv: no such file"),
        (" ,", {}, 2, "names no split"),
        ("../train", {}, 2, "leads elsewhere"),
        ("train", {"max_bad_fraction": 1.5}, 2, "is not from 0 to 1"),
    ],
)
def test_settings_that_cannot_be(splits, more, code, words, source, capsys):
    assert run_command(lambda: list(build_lmdb(LmdbSettings(str(source), splits, **more))) and 0) == code
    assert words in capsys.readouterr().err and not (source / "lmdb").exists()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "rwkv_clip.data.lmdb", "--data_dir", str(RELEASED), "--splits", "train,valid"]
    for words in ("from 6 pictures and 7 texts", "is complete, kept"):
        done = subprocess.run([*command, "--lmdb_dir", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout and "valid: 3 images and 6 pairs" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "valid"]


def test_a_hidden_test_set_has_pictures_and_no_pairs(source):
    write_files(source, "test", IMAGES, [(1, "x", []), (2, "y", [])])
    (report,) = build_lmdb(LmdbSettings(str(source), "test"))
    assert (report.images, report.pairs) == (3, 0) and "without image_ids" in str(report)
    found = dump(source / "lmdb/test")
    assert dict(found["pairs"]) == {b"num_samples": b"0"} and dict(found["imgs"])[b"num_images"] == b"3"
    assert [name for name, _ in open_split(source / "lmdb/test").image_ids()] == ["11", "3", "5"]
    with pytest.raises(RecordError, match="num_samples is 0: no text has an image"):
        LmdbSet(source / "lmdb/test", make_tokenizer(context=8))
    with pytest.raises(SourceError, match="has no pairs, as hidden test sets"):
        load_retrieval(source / "lmdb/test")


def test_a_text_with_a_pair_is_of_use(source):
    write_files(source, "train", IMAGES, [(1, "x", [3, 3, 99]), (2, "y", [98, 5]), (3, "z", [97])])
    report = build(source)
    assert report.pairs == 2 and sum(report.remarks.values()) == 4
    with pytest.raises(SourceError, match="1 of 3 lines are of no use"):
        build(source, lmdb_dir=str(source / "new"), max_bad_fraction=0.3)
