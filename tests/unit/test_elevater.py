"""Classification in ELEVATER's layout: labels, folders, order, templates, and the file of predictions."""

import json
from types import SimpleNamespace

import pytest
import torch

from helpers.color_model import COLORS, save_color, use_color_model
from rwkv_clip.classification import describe_prompts
from rwkv_clip.datasets import load_classification
from rwkv_clip.datasets.elevater import CHINESE_TEMPLATES
from rwkv_clip.eval.main import main
from rwkv_clip.eval.submission import write_submission
from rwkv_clip.eval.tasks.retrieval import note_prefix
from rwkv_clip.factory import create_model
from rwkv_clip.models.packed import pack_weights
from rwkv_clip.tokenizer import BERT_CHINESE, make_tokenizer

NAMES = ["red", "green", "blue"]
VISION = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1}
BERT = {"kind": "bert", "context": 8, "vocab": 50, "width": 8, "depth": 1, "heads": 1, "ffn_width": 8}
TWO_TOWERS = {"image": {"kind": "open_clip", **VISION}, "text": BERT, "embed_dim": 8}


@pytest.fixture
def model(monkeypatch):
    found = use_color_model(monkeypatch)
    found.model.visual = torch.nn.Linear(2, 3)
    return found


def make_set(folder, count: int = 3, digits: int = 1):
    """Picture b.png of class 1 is a blue one, which is wrong."""
    folder.mkdir()
    (folder / "label_cn.txt").write_text("".join(f"{name} \n" for name in [*NAMES, *map(str, range(3, count))]))
    (folder / "label.txt").write_text("".join(f"{name} en\n" for name in [*NAMES, *map(str, range(3, count))]))
    for label, name in enumerate(NAMES):
        place = folder / "test" / f"{label:0{digits}}"
        save_color(place / "a.png", name)
        save_color(place / "b.png", "blue" if label == 1 else name)
    return folder


def classify(folder, logs, *more: str) -> int:
    arguments = ["--checkpoint", "run", "--dataset", "elevater", "--data", str(folder), "--language", "zh"]
    return main(["classification", *arguments, "--logs", str(logs), "--device", "cpu", *more])


@pytest.mark.parametrize("count, digits", [(3, 1), (10, 1), (11, 3)])
def test_folders_are_named_by_number(tmp_path, count, digits):
    found = load_classification("elevater", make_set(tmp_path / "set", count, digits), language="zh")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.class_names[:3] == NAMES
    assert len(found.class_names) == count and tuple(found.templates) == CHINESE_TEMPLATES
    assert load_classification("elevater", tmp_path / "set").class_names[0] == "red en"
    (tmp_path / "set" / "test" / f"{0:0{digits}}").rename(tmp_path / "set" / "test" / f"{0:0{4 - digits}}")
    with pytest.raises(ValueError, match=f"{count} classes have folders {'0' * digits} .. "):
        load_classification("elevater", tmp_path / "set", language="zh")


def test_a_missing_folder_shifts_no_class(tmp_path):
    folder = make_set(tmp_path / "set")
    (folder / "test" / "0").rename(tmp_path / "away")
    assert load_classification("elevater", folder, language="zh").labels.tolist() == [1, 1, 2, 2]


def test_templates_are_ours_and_take_a_name():
    assert 10 <= len(set(CHINESE_TEMPLATES)) == len(CHINESE_TEMPLATES) <= 20
    assert all(template.count("{}") == 1 for template in CHINESE_TEMPLATES)


