"""The embedded demo set: reproducible, held-out scenes really unseen, texts that fit, folders complete."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from rwkv_clip.data.records import RecordFile, unpack
from rwkv_clip.demo.captions import TEXT_NAMES, list_templates, write_texts
from rwkv_clip.demo.dataset import DemoPaths, draw_contact_sheet, main, make_demo
from rwkv_clip.demo.pictures import draw_picture, encode_picture
from rwkv_clip.demo.scenes import (
    COLORS,
    SHAPES,
    draw_class_scenes,
    draw_test_scenes,
    draw_train_scene,
    is_held_out,
    list_groups,
)
from rwkv_clip.tokenizer import make_tokenizer

TRAIN = [draw_train_scene(0, index) for index in range(2_000)]
TEST = draw_test_scenes(0, 256)
SMALL = {"train": 12, "test": 8, "per_class": 2, "size": 32}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def demo(new_folder) -> DemoPaths:
    return make_demo(new_folder("demo") / "set", **SMALL)


def test_no_two_things_of_a_test_scene_meet_in_training():
    seen = {group for scene in TRAIN for group in list_groups(scene)}
    wanted = {group for scene in TEST for group in list_groups(scene)}
    assert len(seen) > 500 and len(wanted) > 100
    assert not seen & wanted


def test_held_out_rule_does_not_depend_on_the_seed():
    other = [group for index in range(500) for group in list_groups(draw_train_scene(7, index))]
    assert not any(map(is_held_out, other))
    assert all(is_held_out(group) for scene in draw_test_scenes(7, 32) for group in list_groups(scene))


def test_every_attribute_of_a_test_scene_is_learnable():
    def kinds(scenes):
        return {(t.shape, t.color) for s in scenes for t in s.things} | {s.background for s in scenes}

    assert kinds(TEST) <= kinds(TRAIN)


def test_test_scenes_and_captions_are_distinct():
    assert len({scene.signature for scene in TEST}) == 256
    assert len({write_texts(scene)["generated"] for scene in TEST}) == 256
    assert {len(scene.things) for scene in TEST} == {2, 3}


def test_twins_use_the_same_words():
    pairs = [(write_texts(a)["generated"], write_texts(b)["generated"]) for a, b in zip(TEST[:32:2], TEST[1:32:2])]
    kinds = [sorted(w for w in a.split() if w in SHAPES + COLORS) for pair in pairs for a in pair]
    assert kinds[::2] == kinds[1::2]
    assert all(a != b for a, b in pairs)


def test_too_many_test_scenes_are_refused(monkeypatch):
    monkeypatch.setattr("rwkv_clip.demo.scenes._MOST_DRAWS", 1)
    with pytest.raises(ValueError, match="test: 64 different"):
        draw_test_scenes(0, 64)


def test_descriptions_name_every_attribute():
    for scene in TEST + TRAIN[:200]:
        words = write_texts(scene)["generated"].replace(",", "").split()
        for thing in scene.things:
            at = words.index(thing.shape)
            while words[at - 3 : at] != [thing.size, thing.texture, thing.color]:
                at = words.index(thing.shape, at + 1)


def test_texts_are_never_empty_and_fit_in_32_tokens():
    texts = [text for scene in TRAIN[:500] + TEST for text in write_texts(scene).values()]
    assert all(text.strip() for text in texts)
    prefixed = [f"a photo of {text}" for text in texts]
    assert int((make_tokenizer(context=77)(prefixed) != 0).sum(dim=1).max()) <= 32


def test_raw_texts_are_noisy_but_mostly_useful():
    raws = [(scene, write_texts(scene)["raw"].lower()) for scene in TRAIN]
    true = sum(all(t.shape in raw for t in scene.things) for scene, raw in raws) / len(raws)
    assert 0.75 < true < 0.95
    assert len({raw for _, raw in raws}) > 1_500


def test_same_scene_same_pixels_other_scene_others():
    first = encode_picture(draw_picture(TRAIN[0], 64), "jpeg")
    assert first == encode_picture(draw_picture(draw_train_scene(0, 0), 64), "jpeg")
    assert len({encode_picture(draw_picture(scene, 32), "png") for scene in TRAIN[:50] + TEST[:50]}) == 100


@pytest.mark.parametrize("size", [16, 48, 65])
def test_picture_sizes(size):
    image = draw_picture(TEST[0], size)
    assert (image.size, image.mode) == ((size, size), "RGB")


def test_same_settings_same_bytes(demo, tmp_path):
    again = make_demo(tmp_path / "other-name", **SMALL)
    assert digests(again.output) == digests(demo.output)
    other = make_demo(tmp_path / "seed", **SMALL, seed=1)
    ours, theirs = digests(demo.output), digests(other.output)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ("train.rec", "retrieval.jsonl", "images/0000.png"))


def test_training_records(demo):
    records = RecordFile(demo.train_records)
    tokenizer = make_tokenizer(context=32)
    assert len(records) == SMALL["train"]
    for index in range(len(records)):
        header, payload = unpack(records.read(index))
        expected = tokenizer([write_texts(draw_train_scene(0, index))[name] for name in TEXT_NAMES])
        assert header.label.astype(int).tolist() == expected.flatten().tolist()
        assert bytes(payload) == encode_picture(draw_picture(draw_train_scene(0, index), 32), "jpeg")
    about = json.loads(Path(f"{demo.train_records}.json").read_text())
    assert (about["views"], about["context"], about["count"]) == (list(TEXT_NAMES), 32, SMALL["train"])


def test_retrieval_set(demo):
    rows = [json.loads(line) for line in demo.retrieval_jsonl.read_text().splitlines()]
    assert len({row["caption"] for row in rows}) == len({row["image"] for row in rows}) == SMALL["test"]
    for row in rows:
        with Image.open(demo.output / row["image"]) as image:
            assert image.size == (32, 32)


def test_classification_folders(demo):
    for attribute, classes in (("shape", SHAPES), ("color", COLORS)):
        folder = demo.classification[attribute]
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(classes)
        assert {len(list((folder / name).glob("*.png"))) for name in classes} == {SMALL["per_class"]}
        about = json.loads((folder / "names.json").read_text())
        assert set(about["names"]) == set(classes)
        assert about["templates"] == list_templates(attribute)
        assert all(template.count("{}") == 1 for template in about["templates"])


def test_class_scenes_vary_the_other_attributes():
    scenes = [scene for name, scene in draw_class_scenes(0, "shape", 32) if name == "star"]
    assert {scene.things[0].shape for scene in scenes} == {"star"}
    assert len({scene.things[0].color for scene in scenes}) == len(COLORS)


def test_finished_set_is_kept_and_another_refused(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.output.rglob("*")}
    assert make_demo(demo.output, **SMALL) == demo
    assert {path: path.stat().st_mtime_ns for path in demo.output.rglob("*")} == before
    with pytest.raises(ValueError, match=r"other settings \(seed 0 -> 3\)"):
        make_demo(demo.output, **SMALL, seed=3)


def test_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a finished demo set"):
        make_demo(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("rwkv_clip.demo.dataset._build_train", fail)
    with pytest.raises(OSError, match="disk full"):
        make_demo(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field, value", [("train", 0), ("test", -1), ("per_class", 0), ("size", 8), ("context", 1)])
def test_bad_settings_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}: {value} is too small"):
        make_demo(tmp_path / "set", **{field: value})


def test_contact_sheet(tmp_path):
    path = draw_contact_sheet(TRAIN[:3], tmp_path / "figure" / "sheet.png")
    with Image.open(path) as image:
        assert image.width > 800 and image.height > 400


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "demo: stopped"), (ValueError("size: wrong"), 2, "demo: size: wrong")],
)
def test_the_command_ends_in_a_line(tmp_path, monkeypatch, capsys, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("rwkv_clip.demo.dataset._build_train", fail)
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path / "demo"), "--test", "1", "--per-class", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code and capsys.readouterr().err.strip() == said and not list(tmp_path.iterdir())
