"""Building records: every kind of input, what is skipped and why, resuming, and the same bytes every time."""

import base64
import csv
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.pictures import picture
from helpers.sources import TEXTS, add_member, contents, make_rows, save_images, save_jsonl
from rwkv_clip.data import build, recordio
from rwkv_clip.data.build import build_records, verify_records
from rwkv_clip.data.fields import Condition, Texts
from rwkv_clip.data.records import RecordError, RecordFile, RecordSet, find_record_files, unpack
from rwkv_clip.data.rows import SourceError
from rwkv_clip.data.sources import Source
from rwkv_clip.tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = (".rec", ".idx", ".json")


@pytest.fixture
def manifest(tmp_path) -> str:
    save_images(tmp_path, 6)
    return save_jsonl(tmp_path / "captions.jsonl", make_rows(6))


def check_standard(prefix, count: int = 6, names=TEXTS) -> None:
    """The records are those of make_rows: pictures byte for byte, tokens of every view in order."""
    records, tokenizer = RecordSet(prefix), make_tokenizer()
    assert (len(records), records.text_names, records.tokenizer, records.vocab_size) == (
        count,
        names,
        "clip-bpe",
        49408,
    )
    for i in range(count):
        image, tokens = records.sample(i)
        assert image == picture(i)
        assert (tokens == tokenizer([f"{view} text {i}" for view in names]).numpy()).all()


# ---- kinds of input


def test_jsonl(manifest, tmp_path):
    report = build_records(manifest, str(tmp_path / "out" / "train"))
    check_standard(tmp_path / "out" / "train")
    assert (report.count, report.skipped, report.fallbacks, report.reencoded) == (6, {}, {}, 0)
    side = json.loads((tmp_path / "out" / "train.json").read_text())
    assert side["views"] == list(TEXTS) and side["count"] == 6 and side["context"] == 77
    file = RecordFile(tmp_path / "out" / "train")
    headers = [unpack(file.read(i))[0] for i in range(6)]
    assert file.keys == [header.id for header in headers] == list(range(6)) and headers[0].flag == 231


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.json"])
def test_tables(tmp_path, name):
    save_images(tmp_path / "images", 6)
    rows, path = make_rows(6), tmp_path / name
    rows[0]["comment"] = 'with, "quotes"' if name == "c.tsv" else 'with, "quotes"\nand a line break'
    if name == "c.json":
        path.write_text(json.dumps(rows))
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, ["comment", "image", *TEXTS], delimiter="\t" if name == "c.tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    build_records(str(path), str(tmp_path / "train"))
    check_standard(tmp_path / "train")


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_webdataset(tmp_path, ending):
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard:02d}.{ending}", "w:gz" if ending == "tar.gz" else "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                add_member(tar, f"a/{i:03d}.jpg", picture(i))
                if i % 2:  # texts in files of their own
                    for text in TEXTS[1:]:
                        add_member(tar, f"a/{i:03d}.{text}.txt", f"{text} text {i}\n".encode())
                    add_member(tar, f"a/{i:03d}.txt", f"raw text {i}\n".encode())
                else:
                    add_member(tar, f"a/{i:03d}.txt", f"raw text {i}".encode())
                    add_member(
                        tar,
                        f"a/{i:03d}.json",
                        json.dumps({text: f"{text} text {i}" for text in TEXTS[1:]}).encode(),
                    )
                add_member(tar, f"a/{i:03d}.cls", b"5")
    build_records(f"{tmp_path}/s-{{00..01}}.{ending}", str(tmp_path / "train"))
    check_standard(tmp_path / "train")
    build_records(f"{tmp_path}/s-*.{ending}", str(tmp_path / "second"))
    assert (tmp_path / "train.rec").read_bytes() == (tmp_path / "second.rec").read_bytes()