@pytest.mark.parametrize("index", [None, [5, 0, 3], []])
def test_the_command_writes_predictions(tmp_path, capsys, model, index):
    folder = make_set(tmp_path / "cifar10")
    if index is not None:
        (folder / "index.json").write_text(json.dumps(index))
    assert classify(folder, tmp_path / "logs", "--save-dir", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert f"Result:\nzeroshot-top1: {5 / 6}\n" in printed  # index.json changes the file only
    assert "not the published set" not in printed and "| elevater/cifar10 |" in printed
    text = (tmp_path / "out" / "cifar10.json").read_text()
    found = json.loads(text)
    assert text == json.dumps(found) and list(found) == [
        *("model_name", "dataset_name", "num_trainable_params", "num_params", "num_visual_params"),
        *("num_backbone_params", "n_shot", "rnd_seeds", "predictions"),
    ]
    count = sum(value.numel() for value in model.model.state_dict().values())  # packed weights are no parameters
    assert (found["model_name"], found["dataset_name"], found["rnd_seeds"]) == ("colors", "cifar10", [123])
    assert (found["num_params"], found["num_backbone_params"], found["num_visual_params"]) == (count, count, 9)
    values = torch.tensor([COLORS[name] for name in NAMES]) / 127.5 - 1
    features = torch.nn.functional.normalize(values, dim=-1)
    pictures = features[[0, 0, 1, 2, 2, 2]]
    expected = (100 * pictures @ features.T).softmax(-1)[index if index is not None else range(6)]
    (predictions,) = found["predictions"]
    assert len(predictions) == len(expected)
    if len(expected):
        torch.testing.assert_close(torch.tensor(predictions), expected, rtol=0, atol=1e-2)
        assert all(p == round(p, 6) for row in predictions for p in row)


def test_templates_of_a_file(tmp_path, model):
    folder = make_set(tmp_path / "set")
    (tmp_path / "t.txt").write_text("\ufeff这是{}。\n\n {} \n", encoding="utf-8")
    assert classify(folder, tmp_path / "logs", "--name", "a", "--templates", str(tmp_path / "t.txt")) == 0
    result = json.loads((tmp_path / "logs" / "a" / "result.json").read_text())["results"][0]
    assert result["templates"] == ["这是{}。", "{}"] and result["metrics"]["hits1"] == 5


@pytest.mark.parametrize(
    "file, content, problem",
    [
        ("label_cn.txt", None, "label_cn.txt is missing"),
        ("label_cn.txt", "a\n\nb\n", "no empty line"),
        ("label_cn.txt", "a\n", "folders 0 .. 0; rename it"),
        ("index.json", "[6]", "index.json: must be a list of numbers of pictures, 0 to 5"),
        ("index.json", "{}", "index.json: must be a list"),
        ("index.json", "[true]", "index.json: must be a list"),
        ("index.json", "[", "index.json: not JSON"),
        ("t.txt", "这是\n", "t.txt:1: a template needs {}"),
        ("t.txt", "\n", "t.txt: holds no template"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, model, file, content, problem):
    folder = make_set(tmp_path / "set")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    more = ["--templates", str(folder / file)] if file == "t.txt" else []
    assert classify(folder, tmp_path / "logs", *more) in (2, 3)
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_parameters_of_an_image_tower_are_counted_in_our_models_and_in_open_clips(tmp_path):
    logits = torch.eye(3)
    for spec in (TWO_TOWERS, {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}):
        model = create_model(spec)
        tower = model.image_model if hasattr(model, "image_model") else model.visual
        counts = [sum(p.numel() for p in part.parameters()) for part in (tower, model)]
        for one in (model, pack_weights(model)):  # as the evaluation encodes
            path = write_submission(tmp_path, "set", one, "CN-CLIP-Ti-8", logits, None)
            found = json.loads(path.read_text())
            assert [found["num_visual_params"], found["num_params"]] == counts and 0 < counts[0] < counts[1]


def test_english_prompts_for_a_chinese_model_are_noted():
    data = SimpleNamespace(class_names=["a", "b"], templates=["a photo of a {}"], note="")
    tokenizer = make_tokenizer(BERT_CHINESE, 12)
    assert "give --language zh" in describe_prompts(data, tokenizer)
    assert describe_prompts(data, make_tokenizer(context=12)) == ""
    data.class_names = ["狗", "猫"]
    assert describe_prompts(data, tokenizer) == ""
    assert "leave it out" in note_prefix("a photo of ", tokenizer)
    assert note_prefix("", tokenizer) == note_prefix("一张", tokenizer) == ""
    assert note_prefix("a photo of ", make_tokenizer(context=12)) == ""
