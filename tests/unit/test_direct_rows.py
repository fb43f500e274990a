"""Rows by number are the rows that are read in order, for every kind of file and wherever pieces of it end."""

import csv
import itertools
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest

from helpers.crashes import fork, wait
from helpers.source_files import JPEG, PNG, pack, read, save
from rwkv_clip.data.direct import lines, tar_table
from rwkv_clip.data.direct.lines import LineTable
from rwkv_clip.data.direct.storage import Stored
from rwkv_clip.data.direct.tar_table import TarTable
from rwkv_clip.data.recordio import RecordError
from rwkv_clip.data.rows import Row, SourceError

# ---- tables and lines


def table_of(path: Path, separator: str | None = None) -> LineTable:
    return LineTable(Stored(str(path)), separator, json=path.suffix == ".jsonl")


def same_rows(table, path: Path) -> None:
    """By number, in any order, and after a copy."""
    expected = [comparable(row) for row in read(path)]
    assert len(table) == len(expected)
    numbers = list(range(len(table)))
    random.Random(0).shuffle(numbers)
    for one in (table, pickle.loads(pickle.dumps(table))):
        assert [comparable(one.row(i)) for i in numbers] == [expected[i] for i in numbers]


def comparable(row: Row) -> Row:
    """Without the number of a line: rows of several lines are named by the first here, and there by the last."""
    return row._replace(name="", folder=None) if ".csv line" in row.name else row._replace(folder=None)


@pytest.fixture(params=[(7, 1), (64, 3), (1 << 20, 16)], ids=lambda sizes: f"pieces of {sizes[0]}")
def sizes(request, monkeypatch) -> None:
    monkeypatch.setattr(lines, "PIECE", request.param[0])
    monkeypatch.setattr(lines, "TOGETHER", request.param[1])
    monkeypatch.setattr(lines, "NEAR", 1 << 30)


TABLES = {
    "plain.csv": "image,caption\na.jpg,a cat\nb.jpg,a dog\n",
    "no end.csv": "image,caption\na.jpg,a cat\nb.jpg,a dog",
    "windows.csv": "image,caption\r\na.jpg,a cat\r\n\r\nb.jpg,a dog\r\n",
    "blank.csv": "\n\nimage,caption\n\na.jpg,a cat\n\n\n\nb.jpg,a dog\n\n",
    "quoted.csv": 'image,caption\na.jpg,"a ""fat"" cat, black"\nb.jpg,"two\nlines\n\nand a blank one"\nc.jpg,"x"\n',
    "inner quotes.csv": 'image,caption\na.jpg,5" of snow\nb.jpg,a dog\nc.jpg,6" and 7"\n',
    "bom.csv": "\ufeffimage,caption\na.jpg,猫\n",
    "tabs.csv": "image\tcaption\na.jpg\ta, b\nb.jpg\tc\n",
    "quoted.tsv": 'image\tcaption\na.jpg\t"a ""fat"" cat"\nb.jpg\t5" of snow\nc.jpg\t"\n',
    "signs.csv": "image,caption\na.jpg,a\u2028b\x0bc\x85d\nb.jpg,x\n",
    "lines.jsonl": '{"image": "a.jpg", "caption": "a"}\n\n  \n{"image": "b.jpg", "captions": ["b", "c"]}\n',
    "windows.jsonl": '{"image": "a.jpg"}\r\n\r\n{"image": "b.jpg"}',
    "bom.jsonl": '\ufeff{"image": "a.jpg"}\n{"image": "b.jpg"}\n',
    "nothing.jsonl": "\n \n",
}


@pytest.mark.parametrize("name", TABLES)
def test_lines_by_number(name, sizes, tmp_path):
    save(tmp_path, {name: TABLES[name]})
    same_rows(table_of(tmp_path / name), tmp_path / name)


@pytest.mark.parametrize("seed", range(6))
def test_random_tables(seed, sizes, tmp_path):
    draw = random.Random(seed)
    letters = ['"', ",", "\n", "\r\n", " ", "a", "猫", "\t", "x" * 300, "''"]
    words = ["".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(200)]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        ending = draw.choice(["\n", "\r\n"])
        table = csv.writer(file, lineterminator=ending)
        table.writerows([("image", "caption"), *((f"{i}.jpg", word) for i, word in enumerate(words))])
    rows = [json.dumps({"image": f"{i}.jpg", "caption": word}) for i, word in enumerate(words)]
    (tmp_path / "b.jsonl").write_text(draw.choice(["\n", "\n\n", "\r\n"]).join(rows))
    for name in ("a.csv", "b.jsonl"):
        same_rows(table_of(tmp_path / name), tmp_path / name)