def test_damaged_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i in range(4):
            add_member(tar, f"{i}.jpg", picture(i))
            add_member(tar, f"{i}.txt", b"text")
    whole = (tmp_path / "s.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[2560:2660] = b"x" * 100  # the header of the third member
    for data in (whole[:5000], whole[:2100], whole[:2560], whole[:2700], bytes(damaged), b"rubbish" * 200):
        (tmp_path / "s.tar").write_bytes(data)
        with pytest.raises(SourceError, match=r"s\.tar"):
            list(Source(tmp_path / "s.tar").rows())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add_member(tar, "0.jpg", b"\0" * 32_000_001)
        add_member(tar, "0.txt", b"text")
        add_member(tar, "1.jpg", picture(1))
        add_member(tar, "1.txt", b"\xff\xfe")
        add_member(tar, "2.jpg", picture(2))
        add_member(tar, "2.txt", b"good")
    report = build_records(str(tmp_path / "s.tar"), str(tmp_path / "train"))
    assert report.skipped == {"image too large": 1, "text is not UTF-8 or JSON": 1} and report.count == 1


def test_a_damaged_checksum_fails_the_build(tmp_path):
    with tarfile.open(tmp_path / "s.tgz", "w:gz") as tar:
        for i in range(4):
            add_member(tar, f"{i}.jpg", picture(i))
            add_member(tar, f"{i}.txt", b"text")
    whole = (tmp_path / "s.tgz").read_bytes()
    (tmp_path / "s.tgz").write_bytes(whole[:-8] + bytes(4) + whole[-4:])  # every member is as it was
    with pytest.raises(SourceError, match=r"s\.tgz: .*CRC"):
        build_records(str(tmp_path / "s.tgz"), str(tmp_path / "train"))
    assert not list(tmp_path.glob("train*"))


@pytest.mark.parametrize("layout", ["coco", "karpathy", "base64.tsv", "base64.jsonl", "pairs", "tar"])
def test_layouts_of_other_programs(tmp_path, layout):
    rows, path = make_rows(6), tmp_path / "data" / "captions.json"
    captions = [[row[text] for text in TEXTS] for row in rows]
    options = {"texts": ("captions.0", "captions.1", "captions.2")} if layout in ("coco", "karpathy") else {}
    save_images(tmp_path / "data", 6)
    if layout == "coco":
        images = [{"id": 10 - i, "file_name": f"{i}.jpg"} for i in range(6)]
        texts = [{"image_id": 10 - i, "caption": captions[i][k]} for k in range(3) for i in (3, 1, 0, 2, 5, 4)]
        path.write_text(json.dumps({"images": images, "annotations": texts}))
    elif layout == "karpathy":
        images = [{"filename": f"{i}.jpg", "sentences": [{"raw": text} for text in captions[i]]} for i in range(6)]
        path.write_text(json.dumps({"images": images}))
    elif layout == "pairs":
        path = path.parent
        for i, texts in enumerate(captions):
            (path / f"{i}.txt").write_text(texts[0])
            (path / f"{i}.json").write_text(json.dumps(dict(zip(TEXTS[1:], texts[1:])) | {"image": "0.jpg"}))
    elif layout == "tar":
        path = tmp_path / "s.tar"
        with tarfile.open(path, "w") as tar:
            for i, row in enumerate(rows):
                about = row | {"image": str(tmp_path / "data" / "0.jpg"), "path": "0.jpg", "filename": "0.jpg"}
                add_member(tar, f"{i}.jpg", picture(i))
                add_member(tar, f"{i}.json", json.dumps(about).encode())
    else:
        path = tmp_path / layout
        rows = [row | {"image": base64.b64encode(picture(i)).decode()} for i, row in enumerate(rows)]
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        lines = [json.dumps(row) for row in rows] if layout == "base64.jsonl" else lines
        path.write_text("\n".join(lines))
    build_records(str(path), str(tmp_path / "train"), **options)
    check_standard(tmp_path / "train")


@pytest.mark.parametrize("layout", ["bytes", "struct", "path", "yfcc15m"])
def test_parquet(tmp_path, layout):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    save_images(tmp_path / "data", 6)
    rows, name = make_rows(6), "image"
    for i, row in enumerate(rows):
        if layout == "bytes":
            row["image"] = picture(i)
        elif layout == "struct":
            row["image"] = {"bytes": picture(i), "path": None} if i % 2 else {"bytes": None, "path": f"{i}.jpg"}
        elif layout == "yfcc15m":  # the columns of the published set: struct of bytes, float32 token ids
            tokens = make_tokenizer()([row[text] for text in TEXTS]).numpy().reshape(-1)
            row.clear()
            row.update({"images": {"bytes": picture(i)}, "texts": tokens.astype(np.float32).tolist()})
            name = "images"
    for part in range(2):
        table = pa.Table.from_pylist(rows[3 * part : 3 * part + 3])
        if layout == "yfcc15m":
            table = table.cast(pa.schema([table.schema.field(name), pa.field("texts", pa.list_(pa.float32()))]))
        pq.write_table(table, tmp_path / "data" / f"train-{part}.parquet", row_group_size=2)
    report = build_records(str(tmp_path / "data"), str(tmp_path / "train"))
    check_standard(tmp_path / "train")
    assert report.rows == 6
    source = Source(tmp_path / "data")
    assert source.count() == 6
    for start in range(7):
        assert [row.name for row in source.rows(start)] == [row.name for row in source.rows()][start:]
    (tmp_path / "data" / "train-1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match=r"train-1\.parquet"):
        build_records(str(tmp_path / "data"), str(tmp_path / "other"))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.float32])
