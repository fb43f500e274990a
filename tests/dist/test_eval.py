"""Evaluation on 1, 2 and 4 gloo ranks, batches of 1, 7 and 64, any number of threads: the same integers and bits."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rwkv_clip
from helpers.color_model import COLORS, ColorModel, ColorTokenizer, loaded, preprocess, save_color
from helpers.ranks import run_ranks
from rwkv_clip.datasets import ClassificationSet
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.eval.encoder import Encoder
from rwkv_clip.eval.tasks.classification import evaluate_classification
from rwkv_clip.features import FeatureExtractor, block_size

SAMPLES, SIZE = 1003, 16  # 1003: prime to nearly everything, so blocks and ranks have rests
CLASSES = ["cup", "oak", "ant", "bus", "sky", "pea", "fox", "hat", "key", "jam", "owl"]
TEMPLATES = ["{}", "a photo of {}.", "many a {}"]
MODEL = {
    "image": {"image_size": [SIZE, SIZE], "patch": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64},
    "text": {"context": 12, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
}
WORLDS, BATCHES = (1, 2, 4), (1, 7, 64)


class Sensitive(nn.Module):
    """Products wide enough that their bits depend on the numbers of rows and of threads, as those of real models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 3072), nn.GELU(), nn.Linear(3072, 128))
        self.words = nn.Embedding(128, 512)
        self.text = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 128))

    def encode_image(self, x, normalize=False):
        return nn.functional.normalize(self.image(x), dim=-1)

    def encode_text(self, tokens, normalize=False):
        return nn.functional.normalize(self.text(self.words(tokens).mean(1)), dim=-1)


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode().ljust(20)[:20]) for text in texts])


def picture(index: int) -> Image.Image:
    """Noise: to a random model its classes are as close to one another as they can be."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (SIZE, SIZE, 3), np.uint8))


def make_set(open_one=picture, count=SAMPLES) -> ClassificationSet:
    labels = torch.arange(count) * 7 % len(CLASSES)
    return ClassificationSet("noise", "-", "-", labels, open_one, CLASSES, TEMPLATES)


def evaluate(folder: str, precision: str, batches: tuple[int, ...], threads: int = 1) -> None:
    """Every rank writes features, class embeddings, labels and counts of every batch size."""
    world = join_world("cpu")
    model = loaded(Sensitive())
    model.tokenizer, model.precision = tokenize, precision
    torch.set_num_threads(threads)
    for batch_size in batches:
        name, data = f"{world.size}-{batch_size}-{world.rank}-{threads}", make_set()
        result = evaluate_classification(Encoder.of(model, world.device, batch_size=batch_size), data)
        for kind, found in (("features", result.features), ("weights", result.weights), ("labels", data.labels)):
            np.save(f"{folder}/{kind}-{name}.npy", found.numpy())
        Path(folder, f"counts-{name}").write_text(json.dumps(result.metrics))
    assert torch.get_num_threads() == threads, "the caller's number of threads is as it was"
    leave_world()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counts_are_the_same_integers_for_any_ranks_batch_and_threads(tmp_path, precision):
    """1,003 pictures; 1, 2 and 4 ranks; batches of 1, 7 and 64; one thread and three: one set of counts and of bits."""
    for world in WORLDS:
        run_ranks(world, tmp_path, evaluate, str(tmp_path), precision, BATCHES)
    run_ranks(1, tmp_path, evaluate, str(tmp_path), precision, (7,), 3)
    runs = sum(WORLDS) * len(BATCHES) + 1
    for kind in ("features", "weights", "labels", "counts"):
        contents = {path.read_bytes() for path in tmp_path.glob(f"{kind}-*")}
        assert len(list(tmp_path.glob(f"{kind}-*"))) == runs and len(contents) == 1, f"{kind}: {len(contents)} kinds"
    metrics = json.loads(next(tmp_path.glob("counts-*")).read_text())
    assert metrics["samples"] == SAMPLES and 0 < metrics["hits1"] < metrics["hits5"] < SAMPLES


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_without_blocks_and_lanes_the_bits_depend_on_batch_and_threads(autocast):
    """Otherwise the test above would prove nothing: on such a processor this one says so."""
    model = Sensitive()
    rows = torch.stack([preprocess(picture(i)) for i in range(64)])

    def encode(size: int, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return torch.cat([model.encode_image(part) for part in rows.split(size)])

    before = torch.get_num_threads()
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        batches, threads = [encode(size, 1) for size in BATCHES], [encode(16, threads) for threads in (1, 3)]
    torch.set_num_threads(before)
    for what, ways in (("batch", batches), ("threads", threads)):
        if all(torch.equal(way, ways[0]) for way in ways):
            pytest.skip(f"the products of this processor do not depend on the {what}")


class Counting(ColorModel):
    """Says which rows it got."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def encode_image(self, x, normalize=False):
        self.rows.append(x[:, 0, 0, 0].tolist())
        return x[:, :, 0, 0]