def test_a_separator_is_as_it_was_said(tmp_path):
    save(tmp_path, {"a.csv": 'image;caption\na.jpg;"a; b"\nb.jpg;c, d\n', "b.csv": "image,a\tcaption\nx,y\tz\n"})
    table = table_of(tmp_path / "a.csv", ";")
    assert [table.row(i).fields["caption"] for i in (0, 1)] == ["a; b", "c, d"]
    assert table_of(tmp_path / "b.csv", "\t").row(0).fields == {"image,a": "x,y", "caption": "z"}
    with pytest.raises(SourceError, match=r"csv_separator: '\|' separates nothing in the first line, image;caption"):
        table_of(tmp_path / "a.csv", "|")


@pytest.mark.parametrize(
    "content, words",
    [
        ("image,caption\na.jpg\nb.jpg,x\n", r"line 2 has 1 columns, not 2"),
        ('image,caption\na.jpg,"x" y\nb.jpg,x\n', r"line 2 or the next is not valid CSV"),
        (b"image,caption\na.jpg,\xff\nb.jpg,x\n", r"line 2 is not valid UTF-8"),
    ],
)
def test_one_bad_line_is_one_bad_row(content, words, tmp_path):
    save(tmp_path, {"a.csv": content})
    table = table_of(tmp_path / "a.csv")
    with pytest.raises(SourceError, match=words):
        table.row(0)
    assert len(table) == 2 and table.row(1).fields["caption"] == "x"


def test_a_text_that_swallows_rows_is_named(tmp_path):
    save(tmp_path, {"a.csv": 'image,caption\na.jpg,"x\nb.jpg,y\nc.jpg,z"\n'})
    with pytest.raises(SourceError, match="goes on over 3 lines and holds what looks like rows"):
        table_of(tmp_path / "a.csv")


def test_long_lines_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    monkeypatch.setattr(lines, "PIECE", 100)
    save(tmp_path, {"a.jsonl": "{" + "x" * 5000, "b.csv": "a,b\n" + '"' + "x" * 5000})
    for name in ("a.jsonl", "b.csv"):
        with pytest.raises(SourceError, match="a line of more than 1,000 bytes"):
            table_of(tmp_path / name)


