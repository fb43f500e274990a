"""Zero-shot classification: class weights, sets and their errors, with a model whose answers are known."""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.color_model import COLORS, ColorModel, ColorTokenizer, loaded, preprocess, save_color
from rwkv_clip.data.records import Header, RecordWriter, pack
from rwkv_clip.datasets import MissingData, load_classification
from rwkv_clip.datasets.benchmarks import BENCHMARKS
from rwkv_clip.datasets.class_folders import PLAIN
from rwkv_clip.eval.encoder import Encoder
from rwkv_clip.eval.tasks.classification import class_weights, evaluate_classification
from rwkv_clip.serialization import encode_tensors

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    for number, color in enumerate(COLORS):
        for copy in range(number % 3 + 1):
            save_color(tmp_path / "set" / color / f"{copy}.png", color)
    return tmp_path / "set"


def encoder_of(model=None, **changes) -> Encoder:
    return Encoder.of(loaded(model), CPU, **changes)


def evaluate(data, **changes):
    return evaluate_classification(encoder_of(**changes), data).metrics


def test_class_weight_is_the_normalised_mean_of_normalised_texts(folder):
    model, names = ColorModel(), ["red", "blue"]
    data = replace(load_classification("imagefolder", folder), class_names=names)
    weights = class_weights(encoder_of(model), replace(data, templates=["{}", "{} white", "green and {}"]))
    for weight, name in zip(weights, names):
        texts = ColorTokenizer()([name, f"{name} white", f"green and {name}"])
        mean = torch.nn.functional.normalize(model.encode_text(texts), dim=-1).mean(0)
        assert torch.allclose(weight, mean / mean.norm(), atol=1e-6)


def test_a_model_that_is_right_scores_full(folder):
    data = load_classification("imagefolder", folder)
    assert data.class_names == sorted(COLORS) and data.templates == PLAIN
    metrics = evaluate(data)
    assert metrics["top1"] == metrics["mean_per_class"] == 1.0
    assert metrics["samples"] == sum(number % 3 + 1 for number in range(len(COLORS)))


def test_counts_do_not_depend_on_batch_size_or_workers(folder):
    save_color(folder / "red" / "really_blue.png", "blue")
    data = load_classification("imagefolder", folder)
    results = [evaluate(data, batch_size=b, workers=w) for b, w in ((1, 0), (3, 2), (64, 4))]
    assert results[0] == results[1] == results[2]
    assert results[0]["hits1"] == results[0]["samples"] - 1


def test_equal_class_weights_tie_against_the_model(folder):
    """Logits that cannot tell classes apart give no class, and neither the first nor every one."""
    (folder / "names.json").write_text(json.dumps({"names": {color: "red" for color in sorted(COLORS)}}))
    metrics = evaluate(load_classification("imagefolder", folder))
    assert metrics["hits1"] == metrics["hits5"] == metrics["mean_per_class"] == 0


def test_close_logits_stay_apart(folder):
    """Similarities that differ by less than one are told apart: logits are no integers."""

    class Close(ColorModel):
        def encode_text(self, tokens, normalize=False):
            features = super().encode_text(tokens, normalize=True)
            return torch.nn.functional.normalize(features * 1e-3 + torch.ones(3), dim=-1)

    data = load_classification("imagefolder", folder)
    exact = evaluate_classification(encoder_of(Close()), data).metrics
    weights = class_weights(encoder_of(Close()), data)
    pictures = torch.stack([preprocess(data.open(i)) for i in range(data.count)])
    logits = Close().encode_image(pictures, normalize=True).double() @ weights.double().T
    assert exact["hits1"] == int((logits.argmax(1) == data.labels).sum())
    assert logits.amax(1).sub(logits.amin(1)).max() < 0.01


def test_names_file_with_a_class_that_has_no_folder(folder):
    names = {"red": "red", "black": "teal"} | {color: color for color in COLORS if color != "red"}
    (folder / "names.json").write_text(json.dumps({"names": names, "templates": ["a {} thing", "{}"]}))
    data = load_classification("imagefolder", folder)
    assert data.class_names[:2] == ["red", "teal"] and data.templates == ("a {} thing", "{}")
    metrics = evaluate(data)
    assert metrics["classes_without_samples"] == ["teal"] and metrics["classes"] == 8


