"""An index of pictures: what is encoded, what is kept, in which order, and what comes of hostile names and files."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.color_model import COLORS, ColorModel, preprocess, save_color, use_color_model
from helpers.pictures import encode, paint, write_records
from rwkv_clip.data.image import ImageError
from rwkv_clip.files import DamagedError, InUse, hold
from rwkv_clip.search import indexing
from rwkv_clip.search.collection import Collection
from rwkv_clip.search.indexing import Encoding, Summary, index_pictures
from rwkv_clip.search.pictures import NoPicture

NAMES = sorted(COLORS)


@pytest.fixture
def model(monkeypatch) -> ColorModel:
    monkeypatch.setattr(indexing, "PART", 16)
    return use(monkeypatch).model


def use(monkeypatch, digest: str = "0" * 64):
    """The stand-in, for pictures of any size."""
    found = use_color_model(monkeypatch)
    found.preprocess, found.digest = lambda picture: preprocess(picture.resize((8, 8))), digest
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """A picture of every color, in two folders."""
    for number, color in enumerate(NAMES):
        save_color(tmp_path / "pictures" / ("inner" if number % 2 else ".") / f"{color}.png", color)
    return tmp_path / "pictures"


def index(images, output: Path, **more) -> Summary:
    return index_pictures(str(images), Encoding(checkpoint="run", device="cpu", progress=False), output, **more)


def ids(output: Path) -> list[str]:
    collection = Collection.open(output)
    return [collection.describe(row)["id"] for row in range(len(collection))]


def content(output: Path) -> dict[str, bytes]:
    """Every file of an index, by its name; copies, too."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def best(output: Path, text: str, k: int = 1) -> list[str]:
    collection = Collection.open(output, device="cpu")
    rows, _ = collection.vectors.search(collection.model.encode_text(text)[None], k)
    return [collection.describe(row)["id"] for row in rows[0].tolist()]


def test_a_folder_of_pictures_is_found_by_text_and_by_picture(folder, tmp_path, model):
    assert index(folder, tmp_path / "index") == Summary(len(NAMES), len(NAMES), 0)
    found = Collection.open(tmp_path / "index", device="cpu")
    assert ids(tmp_path / "index") == [f"{c}.png" for c in NAMES[::2]] + [f"inner/{c}.png" for c in NAMES[1::2]]
    for row in range(len(found)):
        color = Path(found.describe(row)["id"]).stem
        for query in (found.model.encode_text(color), found.model.encode_picture(found.picture(row))):
            assert found.vectors.search(query[None], 1)[0].tolist() == [[row]]
        np.testing.assert_allclose(np.linalg.norm(found.vectors.take([row])), 1, atol=1e-6)


def test_only_what_is_new_or_changed_is_encoded(folder, tmp_path, model):
    output = tmp_path / "index"
    index(folder, output)
    before = content(output)
    model.calls.clear()
    assert index(folder, output) == Summary(len(NAMES), 0, 0) and not model.calls
    assert content(output) == before
    os.utime(folder / "blue.png")  # touched: the same bytes
    (folder / "inner" / "green.png").rename(folder / "moved.png")
    shutil.copy(folder / "blue.png", folder / "twice.png")
    assert index(folder, output) == Summary(len(NAMES) + 1, 0, 1) and not model.calls
    assert "moved.png" in ids(output) and "inner/green.png" not in ids(output)
    save_color(folder / "blue.png", "yellow")
    (folder / "purple.png").unlink()
    Image.new("RGB", (9, 9), (0, 0, 0)).save(folder / "new.png")
    done = index(folder, output)
    assert (done.rows, done.encoded, done.gone) == (len(NAMES) + 1, 1, 2)  # the yellow bytes are known
    assert set(best(output, "yellow", 2)) == {
        "blue.png",
        "inner/yellow.png" if "yellow" in NAMES[1::2] else "yellow.png",
    }
    fresh = tmp_path / "fresh"
    index(folder, fresh)
    assert ids(output) == ids(fresh)
    a, b = (np.concatenate(list(Collection.open(place).vectors.blocks())) for place in (output, fresh))
    assert np.array_equal(a, b)


