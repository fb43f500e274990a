"""The same build a second time: nothing that was changed is answered from the first one, and nothing good is lost."""

import base64
import errno
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from helpers.pictures import picture
from helpers.sources import add_member, contents, make_rows, save_images, save_jsonl
from rwkv_clip.data import encode, plan, recordio
from rwkv_clip.data.build import build_records
from rwkv_clip.data.recordio import RecordFile, RecordWriter, unpack
from rwkv_clip.data.records import RecordSet
from rwkv_clip.errors import explain

TINY = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8ybqm"
    "x5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/wAARCAAIAAgD"
    "ASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAT/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAAAwX/xAAUEQEA"
    "AAAAAAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCIAaw//9k="
)
GOLDEN = {  # of the releases before side files said what they were made of
    "t-00000.idx": "998b11794f422c39de5628b4afe30e4fd0ec2daf6a7b61a86a378ff71b4b654a",
    "t-00000.rec": "7ba27e176a8422108722848c124fc683755fea72edab7e6bba693f6e4368353d",
    "t-00001.idx": "0197dadf35de060d3c1f6280be0755047e4bca9c1d9c69d3eeab41d2c9a9dd23",
    "t-00001.rec": "d7323597932913684cb585338583a3537c7627f1bac4dac33e280c455083ffc3",
}


def test_the_bytes_of_records_are_those_of_earlier_releases(tmp_path):
    """Kept pictures, texts cut and missing, rows skipped, shards."""
    (tmp_path / "a.jpg").write_bytes(TINY)
    rows = [{"image": "a.jpg", "raw": f"raw text {i}", "synthetic": f"synthetic {i} "} for i in range(7)]
    rows[2]["synthetic"] += "and so on " * 30
    rows[3]["synthetic"] = None
    rows[5]["raw"], rows[6]["image"] = "", "b.jpg"
    build_records(save_jsonl(tmp_path / "c.jsonl", rows), str(tmp_path / "t"), shard_size=3, context=16)
    found = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in GOLDEN}
    assert found == GOLDEN


def test_content_is_the_hash_of_the_checksums(tmp_path):
    save_images(tmp_path, 6)
    build_records(save_jsonl(tmp_path / "c.jsonl", make_rows(6)), str(tmp_path / "t"), shard_size=4)
    for number in range(2):
        file = RecordFile(tmp_path / f"t-{number:05d}")
        sums = b"".join(struct.pack("<I", unpack(file.read(i))[0].id2) for i in range(len(file)))
        side = json.loads((tmp_path / f"t-{number:05d}.json").read_text())
        assert side["content"] == hashlib.sha256(sums).hexdigest() and len(sums) == (16, 8)[number]
        assert side["bytes"] == file.path.stat().st_size


# ---- what was changed ------------------------------------------------------------------------------------------------


def replace(path: Path, data: bytes) -> None:
    """As `mv` and `cp` do, and later than the build by more than the clock of a file system is coarse."""
    about = path.stat() if path.exists() else None
    path.write_bytes(data)
    now = max(path.stat().st_mtime_ns, about.st_mtime_ns if about else 0)
    os.utime(path, ns=(now, now + 10_000_000))


def correct_captions(folder: Path) -> None:
    """The size stays as it is."""
    path = folder / "c.jsonl"
    path.write_text(path.read_text().replace("raw text 3", "raw TEXT 3"))


CHANGES = {
    "a picture": lambda d: replace(d / "photos/3.jpg", picture(30)),
    "a picture, of the same size": lambda d: replace(d / "photos/1.jpg", (d / "photos/1.jpg").read_bytes()[::-1]),
    "a picture of the last shard": lambda d: replace(d / "photos/7.jpg", picture(70)),
    "a picture goes": lambda d: (d / "photos/2.jpg").unlink(),
    "a picture that was missing comes": lambda d: replace(d / "photos/5.jpg", picture(5)),
    "the last picture comes": lambda d: replace(d / "photos/8.jpg", picture(8)),
    "a picture becomes a folder": lambda d: ((d / "photos/2.jpg").unlink(), (d / "photos/2.jpg").mkdir()),
    "captions": correct_captions,
    "a row more": lambda d: (d / "c.jsonl").write_text((d / "c.jsonl").read_text() + '{"raw": "x"}\n'),
    "another folder": lambda d: (shutil.move(d / "photos", d / "old"), save_images(d / "photos", 8)),
}


