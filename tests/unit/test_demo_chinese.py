"""The demo set in Chinese: the same scenes, texts that tell them apart and that the vocabulary can spell."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from rwkv_clip.data.records import RecordSet
from rwkv_clip.demo import captions, chinese
from rwkv_clip.demo.chinese import COLORS_ZH, GROUNDS_ZH, SHAPES_ZH, SIZES_ZH, TEXTURES_ZH, write_texts
from rwkv_clip.demo.dataset import DemoSettings, draw_contact_sheet, make_demo
from rwkv_clip.demo.scenes import COLORS, SHAPES, draw_test_scenes, draw_train_scene
from rwkv_clip.fonts import find_font_file
from rwkv_clip.tokenizer import BERT_CHINESE, make_tokenizer

TRAIN = [draw_train_scene(0, index) for index in range(500)]
TEST = draw_test_scenes(0, 256)
TEXTS = [text for scene in TRAIN + TEST for text in write_texts(scene).values()]
SMALL = {"train": 6, "test": 4, "per_class": 1, "size": 32, "language": "zh"}
UNKNOWN = 100


def test_descriptions_tell_all_test_scenes_apart():
    assert len({write_texts(scene)["generated"] for scene in TEST}) == len(TEST)


def test_descriptions_name_every_attribute():
    for scene in TEST + TRAIN:
        text = write_texts(scene)["generated"]
        assert text.startswith(GROUNDS_ZH[scene.background])
        for t in scene.things:
            full = COLORS_ZH[t.color] + TEXTURES_ZH[t.texture] + SIZES_ZH[t.size] + SHAPES_ZH[t.shape]
            assert full in text


def test_mirrored_and_exchanged_places_change_the_description():
    scene = next(s for s in TEST if len(s.things) == 2 and s.things[0].place[0] != s.things[1].place[0])
    a, b = scene.things
    other = replace(scene, things=(replace(a, place=b.place), replace(b, place=a.place)))
    assert write_texts(scene)["generated"] != write_texts(other)["generated"]


def test_vocabulary_spells_all_texts_within_the_context():
    settings = DemoSettings(language="zh")
    assert (settings.tokenizer, settings.context) == (BERT_CHINESE, 48)
    prompts = [t.replace("{}", w) for a in ("shape", "color") for w in chinese.name_classes(a).values()
               for t in chinese.list_templates(a)]  # fmt: skip
    ids = make_tokenizer(BERT_CHINESE, settings.context)(TEXTS + prompts)
    assert not (ids == UNKNOWN).any()
    assert not ids[:, -1].any()  # nothing is cut


def test_set_has_the_pictures_of_the_english_one(tmp_path):
    ours, english = make_demo(tmp_path / "zh", **SMALL), make_demo(tmp_path / "en", **SMALL | {"language": "en"})
    records = RecordSet(str(ours.train_records))
    assert (records.tokenizer, records.context, records.text_names) == (BERT_CHINESE, 48, captions.TEXT_NAMES)
    theirs = RecordSet(str(english.train_records))
    assert [records.sample(i)[0] for i in range(6)] == [theirs.sample(i)[0] for i in range(6)]
    tokens = make_tokenizer(BERT_CHINESE, 48)(list(write_texts(draw_train_scene(0, 5)).values()))
    assert (records.sample(5)[1] == tokens.numpy()).all()
    rows = [json.loads(line) for line in ours.retrieval_jsonl.read_text(encoding="utf-8").splitlines()]
    assert [row["caption"] for row in rows] == [write_texts(s)["generated"] for s in draw_test_scenes(0, 4)]
    about = json.loads((ours.classification["color"] / "names.json").read_text(encoding="utf-8"))
    assert about["names"]["red"] == "红色" and set(about["names"]) == set(COLORS)
    assert len(chinese.list_templates("color")) == len(SHAPES)


def test_languages_are_different_sets_and_english_stamps_are_as_before(tmp_path):
    paths = make_demo(tmp_path / "set", **SMALL | {"language": "en"})
    stamp = json.loads((paths.output / "demo.json").read_text())["settings"]
    assert list(stamp) == ["seed", "train", "test", "per_class", "size", "context", "tokenizer"]
    with pytest.raises(ValueError, match=r"language 'en' -> 'zh'"):
        make_demo(paths.output, **SMALL)


def test_unknown_language():
    with pytest.raises(ValueError, match="language: 'fr' is not one of en, zh"):
        DemoSettings(language="fr")


def test_contact_sheet(tmp_path):
    if find_font_file("图") is None:
        with pytest.raises(ValueError, match="apt-get install fonts-noto-cjk"):
            draw_contact_sheet(TRAIN[:3], tmp_path / "sheet.png", language="zh")
    else:
        with Image.open(draw_contact_sheet(TRAIN[:3], tmp_path / "sheet.png", language="zh")) as image:
            assert image.width > 800
