"""The one reader of caption files, as evaluation calls it: every entry is complete, or named."""

import json

import pytest

from rwkv_clip.data.captions import read_captions
from rwkv_clip.data.fields import CAPTION_FIELDS, IMAGE_FIELDS, RAW_FIELDS
from rwkv_clip.data.rows import SourceError

COCO = {
    "images": [{"id": 7, "file_name": "red.png"}, {"id": 5, "file_name": "blue.png"}, {"id": 6, "file_name": "x.png"}],
    "annotations": [
        {"image_id": 5, "id": 1, "caption": "blue"},
        {"image_id": 7, "id": 2, "caption": "red"},
        {"image_id": 5, "id": 3, "caption": "a blue one"},
    ],
}
KARPATHY = {
    "dataset": "flickr30k",
    "images": [
        {"filename": "red.png", "split": "test", "sentences": [{"raw": "red"}, {"raw": "a red one"}]},
        {"filename": "white.png", "filepath": "val2014", "split": "train", "sentences": [{"raw": "white"}]},
    ],
}
LIST = [{"image": "red.png", "caption": "red"}, {"path": "blue.png", "title": ["b", "c"], "split": "test"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (COCO, [("red.png", ["red"], None), ("blue.png", ["blue", "a blue one"], None), ("x.png", [], None)]),
        (KARPATHY, [("red.png", ["red", "a red one"], "test"), ("val2014/white.png", ["white"], "train")]),
        (LIST, [("red.png", ["red"], None), ("blue.png", ["b", "c"], "test")]),
    ],
    ids=["coco", "karpathy", "list"],
)
def test_every_form_gives_pictures_with_all_their_texts(tmp_path, content, expected):
    file = tmp_path / "set.json"
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    name, entries = read_captions(file)
    assert [entry[1:] for entry in entries] == expected
    assert name == ("flickr30k" if content is KARPATHY else None)
    assert entries[1].where == f"{file} entry 1"


@pytest.mark.parametrize("ending", ["jsonl", "ndjson"])
def test_lines_are_numbered_as_an_editor_does(tmp_path, ending):
    file = tmp_path / f"set.{ending}"
    file.write_text("\n".join(["", *map(json.dumps, LIST), ""]))
    assert [entry.where for entry in read_captions(file)[1]] == [f"{file} line 2", f"{file} line 3"]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_fields_have_the_names_that_building_knows(tmp_path, ending):
    assert set(CAPTION_FIELDS) == set(RAW_FIELDS)
    names = [(image, caption) for image in IMAGE_FIELDS for caption in CAPTION_FIELDS]
    rows = [json.dumps({image: f"{image}.png", caption: caption}) for image, caption in names]
    (tmp_path / f"set.{ending}").write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    found = [(entry.image, entry.captions) for entry in read_captions(tmp_path / f"set.{ending}")[1]]
    assert found == [(f"{image}.png", [caption]) for image, caption in names]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1], "is a list, not an object"),
        ({"caption": "x"}, r"field 'image' is None; give a path as text \(the entry has caption\)"),
        ({"image": 3, "caption": "x"}, "field 'image' is 3"),
        ({"image": "red.png", "sentence": "x"}, r"no field 'caption' or 'captions' .*title.*has image, sentence"),
        ({"image": "red.png", "captions": []}, "field 'captions' is empty"),
        ({"image": "red.png", "captions": ["x", 5]}, "field 'captions' holds 5"),
        ({"image": "red.png", "caption": "  "}, "field 'caption' holds '  '"),
        ({"image": "red.png", "caption": "x", "split": 1}, "field 'split' is 1"),
        ({"image": "iVBORw0KGg" + "A" * 402, "caption": "x"}, "a picture inside the file; the entry has image"),
    ],
)
def test_entries_of_no_use_are_errors(tmp_path, entry, message):
    lines, whole = tmp_path / "set.jsonl", tmp_path / "set.json"
    lines.write_text(f"{json.dumps(LIST[0])}\n{json.dumps(entry)}\n")
    whole.write_text(json.dumps([LIST[0], entry]))
    for file, place in ((lines, "line 2"), (whole, "entry 1")):
        with pytest.raises(SourceError, match=f"{file.name}:? {place}:? {message}"):
            read_captions(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 9, "caption": "x"}]}, "entry 3: captions of a picture that is not listed"),
        ({"annotations": [{"image_id": 7, "bbox": []}]}, "annotation 0 has no image_id and caption"),
        ({"annotations": [{"image_id": 7, "caption": ""}]}, "entry 0: field 'captions' holds ''"),
        ({"images": COCO["images"] * 2}, "image 3 has the id 7 of an earlier one"),
        ({"images": [{"id": 7}]}, "entry 0: field 'image' is None"),
    ],
)
def test_a_coco_file_that_does_not_fit_is_named(tmp_path, change, message):
    (tmp_path / "coco.json").write_text(json.dumps(COCO | change))
    with pytest.raises(SourceError, match=rf"coco\.json:? {message}"):
        read_captions(tmp_path / "coco.json")
