"""The real clip_benchmark command on our models: its figures are ours to the last digit.

Its recalls are means of float32 zeros and ones, so the same hits give the same float32 number.
"""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import rwkv_clip
from rwkv_clip.checkpoint import save_checkpoint
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.eval import clip_benchmark
from rwkv_clip.eval.main import main

NEEDED = ("clip_benchmark", "pycocoevalcap", "requests", "sklearn", "transformers")
absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
real = pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} absent: pip install -e '.[clip-benchmark]'")
WORDS = ["dog", "cat", "bird", "tree", "house", "snow", "red", "blue", "small", "old", "runs", "sits", "near", "two"]
RELEASED = {"image_embed_dims": 32, "n_embd": 32, "image_depth": 2, "n_layer": 2, "image_num_heads": 2}
RELEASED |= {"head_size": 16, "ctx_len": 16, "input_size": 32, "image_patch_size": 16}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PICTURES = 60


@pytest.fixture(scope="module")
def data(new_folder):
    """Pictures with one to five captions in both tools' forms, and the same pictures as six classes."""
    folder = new_folder("sets")
    rng = np.random.default_rng(7)
    rows, lines = [], ["image,caption"]
    for number in range(PICTURES):
        # Any size and shape: both tools scale and crop. JPEG: their reader knows nothing else.
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        size = (40 + number % 17, 44 - number % 9)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        name = f"{number}.jpg"
        label = number % 6 if number % 4 else 0  # classes of different sizes
        for path in (folder / name, folder / "eurosat" / "2750" / f"Class{label}" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=95)
        captions = [f"{' '.join(rng.choice(WORDS, 6))}, number {number}" for _ in range(1 + number % 5)]
        rows.append({"image": name, "captions": captions})
        lines += [f"{name},{caption}" for caption in captions]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "flickr8k_test_karpathy.txt").write_text("\n".join(lines) + "\n")
    classes = ["a dog", "the sea", "an old house", "snow, at night", "two cats", "red"]
    names = {"names": classes, "templates": ["a photo of {}.", "a drawing of {}."]}
    (folder / "eurosat" / "2750" / "names.json").write_text(json.dumps(names))
    templates = [template.replace("{}", "{c}") for template in names["templates"]]
    (folder / "classes.json").write_text(json.dumps({"eurosat": classes}))
    (folder / "templates.json").write_text(json.dumps({"eurosat": templates}))
    return folder


def save_model(kind: str, folder) -> dict[str, list[str]]:
    """A model of random weights on disk; the options by which the two tools find it."""
    torch.manual_seed(3)
    model = rwkv_clip.create_model(OPEN_CLIP if kind.startswith("open_clip") else RELEASED)
    with torch.no_grad():  # far enough from the initial values that features differ between inputs
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    weights = model.state_dict()
    if kind in ("checkpoint", "open_clip checkpoint"):
        state = {"model": "tiny", "spec": model.spec.to_json(), "samples_seen": 0}
        path = str(save_checkpoint(folder / kind, 1, weights, {}, state, keep=2))
        return {"ours": ["--checkpoint", path], "theirs": ["--model_type", "rwkv_clip", "--model", "-"], "file": path}
    path = folder / f"{kind.split()[0]}.pt"
    described = folder / f"{kind.split()[0]}-tiny.json"
    if kind == "released":
        weights = {f"module.{key}": value for key, value in weights.items()}
    described.write_text(json.dumps(RELEASED if kind == "released" else OPEN_CLIP))
    torch.save(weights, path)
    ours = ["--checkpoint", str(path), "--model", str(described)]
    if kind == "released":
        return {"ours": ours, "theirs": ["--model_type", "rwkv_clip", "--model", str(described)], "file": str(path)}
    import open_clip

    open_clip.add_model_config(described)  # clip_benchmark loads it by itself, without our module
    return {"ours": ours, "theirs": ["--model", described.stem], "file": str(path)}


