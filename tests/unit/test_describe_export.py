"""The result of a job as files: every row counted, texts apart, records in the released order."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from helpers.pictures import encode, paint
from helpers.sources import add_member, save_jsonl
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.build import build_records
from rwkv_clip.data.recordio import RecordFile, unpack
from rwkv_clip.data.records import RecordSet
from rwkv_clip.data.sources import Source
from rwkv_clip.demo.pictures import draw_picture, encode_picture
from rwkv_clip.demo.scenes import draw_train_scene
from rwkv_clip.describe.cleaning import clean
from rwkv_clip.describe.export import ExportError, ExportSettings, export
from rwkv_clip.describe.parquet import read_metadata, read_parquet
from rwkv_clip.describe.pictures import PictureReader, PictureSettings, encode_upright, open_found, read_pictures
from rwkv_clip.describe.select import Selection
from rwkv_clip.tokenizer import make_tokenizer

ALL = ("parquet", "jsonl", "webdataset")


def merged(number: int, **changes) -> dict:
    row = {
        "id": f"id{number}",
        "row": number,
        "image": f"{number}.jpg",
        "raw": f"IMG {number} of a Red circle, 12",
        "clean": f"{number} of a Red circle",
        "caption": f"a circle number {number}",
        "generated": f"a red circle beside the number {number}, in a room",
        "engine": "openai:m",
        "composer": "openai:m",
        "license": "CC BY 2.0",
        "url": None,
        "flags": [],
        "tokens_generated": 14,
    }
    return {**row, **changes}


@pytest.fixture
def scenes(tmp_path):
    """Twelve pictures of the demo in a folder, and a source that lists them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        picture = draw_picture(draw_train_scene(0, number), 48)
        (folder / f"{number}.jpg").write_bytes(encode_picture(picture, "jpeg"))
    rows = [{"image": f"{number}.jpg", "raw": f"text {number}"} for number in range(12)]
    return Source(save_jsonl(tmp_path / "rows.jsonl", rows)), PictureSettings(images=str(folder))


# ---- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, row, reason",
    [
        ({}, {"duplicate_of": "id0", "flags": ["pii"], "image": None, "generated": None}, ""),
        ({"duplicates": "exact"}, {"duplicate_of": "id0"}, "duplicate"),
        ({"duplicates": "exact"}, {"near_duplicate_of": "id0"}, ""),
        ({"duplicates": "near"}, {"near_duplicate_of": "id0"}, "near duplicate"),
        ({"duplicates": "near"}, {"duplicate_of": "id0", "near_duplicate_of": "id0"}, "duplicate"),
        ({"min_tokens": 12}, {"tokens_generated": 14}, ""),
        ({"min_tokens": 13}, {"tokens_generated": 14}, "fewer than 13 tokens"),
        ({"min_tokens": 1}, {"tokens_generated": None}, "fewer than 1 tokens"),
        ({"require_picture": True}, {"image": None}, "no picture"),
        ({"require": ("raw", "synthetic")}, {"caption": " "}, "no synthetic text"),
        ({"require": ("generated",)}, {"generated": None}, "no generated text"),
        ({"drop_flags": ("emoji", "pii")}, {"flags": ["url", "pii"]}, "flag pii"),
        ({"drop_flags": ("pii",)}, {"flags": None}, ""),
        ({"drop_flags": ("pii",)}, {"flags": list(clean("call 555-123-4567").flags)}, "flag pii"),
        ({"drop_flags": ("pii",)}, {"flags": list(clean("mail bob@example.com").flags)}, "flag pii"),
        ({"drop_flags": ("pii_phone",)}, {"flags": ["pii_email"]}, ""),
        ({"drop_unsupported": 0.2}, {"unsupported_rate": 0.2}, ""),
        ({"drop_unsupported": 0.2}, {"unsupported_rate": 0.21}, "more than 0.2 of the nouns unsupported"),
        ({"drop_unsupported": 0.2}, {"unsupported_rate": 0.9, "engine": "rules"}, ""),
        ({"drop_unsupported": 0.2}, {"unsupported_rate": None}, ""),
        ({"min_clip": 0.2}, {"clip_generated": 0.2}, ""),
        ({"min_clip": 0.2}, {"clip_generated": 0.1}, "CLIP score below 0.2"),
        ({"min_clip": 0.0}, {"clip_generated": float("nan")}, "CLIP score below 0"),
        ({"min_clip": -1.0}, {"clip_generated": None}, "no CLIP score"),
    ],
)
def test_a_row_is_dropped_for_what_a_setting_says_and_nothing_else(settings, row, reason):
    assert parse(Selection, settings).judge(merged(1, **row)) == reason