def test_names_as_a_list_and_under_another_key(folder, tmp_path):
    path = tmp_path / "spoken.json"
    path.write_text(json.dumps({"classes": [f"my {color}" for color in sorted(COLORS)]}))
    data = load_classification("imagefolder", folder, path)
    assert data.class_names == [f"my {color}" for color in sorted(COLORS)] and data.templates == PLAIN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "write an object"),
        ('{"name": {}}', "write an object"),
        ('{"names": ["a"]}', "1 names for 7 class folders"),
        ('{"names": {"red": "red"}}', "lacks the class folders blue, green"),
        ('{"names": 3}', '"names" must be'),
        ('{"names": {}}', '"names" must be'),
        ('{"templates": ["a photo"]}', '"templates" must be'),
        ('{"templates": "{}"}', '"templates" must be'),
    ],
)
def test_bad_names_files_are_named(folder, content, message):
    (folder / "names.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_classification("imagefolder", folder)
    assert "names.json" in str(error.value)


def test_folders_without_classes_or_pictures(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        load_classification("imagefolder", tmp_path / "none")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="hold no picture"):
        load_classification("imagefolder", tmp_path)


def test_cifar10_as_class_folders(tmp_path):
    for name in ("cat", "airplane"):
        save_color(tmp_path / name / "0.png", "red")
    data = load_classification("cifar10", tmp_path)
    assert data.class_names == list(BENCHMARKS["cifar10"].classes)
    assert data.templates == BENCHMARKS["cifar10"].templates
    assert data.labels.tolist() == [0, 3] and data.name == "cifar10"
    save_color(tmp_path / "unicorn" / "0.png", "red")
    with pytest.raises(ValueError, match="'unicorn', which is not a class of cifar10"):
        load_classification("cifar10", tmp_path)


def test_real_cifar10_folder(shared):
    data = load_classification("cifar10", shared / "data" / "cifar10" / "test")
    lines = (shared / "data" / "cifar10" / "classes.txt").read_text().split()
    assert data.count == 2000 and list(data.class_names) == lines
    picture, label = data.open(1999), data.labels[1999]
    assert picture.size == (32, 32) and label == 9


@pytest.mark.parametrize("dataset", sorted(BENCHMARKS))
def test_a_missing_set_says_what_to_download_and_where(dataset, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(MissingData, match="download") as error:
        load_classification(dataset, tmp_path / "sets")
    assert str(tmp_path / "sets") in str(error.value)


def test_unknown_set(tmp_path):
    with pytest.raises(ValueError, match=r"'cifar' is not known; valid names: cifar10, .*, imagefolder, elevater"):
        load_classification("cifar", tmp_path)


class FakeSet:
    """What torchvision's sets look like from outside."""

    def __init__(self, root, **arguments):
        self.arguments, self.categories = arguments, ["car_side", "sea_horse"]

    def __len__(self):
        return 8677

    def __getitem__(self, index):
        return Image.new("L", (4, 4)), index % 2


def test_torchvision_sets_and_the_caltech_split(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(Caltech101=FakeSet)))
    data = load_classification("caltech101", tmp_path)
    assert data.count == 5677 and data.class_names == ["side of a car", "sea horse"] and len(data.templates) == 34
    _, second = torch.utils.data.random_split(range(8677), [3000, 5677], generator=torch.Generator().manual_seed(3072))
    assert data.labels[:50].tolist() == [index % 2 for index in second.indices[:50]]
    assert data.open(0).mode == "RGB"
    train = load_classification("caltech101", tmp_path, split="train")
    assert train.count == 3000 and train.split != data.split
    with pytest.raises(ValueError, match="split: caltech101 has no 'val'; it has test, train"):
        load_classification("caltech101", tmp_path, split="val")


def test_a_names_file_for_a_torchvision_set_may_reorder_and_add_classes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(Caltech101=FakeSet)))
    own = load_classification("caltech101", tmp_path)
    names = {"nothing": "nothing", "sea_horse": "海马", "car_side": "汽车"}
    (tmp_path / "zh.json").write_text(json.dumps({"names": names, "templates": ["{}的照片"]}))
    data = load_classification("caltech101", tmp_path, tmp_path / "zh.json", language="zh")
    assert data.class_names == ["nothing", "海马", "汽车"] and data.templates == ("{}的照片",)
    assert data.labels[:50].tolist() == (2 - own.labels[:50]).tolist()
    with pytest.raises(ValueError, match="language: caltech101 has no names in 'zh'"):
        load_classification("caltech101", tmp_path, language="zh")


