"""What counts as a class folder and as a picture in it, what is left out and said, and the order of names."""

import json
import os

import pytest

from helpers.color_model import COLORS, ColorTokenizer, save_color
from rwkv_clip.classification import describe_prompts
from rwkv_clip.datasets import load_classification
from rwkv_clip.datasets.class_folders import list_classes
from rwkv_clip.datasets.names import read_names


def make(folder, *files: str):
    """A folder of these files: pictures where the ending says so, else words."""
    for number, name in enumerate(files):
        save_color(folder / name, list(COLORS)[number % len(COLORS)]) if name.endswith(".png") else None
        if not name.endswith(".png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("words")
    return folder


def load(folder, names=None):
    return load_classification("imagefolder", folder, names)


HIDDEN = [
    "cat/.ipynb_checkpoints/0-checkpoint.png",
    "cat/a/.git/b.png",
    "cat/._0.png",
    "cat/@eaDir/0.png",
    "cat/__MACOSX/0.png",
    ".ipynb_checkpoints/0.png",
    ".git/b.png",
    "__MACOSX/cat/0.png",
]


def test_what_is_hidden_never_counts(tmp_path):
    data = load(make(tmp_path, "cat/0.png", "cat/a/1.png", "dog/0.png", *HIDDEN))
    assert data.class_names == ["cat", "dog"] and data.count == 3 and data.labels.tolist() == [0, 0, 1]
    assert data.note == "" and [path.name for path in data.files] == ["0.png", "1.png", "0.png"]


def test_what_is_left_out_is_counted_with_an_example(tmp_path):
    make(tmp_path, "cat/0.png", "cat/notes.txt", "dog/0.png", "dog/0.heic", "stray.png", "read.me")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "cat")
    (tmp_path / "dog" / "folder.png").mkdir()
    data = load(tmp_path)
    assert data.count == 2
    assert data.note == "6 files that are not pictures, or in no class, left out, e.g. cat/notes.txt"


SPLITS = [
    (["train/cat/0.png", "val/cat/0.png", "test/cat/0.png"], "the splits test, train, val", "test"),
    (["train/cat/0.png"], "the splits train", "train"),
    (["Training/cat/0.png", "Validation/cat/0.png"], "the splits Training, Validation", "Validation"),
    (["train2017/cat/0.png", "val2017/cat/0.png"], "the splits train2017, val2017", "val2017"),
    (["train/0.png", "test/0.png"], "the splits test, train", "test"),  # flat, as Kaggle has them
    (["train_images/0.png", "labels/a.txt"], "the splits train_images", "train_images"),
    (["test/cat/0.png", "extra/cat/0.png"], "the splits test", "test"),
    (["valid/0.png", "dev/0.png", "cat/0.png"], "the splits dev, valid", "valid"),
]


@pytest.mark.parametrize("files, message, choice", SPLITS, ids=[" ".join(files) for files, *_ in SPLITS])
def test_splits_are_no_classes(tmp_path, files, message, choice):
    make(tmp_path, *files)
    with pytest.raises(ValueError, match=f"holds {message}, not classes; give one, --data {tmp_path / choice}, or"):
        load(tmp_path)
    # Unless somebody says so.
    names = {folder: folder for folder in list_classes(tmp_path)}
    (tmp_path / "names.json").write_text(json.dumps({"names": names}))
    assert load(tmp_path).class_names == list(names)


def test_a_train_among_vehicles_is_a_class(tmp_path):
    data = load(make(tmp_path, "bus/0.png", "car/0.png", "train/0.png", "testament/0.png"))
    assert data.class_names == ["bus", "car", "testament", "train"]


def test_templates_alone_do_not_make_splits_classes(tmp_path):
    make(tmp_path, "train/cat/0.png", "test/cat/0.png")
    (tmp_path / "names.json").write_text(json.dumps({"templates": ["a {}"]}))
    with pytest.raises(ValueError, match="not classes"):
        load(tmp_path)


NUMBERS = ["0", "1", "10", "11", "2", "9"]


def test_numbered_folders_are_in_the_order_of_numbers(tmp_path):
    make(tmp_path, *(f"{number}/0.png" for number in NUMBERS))
    names = [f"class {number}" for number in sorted(map(int, NUMBERS))]
    (tmp_path / "names.json").write_text(json.dumps({"names": names}))
    data = load(tmp_path)
    assert data.class_names == names
    assert {path.parent.name: names[label] for path, label in zip(data.files, data.labels.tolist())} == {
        number: f"class {number}" for number in NUMBERS
    }
    (tmp_path / "names.json").write_text("{}")
    assert load(tmp_path).class_names == ["0", "1", "2", "9", "10", "11"]
    (tmp_path / "list.json").write_text(json.dumps({"names": names}))
    assert read_names(tmp_path / "list.json", NUMBERS)[0]["10"] == "class 10"


@pytest.mark.parametrize("folders", [["class_1", "class_2", "class_10"], ["2", "10", "other"], ["v9a", "v10b"]])
def test_a_list_of_names_for_folders_of_two_orders_is_refused(tmp_path, folders):
    make(tmp_path, *(f"{folder}/0.png" for folder in folders))
    (tmp_path / "list.json").write_text(json.dumps({"names": [f"the {folder}" for folder in folders]}))
    with pytest.raises(ValueError, match=r'list\.json: "names" is a list, .* different order by number'):
        load(tmp_path, tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps({"names": {folder: f"the {folder}" for folder in folders}}))
    assert load(tmp_path, tmp_path / "list.json").class_names == [f"the {folder}" for folder in folders]


@pytest.mark.parametrize("folders", [["a", "b", "c"], ["01_a", "02_b", "10_c"], ["n001", "n002"]])
def test_a_list_of_names_for_folders_of_one_order_is_taken(tmp_path, folders):
    make(tmp_path, *(f"{folder}/0.png" for folder in folders))
    (tmp_path / "names.json").write_text(json.dumps({"names": [f"the {folder}" for folder in folders]}))
    assert load(tmp_path).class_names == [f"the {folder}" for folder in folders]


def test_names_do_not_lead_to_other_folders(tmp_path):
    make(tmp_path, "set/cat/0.png", "secret/0.png")
    (tmp_path / "set" / "names.json").write_text(json.dumps({"names": {"cat": "cat", "../secret": "dog"}}))
    data = load(tmp_path / "set")
    assert data.count == 1 and data.class_names == ["cat", "dog"]


def test_a_folder_whose_name_is_not_utf_8_is_named(tmp_path):
    make(tmp_path, "cat/0.png")
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/d\xffg")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(ValueError, match=r"the folder b'd\\xffg' has a name that is not UTF-8; rename it"):
        load(tmp_path)


def test_nested_names_files_are_errors_in_words(tmp_path):
    make(tmp_path, "cat/0.png")
    (tmp_path / "names.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        load(tmp_path)


def test_classes_that_nothing_tells_apart_are_said(tmp_path):
    """Ties count against the model, so such classes are never right: ImageNet has two pairs of one name."""
    make(tmp_path, "cat/0.png", "dog/0.png", "cow/0.png", "cup/notes.txt")
    names = {"cat": "red", "dog": "red", "cow": "blue", "cup": "teal"}
    (tmp_path / "names.json").write_text(json.dumps({"names": names}))
    note = describe_prompts(load(tmp_path), ColorTokenizer())
    assert "2 classes have the prompts of another, e.g. red: never told apart" in note and "cup/notes.txt" in note
