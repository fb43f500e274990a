"""Every form of a retrieval set, and its errors: rows of files, and records."""

import json

import numpy as np
import pytest

from helpers.color_model import COLORS, ColorModel, ColorTokenizer, preprocess, save_color
from helpers.sources import save_jsonl
from rwkv_clip.data.records import Header, RecordWriter, pack
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.tokenizer import count_cut, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    for color in COLORS:
        save_color(tmp_path / f"{color}.png", color)
    return tmp_path


def evaluate(data, prefix="", tokenizer=None):
    return evaluate_retrieval(FeatureExtractor(ColorModel(), preprocess, tokenizer or ColorTokenizer()), data, prefix)


def test_json_lines_with_one_and_several_captions(folder):
    rows = [
        {"image": "red.png", "captions": ["a red thing", "red"]},
        {"image": "blue.png", "caption": "blue"},
        {"image": "red.png", "caption": "really red"},  # the same picture again: its captions are joined
    ]
    data = load_retrieval(save_jsonl(folder / "set.jsonl", rows))
    assert data.image_names == ["red.png", "blue.png"]
    assert data.captions == ["a red thing", "red", "blue", "really red"]
    assert data.image_of_caption.tolist() == [0, 0, 1, 0]
    assert data.open(1).getpixel((0, 0)) == COLORS["blue"]
    assert data.name == f"{folder.name}/set" and data.split is None


def test_json_list_below_image_root(folder, new_folder):
    path = new_folder("elsewhere") / "list.json"
    path.write_text(json.dumps([{"image": "red.png", "caption": ["red", "very red"]}]))
    assert load_retrieval(path, image_root=folder).captions == ["red", "very red"]
    with pytest.raises(ValueError, match=r"list.json entry 0: field 'image': 'red.png' .* set image_root"):
        load_retrieval(path)


def test_pictures_in_the_images_folder_are_found(tmp_path):
    save_color(tmp_path / "images" / "red.png", "red")
    data = load_retrieval(save_jsonl(tmp_path / "captions.jsonl", [{"image": "red.png", "caption": "red"}]))
    assert data.open(0).size == (8, 8)


def test_karpathy_file(folder):
    save_color(folder / "val2014" / "white.png", "white")
    entries = [
        {"filename": "red.png", "split": "test", "sentences": [{"raw": "red"}, {"raw": "a red one"}]},
        {"filename": "blue.png", "split": "train", "sentences": [{"raw": "blue"}]},
        {"filename": "white.png", "filepath": "val2014", "split": "test", "sentences": [{"raw": "white"}]},
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "flickr30k", "images": entries}))
    data = load_retrieval(path, split="test")
    assert data.image_names == ["red.png", "val2014/white.png"] and data.name == "flickr30k"
    assert data.image_of_caption.tolist() == [0, 0, 1]
    assert len(load_retrieval(path, split="all").image_names) == 3


COCO = {
    "images": [
        {"id": 7, "file_name": "red.png"},
        {"id": 5, "file_name": "blue.png"},
        {"id": 6, "file_name": "teal.png"},
    ],
    "annotations": [
        {"image_id": 5, "id": 1, "caption": "blue"},
        {"image_id": 7, "id": 2, "caption": "red"},
        {"image_id": 5, "id": 3, "caption": "a blue one"},
    ],
}


def test_captions_of_coco(folder):
    """Grouped by picture; one without captions is a candidate and no query, and counted in words."""
    path = folder / "captions_val2017.json"
    path.write_text(json.dumps(COCO))
    data = load_retrieval(path)
    assert data.image_names == ["red.png", "blue.png", "teal.png"] and data.captions == ["red", "blue", "a blue one"]
    assert data.image_of_caption.tolist() == [0, 1, 1]
    assert data.note.startswith("1 of 3 pictures have no caption (the first is teal.png)")
    metrics = evaluate(data).metrics
    assert (metrics["images"], metrics["image_queries"], metrics["mean_recall"]) == (3, 2, 1.0)


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "parquet", "tar"])
def test_other_kinds_of_files_are_told_what_is_read(folder, ending):
    (folder / f"set.{ending}").write_text("image,caption\nred.png,red\n")
    with pytest.raises(ValueError, match=rf"a \.{ending} file is no retrieval set; give JSON lines .*data2rec\.py"):
        load_retrieval(folder / f"set.{ending}")


def test_deep_nesting_is_an_error_in_words(folder):
    for name, content in (("a.json", "[" * 100_000), ("a.jsonl", '{"image": ' * 100_000)):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="nested too deeply"):
            load_retrieval(folder / name)