def test_npy_of_token_ids(tmp_path, dtype):
    save_images(tmp_path / "pictures", 6)
    tokens = np.stack([make_tokenizer()([row[text] for text in TEXTS]).numpy() for row in make_rows(6)])
    np.save(tmp_path / "tokens.npy", tokens.reshape(6, -1).astype(dtype))
    np.save(tmp_path / "cube.npy", tokens)
    (tmp_path / "list.txt").write_text("".join(f"pictures/{i}.jpg\n" for i in range(6)))
    build_records(str(tmp_path / "tokens.npy"), str(tmp_path / "train"), images=str(tmp_path / "list.txt"))
    check_standard(tmp_path / "train")
    build_records(str(tmp_path / "cube.npy"), str(tmp_path / "cube"), images=str(tmp_path / "list.txt"))
    assert (tmp_path / "train.rec").read_bytes() == (tmp_path / "cube.rec").read_bytes()
    (tmp_path / "list.txt").write_text("0.jpg\n")
    with pytest.raises(SourceError, match=r"has 6 rows, but .* lists 1 images"):
        build_records(str(tmp_path / "tokens.npy"), str(tmp_path / "x"), images=str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="--images FILE"):
        build_records(str(tmp_path / "tokens.npy"), str(tmp_path / "x"))


def test_token_ids_are_checked(tmp_path):
    save_images(tmp_path, 6)
    good = [1.0] * 77
    bad = ([-1.0, *good[1:]], [49408.0, *good[1:]], [0.5, *good[1:]], good[:-1], [float("nan"), *good[1:]])
    rows = [{"image": f"{i}.jpg", "tokens": tokens} for i, tokens in enumerate((good, *bad))]
    report = build_records(save_jsonl(tmp_path / "c.jsonl", rows), str(tmp_path / "train"))
    assert report.count == 1 and report.skipped == {
        "token ids out of range": 4,
        "wrong number of token ids": 1,
    }


# ---- texts, conditions, pictures