def make_set(folder: Path) -> None:
    """Rows 5 and 8 have no picture, row 4 is skipped for its text."""
    save_images(folder / "photos", 8)
    (folder / "photos/5.jpg").unlink()
    rows = make_rows(9)
    rows[4]["raw"] = ""
    save_jsonl(folder / "c.jsonl", rows)


def build(folder: Path, shard_size: int = 3, **settings):
    prefix = str(folder / "out" / "t")
    return build_records(
        str(folder / "c.jsonl"), prefix, images=str(folder / "photos"), shard_size=shard_size, **settings
    )


@pytest.mark.parametrize("shard_size", [0, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_input_is_refused_and_built_anew(tmp_path, change, shard_size):
    make_set(tmp_path)
    build(tmp_path, shard_size)
    assert build(tmp_path, shard_size).kept == (2 if shard_size else 1)
    CHANGES[change](tmp_path)
    before = contents(tmp_path / "out" / "t")
    with pytest.raises(ValueError, match="give --overwrite") as error:
        build(tmp_path, shard_size)
    assert ("the input has changed" in str(error.value)) == (change in ("captions", "a row more"))
    if change in ("a picture", "a picture that was missing comes", "the last picture comes"):
        number = {"a picture": 3, "the last picture comes": 8}.get(change, 5)
        assert f"photos/{number}.jpg was changed or put there since" in str(error.value)
    assert contents(tmp_path / "out" / "t") == before
    built = build(tmp_path, shard_size, overwrite=True)
    fresh = tmp_path / "fresh"
    build_records(str(tmp_path / "c.jsonl"), str(fresh / "t"), images=str(tmp_path / "photos"), shard_size=shard_size)
    assert contents(tmp_path / "out" / "t") == contents(fresh / "t")
    if change == "a picture of the last shard" and shard_size:
        assert built.kept == 1


@pytest.mark.parametrize(
    "change", ["a picture, of the same size", "captions", "another folder", "a picture that was missing comes"]
)
def test_an_interrupted_build_does_not_go_on_with_other_input(tmp_path, change):
    make_set(tmp_path)
    build(tmp_path)
    for ending in (".json", "-00001.rec", "-00001.idx"):
        (tmp_path / "out" / f"t{ending}").unlink()
    CHANGES[change](tmp_path)
    if change == "a picture that was missing comes":  # it is of the part that has not been built
        assert build(tmp_path).kept == 1
    else:
        with pytest.raises(ValueError, match="give --overwrite"):
            build(tmp_path)


def test_a_set_that_was_moved_is_the_same(tmp_path, monkeypatch):
    here = tmp_path / "here"
    make_set(here)
    build(here)
    there = Path(shutil.move(here, tmp_path / "there"))
    os.utime(there / "c.jsonl")
    monkeypatch.setattr(encode.Encoder, "__call__", None)
    monkeypatch.setattr(encode, "read_bytes", None)
    assert build(there).kept == 2, "complete, and no picture was read"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_pictures_inside_the_input(tmp_path, kind, monkeypatch):
    """Nothing but the input itself is looked at; it cannot change unnoticed."""
    path = tmp_path / f"s.{kind}"

    def write(third: bytes) -> None:
        rows = [("a dog", picture(i)) for i in range(3)] + [("a dog", third)]
        if kind == "tar":
            with tarfile.open(path, "w") as tar:
                for i, (text, data) in enumerate(rows):
                    add_member(tar, f"{i}.jpg", data)
                    add_member(tar, f"{i}.txt", text.encode())
        else:
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pytest.importorskip("pyarrow").table({"text": [t for t, _ in rows], "image": [d for _, d in rows]})
            parquet.write_table(table, path)

    write(picture(3))
    build_records(str(path), str(tmp_path / "t"))
    assert json.loads((tmp_path / "t.json").read_text())["pictures"] is None
    monkeypatch.setattr(encode.Encoder, "find_picture", None)
    assert build_records(str(path), str(tmp_path / "t")).kept == 1
    monkeypatch.undo()
    write(picture(3)[::-1])
    with pytest.raises(ValueError, match="the input has changed since"):
        build_records(str(path), str(tmp_path / "t"))


@pytest.mark.parametrize("damage", ["cut", "longer", "index", "rubbish", "side"])
def test_files_that_are_not_what_their_json_says_are_built_again(tmp_path, damage):
    make_set(tmp_path)
    build(tmp_path)
    before, shard = contents(tmp_path / "out" / "t"), tmp_path / "out" / "t-00000"
    if damage == "index":
        index = shard.with_suffix(".idx")
        index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    elif damage == "rubbish":
        index = shard.with_suffix(".idx")
        index.write_text("".join(f"{n}\t0\n" for n in range(len(index.read_text().splitlines()))))
    elif damage == "side":
        side = json.loads(shard.with_suffix(".json").read_text())
        shard.with_suffix(".json").write_text(json.dumps({key: side[key] for key in ("digest", "input", "count")}))
    else:
        rec = shard.with_suffix(".rec")
        rec.write_bytes(rec.read_bytes()[:-4] if damage == "cut" else rec.read_bytes() + bytes(4))
    report = build(tmp_path)
    assert contents(tmp_path / "out" / "t") == before and report.kept == 0
    assert "built again: " in str(report) and "t-00000.rec: " in str(report)


STRANGE = [{"rows": -1}, {"rows": "3"}, {"rows": True}, {"count": 1e9}, {"skipped": {"x": "y"}}, {"cut": [1]}]
STRANGE += [{"where": 5}, {"pictures": 5}, {"shards": 5}]
PLACES = [("t-00000.json", strange) for strange in STRANGE] + [
    ("t.json", strange) for strange in [*STRANGE, {"rows": 1}]
]


@pytest.mark.parametrize("name, strange", PLACES, ids=str)
def test_numbers_that_cannot_be_are_not_believed(tmp_path, name, strange):
    make_set(tmp_path)
    build(tmp_path)
    before, side = contents(tmp_path / "out" / "t"), tmp_path / "out" / name
    side.write_text(json.dumps({**json.loads(side.read_text()), **strange}))
    build(tmp_path)
    assert contents(tmp_path / "out" / "t") == before


def test_a_pipe_in_place_of_a_side_file_is_not_waited_for(tmp_path):
    make_set(tmp_path)
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "t.json")
    with pytest.raises(ValueError, match="not of this program"):
        build(tmp_path)


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("kind", ["manifest", "link", "pair"])
def test_the_input_is_never_overwritten(tmp_path, kind, size):
    """Nor is its name offered to --overwrite."""
    name = "t-00000.json" if size else "t.json"
    (tmp_path / "0.jpg").write_bytes(picture(0))
    source, entry = tmp_path / name, {"image": "0.jpg", "caption": "a dog"}
    if kind == "pair":
        source = tmp_path / "pairs"
        source.mkdir()
        (source / name).with_suffix(".jpg").write_bytes(picture(0))
        (source / name).write_text(json.dumps(entry))
    elif kind == "link":
        source = tmp_path / "linked.json"
        source.symlink_to(name)
    if kind != "pair":
        (tmp_path / name).write_text(json.dumps([entry] * 3))
    place = source if kind == "pair" else tmp_path
    before = (place / name).read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"a file of the input.*another prefix|lies in the input"):
            build_records(str(source), str(place / "t"), shard_size=size, overwrite=overwrite)
    assert (place / name).read_bytes() == before and not list(place.glob("t*.rec"))


