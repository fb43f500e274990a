"""Names and files that a manifest of somebody else may hold, and places where nothing can be read or written."""

import errno
import json
import os
import resource

import pytest

from helpers.pictures import picture
from helpers.sources import save_jsonl
from rwkv_clip import files
from rwkv_clip.data import encode
from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import RecordSet
from rwkv_clip.data.sources import Source
from rwkv_clip.errors import explain
from rwkv_clip.tokenizer import make_tokenizer

OUTSIDE = "image outside the image folder"


@pytest.fixture
def places(tmp_path):
    """photos/a.jpg may be read; private/id.jpg may not."""
    for folder in ("photos/sub", "private"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "photos/a.jpg").write_bytes(picture(0))
    (tmp_path / "photos/sub/b.jpg").write_bytes(picture(1))
    (tmp_path / "private/id.jpg").write_bytes(picture(2))
    (tmp_path / "photos/link.jpg").symlink_to(tmp_path / "private/id.jpg")
    (tmp_path / "photos/relative.jpg").symlink_to("../private/id.jpg")
    (tmp_path / "photos/inside.jpg").symlink_to("sub/b.jpg")
    (tmp_path / "photos/folder").symlink_to(tmp_path / "private")
    (tmp_path / "photos/circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(tmp_path / "photos/pipe.jpg")
    (tmp_path / "photos/device.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "photos/big.jpg", "wb") as file:
        file.truncate(3 << 30)
    (tmp_path / "photos/empty.jpg").touch()
    return tmp_path


NAMES = {  # name: what becomes of it, and with --allow-outside
    "a.jpg": (None, None),
    "./sub/../a.jpg": (None, None),
    "sub/b.jpg": (None, None),
    "inside.jpg": (None, None),
    "../photos/a.jpg": (None, None),
    "{}/photos/a.jpg": (None, None),
    "../private/id.jpg": (OUTSIDE, None),
    "sub/../../private/id.jpg": (OUTSIDE, None),
    "{}/private/id.jpg": (OUTSIDE, None),
    "link.jpg": (OUTSIDE, None),
    "relative.jpg": (OUTSIDE, None),
    "folder/id.jpg": (OUTSIDE, None),
    "../nothing.jpg": ("missing image", "missing image"),
    "circle.jpg": ("missing image", "missing image"),
    "pipe.jpg": ("image is not a regular file", "image is not a regular file"),
    "device.jpg": ("image is not a regular file", "image is not a regular file"),
    "/dev/zero": ("image is not a regular file", "image is not a regular file"),
    "/proc/self/mem": (OUTSIDE, "unreadable image"),
    ".": ("image is not a regular file", "image is not a regular file"),
    "big.jpg": ("image too large", "image too large"),
    "empty.jpg": ("unreadable image", "unreadable image"),
    "a.jpg\0": ("missing image", "missing image"),
    "\ud800.jpg": ("missing image", "missing image"),
    "x" * 300: ("unreadable image", "unreadable image"),
}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("given", [True, False], ids=["--images", "the manifest's folder"])
@pytest.mark.parametrize("name", NAMES)
def test_names(places, name, given, allow):
    rows = [{"image": "a.jpg", "raw": "good"}, {"image": name.format(places), "raw": "a"}]
    path = (places if given else places / "photos") / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tokenizer()("warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = {"images": str(places / "photos")} if given else {}
    report = build_records(str(path), str(places / "out/t"), allow_outside=allow, **settings)
    problem = NAMES[name][allow]
    assert report.skipped == ({problem: 1} if problem else {})
    assert report.count == len(RecordSet(places / "out/t")) == 2 - bool(problem)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    if problem == OUTSIDE:
        assert "--allow-outside" in str(report) and "c.jsonl line 2" in str(report)


def test_a_folder_of_images_may_be_a_link(places):
    """Beside the manifest it is called images; what it points to is the folder that names have to stay in."""
    (places / "images").symlink_to("photos")
    rows = [{"image": name, "raw": "a"} for name in ("a.jpg", "sub/b.jpg", "inside.jpg", "link.jpg")]
    path = save_jsonl(places / "c.jsonl", rows)
    assert build_records(path, str(places / "out/t")).skipped == {OUTSIDE: 1}
    assert build_records(path, str(places / "out/u"), images=str(places / "images")).skipped == {OUTSIDE: 1}


def test_all_pictures_outside_is_an_error_with_a_remedy(places):
    path = save_jsonl(places / "c.jsonl", [{"image": "/etc/hostname", "raw": "a"}] * 3)
    with pytest.raises(ValueError, match=rf"none of 3 rows .*{OUTSIDE}: 3 \(name the folder .*--allow-outside"):
        build_records(path, str(places / "out/t"))


def test_a_fault_of_the_machine_is_no_fault_of_the_picture(places, monkeypatch):
    def fail(path, most):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    path = save_jsonl(places / "photos/c.jsonl", [{"image": "a.jpg", "raw": "a"}])
    monkeypatch.setattr(encode, "read_bytes", fail)
    with pytest.raises(OSError) as error:
        build_records(path, str(places / "out/t"))
    assert explain(error.value)[0] == 2 and "ulimit -n" in explain(error.value)[1]


@pytest.mark.parametrize(
    "images, words", [("nowhere", "is not there"), ("c.jsonl", "is a file"), ("photos/pipe.jpg", "is a file")]
)
def test_images_that_are_no_folder_are_named_before_anything_is_read(places, images, words, monkeypatch):
    path = save_jsonl(places / "c.jsonl", [{"image": "a.jpg", "raw": "a"}])
    monkeypatch.setattr(Source, "rows", None)
    with pytest.raises(ValueError, match=f"--images: '.*{images}' {words}"):
        build_records(path, str(places / "out/t"), images=str(places / images))
    assert not (places / "out").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_output_folder_that_cannot_be_written(places, monkeypatch, code):
    path = save_jsonl(places / "photos/c.jsonl", [{"image": "a.jpg", "raw": "a"}])

    def refuse(lock, *_, **__):
        raise OSError(code, os.strerror(code), str(lock))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(OSError) as error:
        build_records(path, str(places / "out/t"))
    assert explain(error.value)[0] == 76 and "out/t.lock" in explain(error.value)[1]


def test_names_that_are_not_utf8(places):
    """Of the input they are names like others; of the output they would be in a .json."""
    strange = places / os.fsdecode(b"caf\xe9")
    (places / "photos").rename(strange)
    path = save_jsonl(strange / os.fsdecode(b"c\xff.jsonl"), [{"image": "a.jpg", "raw": "a"}])
    assert build_records(path, str(places / "out/t"), images=str(strange)).count == 1
    with pytest.raises(UnicodeEncodeError) as error:
        build_records(path, str(places / os.fsdecode(b"\xff")), shard_size=1)
    assert explain(error.value) == (2, explain(error.value)[1]) and "not UTF-8; rename it" in explain(error.value)[1]
    assert json.loads((places / "out/t.json").read_text())["count"] == 1


@pytest.mark.parametrize("prefix", ["in/out", "in/deeper/out", "link/out", "in/../in/out"])
def test_output_in_the_folder_that_is_the_input_is_refused(tmp_path, monkeypatch, prefix):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "in" / "a.jpg").write_bytes(picture(0))
    (tmp_path / "in" / "a.txt").write_text("a dog")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="lies in the input 'in'"):
        build_records("in", prefix)
    assert sorted(os.listdir("in")) == ["a.jpg", "a.txt"]
    assert build_records("in", "beside").count == 1