def test_rows_cost_a_byte_each(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(f'{{"image": "{i}.jpg", "caption": "a picture of {i} cats"}}\n' for i in range(100_000))
    table = table_of(tmp_path / "a.jsonl")
    assert table.size_of_state() <= 1.1 * len(table) and len(pickle.dumps(table)) <= 1.2 * len(table)
    assert table.row(99_999).fields["image"] == "99999.jpg" and table.row(77_777).name == "a.jsonl line 77778"


def test_a_file_that_changes_is_an_error_of_the_row(tmp_path):
    save(tmp_path, {"a.jsonl": '{"image": "a.jpg"}\n' * 40})
    table, copy = table_of(tmp_path / "a.jsonl"), pickle.dumps(table_of(tmp_path / "a.jsonl"))
    os.truncate(tmp_path / "a.jsonl", 400)
    assert table.row(0).fields == {"image": "a.jpg"}
    with pytest.raises(RecordError, match=r"a\.jsonl: cut short, or changed, before byte"):
        table.row(39)
    with pytest.raises(RecordError, match=r"a\.jsonl: changed since it was opened"):
        pickle.loads(copy).row(0)


# ---- tars


def link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


TARS = {
    "plain": [("0.jpg", JPEG), ("0.txt", b"a"), ("1.txt", b"b"), ("1.jpg", JPEG)],
    "folders": [("a/0.jpg", JPEG), ("a/0.txt", b"a"), ("b/0.jpg", PNG), ("b/0.json", b'{"caption": "c"}')],
    "hidden": [("._0.jpg", b"x"), ("0.jpg", JPEG), ("._0.txt", b"x"), ("0.txt", b"a"), ("__MACOSX/1.txt", b"x")],
    "apart": [("0.jpg", JPEG), ("1.jpg", JPEG), ("1.txt", b"b"), ("0.txt", b"a"), ("2.jpg", JPEG), ("2.txt", b"c")],
    "long names": [("x" * 300 + "/0.jpg", JPEG), ("x" * 300 + "/0.txt", b"a"), ("猫" * 60 + ".jpg", PNG)],
    "links": [("0.jpg", JPEG), link("0.txt"), link("1.jpg"), ("1.txt", b"b")],
    "others": [("0.jpg", JPEG), ("0.cls", b"7"), ("0.txt", b"a"), ("0.npy", bytes(70_000)), ("1.jpg", b"")],
    "twice": [("0.jpg", JPEG), ("0.jpg", PNG), ("0.txt", b"a"), ("1.png", PNG), ("1.jpg", JPEG), ("1.txt", b"b")],
    "numbered": [("0.jpg", JPEG), ("0.10.txt", b"k"), ("0.2.txt", b"c"), ("0.0.txt", b"a")],
    "empty": [],
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("name", TARS)
@pytest.mark.parametrize("at_once", [1 << 22, 100])
def test_tars_by_number(name, format, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_table, "AT_ONCE", at_once)
    save(tmp_path, {"a.tar": pack(TARS[name], format=format)})
    same_rows(TarTable(Stored(str(tmp_path / "a.tar"))), tmp_path / "a.tar")


def test_numbered_texts_are_several_captions(tmp_path):
    save(tmp_path, {"a.tar": pack(TARS["numbered"]), "b.tar": pack([*TARS["numbered"], ("0.txt", b"own")])})
    assert read(tmp_path / "a.tar")[0].fields["captions"] == ["a", "c", "k"]
    assert "captions" not in read(tmp_path / "b.tar")[0].fields  # as ever: 0.txt is the text


def tar(path: Path, count: int = 40, text: str = "text") -> Path:
    members = [(f"{i:03}.{ending}", content) for i in range(count) for ending, content in (("jpg", JPEG), ("txt", b""))]
    members = [(name, f"{text} {name}".encode() if name.endswith("txt") else data) for name, data in members]
    path.write_bytes(pack(members))
    return path


def test_an_index_is_made_once(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar")
    first = TarTable(Stored(str(path))).row(7)
    index = path.with_name("a.tar.index")
    monkeypatch.setattr(tar_table, "index_tar", None)
    again = TarTable(Stored(str(path)))
    assert again.row(7) == first and again.size_of_state() == 0 and len(pickle.dumps(again)) < 1000
    assert index.stat().st_size < 1000 + 8 * 41 and sorted(tmp_path.iterdir()) == [path, index]


def test_an_index_goes_where_it_is_said(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "indices").mkdir()
    paths = [tar(tmp_path / name / "a.tar", count) for name, count in (("one", 3), ("two", 4))]
    for _ in range(2):
        assert [len(TarTable(Stored(str(path)), str(tmp_path / "indices"))) for path in paths] == [3, 4]
    assert len(list((tmp_path / "indices").iterdir())) == 2 and list((tmp_path / "one").iterdir()) == paths[:1]
    with pytest.raises(ValueError, match=r"index: .*/none is no folder; make it first"):
        TarTable(Stored(str(paths[0])), str(tmp_path / "none"))


def test_a_folder_that_takes_no_index_is_named(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar")

    def refuse(path, pieces):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("rwkv_clip.data.direct.index_file.write_whole", refuse)
    with pytest.raises(ValueError, match=r"a\.tar\.index cannot be written \(Permission denied\); .*--index FOLDER"):
        TarTable(Stored(str(path)))


def test_a_tar_that_was_cut_or_changed_is_named(tmp_path):
    path = tar(tmp_path / "a.tar")
    table = TarTable(Stored(str(path)))
    whole = path.read_bytes()
    path.write_bytes(whole[:20_000])
    with pytest.raises(SourceError, match=r"a\.tar: has 20,000 bytes, but had .* cut or changed; .*remove the index"):
        TarTable(Stored(str(path)))
    with pytest.raises((SourceError, RecordError), match=r"a\.tar"):
        table.row(39)
    tar(path, text="TEXT")
    assert path.stat().st_size == len(whole)
    with pytest.raises(SourceError, match=r"a\.tar: holds something else than when its index"):
        TarTable(Stored(str(path)))
    path.write_bytes(whole)  # at another time
    assert TarTable(Stored(str(path))).row(39) == table.row(39)
    path.with_name("a.tar.index").unlink()
    tar(path, text="TEXT")
    assert TarTable(Stored(str(path))).row(39).fields["txt"].startswith("TEXT")


def test_another_tar_in_its_place_is_an_error_of_the_row(tmp_path):
    path = tar(tmp_path / "a.tar", 30)
    table = TarTable(Stored(str(path)))
    expected = [table.row(i) for i in range(30)]
    data = bytearray(path.read_bytes())
    data[512 * 40 : 512 * 80] = data[512 * 41 : 512 * 81]  # in place
    path.write_bytes(data)
    changed = 0
    for i, row in enumerate(expected):
        try:
            changed += table.row(i) != row
        except (SourceError, RecordError):
            changed += 1
    assert 0 < changed < 20


@pytest.mark.parametrize("at", ["head", "data", "cut", "empty"])
def test_a_damaged_index_is_made_anew(at, tmp_path):
    path = tar(tmp_path / "a.tar")
    expected = TarTable(Stored(str(path))).row(5)
    index = path.with_name("a.tar.index")
    data = bytearray(index.read_bytes())
    if at in ("head", "data"):
        data[{"head": 3, "data": -20}[at]] ^= 64
    index.write_bytes({"cut": data[:-8], "empty": b""}.get(at, data))
    assert TarTable(Stored(str(path))).row(5) == expected


@pytest.mark.parametrize(
    "content, words",
    [
        (pack(TARS["plain"])[:2000], "cut short"),
        (b"x" * 2048, "no valid header; damaged"),
        (pack(TARS["plain"], pax_headers={"path": "all"}, format=tarfile.PAX_FORMAT), "gives all members one name"),
    ],
)
def test_broken_tars_are_named(content, words, tmp_path):
    save(tmp_path, {"a.tar": content})
    with pytest.raises(SourceError, match=rf"a\.tar.*{words}"):
        TarTable(Stored(str(tmp_path / "a.tar")))
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_compressed_tars_are_refused(tmp_path):
    import gzip

    save(tmp_path, {"a.tar": gzip.compress(pack(TARS["plain"]))})
    with pytest.raises(SourceError, match=r"is compressed, .* unpack it"):
        TarTable(Stored(str(tmp_path / "a.tar")))


# ---- Parquet

PACKED = ("none", "snappy", "gzip", "zstd", "lz4", "brotli")


def parquet(path: Path, *, top: bool = False, count: int = 90, **options) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
    write = pytest.importorskip("pyarrow.parquet").write_table
    data = [JPEG[: 20 + i % 3] * (i % 7) if i % 11 else None for i in range(count)]
    pictures = data if top else [None if i % 13 == 5 else {"bytes": one, "path": f"{i}"} for i, one in enumerate(data)]
    captions = [[f"a {i}", "b"][: i % 3] for i in range(count)]
    table = arrow.table({"id": list(range(count)), "image": pictures, "captions": captions, "mask": data[::-1]})
    write(table, path, row_group_size=37, **options)
    return path


@pytest.mark.parametrize("compression", PACKED)
@pytest.mark.parametrize("top", [False, True], ids=["in a struct", "a column"])
def test_parquet_by_number(compression, top, tmp_path):
    from rwkv_clip.data.direct.parquet_table import ParquetTable

    for number, (words, version) in enumerate(itertools.product([True, False], ["1.0", "2.0"])):
        path = tmp_path / f"{number}.parquet"
        how = {"compression": compression, "use_dictionary": words, "data_page_version": version}
        parquet(path, top=top, data_page_size=300, **how)
        same_rows(ParquetTable(Stored(str(path))), path)


def test_parquet_in_an_encoding_that_cannot_be_taken_apart_is_named(tmp_path):
    from rwkv_clip.data.direct.parquet_table import ParquetTable

    path = parquet(
        tmp_path / "a.parquet", top=True, use_dictionary=False, column_encoding={"image": "DELTA_BYTE_ARRAY"}
    )
    with pytest.raises(SourceError, match=r"column 'image': the page at byte .*encoding 7; write it anew with PLAIN"):
        ParquetTable(Stored(str(path)))


def test_a_changed_parquet_file_is_named(tmp_path):
    from rwkv_clip.data.direct.parquet_table import ParquetTable

    path = parquet(tmp_path / "a.parquet")
    ParquetTable(Stored(str(path)))
    parquet(path, count=91)
    with pytest.raises(SourceError, match=r"a\.parquet: has .* bytes, but had .* cut or changed"):
        ParquetTable(Stored(str(path)))


def test_hybrid_numbers():
    from rwkv_clip.data.direct.pages import decode_hybrid

    packed = bytes([0b00000011, 0x88, 0xC6, 0xFA])  # the definition's example: 0 to 7 in 3 bits
    assert decode_hybrid(packed, 0, 4, 3, 8).tolist() == list(range(8))
    assert decode_hybrid(bytes([200, 1, 5]) + packed, 0, 7, 3, 103).tolist() == [5] * 100 + [0, 1, 2]
    assert decode_hybrid(b"", 0, 0, 0, 4).tolist() == [0] * 4
    for bad in (b"", b"\xff", b"\x03", b"\x00\x01"):
        with pytest.raises(ValueError):
            decode_hybrid(bad, 0, len(bad), 3, 9)


# ---- processes and storage


def test_processes_share_what_is_open(tmp_path):
    save(tmp_path, {"a.csv": TABLES["quoted.csv"], "a.tar": pack(TARS["plain"])})
    tables = [table_of(tmp_path / "a.csv"), TarTable(Stored(str(tmp_path / "a.tar")))]
    expected = [table.row(1) for table in tables]

    def check():
        assert [table.row(1) for table in tables] == expected

    assert [wait(fork(check)) for _ in range(2)] == [0, 0]
    check()


def test_storage_behind_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="pip install -e '.[fsspec]'")
    from rwkv_clip.data.direct.parquet_table import ParquetTable
    from rwkv_clip.data.direct.storage import expand_url

    system = fsspec.filesystem("memory")
    save(tmp_path, {"a.tar": pack(TARS["plain"]), "a.csv": TABLES["quoted.csv"]})
    parquet(tmp_path / "a.parquet")
    for path in list(tmp_path.iterdir()):
        system.pipe(f"/direct/{path.name}", path.read_bytes())
    assert expand_url("memory://direct/*.tar") == ["memory:///direct/a.tar"]
    index = tmp_path / "indices"
    index.mkdir()
    for make, name in ((TarTable, "a.tar"), (ParquetTable, "a.parquet")):
        with pytest.raises(ValueError, match="is read through a URL; say where its index goes, --index FOLDER"):
            make(Stored(f"memory://direct/{name}"))
        same_rows(make(Stored(f"memory://direct/{name}"), str(index)), tmp_path / name)
    same_rows(LineTable(Stored("memory://direct/a.csv"), json=False), tmp_path / "a.csv")
    with pytest.raises(SourceError, match="memory://direct/none: no such file"):
        Stored("memory://direct/none")

    system.pipe("/direct/a.tar", pack(TARS["plain"])[:-2048])
    with pytest.raises(SourceError, match=r"memory://direct/a\.tar: has"):
        TarTable(Stored("memory://direct/a.tar"), str(index))


def outcomes(make, path: Path) -> list:
    """Of each row, what it is, or the kind of its error; or the error of opening. Anything else is a bug."""
    try:
        table = make(Stored(str(path)))
    except SourceError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return [str(error)]
    found = []
    for i in range(len(table)):
        try:
            found.append(table.row(i))
        except (SourceError, RecordError) as error:
            found.append(type(error).__name__)
    return found


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow", "csv"])
def test_flipped_bits_are_errors_of_ours(kind, tmp_path):
    """In a process of its own, which must not die; the index is made for what is damaged already."""
    path = tmp_path / f"a.{kind}"
    make = TarTable
    if kind == "tar":
        tar(path, 8)
    elif kind == "csv":
        save(tmp_path, {path.name: TABLES["quoted.csv"] * 5})
        make = lambda stored: LineTable(stored, json=False)  # noqa: E731
    else:
        arrow = pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
        from rwkv_clip.data.direct.arrow_rows import ArrowTable
        from rwkv_clip.data.direct.parquet_table import ParquetTable

        make = ParquetTable if kind == "parquet" else ArrowTable
        parquet(tmp_path / "p.parquet", count=20, compression="snappy").rename(tmp_path / "a.parquet")
        if kind == "arrow":
            table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "a.parquet")
            with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
    data = path.read_bytes()

    def flip() -> None:
        draw = random.Random(1)
        for number in range(150):
            damaged = bytearray(data)
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.unlink()
            path.write_bytes(damaged[: draw.randrange(len(data))] if number % 10 == 0 else damaged)
            path.with_name(path.name + ".index").unlink(missing_ok=True)
            outcomes(make, path)

    assert wait(fork(flip)) == 0