def test_same_size_and_time_but_other_bytes_need_a_stamp_that_differs(folder, tmp_path, model):
    """What is documented: a stamp tells, not the bytes."""
    output = tmp_path / "index"
    index(folder, output)
    data, about = encode(paint(20, 20), "PNG"), os.stat(folder / "blue.png")
    (folder / "blue.png").write_bytes(data)
    os.utime(folder / "blue.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert index(folder, output).encoded == int(len(data) != about.st_size)


def test_another_model_encodes_all_again(folder, tmp_path, model, monkeypatch):
    output = tmp_path / "index"
    index(folder, output)
    use(monkeypatch, "1" * 64)
    assert index(folder, output).encoded == len(NAMES)
    with pytest.raises(ValueError, match="is not what made the vectors"):
        use(monkeypatch, "2" * 64)
        Collection.open(output, device="cpu").model.encode_text("red")


def test_what_has_its_stamp_is_not_read(folder, tmp_path, model, monkeypatch):
    index(folder, tmp_path / "index")
    monkeypatch.setattr("rwkv_clip.data.encode.read_bytes", lambda *_: pytest.fail("a picture was read"))
    assert index(folder, tmp_path / "index") == Summary(len(NAMES), 0, 0)


def test_a_tar_of_known_pictures_is_copied(folder, tmp_path, model):
    index(folder, tmp_path / "index")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder / "blue.png", "blue.png")
    assert index(tmp_path / "all.tar", tmp_path / "index").rows == 1
    shutil.rmtree(folder)
    assert Collection.open(tmp_path / "index").picture(0)


