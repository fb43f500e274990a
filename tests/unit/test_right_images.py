"""Retrieval where texts belong to several pictures or to none, and Chinese-CLIP's files as retrieval sets."""

import base64
import json

import numpy as np
import pytest
import torch

from helpers.chinese_clip import RELEASED, write_files, write_split
from helpers.pictures import picture
from rwkv_clip.data.image import ImageError
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.data.rows import SourceError
from rwkv_clip.errors import run_command
from rwkv_clip.eval.tasks import retrieval
from rwkv_clip.metrics import NEVER, recall_at_k, recall_hits, retrieval_ranks


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def draw_pairs(captions: int, images: int, seed: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(seed)
    pairs = [
        (c, i) for c in range(captions) for i in random.choice(images, random.integers(0, 4), replace=False).tolist()
    ]
    random.shuffle(pairs)
    return pairs


def slow_ranks(image: torch.Tensor, text: torch.Tensor, pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The definition: how many wrong items are at least as similar as the best right one."""
    similarity = image.double().numpy() @ text.double().numpy().T
    right = np.zeros(similarity.shape, bool)
    for caption, owner in pairs:
        right[owner, caption] = True

    def rank(row: np.ndarray, own: np.ndarray) -> int:
        return int((row[~own] >= row[own].max()).sum()) if own.any() else NEVER

    return (
        [rank(row, own) for row, own in zip(similarity, right) if own.any()],
        [rank(row, own) for row, own in zip(similarity.T, right.T)],
    )


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_brute_force(seed, chunk):
    pairs = draw_pairs(50, 30, seed)
    image, text = unit(30, 6, seed=seed), unit(50, 6, seed=seed + 9)
    image[5], text[7] = image[4], text[8]  # ties
    found = retrieval_ranks(image, text, torch.tensor(pairs + pairs[:5]), chunk)
    assert [ranks.tolist() for ranks in found] == list(slow_ranks(image, text, pairs))
    assert (found[1] == NEVER).any() and len(found[0]) == len({owner for _, owner in pairs})


def test_one_right_image_for_each_is_the_same_to_the_last_bit():
    owner = np.random.default_rng(0).integers(0, 40, 90)
    image, text = unit(40, 16), unit(90, 16, seed=1)
    pairs = torch.from_numpy(np.stack([np.arange(90), owner], 1))
    for one, other in zip(retrieval_ranks(image, text, owner), retrieval_ranks(image, text, pairs)):
        assert one.equal(other)
    assert recall_at_k(image, text, owner) == recall_at_k(image, text, pairs)


def test_a_text_without_a_picture_is_a_query_that_finds_nothing():
    image = torch.eye(3)
    found = recall_at_k(image, image, torch.tensor([[0, 0], [2, 2]]), ks=(1, 100))
    assert found["text_to_image_hits@1"] == found["text_to_image_hits@100"] == 2
    assert found["text_to_image_R@1"] == 2 / 3 and found["image_to_text_R@1"] == 1.0 and found["image_queries"] == 2
    assert recall_hits(torch.tensor([NEVER]), (1, 1 << 40)) == {1: 0, 1 << 40: 0}


@pytest.mark.parametrize(
    "pairs, words",
    [
        (torch.zeros(0, 2, dtype=torch.int64), "no caption belongs to an image"),
        ([[0, 3]], "entry 0 is 3; it must be within 0 and 2"),
        ([[3, 0]], "entry 0 is 3; it must be within 0 and 2"),
        ([[0, -1]], "entry 0 is -1"),
        ([0, 1], "2 entries for 3 captions; give one per caption, or pairs"),
        ([[0, 1, 2]], "give one per caption, or pairs"),
    ],
)
def test_pairs_that_do_not_fit(pairs, words):
    with pytest.raises(ValueError, match=words):
        recall_at_k(torch.eye(3), torch.eye(3), torch.as_tensor(pairs))


# ---- sets

IMAGES = {70: picture(70), 8: picture(8), 100: picture(100)}
TEXTS = [(3, "一只猫", [8, 100]), (1, "“狗”", [70]), (2, "鸟", []), (9, "鱼", [8, 55, 8])]


def test_texts_and_pictures_with_their_ids(tmp_path):
    write_files(tmp_path / "set", "test", IMAGES, TEXTS)
    data = load_retrieval(tmp_path / "set/test_texts.jsonl")
    assert data.image_ids == [100, 70, 8] and list(data.image_names) == ["100", "70", "8"]  # as an LMDB has its keys
    assert data.text_ids == [3, 1, 2, 9] and data.captions == [text for _, text, _ in TEXTS]
    assert data.pairs.tolist() == [[0, 2], [0, 0], [1, 1], [3, 2]] and data.image_of_caption.tolist() == [2, 1, -1, 2]
    assert [data.images_of(i) for i in range(4)] == [[2, 0], [1], [], [2]] and data.right_images is data.pairs
    assert np.asarray(data.open(0)).shape == (16, 24, 3) and data.name == "set/test"
    assert (
        "1 ids of images are not among the pictures" in data.note and "1 of 4 texts belong to no picture" in data.note
    )


def test_an_lmdb_is_the_same_set(tmp_path):
    for split in ("train", "valid"):
        texts, pairs = load_retrieval(RELEASED / f"{split}_texts.jsonl"), load_retrieval(RELEASED / "lmdb" / split)
        for name in ("name", "image_names", "image_ids", "text_ids", "captions", "note"):
            assert getattr(texts, name) == getattr(pairs, name), name
        assert (texts.pairs == pairs.pairs).all() and (texts.image_of_caption == pairs.image_of_caption).all()
        for i in range(len(texts.image_names)):
            assert texts.open(i).tobytes() == pairs.open(i).tobytes()


def test_recall_is_that_of_the_released_evaluation(tmp_path):
    """Any of a text's pictures among the first k; every text is a query, also one without pictures."""
    write_files(
        tmp_path,
        "t",
        {i: picture(i) for i in range(12)},
        [(i, f"t{i}", [i, (5 * i) % 12]) for i in range(12)] + [(77, "x", [])],
    )
    data = load_retrieval(tmp_path / "t_texts.jsonl")
    image, text = unit(12, 8), unit(13, 8, seed=1)
    found = recall_at_k(image, text, torch.from_numpy(data.right_images))
    order = (text.double() @ image.double().T).sort(dim=1, descending=True, stable=True).indices
    gold = [{data.image_ids.index(i) for i in (n, (5 * n) % 12)} for n in range(12)] + [set()]
    for k in (1, 5, 10):
        hits = sum(bool(own & set(best[:k])) for own, best in zip(gold, order.tolist()))
        assert found[f"text_to_image_hits@{k}"] == hits and found[f"text_to_image_R@{k}"] == hits / 13


def test_a_hidden_test_set_can_be_encoded_but_not_ranked(tmp_path):
    write_files(tmp_path, "test", IMAGES, [(i, text, []) for i, text, _ in TEXTS])
    data = load_retrieval(tmp_path / "test_texts.jsonl")
    assert data.pairs.shape == (0, 2) and data.text_ids == [3, 1, 2, 9]
    with pytest.raises(ValueError, match="no caption belongs to an image"):
        recall_at_k(unit(3, 4), unit(4, 4), torch.from_numpy(data.right_images))


def test_ids_that_are_no_numbers_are_not_handed_on(tmp_path):
    write_split(tmp_path, {"a.jpg": base64.b64encode(picture(1))}, [("a.jpg", 1, "x"), ("a.jpg", 1, "y")])
    data = load_retrieval(tmp_path)
    assert data.image_ids is None and data.text_ids is None and data.captions == ["x", "y"]
    assert "1 text_ids come again with another text" in data.note


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text_id": "a", "text": "x", "image_ids": [8]}', "line 5: text_id is not a whole number; repair it"),
        ("{", "line 5: a line is not a JSON object"),
        ('{"text_id": 5, "text": "", "image_ids": [8]}', "line 5: the text is empty"),
    ],
)
def test_an_evaluation_leaves_no_line_out(line, words, tmp_path, capsys):
    write_files(tmp_path, "t", IMAGES, TEXTS)
    with open(tmp_path / "t_texts.jsonl", "a") as file:
        file.write(line)
    assert run_command(lambda: load_retrieval(tmp_path / "t_texts.jsonl") and 0) == 3
    assert words in capsys.readouterr().err