def test_files_of_an_earlier_release_are_refused(tmp_path):
    make_set(tmp_path)
    build(tmp_path)
    for path in (tmp_path / "out").glob("*.json"):
        side = json.loads(path.read_text())
        for key in ("input", "pictures", "bytes", "content", "cut", "unused", "where"):
            side.pop(key, None)
        path.write_text(json.dumps(side | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match=r"made by an earlier release, which did not note .* give --overwrite"):
        build(tmp_path)


# ---- room on the disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [0, 3])
@pytest.mark.parametrize("when", ["write 1", "write 2", "write 5", "flush", "side file"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, when, shard_size):
    make_set(tmp_path)
    build(tmp_path, shard_size)
    before, calls = contents(tmp_path / "out" / "t"), []
    step, _, number = when.partition(" ")
    owner, name = {"write": (recordio, "_parts"), "flush": (os, "fsync"), "side": (recordio, "write_json")}[step]
    original = getattr(owner, name)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == int(number if step == "write" else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/t" if step == "side" else None)
        return original(*arguments)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError) as error:
        build(tmp_path, shard_size, overwrite=True, quality=90)
    code, words = explain(error.value)
    assert code == 76 and "free some space" in words and "out/t" in words
    after = contents(tmp_path / "out" / "t")
    if when != "write 5" or not shard_size:
        assert after == before
    else:  # the first shard was replaced, the rest is as it was, and no summary says that they belong together
        assert {name for name in before if before[name] != after.get(name)} == {"t-00000.json", "t.json"}
        assert "t.json" not in after
    monkeypatch.undo()
    build(tmp_path, shard_size, overwrite=True, quality=90)
    RecordSet(tmp_path / "out" / "t")


def test_rests_of_a_killed_build_go_and_nothing_else(tmp_path):
    make_set(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    ours = ["t.rec.tmp", "t-00007.rec.tmp", "t-00007.idx.tmp", "t.json.12.part", "t-00001.json.tmp.345.part"]
    others = ["t-notes.tmp", "t.tmp", "t2.rec.tmp", "t-00007.tmp", "t-1.rec.tmp", "t.json.part", "u.rec.tmp"]
    for name in ours + others:
        (out / name).touch()
    build(tmp_path)
    left = {path.name for path in out.iterdir()}
    assert left >= set(others) and not left & set(ours) and "t.lock" not in left


def test_overwriting_by_another_number_of_files(tmp_path):
    make_set(tmp_path)
    for size in (0, 2, 3, 0, 4):
        build(tmp_path, size, overwrite=True)
        names = [f"t-{i:05d}" for i in range(-(-6 // size))] if size else ["t"]
        expected = {f"{name}.{ending}" for name in names for ending in ("rec", "idx", "json")} | {"t.json"}
        assert set(contents(tmp_path / "out" / "t")) == expected and len(RecordSet(tmp_path / "out" / "t")) == 6


# ---- rotated pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_side", [0, 30])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_records_hold_upright_pictures(tmp_path, kind, orientation, max_side):
    stored = Image.new("RGB", (60, 40))
    stored.paste((255, 0, 0), (0, 0, 30, 20))
    tag = Image.Exif()
    tag[0x0112] = orientation
    data = io.BytesIO()
    stored.save(data, kind, exif=tag.tobytes())
    (tmp_path / "a.jpg").write_bytes(data.getvalue())
    build_records(
        save_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg", "raw": "a"}]), str(tmp_path / "t"), max_side=max_side
    )
    kept = RecordSet(tmp_path / "t").sample(0)[0]
    assert (kept == data.getvalue()) == (kind == "JPEG" and orientation == 1 and not max_side)
    found = Image.open(io.BytesIO(kept))
    assert found.getexif().get(0x0112, 1) == 1
    assert (found.width > found.height) == (orientation < 5)
    red = [
        (x, y)
        for x in (0.25, 0.75)
        for y in (0.25, 0.75)
        if found.convert("RGB").getpixel((int(x * found.width), int(y * found.height)))[0] > 128
    ]
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    assert red == [tuple(0.25 + 0.5 * side for side in corners[orientation])]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_tag_that_nobody_can_read_is_no_tag(tmp_path):
    data = TINY[:2] + b"\xff\xe1\x00\x12Exif\0\0II*\0\xff\xff\xff\xff" + b"\0\0" + TINY[2:]
    (tmp_path / "a.jpg").write_bytes(data)
    build_records(save_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg", "raw": "a"}]), str(tmp_path / "t"))
    assert RecordSet(tmp_path / "t").sample(0)[0] == data and plan.RULES == 2


def test_what_changes_while_it_is_read_has_changed_for_the_next_run(tmp_path, monkeypatch):
    make_set(tmp_path)
    write = RecordWriter.write

    def write_and_change(writer, key, packed):
        (tmp_path / "c.jsonl").open("a").write("\n")
        write(writer, key, packed)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write_and_change)
        build(tmp_path, 0)
    with pytest.raises(ValueError, match="input has changed since"):
        build(tmp_path, 0)
