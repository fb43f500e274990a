"""Recall and accuracy against brute force, with ties, missing captions, missing classes and any chunking."""

import numpy as np
import pytest
import torch

from rwkv_clip.eval.confusion import worst_classes
from rwkv_clip.eval.logistic import Classifier
from rwkv_clip.metrics import (
    COLUMNS,
    accuracy,
    exact_features,
    nearest_items,
    recall_at_k,
    recall_hits,
    retrieval_ranks,
    target_ranks,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def slow_rank(similarity: np.ndarray, target: int) -> int:
    """The definition, word by word: other items that are as similar or more."""
    return sum(value >= similarity[target] for place, value in enumerate(similarity) if place != target)


def slow_ranks(image: torch.Tensor, text: torch.Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    similarity = image.double().numpy() @ text.double().numpy().T
    image_to_text = []
    for i in sorted(set(owner)):
        best = max(similarity[i, c] for c in range(len(owner)) if owner[c] == i)
        image_to_text.append(sum(similarity[i, c] >= best for c in range(len(owner)) if owner[c] != i))
    return image_to_text, [slow_rank(similarity[:, c], o) for c, o in enumerate(owner)]


@pytest.mark.parametrize("chunk", [1, 3, 64, 10_000])
def test_ranks_equal_brute_force_with_any_number_of_captions(chunk):
    owner = np.random.default_rng(0).integers(0, 40, 90).tolist()
    owner = [o for o in owner if o != 7]  # picture 7 has no caption
    image, text = unit(40, 16), unit(len(owner), 16, seed=1)
    text = torch.nn.functional.normalize(text + 0.8 * image[owner], dim=-1)
    image_to_text, text_to_image = retrieval_ranks(image, text, owner, chunk)
    expected = slow_ranks(image, text, owner)
    assert (image_to_text.tolist(), text_to_image.tolist()) == expected
    assert 7 not in owner and len(image_to_text) == len(set(owner))


@pytest.mark.parametrize("count", [2, 8, 100])
def test_a_model_that_says_the_same_of_everything_finds_nothing(count):
    """At every metric: a hit needs the right answer to be better than all wrong ones, or room for all of them."""
    same, places, names = unit(1, 5).repeat(count, 1), torch.arange(count), [str(i) for i in range(count)]
    report = recall_at_k(same, same, places, ks=(1, 5, 10, count - 1, count))
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10, count - 1, count):
            assert report[f"{way}_R@{k}"] == float(k >= count), (way, k)
    probe = Classifier(torch.zeros(count, 5).double(), torch.ones(count).double(), 0, 0.0)
    for ranks in (target_ranks(same, same, places), probe.ranks(same, places)):
        assert ranks.tolist() == [count - 1] * count
        report = accuracy(ranks, places, names)
        assert report["top1"] == report["mean_per_class"] == 0.0 and report["top5"] == float(count <= 5)
    for entry in worst_classes(same, same, places, names):
        wrong = int(entry["class"] == 0)  # the first of the others
        assert entry["right"] == 0 and entry["predicted"] == [[wrong, str(wrong), 1]]
    assert nearest_items(same[:1], same, 3)[0].tolist() == [[0, 1, 2][:count]]  # an order to look at, no metric


def test_captions_that_pictures_share_are_found_by_none_of_them():
    """Two pictures with one text: it ties on the way to the texts; on the way back it is a query for either."""
    image, text = torch.eye(3), torch.eye(3)[[0, 0, 2, 2]]
    image_to_text, text_to_image = retrieval_ranks(image, text, [0, 1, 2, 2])
    assert image_to_text.tolist() == [1, 3, 0]  # the last picture says one text twice, which harms nobody
    assert text_to_image.tolist() == [0, 2, 0, 0]


def test_ties_do_not_depend_on_order_or_chunk():
    # Few distinct vectors of awkward length: a sum in another order would break these ties at random.
    image, text = unit(7, 637)[torch.arange(140) % 7], unit(7, 637)[torch.arange(420) % 7]
    owner = torch.arange(420) % 140
    reference = retrieval_ranks(image, text, owner, 1000)
    for chunk in (1, 2, 5, 33, 256):
        for ours, expected in zip(retrieval_ranks(image, text, owner, chunk), reference):
            assert torch.equal(ours, expected)
    assert set(reference[1].tolist()) == {19}  # each caption equals 20 pictures
    order = torch.randperm(140, generator=torch.Generator().manual_seed(0))
    moved = retrieval_ranks(image[order], text, torch.argsort(order)[owner])
    assert torch.equal(moved[0], reference[0][order]) and torch.equal(moved[1], reference[1])


def test_image_ranks_as_its_best_caption():
    image = torch.eye(3)
    text = torch.stack([image[1], image[0], image[2], image[1]])
    image_to_text, _ = retrieval_ranks(image, text, [0, 0, 1, 1])
    assert image_to_text.tolist() == [0, 1]  # picture 1: caption 3 ties with caption 0, which is another picture's


def brute_force(image: torch.Tensor, text: torch.Tensor, owner: np.ndarray) -> tuple[list[int], list[int]]:
    """The definition: wrong items that are as similar or more; an image ranks as its best caption."""
    similarity = text.double().numpy() @ image.double().numpy().T  # exact: products and sums of small integers / 64
    of_images = []
    for i in np.unique(owner):
        own = owner == i
        of_images.append(int((similarity[~own, i] >= similarity[own, i].max()).sum()))
    return of_images, [int((row >= row[own]).sum()) - 1 for row, own in zip(similarity, owner)]


def coarse(rng: np.random.Generator, count: int, width: int) -> torch.Tensor:
    """Vectors of length below 1 of which many are equal, and of whose products most are."""
    return torch.from_numpy(rng.integers(-1, 2, (count, width)) / 8).float()


@pytest.mark.parametrize("seed", range(40))
def test_ranks_of_any_tile_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    images, captions = int(rng.integers(1, 90)), int(rng.integers(1, 130))
    owner = rng.integers(0, images, captions)  # any number of captions, none at all included
    width = int(rng.integers(1, 6))
    image, text = coarse(rng, images, width), coarse(rng, captions, width)
    expected = brute_force(image, text, owner)
    for chunk in (1, 2, 5, 1000):  # tiles of 1 x 16, 2 x 32, 5 x 80, and the whole
        found = retrieval_ranks(image, text, owner, chunk)
        assert tuple(ranks.tolist() for ranks in found) == expected, chunk


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("same", [False, True], ids=["different", "all tied"])
def test_ranking_needs_a_tile_at_a_time(same):
    image = torch.nn.functional.normalize(torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    image = image[:1].expand(5000, 4) if same else image
    with Largest() as largest:
        recall_at_k(image, image.repeat_interleave(2, 0), torch.arange(10_000) // 2, chunk=128)
    assert largest.numbers <= 128 * 128 * COLUMNS


def in_python(queries: torch.Tensor, items: torch.Tensor, count: int) -> list[list[int]]:
    """All pairs, sorted by (similarity, place) in Python: the specification."""
    rows = (exact_features(queries) @ exact_features(items).T).tolist()
    return [sorted(range(len(items)), key=lambda place, row=row: (-row[place], place))[:count] for row in rows]


@pytest.mark.parametrize("chunk", [(1, 1), (3, 7), (5, 64), (256, 8192)])
@pytest.mark.parametrize("count", [1, 5, 23, 200])
@pytest.mark.parametrize("distinct", [1, 4, 61])
def test_the_nearest_are_those_of_a_full_sort(chunk, count, distinct):
    """61 items, few of them different: most of an answer is a question of ties."""
    items = unit(distinct, 5)[torch.randint(distinct, (61,), generator=torch.Generator().manual_seed(count))]
    queries = torch.cat([unit(6, 5, seed=1), items[:3]])
    places, scores = nearest_items(queries, items, count, chunk=chunk)
    assert places.tolist() == in_python(queries, items, count)
    similarity = exact_features(queries) @ exact_features(items).T
    assert torch.equal(scores, similarity.gather(1, places))


@pytest.mark.parametrize("distinct", [1, 3000])
def test_searching_needs_a_tile_at_a_time(distinct):
    items, queries = unit(distinct, 8)[torch.arange(3000) % distinct], unit(200, 8, seed=1)
    with Largest() as largest:
        places, _ = nearest_items(queries, items, 10, chunk=(64, 500))
    assert largest.numbers <= 2 * 64 * (500 + 10)  # nonzero gives two numbers for each that it finds
    assert torch.equal(places, nearest_items(queries, items, 10)[0])


def test_an_item_stands_where_recall_ranks_it():
    items, queries = unit(40, 4)[torch.arange(80) % 40], unit(30, 4, seed=1)
    places, _ = nearest_items(queries, items, 80, chunk=(7, 11))
    targets = torch.arange(30) * 2
    # Every item is there twice; a list has to begin with one of the two, recall counts the other against the model.
    twins = (places % 40 == targets[:, None] % 40) * torch.arange(80)
    assert torch.equal(target_ranks(queries, items, targets), twins.amax(1))


def test_nothing_to_search():
    assert nearest_items(unit(3, 4), unit(3, 4)[:0], 5)[0].shape == (3, 0)
    assert nearest_items(unit(3, 4)[:0], unit(3, 4), 5)[0].numel() == 0
    with pytest.raises(ValueError, match="4 dimensions and items 5"):
        nearest_items(unit(3, 4), unit(3, 5), 1)


def test_recall_counts_and_fractions():
    image, text = unit(30, 8), unit(60, 8, seed=3)
    owner = [i // 2 for i in range(60)]
    report = recall_at_k(image, text, owner)
    image_to_text, text_to_image = slow_ranks(image, text, owner)
    for name, ranks in (("image_to_text", image_to_text), ("text_to_image", text_to_image)):
        for k in (1, 5, 10):
            hits = sum(rank < k for rank in ranks)
            assert report[f"{name}_hits@{k}"] == hits
            assert report[f"{name}_R@{k}"] == hits / len(ranks)
    recalls = [value for key, value in report.items() if "_R@" in key]
    assert len(recalls) == 6 and report["mean_recall"] == pytest.approx(sum(recalls) / 6)
    assert (report["images"], report["captions"], report["image_queries"]) == (30, 60, 30)


def test_k_beyond_the_items_counts_every_query():
    report = recall_at_k(unit(3, 4), unit(3, 4, seed=1), [0, 1, 2])
    assert report["text_to_image_R@5"] == report["image_to_text_R@10"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.full((2, 4), float("nan"))}, "not finite"),
        ({"image": 3 * torch.eye(4)[:2]}, "normalise"),
        ({"image": torch.eye(3)[:2]}, "dimensions"),
        ({"image": torch.ones(2)}, "shape"),
        ({"image_of_caption": [0]}, "one per caption"),
        ({"image_of_caption": [0, 2]}, "within 0 and 1"),
        ({"image_of_caption": [0, -1]}, "within 0 and 1"),
        ({"image": torch.zeros(0, 4)}, "at least one"),
        ({"text": torch.zeros(0, 4), "image_of_caption": []}, "at least one"),
        ({"chunk": 0}, "chunk"),
        ({"ks": (0,)}, "k >= 1"),
    ],
)
def test_what_cannot_be_ranked_is_named(change, message):
    arguments = {"image": torch.eye(4)[:2], "text": torch.eye(4)[:2], "image_of_caption": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        recall_at_k(**arguments)


def test_no_queries_have_no_ranks():
    assert target_ranks(torch.zeros(0, 4), torch.eye(4), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_accuracy_leaves_out_and_names_a_class_without_samples():
    ranks = torch.tensor([0, 3, 0, 5, 0, 0])
    labels = torch.tensor([0, 0, 0, 2, 3, 3])
    report = accuracy(ranks, labels, list("abcdefg"))
    assert report["classes_without_samples"] == ["b", "e", "f", "g"]
    assert report["mean_per_class"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert (report["hits1"], report["hits5"], report["samples"], report["top5_k"]) == (4, 5, 6, 5)
    assert report["top1"] == pytest.approx(4 / 6) and report["top5"] == pytest.approx(5 / 6)


def test_top5_of_three_classes_takes_three():
    report = accuracy(torch.tensor([0, 2]), torch.tensor([0, 1]), ["a", "b", "c"])
    assert (report["top5_k"], report["top5"], report["top1"]) == (3, 1.0, 0.5)


def test_accuracy_refuses_nothing_and_foreign_labels():
    with pytest.raises(ValueError, match="no samples"):
        accuracy(torch.zeros(0), torch.zeros(0), ["a"])
    with pytest.raises(ValueError, match="labels: entry 1 is 2"):
        accuracy(torch.tensor([0, 0]), torch.tensor([0, 2]), ["a", "b"])
    with pytest.raises(ValueError, match="one label per sample"):
        accuracy(torch.tensor([0, 0]), torch.tensor([0]), ["a", "b"])


def test_recall_hits_are_integers():
    assert recall_hits(torch.tensor([0, 4, 5, 10]), (1, 5, 10)) == {1: 1, 5: 2, 10: 3}