@pytest.mark.parametrize(
    "settings", [{"min_clip": 2}, {"drop_unsupported": 1.5}, {"min_tokens": 76}, {"duplicates": "x"}]
)
def test_settings_of_selection_have_limits(settings):
    with pytest.raises(ConfigError):
        parse(Selection, settings)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_rows_in_are_written_or_dropped_by_reason(tmp_path):
    rows = [
        merged(i, flags=["pii"] if i % 3 == 0 else [], caption=None if i % 4 == 1 else "a thing") for i in range(50)
    ]
    rows[7]["generated"] = "  "
    settings, selection = ExportSettings(to=("parquet", "jsonl")), Selection(drop_flags=("pii",))
    report = export(lambda: iter(rows), tmp_path / "out", settings, selection)
    assert (report.rows, report.written, dict(report.dropped)) == (50, 33, {"flag pii": 17})
    lines = [json.loads(line) for line in (tmp_path / "out/texts.jsonl").read_text().splitlines()]
    table = list(read_parquet(tmp_path / "out/texts.parquet"))
    assert lines == table and len(table) == 33
    assert report.missing == {"synthetic": sum(row["synthetic"] is None for row in table), "generated": 1}
    assert [row["generated"] for row in table if row["id"] == "id7"] == [None]
    assert list(table[0]) == ["id", "image", "raw", "synthetic", "generated", "engine", "license", "url"]
    said = json.loads((tmp_path / "out/export.json").read_text())
    assert said["rows"] == said["written"] + sum(said["dropped"].values())
    assert "50 rows: 33 written, 17 dropped" in str(report)


def test_raw_texts_as_found_or_cleaned(tmp_path):
    for raw, text in (("found", "IMG 1 of a Red circle, 12"), ("clean", "1 of a Red circle")):
        export(lambda: iter([merged(1)]), tmp_path, ExportSettings(raw=raw), Selection(), about={"prompt": "paper"})
        assert next(read_parquet(tmp_path / "texts.parquet"))["raw"] == text
    assert read_metadata(tmp_path / "texts.parquet")["prompt"] == "paper"


@pytest.mark.parametrize("kind", ALL)
def test_a_failed_export_leaves_what_was_there_and_no_mark(tmp_path, scenes, kind):
    source, pictures = scenes
    settings = ExportSettings(to=(kind,))

    def write(rows):
        return export(rows, tmp_path / "out", settings, Selection(), source, pictures)

    write(lambda: iter([merged(1)]))
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}

    def fail():
        yield merged(2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(fail)
    after = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    marks = {tmp_path / "out/export.json", tmp_path / "out/webdataset/__len__"}
    assert after == {file: content for file, content in before.items() if file not in marks}


def test_rows_that_change_between_files_are_an_error(tmp_path):
    turns = iter([[merged(1)], [merged(1), merged(2)]])
    with pytest.raises(ExportError, match="rows changed"):
        export(lambda: iter(next(turns)), tmp_path, ExportSettings(to=("parquet", "jsonl")), Selection())
    assert not (tmp_path / "export.json").exists()


def test_hostile_texts_come_through(tmp_path, scenes):
    source, pictures = scenes
    rows = [merged(0, raw="half \ud800 pair", generated='quo"te\n\0\u2028end'), merged(1, raw="\u202eright to left")]
    export(lambda: iter(rows), tmp_path, ExportSettings(to=ALL), Selection(), source, pictures)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_bytes().split(b"\n")[:-1]]
    assert lines == list(read_parquet(tmp_path / "texts.parquet"))
    assert lines[0]["raw"] == "half ? pair" and lines[0]["generated"] == 'quo"te\n\0\u2028end'


