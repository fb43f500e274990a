"""What a log shows of a batch: duplicates and accuracies; loss and accuracies of the validation; when epochs end."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.dense_loss import dense_losses, make_keys
from helpers.ranks import run_ranks, train_logging_ids
from helpers.tiny import COUNT, make_smaller, make_tiny
from rwkv_clip.config import parse
from rwkv_clip.losses import pairs
from rwkv_clip.losses.pairs import measure_duplicates, rank_own_first
from rwkv_clip.retrieval import RetrievalResult
from rwkv_clip.training.data.augment import hash64
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.validation import measure_batches

BATCH, WIDTH = 40, 6


def features(*texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(BATCH, WIDTH, generator=g), dim=-1)
    noise = torch.randn(BATCH, *texts, WIDTH, generator=g)
    return image, F.normalize(image.view(BATCH, *(1 for _ in texts), WIDTH) + noise, dim=-1)


def dense_hits(image, text, image_keys=None, text_keys=None) -> list[list[bool]]:
    """By two loops."""
    scores = image @ text.T
    same = torch.zeros(len(image), len(image), dtype=torch.bool)
    for keys in (image_keys, text_keys):
        if keys is not None:
            same |= keys[:, None] == keys[None]
    others = [[j for j in range(len(image)) if j != i and not same[i, j]] for i in range(len(image))]
    of_images = [all(scores[i, i] > scores[i, j] for j in others[i]) for i in range(len(image))]
    return [of_images, [all(scores[i, i] > scores[j, i] for j in others[i]) for i in range(len(image))]]


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("masked", [False, True])
def test_accuracies_are_those_of_two_loops(rows, masked, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    image, text = features()
    keys = (torch.arange(BATCH) // 4, torch.arange(BATCH) % 9) if masked else ()
    found = [hits.tolist() for hits in rank_own_first(image, text, *keys)]
    assert found == dense_hits(image, text, *keys) and 0 < sum(found[0]) < BATCH
    if masked:
        assert found != dense_hits(image, text)
    image, text = features(3)
    keys = make_keys(BATCH, 3) if masked else ()
    of_images, of_texts = rank_own_first(image, text, *keys)
    for v in range(3):
        expected = dense_hits(image, text[:, v], *((keys[0], keys[1][:, v]) if masked else ()))
        assert [of_images[:, v].tolist(), of_texts[:, v].tolist()] == expected


def test_a_tie_counts_against():
    image, text = torch.eye(4), torch.eye(4)
    text[1] = text[0]
    of_images, of_texts = rank_own_first(image, text)
    assert of_images.tolist() == [False, False, True, True] and of_texts.tolist() == [True, False, True, True]
    keys = torch.tensor([7, 7, 8, 9])
    assert rank_own_first(image, text, text_keys=keys)[0].tolist() == [True, False, True, True]
    assert rank_own_first(torch.full((2, 3), float("nan")), torch.eye(3)[:2])[0].tolist() == [False, False]


def test_duplicates():
    images, texts = torch.tensor([1, 2, 3, 1, 5]), torch.tensor([5, 6, 6, 7, 8])
    assert float(measure_duplicates(None, texts)) == pytest.approx(2 / 5)
    assert float(measure_duplicates(images, texts)) == pytest.approx(4 / 5)
    both = torch.stack([texts, torch.tensor([5, 6, 7, 8, 9])], 1)  # columns are compared with themselves
    assert float(measure_duplicates(None, both)) == pytest.approx(2 / 10)


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, BATCH, 4096])
def test_validation_is_the_plain_formula_batch_by_batch(size):
    image, text = features()
    images = torch.from_numpy(np.arange(BATCH) // 2)
    pairs = np.stack([np.arange(BATCH), images.numpy()], 1)
    found = measure_batches(RetrievalResult({}, image, text, 0), pairs, torch.tensor(2.0), size, seed=1)
    again = measure_batches(RetrievalResult({}, image, text, 0), pairs, torch.tensor(2.0), size, seed=2)
    order = torch.from_numpy(np.argsort(hash64(1, np.arange(BATCH)), kind="stable"))
    losses, hits = [], []
    for batch in order.split(size):
        part = image[images[batch]], text[batch]
        of_images, of_texts = dense_losses(*(x.double() for x in part), torch.tensor(math.exp(2.0)))
        losses.append(((of_images + of_texts) / 2).sum())
        hits.append(torch.tensor(dense_hits(*part)).sum(1))
    assert found["loss"] == pytest.approx(float(sum(losses)) / BATCH, rel=1e-5, abs=1e-6)
    accuracies = (sum(hits) / BATCH).tolist()
    assert [found["image_to_text_acc"], found["text_to_image_acc"]] == pytest.approx(accuracies)
    assert (found["loss"] == pytest.approx(again["loss"], rel=1e-6)) == (size in (1, BATCH, 4096))


def test_a_caption_counts_with_each_of_its_images_and_one_without_any_not_at_all():
    image, text = features()
    result = RetrievalResult({}, image, text, 0)
    pairs = np.array([(1, 0), (1, 3), (2, 2)])  # caption 0 has no image
    found = measure_batches(result, pairs, torch.tensor(2.0), 1, seed=1)
    assert found["loss"] == 0 and found["image_to_text_acc"] == 1  # every pair alone
    of_images, of_texts = dense_losses(image[[0, 3, 2]].double(), text[[1, 1, 2]].double(), torch.tensor(math.exp(2.0)))
    found = measure_batches(result, pairs, torch.tensor(2.0), 3, seed=1)
    assert found["loss"] == pytest.approx(float((of_images + of_texts).mean() / 2), rel=1e-6)
    assert measure_batches(result, pairs[:0], torch.tensor(2.0), 3, seed=1) == {}


def test_captions_of_one_image_are_spread():
    """An image with five captions that stand together: in the order of the set every batch would hold it five times."""
    order = np.argsort(hash64(0, np.arange(1000)), kind="stable").reshape(20, 50) // 5
    assert np.mean([len(np.unique(batch)) for batch in order]) > 44


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    return make_smaller(make_tiny(tmp_path)) | {"batch_size": 16, "lr": 1e-3, "max_steps": 3}


def records_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("choice", ["first", "all"])
def test_a_log_has_them(data, choice):
    plain, asked = (
        records_of(
            run(parse(Settings, data | {"name": str(on), "text_choice": choice, "report_training_batch_acc": on}))
        )
        for on in (False, True)
    )
    accuracies = {"image_to_text_acc", "text_to_image_acc"}
    steps = [record for record in asked if "loss" in record]
    assert all(0 <= record[name] <= 1 for record in steps for name in accuracies)
    assert not any(accuracies & record.keys() for record in plain)
    losses = [[record["loss"] for record in log if "loss" in record] for log in (plain, asked)]
    assert losses[0] == losses[1]
    # Of the texts, the first are all different; the others are one of five.
    assert all(record["duplicates"] == pytest.approx(0 if choice == "first" else 2 / 3, abs=0.05) for record in steps)
    (validation,) = (record for record in asked if "val_loss" in record)
    assert {f"val_{name}" for name in accuracies} < validation.keys() and validation["val_loss"] > 0


def test_ranks_report_the_global_batch(data, tmp_path):
    settings = data | {"report_training_batch_acc": True, "val_data": None, "text_choice": "first", "lr": 1e-5}
    logs = {}
    for world in (1, 2):
        folder = tmp_path / "logs" / str(world)
        folder.mkdir(parents=True)
        run_ranks(world, folder, train_logging_ids, settings | {"name": str(world), "batch_size": 16 // world})
        logs[world] = records_of(folder)
    for one, two in zip(logs[1], logs[2]):
        for name in ("duplicates", "image_to_text_acc", "text_to_image_acc"):
            assert one[name] == pytest.approx(two[name], abs=1e-6)


@pytest.mark.parametrize("every, batch", [(1, 16), (2, 16), (1, 20), (3, 7)])
def test_epochs_end_with_the_step_that_completes_them(data, every, batch):
    """Where a batch holds the end of an epoch, after that batch."""
    steps = math.ceil(4 * COUNT / batch)
    changes = {"batch_size": batch, "max_steps": steps, "val_frequency": every, "save_frequency": every}
    folder = run(parse(Settings, data | changes | {"save_every_n_steps": 1000, "keep_checkpoints": 9}))
    expected = sorted({math.ceil(epoch * COUNT / batch) for epoch in range(every, 5, every)} | {steps})
    assert [record["step"] for record in records_of(folder) if "val_loss" in record] == expected
    assert sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir()) == expected
