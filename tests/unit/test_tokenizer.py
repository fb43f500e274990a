"""A tokenizer goes where its data set goes: pickled to spawned workers, copied, and still with the same ids."""

import copy
import pickle
import subprocess
import sys

import open_clip.tokenizer
import pytest
import torch
from PIL import Image

from rwkv_clip.factory import get_tokenizer
from rwkv_clip.tokenizer import Tokenizer, make_tokenizer
from rwkv_clip.transform import train_transform, val_transform

TEXTS = ["a photo of two dogs", "", "Ünïcödé and 日本", "word " * 200]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "two", "dogs", "word", "and"]


def hugging_face(tmp_path, monkeypatch) -> Tokenizer:
    """That of an open_clip model whose texts go through transformers."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "hub")
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path / "hub"), context_length=12)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: theirs)
    tokenizer = get_tokenizer("ViT-B-16-SigLIP")
    assert tokenizer.vocab_size == len(WORDS)
    return tokenizer


@pytest.mark.parametrize("kind", ["ours", "open_clip", "hugging face"])
@pytest.mark.parametrize("carry", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_give_equal_ids(kind, carry, tmp_path, monkeypatch):
    if kind == "ours":
        tokenizer = make_tokenizer(context=16)
    elif kind == "open_clip":
        tokenizer = Tokenizer("open_clip:x", open_clip.tokenizer.SimpleTokenizer(), 49408, 77)
    else:
        tokenizer = hugging_face(tmp_path, monkeypatch)
    carried = carry(tokenizer)
    assert torch.equal(carried(TEXTS), tokenizer(TEXTS))
    assert torch.equal(carried(TEXTS, 7), tokenizer(TEXTS, 7))
    wanted = (tokenizer.name, tokenizer.vocab_size, tokenizer.context)
    assert (carried.name, carried.vocab_size, carried.context) == wanted


def test_our_pickle_holds_no_vocabulary():
    assert len(pickle.dumps(make_tokenizer())) < 1000


def test_transforms_travel_too():
    picture = Image.linear_gradient("L")
    for transform in (val_transform(24), val_transform((24, 16)), train_transform(24)):
        carried = pickle.loads(pickle.dumps(transform))
        torch.manual_seed(0)
        expected = transform(picture)
        torch.manual_seed(0)
        assert torch.equal(carried(picture), expected)


def test_a_process_that_starts_anew_gives_equal_ids():
    """What a spawned worker gets: the pickle, and a Python that has imported nothing."""
    tokenizer = make_tokenizer(context=16)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(eval(sys.argv[1])).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, ascii(TEXTS)], input=pickle.dumps(tokenizer), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str(tokenizer(TEXTS).tolist())