# ---- records ---------------------------------------------------------------------------------------------------------


def expected_labels(table: list[dict], context: int = 77) -> np.ndarray:
    tokenizer = make_tokenizer(context=context)
    texts = [[row[name] or row["raw"] for name in ("raw", "synthetic", "generated")] for row in table]
    return np.stack([tokenizer(three).numpy().reshape(-1) for three in texts]).astype(np.float32)


def check_records(prefix: str, table: list[dict]) -> None:
    file = RecordFile(f"{prefix}.rec")
    labels = np.stack([unpack(file.read(i))[0].label for i in range(len(file))])
    assert labels.shape == (len(table), 231)
    expected = expected_labels(table)
    assert np.array_equal(labels, expected)
    for place, name in enumerate(("raw", "synthetic", "generated")):  # upstream's slices
        alone = make_tokenizer()([row[name] or row["raw"] for row in table]).numpy()
        assert np.array_equal(labels[:, 77 * place : 77 * place + 77], alone)
    records = RecordSet(prefix)
    assert records.text_names == ("raw", "synthetic", "generated")
    read = np.stack([records.sample(i)[1] for i in range(len(records))])
    assert np.array_equal(read.reshape(-1, 231), expected)


def test_parquet_becomes_records_of_231_labels_in_the_released_order(tmp_path, scenes):
    _, pictures = scenes
    rows = [merged(i) for i in range(12)]
    rows[3]["generated"], rows[5]["generated"], rows[6]["caption"] = None, "a long text " * 30, ""
    report = export(lambda: iter(rows), tmp_path / "out", ExportSettings(), Selection())
    table = list(read_parquet(tmp_path / "out/texts.parquet"))
    said = build_records(str(tmp_path / "out/texts.parquet"), str(tmp_path / "train"), images=pictures.images)
    assert "generated" in str(said)
    check_records(str(tmp_path / "train"), table)
    assert "--texts raw synthetic generated" in report.next and "texts.parquet" in report.next


def test_tars_become_the_same_records(tmp_path, scenes):
    source, pictures = scenes
    rows = [merged(i) for i in range(12)]
    settings = ExportSettings(to=ALL, shard_size=5)
    report = export(lambda: iter(rows), tmp_path, settings, Selection(), source, pictures)
    assert report.in_tars == 12 and len(report.files) == 5
    assert (tmp_path / "webdataset/__len__").read_text() == "12\n"
    build_records(str(tmp_path / "webdataset"), str(tmp_path / "train"))
    check_records(str(tmp_path / "train"), list(read_parquet(tmp_path / "texts.parquet")))
    with tarfile.open(tmp_path / "webdataset/00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.jpg", "000000000.json", "000000000.txt"]
        assert tar.extractfile("000000001.txt").read().decode() == rows[1]["generated"]
    before = {file: file.read_bytes() for file in (tmp_path / "webdataset").iterdir()}
    export(lambda: iter(rows), tmp_path, settings, Selection(), source, pictures)
    assert {file: file.read_bytes() for file in (tmp_path / "webdataset").iterdir()} == before
    export(lambda: iter(rows[:4]), tmp_path, settings, Selection(), source, pictures)
    assert sorted(file.name for file in (tmp_path / "webdataset").iterdir()) == ["00000.tar", "__len__"]


def test_open_clip_reads_the_tars(tmp_path, scenes):
    wds = pytest.importorskip("webdataset")
    source, pictures = scenes
    export(lambda: map(merged, range(4)), tmp_path, ExportSettings(to=("webdataset",)), Selection(), source, pictures)
    files = str(tmp_path / "webdataset/00000.tar")
    samples = list(wds.WebDataset(files, shardshuffle=False).decode("pilrgb").rename(image="jpg;png", text="txt"))
    assert [sample["text"] for sample in samples] == [merged(i)["generated"] for i in range(4)]
    size = pytest.importorskip("open_clip_train.data").get_dataset_size(files)
    assert size == (4, 1)
    assert samples[2]["json"]["synthetic"] == "a circle number 2" and samples[0]["image"].size == (48, 48)