def test_missing_texts_fall_back_to_raw_and_are_counted(tmp_path):
    save_images(tmp_path, 6)
    rows = make_rows(6)
    del rows[1]["synthetic"]
    rows[2]["synthetic"], rows[2]["generated"] = "  ", None
    rows[3]["raw"] = ""
    del rows[4]["raw"]
    rows[5]["generated"] = 5
    report = build_records(save_jsonl(tmp_path / "c.jsonl", rows), str(tmp_path / "train"))
    assert report.fallbacks == {"synthetic": 2, "generated": 1} and report.count == 3
    assert report.skipped == {"empty text": 1, "no raw text": 1, "text is not a string": 1}
    tokens, raw = RecordSet(tmp_path / "train").sample(2)[1], make_tokenizer()("raw text 2")
    assert (tokens == raw.numpy()).all()
    side = json.loads((tmp_path / "train.json").read_text())
    assert side["fallbacks"] == report.fallbacks and side["skipped"] == report.skipped
    assert "empty text: 1" in str(report) and "no synthetic text, raw taken instead: 2" in str(report)


@pytest.mark.parametrize("field", ["raw", "caption", "captions", "text", "txt"])
def test_raw_has_many_names(tmp_path, field):
    save_images(tmp_path, 1)
    text = ["raw text 0", "another"] if field == "captions" else "raw text 0"
    build_records(save_jsonl(tmp_path / "c.jsonl", [{"image": "0.jpg", field: text}]), str(tmp_path / "train"))
    check_standard(tmp_path / "train", 1, ("raw",))


def test_texts_from_a_list_of_captions_and_where(tmp_path):
    save_images(tmp_path, 6)
    rows = [
        {"image": f"{i}.jpg", "captions": [f"{text} text {i}" for text in TEXTS], "split": "train"} for i in range(6)
    ]
    odd = [{"image": "0.jpg", "captions": ["x"], "split": split} for split in ("val", "test", None)]
    path = save_jsonl(tmp_path / "c.jsonl", [odd[0], *rows[:3], odd[1], *rows[3:], odd[2]])
    names = ("captions.0", "captions.1", "captions.2")
    report = build_records(path, str(tmp_path / "train"), texts=names, where=("split=train",))
    check_standard(tmp_path / "train")
    assert report.filtered == 3 and report.rows == 9
    names = ("raw=captions.0", "generated=captions.2")
    build_records(path, str(tmp_path / "two"), texts=names, where=("split!=val", "split!=null,test"))
    check_standard(tmp_path / "two", names=("raw", "generated"))


@pytest.mark.parametrize("entries", [("synthetic",), ("raw", "raw"), ("raw", "=x"), ("raw", "x="), ("a.0=",)])
def test_bad_texts_are_refused(entries):
    with pytest.raises(ValueError, match="texts: "):
        Texts.parse(entries)
    with pytest.raises(ValueError, match="where: "):
        Condition.parse("split")