def save_sun397(root, listed: bool) -> None:
    """Three classes, two of them one folder deeper; the second picture of each class is in the test part."""
    classes = ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]
    (root / "SUN397").mkdir(parents=True)
    (root / "SUN397" / "ClassName.txt").write_text("".join(f"{name}\n" for name in classes))
    names = [f"{name}/sun_{letter}.jpg" for name in classes for letter in "abc"]
    for number, name in enumerate(names):
        save_color(root / "SUN397" / name.strip("/"), list(COLORS)[number // 3])
    if listed:
        (root / "SUN397" / "Testing_01.txt").write_text("".join(f"{name}\n" for name in names[1::3]))


def test_sun397_takes_the_official_partition(tmp_path):
    save_sun397(tmp_path, listed=True)
    data = load_classification("sun397", tmp_path)
    assert data.class_names == ["abbey", "apartment building outdoor", "zoo"] and len(data.templates) == 2
    assert (data.split, data.note, data.count) == ("partition 1, test", "", 3)
    assert data.labels.tolist() == [0, 1, 2]
    assert data.open(1).getpixel((0, 0)) == pytest.approx(COLORS["green"], abs=4)
    (tmp_path / "SUN397" / "Testing_01.txt").write_text("/k/kasbah/sun_a.jpg\n")
    with pytest.raises(ValueError, match=r"/k/kasbah/sun_a.jpg is in no class of ClassName\.txt"):
        load_classification("sun397", tmp_path)


def test_sun397_without_its_lists_has_a_split_of_its_own_and_says_so(tmp_path, monkeypatch):
    save_sun397(tmp_path, listed=False)
    with pytest.raises(ValueError, match="9 pictures instead of 108754"):
        load_classification("sun397", tmp_path)
    small = replace(BENCHMARKS["sun397"], random={"count": 9, "train": 2, "test": 4, "seed": 0})
    monkeypatch.setitem(BENCHMARKS, "sun397", small)
    splits = [load_classification("sun397", tmp_path, split=split) for split in ("train", "test")]
    expected = torch.utils.data.random_split(range(9), [2, 4, 3], generator=torch.Generator().manual_seed(0))
    for data, places in zip(splits, expected):
        assert data.labels.tolist() == [place // 3 for place in places.indices]
    assert splits[1].split == "random test part of 4, seed 0" and "not the official partition" in splits[1].note


def save_records(path, labels: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with RecordWriter(path) as writer:
        for key, label in enumerate(labels):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), COLORS["red" if key % 2 else "blue"]).save(picture, "PNG")
            writer.write(key, pack(Header(0, label, key, 0), picture.getvalue()))


@pytest.mark.parametrize("place", ["imagenet/val.rec", "val.rec"])
def test_imagenet_as_records(tmp_path, place):
    pytest.importorskip("open_clip")
    save_records(tmp_path / place, [999.0, 0.0, 1.0])
    data = load_classification("imagenet", tmp_path)
    assert data.labels.tolist() == [999, 0, 1] and data.class_names[1] == "goldfish"
    assert data.open(1).getpixel((0, 0)) == COLORS["red"] and data.split == "val" and len(data.templates) == 80
    assert load_classification("imagenet", tmp_path / place).count == 3
    with pytest.raises(MissingData):
        load_classification("imagenet", tmp_path, split="train")


@pytest.mark.parametrize("label", [-1.0, 0.5, 1000.0, float("nan"), [3.0, 4.0]])
def test_a_record_that_is_no_class_is_named(tmp_path, label):
    pytest.importorskip("open_clip")
    save_records(tmp_path / "val.rec", [0.0, label])
    with pytest.raises(ValueError, match=r"val\.rec: record 1: its label is .*from 0 to 999"):
        load_classification("imagenet", tmp_path)


def test_class_folders_below_the_root_of_all_sets(tmp_path):
    for place, colors in (("cifar10/test", "cat"), ("cifar10/train", "dog"), ("cifar100", "apple")):
        save_color(tmp_path / place / colors / "0.png", "red")
    assert load_classification("cifar10", tmp_path).path == str(tmp_path / "cifar10" / "test")
    train = load_classification("cifar10", tmp_path, split="train")
    assert train.path == str(tmp_path / "cifar10" / "train") and train.labels[0] == 5 and train.split == "train"
    assert load_classification("cifar100", tmp_path).class_names[0] == "apple"


def test_chinese_imagenet(tmp_path):
    pytest.importorskip("clip_benchmark")
    save_records(tmp_path / "val.rec", [0.0])
    data = load_classification("imagenet", tmp_path, language="zh")
    assert list(data.class_names[:2]) == ["丁鲷", "金鱼"] and len(data.class_names) == 1000
    assert data.templates[0] == "{}的照片。" and len(data.templates) == 80
    assert all(template.count("{}") == 1 for template in data.templates)


def test_class_embeddings_are_kept_by_checkpoint_names_and_templates(folder, tmp_path):
    """The same bits again without encoding; anything else that they depend on makes new ones; damage is repaired."""
    data = load_classification("imagefolder", folder)
    run = loaded()

    def weights(run=run, data=data, **changes):
        before = len(run.model.calls)
        found = class_weights(Encoder.of(run, CPU, cache=tmp_path / "cache", **changes), data)
        return found, len(run.model.calls) > before

    first, encoded = weights()
    again, encoded_again = weights(batch_size=3)
    assert torch.equal(first, again) and (encoded, encoded_again) == (True, False)
    assert torch.equal(first, class_weights(Encoder.of(run, CPU), data))
    others = [
        {"data": replace(data, templates=("{}", "white and {}"))},
        {"data": replace(data, class_names=data.class_names[::-1])},
        {"run": SimpleNamespace(**vars(run) | {"digest": "1" * 64})},
        {"run": SimpleNamespace(**vars(run) | {"precision": "amp_bf16"})},
        {"run": SimpleNamespace(**vars(run) | {"model": other_model()})},
    ]
    assert all(weights(**other)[1] for other in others)
    assert len(list((tmp_path / "cache" / "classes").iterdir())) == 1 + len(others)
    until_0_5 = b"".join(encode_tensors({"weights": first, "sha256": torch.zeros(32, dtype=torch.uint8)}))
    damages = [lambda content: content[:-9], lambda content: content[:-9] + b"x" * 9, lambda content: b""]
    for damage in (*damages, lambda content: until_0_5):
        for path in (tmp_path / "cache" / "classes").iterdir():
            path.write_bytes(damage(path.read_bytes()))
        repaired, encoded = weights()
        assert torch.equal(repaired, first) and encoded and not weights()[1]


def other_model() -> ColorModel:
    """The same file in name, other weights: what open_clip:NAME without a tag is."""
    model = ColorModel()
    model.table.data.mul_(0.5)
    return model


def test_names_and_templates_are_those_of_clip_benchmark():
    """The public list as another package has it, where it has it; the typing slips of two names are left out."""
    package = importlib.util.find_spec("clip_benchmark")
    if package is None:
        pytest.skip("needs clip-benchmark")
    lists = Path(package.origin).parent / "datasets"
    templates = json.loads((lists / "en_zeroshot_classification_templates.json").read_text())
    theirs = {"stanford_cars": "cars", "aircraft": "fgvc_aircraft"}
    for key, row in BENCHMARKS.items():
        if row.templates:
            assert [t.replace("{}", "{c}") for t in row.templates] == templates[theirs.get(key, key)], key
    names = json.loads((lists / "en_classnames.json").read_text())
    from torchvision.datasets import Flowers102

    assert [BENCHMARKS["flowers"].say(name) for name in Flowers102.classes] == names["flowers"]
    said = {" ".join(name.split()) for name in names["caltech101"]}
    assert set(BENCHMARKS["caltech101"].spoken.values()) <= said


def test_prompt_counts_are_those_of_the_public_list():
    assert {key: len(row.templates) for key, row in BENCHMARKS.items() if row.templates} == {
        "cifar10": 18, "cifar100": 18, "food101": 1, "pets": 1, "flowers": 1, "sun397": 2, "stanford_cars": 8,
        "dtd": 8, "caltech101": 34, "aircraft": 2,
    }  # fmt: skip
    assert len(BENCHMARKS) == 11 and [k for k, row in BENCHMARKS.items() if row.headline == "mean_per_class"] == [
        "pets", "flowers", "caltech101", "aircraft",
    ]  # fmt: skip
    classes = BENCHMARKS["cifar100"].classes
    assert len(set(classes)) == 100 and list(classes) == sorted(classes)
    for row in BENCHMARKS.values():
        assert len(set(row.templates)) == len(row.templates)
        assert all(template.count("{}") == 1 for template in row.templates)


def test_imagenet_folders_take_names_and_templates_of_open_clip(tmp_path):
    pytest.importorskip("open_clip")
    for number in range(1000):
        (tmp_path / f"n{number:08d}").mkdir()
    save_color(tmp_path / "n00000001" / "0.JPEG", "red")
    data = load_classification("imagenet", tmp_path)
    assert (data.class_names[0], data.class_names[1]) == ("tench", "goldfish") and len(data.templates) == 80
    assert data.labels[0] == 1 and data.split == "val"
    (tmp_path / "n00000002").rmdir()
    with pytest.raises(ValueError, match="999 of the 1000"):
        load_classification("imagenet", tmp_path)