def theirs(model: dict, folder, *options: str, patch) -> dict[str, float]:
    """Metrics of clip_benchmark's own command line."""
    output = folder / "theirs.json"
    command = ["clip_benchmark", "eval", *model["theirs"], "--pretrained", model["file"], "--no_amp", "--quiet"]
    patch.setattr(sys, "argv", [*command, "--num_workers", "0", "--output", str(output), *options])
    patch.setattr(torch.cuda, "is_available", lambda: False)  # the same device under both tools
    assert clip_benchmark.main() == 0
    return json.loads(output.read_text())["metrics"]


def ours(task: str, model: dict, folder, *options: str) -> dict[str, float]:
    logs = folder / "logs" / task
    assert main([task, *model["ours"], "--logs", str(logs), "--name", "ours", "--device", "cpu", *options]) == 0
    (result,) = json.loads((max(logs.iterdir()) / "result.json").read_text())["results"]
    assert result["status"] == "done"
    return result["metrics"]


@real
@pytest.mark.parametrize("kind", ["checkpoint", "released", "open_clip checkpoint", "open_clip by itself"])
@pytest.mark.parametrize("batch", [7, 64])
def test_retrieval_is_theirs_to_the_last_digit(kind, batch, data, tmp_path, monkeypatch):
    model = save_model(kind, tmp_path)
    options = ["--dataset", "flickr8k", "--dataset_root", str(data), "--recall_k", "1", "5", "10"]
    found = theirs(model, tmp_path, *options, "--batch_size", str(batch), patch=monkeypatch)
    own = ours("retrieval", model, tmp_path, "--data", str(data / "set.jsonl"), "--gallery", "0")
    ways = {"image_retrieval": ("text_to_image", "captions"), "text_retrieval": ("image_to_text", "images")}
    assert len(found) == 6
    for their_name, (way, queries) in ways.items():
        for k in (1, 5, 10):
            hits = own[f"{way}_hits@{k}"]
            assert found[f"{their_name}_recall@{k}"] == float(np.float32(hits) / np.float32(own[queries])), (way, k)
    assert own["images"] == PICTURES and own["captions"] == len(load_retrieval(data / "set.jsonl").captions)
    assert 0 < own["text_to_image_hits@1"] < own["text_to_image_hits@10"] < own["captions"]


@real
@pytest.mark.parametrize("kind", ["checkpoint", "open_clip by itself"])
def test_classification_is_theirs_to_the_last_digit(kind, data, tmp_path, monkeypatch):
    model = save_model(kind, tmp_path)
    options = ["--dataset", "eurosat", "--dataset_root", str(data), "--batch_size", "7"]
    options += ["--custom_classname_file", str(data / "classes.json")]
    options += ["--custom_template_file", str(data / "templates.json")]
    found = theirs(model, tmp_path, *options, patch=monkeypatch)
    own = ours("classification", model, tmp_path, "--data", str(data / "eurosat" / "2750"))
    assert (found["acc1"], found["acc5"]) == (own["top1"], own["top5"]) and own["samples"] == PICTURES
    assert found["mean_per_class_recall"] == pytest.approx(own["mean_per_class"], rel=1e-15)
    assert 0 < own["top1"] < own["top5"] < 1 and own["top1"] != own["mean_per_class"]


@real
def test_a_second_registration_changes_nothing():
    from clip_benchmark import models

    clip_benchmark.register()
    clip_benchmark.register()
    assert models.MODEL_TYPES.count("rwkv_clip") == 1 and "open_clip" in models.MODEL_TYPES


@real
def test_a_wrong_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    command = ["clip_benchmark", "eval", "--model_type", "rwkv_clip", "--model", "-", "--quiet"]
    monkeypatch.setattr(sys, "argv", [*command, "--pretrained", str(tmp_path / "none"), "--dataset", "flickr8k"])
    assert clip_benchmark.main() == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    assert clip_benchmark.main() == 2
    assert "pip install -e '.[clip-benchmark]'" in capsys.readouterr().err