def test_pictures_are_kept_or_encoded_anew(tmp_path):
    whole = picture(0)
    files = {
        "plain.jpg": whole,
        "grey.jpg": picture(1, "L"),
        "cmyk.jpg": picture(2, "CMYK"),
        "rgb.png": picture(3, kind="PNG"),
        "palette.gif": picture(4, "P", "GIF"),
        "alpha.png": picture(5, "RGBA", "PNG"),
        "wide.jpg": picture(6, size=(90, 30)),
        "cut.jpg": whole[: len(whole) // 2],
        "text.jpg": b"not a picture",
        "empty.jpg": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows = [{"image": name, "raw": "text"} for name in [*files, "absent.jpg", ""]]
    source = save_jsonl(tmp_path / "c.jsonl", rows)
    report = build_records(source, str(tmp_path / "train"), max_side=64, verify=True)
    assert report.skipped == {"unreadable image": 3, "missing image": 2} and report.count == report.verified == 7
    assert report.reencoded == 5
    stored = [RecordSet(tmp_path / "train").sample(i)[0] for i in range(7)]
    assert stored[0] == whole and stored[1] == files["grey.jpg"]
    for data, name in zip(stored[2:], list(files)[2:7]):
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.info.get("exif")) == ("JPEG", "RGB", None)
        assert image.size == ((64, 21) if name == "wide.jpg" else (24, 16))


# ---- determinism, shards, resuming


def test_output_does_not_depend_on_workers(tmp_path):
    save_images(tmp_path, 40)
    rows = make_rows(40)
    for i in (3, 17, 18, 39):
        rows[i]["raw"] = ""
    source = save_jsonl(tmp_path / "c.jsonl", rows)
    for name, workers in (("one", 1), ("two", 2), ("again", 1)):
        build_records(source, str(tmp_path / name / "t"), shard_size=10, workers=workers, verify=workers == 2)
    assert contents(tmp_path / "one" / "t") == contents(tmp_path / "two" / "t") == contents(tmp_path / "again" / "t")
    assert len(contents(tmp_path / "one" / "t")) == 4 * 3 + 1


def test_shards_and_summary(manifest, tmp_path):
    prefix = tmp_path / "out" / "train"
    report = build_records(manifest, str(prefix), shard_size=4)
    assert [path.name for path in report.shards] == ["train-00000.rec", "train-00001.rec"]
    check_standard(prefix)
    assert [len(RecordFile(shard)) for shard in report.shards] == [4, 2]
    summary = json.loads((tmp_path / "out" / "train.json").read_text())
    assert summary["shards"] == ["train-00000", "train-00001"] and summary["count"] == 6
    (tmp_path / "out" / "train-00001.rec").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.rec'\] are missing"):
        find_record_files(prefix)


@pytest.mark.parametrize("stop", range(1, 14))
def test_interrupted_build_goes_on(tmp_path, monkeypatch, stop):
    save_images(tmp_path, 10)
    rows = make_rows(10)
    rows[0]["raw"] = rows[4]["raw"] = rows[9]["raw"] = ""
    rows[7]["split"] = "val"
    source, where = save_jsonl(tmp_path / "c.jsonl", rows), ("split!=val",)
    build_records(source, str(tmp_path / "whole" / "t"), shard_size=2, where=where)
    calls, prefix = [], tmp_path / "out" / "t"

    def crash_at(name, original):
        def replace(*arguments):
            calls.append(name)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return original(*arguments)

        return replace

    # Every publication of a file goes through os.replace: .json (twice), .rec, .idx of each shard, then the summary.
    monkeypatch.setattr(recordio.os, "replace", crash_at("replace", recordio.os.replace))
    with pytest.raises(KeyboardInterrupt):
        build_records(source, str(prefix), shard_size=2, where=where)
    monkeypatch.undo()
    finished = len(list((tmp_path / "out").glob("t-*.idx")))
    if finished:
        with pytest.raises(ValueError, match=r"not finished|missing"):
            find_record_files(prefix)
    report = build_records(source, str(prefix), shard_size=2, where=where)
    assert report.kept == finished
    assert (report.count, report.skipped, report.filtered) == (6, {"empty text": 3}, 1)
    assert contents(prefix) == contents(tmp_path / "whole" / "t")


def test_finished_build_is_kept_and_others_are_in_the_way(manifest, tmp_path, monkeypatch):
    prefix = str(tmp_path / "out" / "t")
    for size in (0, 4):
        first = build_records(manifest, prefix, shard_size=size, overwrite=True)
        before = contents(prefix)
        monkeypatch.setattr(build, "_write_shard", None)  # nothing may be written again
        second = build_records(manifest, prefix, shard_size=size, verify=True)
        monkeypatch.undo()
        assert (second.kept, second.count, second.verified) == (len(first.shards), 6, 6)
        assert contents(prefix) == before
        for change in ({"texts": ("raw",)}, {"shard_size": 3}, {"where": ("raw!=x",)}, {"max_side": 8}):
            with pytest.raises(ValueError, match="give --overwrite"):
                build_records(manifest, prefix, **{"shard_size": size, **change})
    assert contents(prefix) == before
    build_records(manifest, prefix, texts=("raw",), overwrite=True)
    assert sorted(contents(prefix)) == ["t.idx", "t.json", "t.rec"]
    check_standard(prefix, names=("raw",))
    (tmp_path / "out" / "t.json").unlink()  # now it looks like a file of another program
    with pytest.raises(ValueError, match="give --overwrite"):
        build_records(manifest, prefix)


def test_verify_finds_damage(manifest, tmp_path):
    build_records(manifest, str(tmp_path / "t"))
    file = RecordFile(tmp_path / "t")
    offset = int((tmp_path / "t.idx").read_text().splitlines()[3].split("\t")[1])
    data = bytearray((tmp_path / "t.rec").read_bytes())
    data[offset + 1200] ^= 1
    (tmp_path / "t.rec").write_bytes(data)
    assert len(file) == 6
    with pytest.raises(RecordError, match=r"1 of 6 records are bad:\n  .*t\.rec key 3: checksum"):
        verify_records(str(tmp_path / "t"))


# ---- the user's mistakes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", '{"image": "0.jpg"\n', "line 1: not JSON"),
        ("c.jsonl", '{"raw": "a"}\n[]\n', "line 2 is a list"),
        ("c.jsonl", b'{"raw": "\xff"}\n', "line 1: not UTF-8"),
        ("c.jsonl", "", "no row was selected"),
        ("c.jsonl", '{"raw": "a", "image": "none.jpg"}\n', "missing image: 1"),
        ("c.json", "{}", "list of objects"),
        ("c.csv", "image,raw\na,b,c\n", "2 columns"),
        ("c.csv", "image,raw\na\n", "2 columns"),
        ("c.csv", b"image,raw\na,\xff\n", "not valid"),
        ("c.npy", b"\x93NUMPY", "images"),
        ("c.txt", "x", "known kind"),
    ],
)
def test_damaged_input_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message) as error:
        build_records(str(tmp_path / name), str(tmp_path / "out"))
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_inputs_are_of_one_kind(tmp_path):
    for name in ("a.tar", "b.tar", "c.csv", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in Source(f"{tmp_path}/*.tar").files] == ["a.tar", "b.tar"]
    assert len(Source(f"{tmp_path}/a.tar, {tmp_path}/b.tar").files) == 2
    for spec in (
        tmp_path,
        f"{tmp_path}/x*.tar",
        f"{tmp_path}/none.csv",
        "",
        f"{tmp_path}/a.tar,{tmp_path}/c.csv",
    ):
        with pytest.raises(ValueError, match="source: "):
            Source(spec)