def test_rows_without_a_usable_picture_are_counted(tmp_path, scenes):
    source, pictures = scenes
    folder = tmp_path / "photos"
    (folder / "1.jpg").unlink()
    (folder / "2.jpg").write_bytes(b"no picture")
    rows = [merged(i) for i in range(14)]
    rows[4].update(raw=None, generated="")
    report = export(
        lambda: iter(rows), tmp_path / "out", ExportSettings(to=("webdataset",)), Selection(), source, pictures
    )
    assert report.in_tars == 9 and report.written == 14
    assert report.left_out == {
        "missing image": 3,
        "unreadable image": 1,
        "neither generated nor raw text": 1,
    }


def test_settings_without_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to write"):
        parse(ExportSettings, {"to": []})
    with pytest.raises(ValueError, match="needs the source"):
        export(lambda: iter([]), tmp_path, ExportSettings(to=("webdataset",)), Selection())


def test_rows_whose_pictures_came_with_them_are_not_sent_to_a_folder(tmp_path, scenes):
    source, pictures = scenes
    rows = [merged(i, image=None) for i in range(3)]
    report = export(lambda: iter(rows), tmp_path, ExportSettings(), Selection())
    assert report.missing == {"image": 3} and "webdataset" in report.next
    report = export(lambda: iter(rows), tmp_path, ExportSettings(to=ALL), Selection(), source, pictures)
    assert report.next == f"records: python data2rec.py {tmp_path}/webdataset PREFIX --texts raw synthetic generated"


@pytest.mark.parametrize(
    ("missing", "end"),
    [
        ({}, "--texts raw synthetic generated"),
        ({"caption": None}, "--texts raw generated"),
        ({"raw": ""}, "--texts raw=synthetic generated"),
        ({"raw": "", "caption": None, "generated": ""}, "see what `rows:` says above"),
    ],
)
def test_the_command_for_records_names_texts_that_there_are(tmp_path, missing, end):
    rows = [merged(i, **missing) for i in range(3)]
    assert export(lambda: iter(rows), tmp_path, ExportSettings(), Selection()).next.endswith(end)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_read_in_one_pass(scenes):
    source, pictures = scenes
    found = list(read_pictures(source, iter([2, 3, 9]), pictures))
    assert [one.row for one in found] == [2, 3, 9] and all(one.data[:2] == b"\xff\xd8" for one in found)


class Counted(Source):
    """A source that counts the rows it gives."""

    given = 0

    def rows(self, start=0):
        for row in super().rows(start):
            self.given += 1
            yield row


def test_rows_that_name_a_file_do_not_cost_a_pass(tmp_path, scenes):
    _, pictures = scenes
    source = Counted(tmp_path / "rows.jsonl")
    reader = PictureReader(source, pictures)
    found = list(reader.read(merged(i) for i in (9, 2, 2, 11)))
    assert [one.row for one in found] == [9, 2, 2, 11] and not any(one.reason for one in found)
    assert found[1] == found[2] != found[0] and source.given == 0
    [found] = reader.read([{"row": 3, "image": None}])  # what a row does not name, its source does
    assert found.data == (tmp_path / "photos/3.jpg").read_bytes()


def test_pictures_in_a_source_cost_few_passes_also_for_two_readers_in_turn(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(40):
            add_member(tar, f"{number:02d}.png", encode(paint(4, 4, number), "PNG"))
            add_member(tar, f"{number:02d}.txt", b"text")
    source = Counted(tmp_path / "a.tar")
    reader = PictureReader(source, PictureSettings())
    for start in range(0, 20, 5):  # two parts of a job, a chunk of each in turn
        for part in (0, 20):
            numbers = range(part + start, part + start + 5)
            for found in reader.read({"row": number, "image": None} for number in numbers):
                assert found.data == encode(paint(4, 4, found.row), "PNG")
    assert source.given < 80  # 160 if every chunk went back to the beginning
    [found] = reader.read([{"row": 0}])
    assert found.data == encode(paint(4, 4, 0), "PNG")


def test_a_table_that_holds_pictures_is_asked_for_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pictures = [{"bytes": encode(paint(4, 4, i), "PNG"), "path": f"{i}.png"} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, "raw": ["a"] * 3}), tmp_path / "a.parquet")
    reader = PictureReader(Source(tmp_path / "a.parquet"), PictureSettings())
    found = list(reader.read({"row": i, "image": f"{i}.png"} for i in range(3)))
    assert [one.data for one in found] == [picture["bytes"] for picture in pictures]