def test_one_file_is_one_picture_however_it_is_spelled(folder):
    (folder / "again.png").symlink_to("red.png")
    names = ["red.png", "./red.png", "images/../red.png", "again.png"]
    (folder / "images").mkdir()
    data = load_retrieval(save_jsonl(folder / "set.jsonl", [{"image": n, "caption": n} for n in names]))
    assert data.image_names == ["red.png"] and data.image_of_caption.tolist() == [0] * 4 and data.note == ""


def test_a_caption_that_stands_twice_is_counted_and_said(folder):
    rows = [{"image": "red.png", "captions": ["red", "red"]}, {"image": "blue.png", "caption": "red"}]
    data = load_retrieval(save_jsonl(folder / "set.jsonl", rows))
    assert len(data.captions) == 3 and data.note == "1 captions repeat one of the same picture, e.g. 'red' of red.png"


@pytest.mark.parametrize("name", ["../secret/red.png", "absolute", "link.png", "linked/red.png"])
def test_names_that_lead_out_are_refused(folder, new_folder, name):
    secret = new_folder("outside") / "secret"
    save_color(secret / "red.png", "red")
    root = secret.parent / "set"
    save_color(root / "blue.png", "blue")
    (root / "link.png").symlink_to(secret / "red.png")
    (root / "linked").symlink_to(secret)
    name = str(secret / "red.png") if name == "absolute" else name
    path = save_jsonl(root / "set.jsonl", [{"image": "blue.png", "caption": "a"}, {"image": name, "caption": "b"}])
    message = r"set.jsonl line 2: field 'image': .*leads out of .*\(1 of 2 such names\); .*--allow-outside"
    for place in ({}, {"image_root": root}):
        with pytest.raises(ValueError, match=message):
            load_retrieval(path, **place)
    data = load_retrieval(path, allow_outside=True)
    assert data.open(1).getpixel((0, 0)) == COLORS["red"]


def test_an_image_root_that_is_a_link_is_no_way_out(folder, new_folder):
    root = new_folder("elsewhere")
    (root / "images").symlink_to(folder)
    data = load_retrieval(save_jsonl(root / "set.jsonl", [{"image": "red.png", "caption": "red"}]))
    assert data.open(0).getpixel((0, 0)) == COLORS["red"]


def test_captions_that_are_cut_are_counted(folder):
    texts = ["red", "red blue green", "red blue green teal white", "white " * 50, ""]
    tokenizer = make_tokenizer(context=5)
    assert count_cut(texts, tokenizer(texts), tokenizer) == 2  # three words, start and end just fit
    rows = [{"image": "red.png", "captions": texts[:4]}]
    data = load_retrieval(save_jsonl(folder / "set.jsonl", rows))
    assert data.tokenize(tokenizer)[1] == 2 and data.tokenize(tokenizer, "a ")[1] == 3


def test_split_must_be_chosen_where_there_are_several(folder):
    rows = [{"image": f"{c}.png", "caption": c, "split": s} for c, s in zip(COLORS, ["train", "test", "test"])]
    path = save_jsonl(folder / "set.jsonl", rows)
    with pytest.raises(ValueError, match=r"several splits: train \(1\), test \(2\); choose one"):
        load_retrieval(path)
    assert load_retrieval(path, split="test").captions == ["green", "blue"]
    with pytest.raises(ValueError, match="'val' is not in the file"):
        load_retrieval(path, split="val")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.jsonl", "", r"set\.jsonl: no entries"),
        ("set.json", "[]", r"set\.json: no entries"),
        ("set.json", "{}", "an object with nothing; should be a list of objects"),
        ("set.jsonl", '{"image": "red.png", "caption": "red"}\n{"image": "red.png"}', "line 2: no field 'caption'"),
        ("set.json", '[{"image": "red.png", "caption": "red", "split": 1}]', "entry 0: field 'split' is 1"),
        ("set.json", json.dumps(COCO | {"annotations": []}), "no annotation has a caption"),
        (
            "set.json",
            '{"images": [{"filename": "red.png", "sentences": [{}]}]}',
            "entry 0: field 'captions' holds None",
        ),
        (
            "set.jsonl",
            '{"image": "red.png", "caption": "red"}\n{"image": "gone.png", "caption": "x"}',
            r"line 2: field 'image': 'gone.png' is not below .*\(1 of 2 pictures are missing\); set image_root",
        ),
        ("set.jsonl", json.dumps({"image": "x" * 5000, "caption": "x"}), "cannot be looked up .*pictures are missing"),
    ],
)
def test_bad_files_are_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_retrieval(folder / name)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_retrieval(tmp_path / "none.jsonl")