@pytest.mark.parametrize("stop", [1, 15, 16, 17, 33, 47])
def test_a_run_that_was_stopped_goes_on_and_ends_alike(tmp_path, model, stop, monkeypatch):
    for number in range(48):
        save_color(tmp_path / "p" / f"{number:02d}.png", NAMES[number % 7])
        paint(8, 8, number).save(tmp_path / "p" / f"{number:02d}.png")
    index(tmp_path / "p", tmp_path / "whole")
    counted, real = [0], indexing._Run._look_at

    def look(self, item):
        counted[0] += 1
        if counted[0] == stop:
            raise KeyboardInterrupt
        return real(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(indexing._Run, "_look_at", look)
        with pytest.raises(KeyboardInterrupt):
            index(tmp_path / "p", tmp_path / "index")
    assert not (tmp_path / "index" / "about.json").exists()
    model.calls.clear()
    done = index(tmp_path / "p", tmp_path / "index")
    assert done.rows == 48 and done.encoded == 48 - (stop - 1) // 16 * 16
    assert sum(model.calls) <= -(-done.encoded // 16) * 16
    assert content(tmp_path / "index") == content(tmp_path / "whole")


# ---- other sources ---------------------------------------------------------------------------------------------------


def make_tar(tmp_path: Path) -> str:
    make_folder(tmp_path)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted((tmp_path / "p").iterdir()):
            tar.add(path, path.name)
    return str(tmp_path / "all.tar")


def make_jsonl(tmp_path: Path) -> str:
    make_folder(tmp_path)
    rows = [{"image": f"p/{c}.png", "caption": f"it is {c}", "warm": c == "red"} for c in NAMES]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return str(tmp_path / "all.jsonl")


def make_folder(tmp_path: Path) -> str:
    for color in NAMES:
        save_color(tmp_path / "p" / f"{color}.png", color)
        (tmp_path / "p" / f"{color}.json").write_text(json.dumps({"caption": f"it is {color}", "warm": color == "red"}))
    return str(tmp_path / "p")


def make_records(tmp_path: Path) -> str:
    write_records(tmp_path / "all", [encode(Image.new("RGB", (8, 8), COLORS[c]), "PNG") for c in NAMES])
    return str(tmp_path / "all.rec")


@pytest.mark.parametrize("make", [make_tar, make_jsonl, make_folder, make_records])
def test_every_kind_of_source(tmp_path, model, make: Callable[[Path], str]):
    spec, output = make(tmp_path), tmp_path / "index"
    assert index(spec, output) == Summary(len(NAMES), len(NAMES), 0)
    assert index(spec, output) == Summary(len(NAMES), 0, 0)
    found = Collection.open(output, device="cpu")
    for place, color in enumerate(NAMES):
        row = int(found.vectors.search(found.model.encode_text(color)[None], 1)[0][0, 0])
        assert row == place
        np.testing.assert_allclose(
            found.model.encode_picture(found.picture(row)), found.vectors.take([row])[0], atol=0.02
        )
        if make is not make_records:
            assert found.describe(row)["text"] == f"it is {color}"
            assert found.describe(row)["fields"]["warm"] is (color == "red")
    if make is not make_records:
        assert found.filters() == {"warm": [False, True]}
        assert found.select({"warm": ["True"]}).tolist() == [color == "red" for color in NAMES]
        assert not found.select({"warm": ["maybe"]}).any()
        with pytest.raises(ValueError, match="'cold' is not one of 'warm'"):
            found.select({"cold": ["True"]})


def test_a_folder_with_pictures_means_these(folder, tmp_path, model):
    """Whatever lies beside them, an index included."""
    (folder / "labels.csv").write_text("name,label\na,1\n")
    (folder / "notes.json").write_text("[1]")
    write_records(folder / "old", [encode(paint(8, 8))])
    for _ in range(2):
        assert index(folder, folder / "index").rows == len(NAMES)


def test_a_picture_and_a_glob_of_pictures(folder, tmp_path, model):
    (folder / "blue.txt").write_text("sea")
    assert index(folder / "blue.png", tmp_path / "one").rows == 1
    found = Collection.open(tmp_path / "one")
    assert (found.describe(0)["id"], found.describe(0)["text"]) == ("blue.png", "sea") and found.picture(0)
    index(folder / "**" / "[!b]*.png", tmp_path / "glob")
    names = {Path(name).name for name in ids(tmp_path / "glob")}
    assert names == {f"{color}.png" for color in NAMES} - {"blue.png"}
    assert all(Collection.open(tmp_path / "glob").picture(row) for row in range(len(NAMES) - 1))


def test_copies_of_a_tar_outlive_it_and_are_swept(tmp_path, model):
    spec, output = make_tar(tmp_path), tmp_path / "index"
    index(spec, output)
    os.unlink(spec)
    assert Collection.open(output).picture(0)
    with tarfile.open(spec, "w") as tar:
        tar.add(tmp_path / "p" / "red.png", "red.png")
        paint(3000, 200).save(tmp_path / "wide.png")
        tar.add(tmp_path / "wide.png", "wide.png")
    assert index(spec, output) == Summary(2, 1, len(NAMES) - 1)
    found = Collection.open(output)
    with Image.open(io.BytesIO(found.picture(1))) as picture:
        assert picture.size == (1024, 68)
    shutil.copy(tmp_path / "wide.png", tmp_path / "p")
    assert index(tmp_path / "p" / "wide.png", output).encoded == 0
    assert not list((output / "pictures").iterdir())


# ---- hostile names and files -----------------------------------------------------------------------------------------

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a\nb",
    "'; DROP TABLE",
    "x..png",
    "%2e%2e",
    " ",
    "\u202egnp",
    "é" * 100,
    "-rf",
    "a\\b",
]


def test_hostile_names_are_names(tmp_path, model):
    places = [tmp_path / "p" / f"{name}.png" for name in HOSTILE]
    raw = os.fsencode(tmp_path / "p") + b"/\xff\xfe.png"
    for place in places:
        save_color(place, "red")
    os.rename(os.fsencode(places.pop()), raw)
    assert index(tmp_path / "p", tmp_path / "index").rows == len(HOSTILE)
    found = Collection.open(tmp_path / "index")
    names = [found.describe(row)["id"] for row in range(len(found))]
    assert sorted(map(os.fsencode, names)) == sorted([*(os.fsencode(place.name) for place in places), b"\xff\xfe.png"])
    for row in range(len(found)):
        json.dumps(found.describe(row)).encode()
        assert found.picture(row)


def test_pictures_that_are_none_are_left_out_and_counted(folder, tmp_path, model):
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "blue.png").read_bytes()[:40])
    secret = tmp_path / "secret.png"
    save_color(secret, "red")
    (folder / "link.png").symlink_to(secret)
    (folder / "own.png").symlink_to("blue.png")
    os.mkfifo(folder / "pipe.png")
    Image.new("1", (40_000, 4)).save(folder / "long.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "own.json").write_text("{broken")
    (folder / "own.txt").write_bytes(b"\xff\xfe")
    done = index(folder, tmp_path / "index")
    assert done.rows == len(NAMES) + 1 and "own.png" in ids(tmp_path / "index")
    assert done.skipped == {"unreadable image": 3, "a link that leads out of the folder": 1, "image too large": 1}
    found = Collection.open(tmp_path / "index").describe(ids(tmp_path / "index").index("own.png"))
    assert found == {"id": "own.png", "text": "", "fields": {}}
    assert index(folder, tmp_path / "index", outside=True).rows == len(NAMES) + 2


def test_rows_are_bounded_numbers(folder, tmp_path, model):
    index(folder, tmp_path / "index")
    found = Collection.open(tmp_path / "index")
    for row in (-1, len(found), 10**30):
        with pytest.raises(IndexError):
            found.picture(row)
        with pytest.raises(IndexError):
            found.describe(row)
    (folder / "blue.png").unlink()
    with pytest.raises(NoPicture, match="no such file"):
        found.picture(0)
    (folder / "blue.png").symlink_to("/etc/hostname")
    with pytest.raises(NoPicture, match="leads out"):
        found.picture(0)
    (folder / "blue.png").unlink()
    (folder / "blue.png").write_bytes(b"nonsense")
    with pytest.raises(ImageError):
        found.picture(0)


def test_pictures_are_shown_upright_and_small(tmp_path, model):
    picture = paint(40, 20)
    exif = picture.getexif()
    exif[0x0112] = 6
    (tmp_path / "p").mkdir()
    picture.save(tmp_path / "p" / "a.jpg", exif=exif)
    Image.new("I;16", (30, 30)).save(tmp_path / "p" / "b.png")
    index(tmp_path / "p", tmp_path / "index")
    found = Collection.open(tmp_path / "index")
    sizes = []
    for row, side in ((0, 0), (0, 10), (1, 0)):
        with Image.open(io.BytesIO(found.picture(row, side))) as shown:
            sizes.append((shown.size, shown.mode, shown.getexif().get(0x0112)))
    assert sizes == [((20, 40), "RGB", None), ((5, 10), "RGB", None), ((30, 30), "RGB", None)]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path, model):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        index(folder, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="names no file of a known kind"):
        index(tmp_path / "empty", tmp_path / "index")
    (tmp_path / "empty" / "a.png").touch()
    with pytest.raises(ValueError, match=r"no picture that can be read \(unreadable image: 1\)"):
        index(tmp_path / "empty", tmp_path / "index")


def test_one_writer(folder, tmp_path, model):
    index(folder, tmp_path / "index")
    lock = tmp_path / "index" / "index.lock"
    code = f"import fcntl, sys; f = open({str(lock)!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(InUse):
            index(folder, tmp_path / "index")
        other.stdin.close()
    with hold(lock, "it", "wait"):
        pass


DAMAGE = {
    "rows cut": lambda data: (data / "rows.jsonl").write_bytes((data / "rows.jsonl").read_bytes()[:-9]),
    "a row less": lambda data: (data / "rows.jsonl").write_bytes(b"".join(_lines(data)[1:])),
    "half cut": lambda data: (data / "half.npy").write_bytes((data / "half.npy").read_bytes()[:-9]),
    "other half": lambda data: np.save(data / "half.npy", np.zeros((3, 3), np.float16)),
    "objects": lambda data: np.save(data / "half.npy", np.array([{}], object), allow_pickle=True),
    "lost is a text": lambda data: (data / "vectors.json").write_text('{"schema": 1, "lost": "x"}'),
    "filters": lambda data: np.save(data / "filters.npy", np.zeros((3, 3), np.int8)),
    "pickled filters": lambda data: np.save(data / "filters.npy", np.array([{}], object), allow_pickle=True),
}


def _lines(data: Path) -> list[bytes]:
    return (data / "rows.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(folder, tmp_path, model, name):
    index(folder, tmp_path / "index")
    DAMAGE[name](tmp_path / "index" / "rows-000001")
    with pytest.raises(DamagedError):
        Collection.open(tmp_path / "index")