@pytest.mark.parametrize("setting", [{"workers": 0}, {"quality": 101}, {"shard_size": -1}, {"context": 1}])
def test_bad_numbers_are_refused(manifest, tmp_path, setting):
    with pytest.raises(ValueError, match="--" + next(iter(setting)).replace("_", "-")):
        build_records(manifest, str(tmp_path / "t"), **setting)


def test_command_line(manifest, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "data2rec.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(manifest, str(tmp_path / "t"), "--texts", "raw", "generated", "--where", "raw!=x", "--verify")
    assert done.returncode == 0 and "6 records read back" in done.stdout, done.stderr
    check_standard(tmp_path / "t", names=("raw", "generated"))
    wrong = run(str(tmp_path / "none.jsonl"), str(tmp_path / "t"))
    assert wrong.returncode == 2 and "names no file" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("flag", ["--texts", "--views"])
def test_the_texts_have_their_earlier_flag_as_well(flag):
    spec = importlib.util.spec_from_file_location("data2rec", ROOT / "data2rec.py")
    data2rec = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data2rec)
    command = data2rec.parse(["c.jsonl", "out/t", flag, "raw=alt", "synthetic", "--workers", "2"])
    assert (command.texts, command.workers, command.prefix) == (("raw=alt", "synthetic"), 2, "out/t")