def test_what_does_not_fit_is_named(tmp_path):
    write_files(tmp_path, "t", {1: base64.b64encode(b"junk" * 20).decode()}, [(1, "x", [1])])
    with pytest.raises(ImageError, match=r"t_imgs\.tsv image 1: .*an evaluation leaves no picture out"):
        load_retrieval(tmp_path / "t_texts.jsonl").open(0)
    for more in ({"split": "test"}, {"image_root": "."}, {"texts": ["raw"]}):
        with pytest.raises(ValueError, match="are of one split; leave split, image_root and texts out"):
            load_retrieval(tmp_path / "t_texts.jsonl", **more)
    with pytest.raises(ValueError, match="names 2 LMDB folders"):
        load_retrieval(f"{RELEASED}/lmdb/*")
    with pytest.raises(ValueError, match="holds several parts"):
        load_retrieval(RELEASED / "lmdb")
    (tmp_path / "u_imgs.tsv").write_text("5\tAAAA\n")
    (tmp_path / "u_texts.jsonl").write_text(json.dumps({"text_id": 1, "text": "x", "image_ids": [6]}))
    with pytest.raises(SourceError, match="are the ids the same"):
        load_retrieval(tmp_path / "u_texts.jsonl")


def test_the_gallery_counts_no_right_picture_as_a_wrong_one(tmp_path, monkeypatch):
    """A text whose two pictures both come behind seven wrong ones; the better of them is shown, with its rank."""
    write_files(tmp_path, "test", {i: picture(i) for i in range(10)}, [(1, "no picture", []), (2, "two", [8, 9])])
    data, shown = load_retrieval(tmp_path / "test_texts.jsonl"), []
    angles = torch.tensor([0.1 * i for i in range(8)] + [1.0, 0.65])  # from the text: 9 is seventh, 8 the last
    images = torch.stack([angles.cos(), angles.sin()], 1)
    found = retrieval.RetrievalResult({}, images, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 0)
    monkeypatch.setattr(retrieval, "_show", lambda axes, image, frame, title="": shown.append((frame, title)))
    assert retrieval.draw_gallery(data, found, 8).startswith(b"\x89PNG")
    assert shown == [(None, "")] * 5 + [("tab:orange", "rank 8 of 10")]