def test_pictures_of_a_folder_of_pictures(tmp_path):
    (tmp_path / "set" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "set" / f"{name}.jpg").write_bytes(encode(paint(8, 8)))
        (tmp_path / "set" / f"{name}.txt").write_text("text")
    source = Counted(tmp_path / "set")
    found = list(
        PictureReader(source, PictureSettings()).read(
            {"row": i, "image": n} for i, n in enumerate(("inner/b.jpg", "a.jpg"))
        )
    )
    assert all(one.data == encode(paint(8, 8)) for one in found) and source.given == 0


def test_pictures_in_tars_come_with_their_rows(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            add_member(tar, f"{number}.png", encode(paint(20, 10, number), "PNG"))
            add_member(tar, f"{number}.txt", b"text")
    found = list(read_pictures(Source(tmp_path / "a.tar"), [1, 2], PictureSettings()))
    assert [np.array_equal(np.asarray(open_found(one)), np.asarray(paint(20, 10, one.row))) for one in found] == [
        True
    ] * 2


@pytest.mark.parametrize(
    "name, reason",
    [
        ("http://127.0.0.1:9/a.jpg", "missing image"),
        ("https://example.com/a.jpg", "missing image"),
        ("file:///etc/passwd", "missing image"),
        ("../secret.jpg", "image outside the image folder"),
        ("/etc/passwd", "image outside the image folder"),
        ("", "missing image"),
        ("a\0b.jpg", "missing image"),
    ],
)
def test_no_page_and_no_file_outside_is_read(tmp_path, name, reason, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    (tmp_path / "secret.jpg").write_bytes(encode(paint(8, 8)))
    (tmp_path / "photos").mkdir()
    source = Source(save_jsonl(tmp_path / "rows.jsonl", [{"image": name, "raw": "a"}]))
    settings = PictureSettings(images=str(tmp_path / "photos"))
    [found] = read_pictures(source, [0], settings)
    assert found == (0, b"", reason)
    assert list(PictureReader(source, settings).read([{"row": 0, "image": name}])) == [(0, b"", reason)]


def tagged(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(paint(40, 20), kind, exif=exif)


@pytest.mark.parametrize(
    "data, ending, size, same",
    [
        (encode(paint(40, 20)), "jpg", (40, 20), True),
        (encode(paint(40, 20), "PNG"), "png", (40, 20), True),
        (tagged(6), "jpg", (20, 40), False),
        (tagged(8, "PNG"), "jpg", (20, 40), False),
        (encode(paint(40, 20), "WEBP"), "jpg", (40, 20), False),
        (encode(paint(40, 20).convert("CMYK")), "jpg", (40, 20), False),
        (encode(paint(40, 20).convert("RGBA"), "PNG"), "jpg", (40, 20), False),
        (encode(paint(200, 100), "PNG"), "jpg", (64, 32), False),
    ],
)
def test_pictures_that_are_written_are_upright_and_bounded(tmp_path, data, ending, size, same):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "0.webp", data)
        add_member(tar, "0.txt", b"text")
    [found] = read_pictures(Source(tmp_path / "a.tar"), [0], PictureSettings())
    written, kind = encode_upright(found, 64)
    image = Image.open(io.BytesIO(written))
    assert kind == ending and image.size == size and (written == data) == same
    assert image.getexif().get(0x0112, 1) == 1


def test_settings_are_frozen_and_checked(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        PictureSettings().images = "x"
    with pytest.raises(ConfigError, match="is no folder"):
        parse(PictureSettings, {"images": str(tmp_path / "none")})
