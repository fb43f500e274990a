"""--legacy: figures as the released code counts them, against its plain, slow formulas; the defects by name."""

import pytest
import torch
from torch.nn.functional import normalize

from rwkv_clip.eval.upstream import count_classification, count_retrieval, integer_logits, phantom_rows
from rwkv_clip.metrics import accuracy, recall_at_k, target_ranks

COSINES = torch.arange(-98, 99, dtype=torch.float64)


def on_a_circle(cosines) -> torch.Tensor:
    """Unit vectors with these cosines to (1, 0)."""
    cosines = torch.as_tensor(cosines, dtype=torch.float64)
    return torch.stack([cosines, (1 - cosines**2).sqrt()], 1)


def names(found: dict) -> dict[str, bool]:
    return {defect["name"]: defect["reproduced"] for defect in found["defects"]}


def noisy(classes: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weights = normalize(torch.randn(classes, 64, generator=g), dim=1)
    labels = torch.randint(0, classes, (count,), generator=g)
    return normalize(weights[labels] + 1.5 * torch.randn(count, 64, generator=g), dim=1), weights, labels


def test_logits_are_cut_toward_zero_not_rounded():
    """-0.7 becomes 0 as 0.7 does, and 39.9 becomes 39: what a float put into an int64 buffer does."""
    for offset in (0.1, 0.4, 0.5, 0.9):
        found = integer_logits(on_a_circle((COSINES + offset) / 100).float(), torch.tensor([[1.0, 0.0]]))[:, 0]
        wanted = torch.where(COSINES >= 0, COSINES, COSINES + 1).long()
        assert found.dtype == torch.int64 and torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_the_released_formulas(seed):
    features, weights, labels = noisy(12, 400, seed)
    buffer = torch.zeros(400, 12, dtype=torch.int64)
    for row, feature in enumerate(features):  # their buffer takes float32 logits
        buffer[row] = 100 * feature @ weights.T
    right = buffer.topk(1, 1, True, True).indices[:, 0] == labels
    found = count_classification(features, weights, labels, "set", 12)["metrics"]
    assert found["hits1"] == int(right.sum()) and found["samples"] == 400
    per_class = [float(right[labels == label].float().mean()) for label in range(12)]
    assert found["mean_per_class"] == pytest.approx(sum(per_class) / 12, abs=1e-7)
    assert found["tied_rows"] == sum(int((row == row.max()).sum() > 1) for row in buffer) > 20


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_ties_leaves_the_range(seed):
    """Lowest: the right class comes last of equal ones. Highest: it comes first. Both are reached, none is passed."""
    features, weights, labels = noisy(12, 400, seed)
    logits = integer_logits(features, weights)
    right = torch.nn.functional.one_hot(labels, 12)
    extremes = [int(((2 * logits + sign * right).argmax(1) == labels).sum()) for sign in (-1, 1)]
    metrics = count_classification(features, weights, labels, "set", 12)["metrics"]
    assert metrics["hits1_range"] == extremes and extremes[0] < extremes[1]
    assert extremes[0] <= metrics["hits1"] <= extremes[1]


def test_exact_logits_tell_apart_what_integer_ones_tie():
    features, weights, labels = noisy(12, 400, 0)
    exact = accuracy(target_ranks(features, weights, labels), labels, [str(i) for i in range(12)])
    legacy = count_classification(features, weights, labels, "set", 12)
    assert exact["hits1"] != legacy["metrics"]["hits1"] and names(legacy) == {"integer-logits": True}
    assert f"{legacy['metrics']['tied_rows']} of 400 rows" in legacy["defects"][0]["effect"]


def test_phantom_rows_of_imagenet():
    """50,000 pictures over 8 ranks of batch 128: 176 rows that no picture fills."""
    assert phantom_rows(50_000) == 176
    assert [phantom_rows(n, ranks=2, batch=4) for n in (0, 1, 7, 8, 9)] == [0, 3, 1, 0, 3]
    features, weights, labels = noisy(12, 400, 0)
    plain = count_classification(features, weights, labels, "set", 12)["metrics"]
    found = count_classification(features, weights, labels, "imagenet", 12)
    phantoms = phantom_rows(400)
    assert phantoms == 8 * 78 and found["metrics"]["samples"] == 400 + phantoms
    first = int(torch.zeros(1, 12, dtype=torch.int64).topk(1).indices[0, 0] == 0)
    assert found["metrics"]["hits1"] == plain["hits1"] + phantoms * first
    assert found["metrics"]["hits1_range"] == [plain["hits1_range"][0], plain["hits1_range"][1] + phantoms]
    assert names(found) == {"integer-logits": True, "phantom-rows": True}


def test_absent_class_and_salted_split_are_named():
    features, weights, labels = noisy(12, 400, 0)
    labels[labels == 3] = 4
    found = count_classification(features, weights, labels, "sun397", 12)
    assert found["metrics"]["mean_per_class"] is None
    assert names(found) == {"integer-logits": True, "absent-class": True, "salted-split": False}
    assert "ZeroDivisionError" in found["defects"][1]["effect"]


def pairs(images: int, captions: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    owner = torch.arange(images).repeat_interleave(torch.tensor(captions))
    image = normalize(torch.randn(images, 16, generator=g), dim=1)
    text = normalize(image[owner] + 1.2 * torch.randn(len(owner), 16, generator=g), dim=1)
    return image, text, owner


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_equals_the_released_way_and_ours_without_ties(seed):
    image, text, owner = pairs(60, [5] * 60, seed)
    exact = recall_at_k(image, text, owner)
    for dataset in ("coco", "flickr30k"):
        found = count_retrieval(image, text, owner, dataset)
        for key, value in exact.items():
            if "hits@" in key:
                assert found["metrics"][key] == value and found["metrics"][f"{key}_range"] == [value, value]
        assert found["metrics"]["mean_recall"] == pytest.approx(exact["mean_recall"])
    assert names(found) == {"unstable-sort": True, "five-captions": True}
    assert "0 of 300 captions" in found["defects"][1]["effect"]


def test_five_captions_are_assumed_for_flickr30k_only():
    """Six captions, then four: the sixth of picture 0 counts as picture 1's."""
    image, text, owner = pairs(40, [6, 4] * 20, 0)
    shifted = torch.arange(200) // 5
    wrong = count_retrieval(image, text, owner, "flickr30k")
    assert wrong["metrics"]["text_to_image_hits@1"] == recall_at_k(image, text, shifted)["text_to_image_hits@1"]
    assert "20 of 200 captions go to a wrong picture" in wrong["defects"][1]["effect"]
    right = count_retrieval(image, text, owner, "coco")
    exact = recall_at_k(image, text, owner)
    assert right["metrics"]["text_to_image_hits@1"] == exact["text_to_image_hits@1"]
    assert right["metrics"]["text_to_image_hits@1"] != wrong["metrics"]["text_to_image_hits@1"]
    assert names(right) == {"unstable-sort": True}


def test_sets_on_which_the_released_code_stops():
    found = count_retrieval(*pairs(40, [5] * 39 + [4], 0), "flickr30k")
    assert names(found) == {"unstable-sort": True, "five-captions": False}
    assert "stops" in found["defects"][1]["effect"]
    lone = count_retrieval(*pairs(43, [3] * 43, 0), "coco")
    assert names(lone) == {"unstable-sort": True, "lone-caption": False}


def test_equal_captions_are_reported_as_a_range():
    """Two pictures with one and the same caption, and a picture that is like no caption: only the sort decides."""
    image = normalize(torch.eye(6), dim=1)
    text = image[[0, 0, 2, 3, 4, 5]]
    metrics = count_retrieval(image, text, torch.arange(6), "coco")["metrics"]
    assert metrics["image_to_text_hits@1_range"] == [4, 6]
    assert 4 <= metrics["image_to_text_hits@1"] <= 6
    everything = count_retrieval(image, image[[0] * 6], torch.arange(6), "coco")
    assert everything["metrics"]["image_to_text_hits@1_range"] == [0, 6]
    assert "11 of 12 queries" in everything["defects"][0]["effect"]


def test_pictures_without_captions_are_no_queries():
    image, text, owner = pairs(10, [2] * 5 + [0] * 5, 0)
    found, exact = count_retrieval(image, text, owner, "coco")["metrics"], recall_at_k(image, text, owner)
    assert found["image_to_text_R@1"] == exact["image_to_text_R@1"]