@pytest.fixture
def records(folder):
    """Three records of two texts; the second record says the same in both."""
    texts = [("red", "red white"), ("blue", "blue"), ("green", "red")]
    return save_records(folder / "shard", [(pair[0], pair) for pair in texts])


def test_records_give_their_tokens_and_distinct_texts(records):
    data = load_retrieval(records)
    assert data.captions is None and data.tokens.dtype == np.int64 and data.tokenizer == "colors"
    assert data.image_of_caption.tolist() == [0, 0, 1, 2, 2]
    assert data.tokens[:, 0].tolist() == [1, 1, 3, 2, 1]  # red, red white, blue, green, red: in their order
    assert data.open(2).getpixel((0, 0)) == COLORS["green"]
    only = load_retrieval(records, texts=["raw"])
    assert np.array_equal(only.tokens, ColorTokenizer()(["red", "blue", "green"]).numpy())
    metrics = evaluate(only).metrics
    assert metrics["text_to_image_R@1"] == metrics["image_to_text_R@1"] == 1.0


def save_records(path, rows) -> str:
    """A record of each (color of its picture, its texts)."""
    views = ["raw", "synthetic"][: len(rows[0][1])]
    with RecordWriter(path) as writer:
        for key, (color, texts) in enumerate(rows):
            label = ColorTokenizer()(list(texts)).numpy().astype(np.float32).reshape(-1)
            image = (path.parent / f"{color}.png").read_bytes()
            writer.write(key, pack(Header(flag=len(label), label=label, id=key, id2=0), image))
    about = {"schema": 1, "views": views, "context": 4, "tokenizer": "colors", "vocab_size": 8, "count": len(rows)}
    path.with_suffix(".json").write_text(json.dumps(about | {"skipped": {}}))
    return f"{path}.rec"


def test_records_of_one_picture_are_joined_as_rows_are(folder):
    """The same data, two readers, the same figures: rows of a picture follow one another, or do not."""
    texts = {"red": ["red", "red white", "red teal"], "blue": ["blue", "blue white"], "green": ["green"]}
    rows = [(color, [texts[color][i]]) for i in range(3) for color in texts if i < len(texts[color])]
    lines = [{"image": f"{color}.png", "caption": text} for color, (text,) in rows]
    by_name = load_retrieval(save_jsonl(folder / "set.jsonl", lines))
    by_bytes = load_retrieval(save_records(folder / "shard", rows))
    assert by_bytes.image_of_caption.tolist() == by_name.image_of_caption.tolist() == [0, 1, 2, 0, 1, 0]
    assert evaluate(by_bytes).metrics == evaluate(by_name).metrics
    assert by_bytes.note == "6 records hold 3 different pictures: equal ones are joined"
    assert [by_bytes.open(i).getpixel((0, 0)) for i in range(3)] == [COLORS[color] for color in texts]
    assert len(by_bytes.image_names) == 3 and by_bytes.image_names[1].endswith("key 1")


def test_equal_texts_of_a_joined_picture_count_once(folder):
    rows = [("red", ["red", "red white"]), ("blue", ["red", "blue"]), ("red", ["red white", "red teal"])]
    data = load_retrieval(save_records(folder / "shard", rows))
    assert data.image_of_caption.tolist() == [0, 0, 1, 1, 0]
    assert np.array_equal(data.tokens, ColorTokenizer()(["red", "red white", "red", "blue", "red teal"]).numpy())


def test_records_refuse_what_they_cannot_do(records):
    with pytest.raises(ValueError, match=r"choose from \['raw', 'synthetic'\]"):
        load_retrieval(records, texts=["generated"])
    with pytest.raises(ValueError, match="no split"):
        load_retrieval(records, split="test")
    with pytest.raises(ValueError, match="prefix"):
        evaluate(load_retrieval(records), prefix="a photo of ")
    tokenizer = ColorTokenizer()
    tokenizer.name = "clip-bpe"
    with pytest.raises(ValueError, match="made by 'colors', the model reads 'clip-bpe'"):
        evaluate(load_retrieval(records), tokenizer=tokenizer)
    tokenizer = ColorTokenizer()
    tokenizer.context = 2
    with pytest.raises(ValueError, match="4 tokens a text, the model reads 2"):
        evaluate(load_retrieval(records), tokenizer=tokenizer)


def test_names_of_texts_belong_to_records(folder):
    path = save_jsonl(folder / "set.jsonl", [{"image": "red.png", "caption": "red"}])
    with pytest.raises(ValueError, match=r"no \.rec"):
        load_retrieval(path, texts=["raw"])
