"""Folders of pictures with texts, what a spec names, and fingerprints of the input."""

import json
import os
import tarfile

import numpy as np
import pytest

from helpers.source_files import BOM, JPEG, PNG, outcome, pack, read, save
from rwkv_clip.data.sources import Source

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
        (["readme.md"], "names no file of a known kind"),
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
    (tmp_path / "d" / "circle").symlink_to("circle")
    (tmp_path / "d" / "gone.tar").symlink_to("nowhere")
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
