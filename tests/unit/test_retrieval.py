"""The evaluation of a model whose answers are known, on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from color_model import COLORS, ColorModel, ColorTokenizer, loaded, preprocess, save_color
from PIL import Image

import rwkv_clip
from helpers.ranks import run_ranks
from helpers.sources import save_jsonl
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.features import FeatureExtractor, read_ahead
from rwkv_clip.retrieval import evaluate_retrieval


@pytest.fixture
def folder(tmp_path):
    for color in COLORS:
        save_color(tmp_path / f"{color}.png", color)
    return tmp_path


@pytest.fixture
def colors(folder):
    return load_retrieval(save_jsonl(folder / "set.jsonl", [{"image": f"{c}.png", "caption": c} for c in COLORS]))


def evaluate(data, model=None, **changes):
    return evaluate_retrieval(FeatureExtractor(model or ColorModel(), preprocess, ColorTokenizer(), **changes), data)


def test_a_model_that_is_right_scores_full(colors):
    result = evaluate(colors)
    assert result.metrics["mean_recall"] == 1.0
    assert result.metrics["text_to_image_hits@1"] == len(COLORS)
    assert result.image_features.shape == result.text_features.shape == (len(COLORS), 3)
    assert result.image_features.dtype == torch.float32


def test_counts_do_not_depend_on_batch_size_or_workers(folder):
    rng = np.random.default_rng(0)
    names = list(COLORS)
    rows = [{"image": f"{c}.png", "captions": rng.choice(names, 3).tolist()} for c in COLORS]
    data = load_retrieval(save_jsonl(folder / "set.jsonl", rows))
    results = [evaluate(data, batch_size=b, workers=w).metrics for b, w in ((1, 0), (3, 2), (64, 4))]
    assert results[0] == results[1] == results[2]
    assert 0 < results[0]["text_to_image_hits@1"] < 3 * len(COLORS)


def test_last_partial_batch_counts_once_and_equal_captions_are_encoded_once(folder):
    rows = [{"image": f"{c}.png", "captions": [c, "red"]} for c in COLORS]
    data, model = load_retrieval(save_jsonl(folder / "set.jsonl", rows)), ColorModel()
    result = evaluate(data, model, batch_size=4)
    assert model.calls == [16, 16]  # seven pictures, seven distinct captions of fourteen, blocks of one shape
    assert len(result.text_features) == 14


def test_prefix_stands_before_every_caption(colors):
    seen = []

    class Tokenizer(ColorTokenizer):
        def __call__(self, texts):
            seen.extend(texts)
            return super().__call__(texts)

    evaluate_retrieval(FeatureExtractor(ColorModel(), preprocess, Tokenizer()), colors, "a photo of ")
    assert seen == [f"a photo of {color}" for color in COLORS]


def test_training_mode_and_gradients_are_as_before(colors):
    model = ColorModel().train()
    result = evaluate(colors, model)
    assert model.training and not result.image_features.requires_grad
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(colors, model, batch_size=0)
    assert model.training


def test_bfloat16_features_have_length_one(colors):
    model = ColorModel().to(torch.bfloat16)
    extractor = FeatureExtractor(model, preprocess, ColorTokenizer())
    images, texts = extractor.encode_images(colors.open, 3), extractor.encode_texts(["red", "blue"])
    for features in (images, texts):
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_loaded_model_computes_in_its_precision(colors, precision, dtype):
    seen = []

    class Product(ColorModel):
        def encode_image(self, x, normalize=False):
            features = x.mean((2, 3)) @ torch.eye(3)
            seen.append(features.dtype)
            return features

    run = loaded(Product())
    run.precision = precision
    features = FeatureExtractor.of(run, "cpu").encode_images(colors.open, 3)
    assert seen == [dtype] and features.dtype == torch.float32


def test_a_broken_picture_stops_the_evaluation_by_name(folder, colors):
    (folder / "blue.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"blue\.png"):
        evaluate(colors, workers=2)


def test_a_model_that_gives_nan_is_refused(colors):
    model = ColorModel()
    model.table.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate(colors, model)


def test_read_ahead_keeps_order_and_stops_early():
    assert list(read_ahead(lambda key: key * key, range(50), workers=3, ahead=7)) == [i * i for i in range(50)]
    done = []
    results = read_ahead(lambda key: done.append(key) or key, range(1000), workers=1, ahead=5)
    assert next(results) == 0
    results.close()
    assert len(done) < 20


def test_open_clip_models_go_through_the_same_functions(folder, colors):
    open_clip = pytest.importorskip("open_clip")
    tower = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=tower, text_cfg=text)
    transform = open_clip.image_transform(32, is_train=False)
    from rwkv_clip.tokenizer import make_tokenizer

    for autocast in (None, torch.bfloat16):
        extractor = FeatureExtractor(model, transform, make_tokenizer(context=16), autocast=autocast)
        result = evaluate_retrieval(extractor, colors)
        assert 0 <= result.metrics["mean_recall"] <= 1 and result.image_features.shape == (7, 16)


PICTURES = 100
MODEL = {
    "image": {"image_size": [16, 16], "patch": 8, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    "text": {"context": 12, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
}


def evaluate_on_ranks(folder: str, autocast: torch.dtype | None) -> None:
    """Every rank writes the metrics of every batch size."""
    world = join_world("cpu")
    torch.manual_seed(1)
    model = rwkv_clip.create_model(MODEL)
    data, tokenizer = load_retrieval(Path(folder, "set.jsonl")), rwkv_clip.get_tokenizer(MODEL)
    transform = rwkv_clip.factory.preprocess_of(model)
    for batch_size in (1, 7, 64):
        extractor = FeatureExtractor(model, transform, tokenizer, batch_size=batch_size, autocast=autocast)
        result = evaluate_retrieval(extractor, data)
        Path(folder, f"{world.size}-{world.rank}-{batch_size}.json").write_text(json.dumps(result.metrics))
    leave_world()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_ranks_and_batches_give_the_same_integers(autocast, tmp_path):
    rng = np.random.default_rng(5)
    rows = []
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"{number} of {i}" for i in range(1 + number % 5)]})
    save_jsonl(tmp_path / "set.jsonl", rows)
    for world in (1, 2, 4):
        run_ranks(world, tmp_path, evaluate_on_ranks, str(tmp_path), autocast)
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*-*-*.json")}
    assert len(found) == (1 + 2 + 4) * 3
    reference = found["1-0-64.json"]
    assert all(metrics == reference for metrics in found.values()), found
    assert 0 < reference["text_to_image_hits@10"] < reference["captions"]