def numbered(index: int) -> torch.Tensor:
    return torch.tensor([index + 1.0, 1.0, 0.0])[:, None, None]


def share(folder: str, count: int) -> None:
    world = join_world("cpu")
    model, opened = Counting(), []

    def open_one(index: int) -> int:
        opened.append(index)
        return index

    extractor = FeatureExtractor(model, numbered, ColorTokenizer(), workers=0)
    found = extractor.encode_images(open_one, count)
    texts = extractor.encode_tokens(torch.arange(min(count, 7))[:, None] % 3)
    place = f"{folder}/{count}-{world.size}-{world.rank}"
    Path(f"{place}.json").write_text(json.dumps([opened, model.rows]))
    np.save(f"{place}.npy", found.numpy())
    assert len(texts) == min(count, 7)
    leave_world()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 64, 100])
def test_every_picture_is_opened_once_and_blocks_have_one_shape(tmp_path, count):
    size, expected = block_size("cpu"), torch.stack([numbered(i)[:, 0, 0] for i in range(count)]) if count else None
    for world in (1, 3):
        run_ranks(world, tmp_path, share, str(tmp_path), count)
        told = [json.loads((tmp_path / f"{count}-{world}-{rank}.json").read_text()) for rank in range(world)]
        assert sorted(index for opened, _ in told for index in opened) == list(range(count))
        assert all(len(rows) == size for _, blocks in told for rows in blocks)
        assert sum(len(blocks) for _, blocks in told) == -(-count // size)
        assert max(len(blocks) for _, blocks in told) - min(len(blocks) for _, blocks in told) <= 1
        for rank in range(world):
            found = torch.from_numpy(np.load(tmp_path / f"{count}-{world}-{rank}.npy"))
            if count:
                assert torch.equal(found, torch.nn.functional.normalize(expected, dim=-1))
            else:
                assert found.shape == (0, 0)


def fail(folder: str, bad: tuple[int, ...]) -> None:
    world = join_world("cpu")

    def open_one(index: int) -> Image.Image:
        if index in bad:
            raise ValueError(f"{index}.png: not a picture")
        return Image.new("RGB", (4, 4), COLORS["red"])

    with pytest.raises(ValueError) as error:
        evaluate_classification(Encoder.of(loaded(), world.device), make_set(open_one, 100))
    Path(folder, f"{world.size}-{world.rank}").write_text(str(error.value))
    leave_world()


@pytest.mark.parametrize("bad", [(50,), (99, 70, 20)])
def test_a_broken_picture_of_one_rank_is_an_error_of_all(tmp_path, bad):
    """All ranks end, with the message that one process gives: that of the first such picture."""
    for world in (1, 3):
        run_ranks(world, tmp_path, fail, str(tmp_path), bad, timeout=300)
    assert {path.read_text() for path in tmp_path.iterdir()} == {f"{min(bad)}.png: not a picture"}
    assert len(list(tmp_path.iterdir())) == 4


def command(folder: str, name: str, *more: str) -> None:
    from rwkv_clip.eval.main import main

    data = ["--data", f"{folder}/sets", "--logs", f"{folder}/logs", "--name", name, "--device", "cpu", *more]
    model = ["--checkpoint", f"{folder}/model.safetensors", "--model", f"{folder}/model.json"]
    sys.exit(main(["classification", *model, *data]))


def test_the_command_under_several_ranks_leaves_one_result(tmp_path):
    """Two ranks and one: the same result but for times; missing sets are skipped; class embeddings are kept once."""
    torch.manual_seed(0)
    for number, color in enumerate(("cat", "dog", "ship")):
        for copy in range(7 + number):
            save_color(tmp_path / "sets" / "cifar10" / "test" / color / f"{copy}.png", list(COLORS)[copy % 7])
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    from safetensors.torch import save_file

    save_file(rwkv_clip.create_model(MODEL).state_dict(), tmp_path / "model.safetensors")
    results = []
    for world, name in ((1, "one"), (2, "two")):
        run_ranks(world, tmp_path, command, str(tmp_path), name, "--dataset", "all")
        (result,) = (json.loads(path.read_text()) for path in (tmp_path / "logs").glob(f"{name}*/result.json"))
        results.append([{**entry, "seconds": 0} for entry in result["results"]])
    assert results[0] == results[1]
    done = [entry for entry in results[0] if entry["status"] == "done"]
    assert [entry["dataset"] for entry in done] == ["cifar10"] and done[0]["metrics"]["samples"] == 24
    skipped = [entry for entry in results[0] if entry["status"] == "skipped"]
    assert len(skipped) == 10 and all("download" in entry["reason"] for entry in skipped)
    assert len(list((tmp_path / "logs" / "cache" / "classes").iterdir())) == 1
