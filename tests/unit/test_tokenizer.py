"""A tokenizer goes where its data set goes: pickled to spawned workers, copied, and still with the same ids."""

import copy
import pickle
import subprocess
import sys

import open_clip
import pytest
import torch
from PIL import Image

from rwkv_clip.image import train_transform, val_transform
from rwkv_clip.tokenizer import Tokenizer, make_tokenizer

TEXTS = ["a photo of two dogs", "", "Ünïcödé and 日本", "word " * 200]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "two", "dogs", "word", "and"]

SPAWNED = """
import torch
from rwkv_clip.tokenizer import make_tokenizer

class Set(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
    def __len__(self):
        return 2
    def __getitem__(self, i):
        return self.tokenizer(["a dog", "two cats"][i])[0]

if __name__ == "__main__":
    tokenizer = make_tokenizer(context=9)
    loader = torch.utils.data.DataLoader(Set(tokenizer), 2, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader)), tokenizer(["a dog", "two cats"]))
"""


def theirs(tmp_path) -> Tokenizer:
    """How an open_clip model's tokenizer from Hugging Face is wrapped."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "hub")
    tokenizer = open_clip.HFTokenizer(str(tmp_path / "hub"), context_length=12)
    return Tokenizer("open_clip:x", tokenizer, tokenizer.vocab_size, tokenizer.context_length)


@pytest.mark.parametrize("kind", ["ours", "open_clip", "hugging face"])
@pytest.mark.parametrize("carry", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_give_equal_ids(kind, carry, tmp_path):
    if kind == "ours":
        tokenizer = make_tokenizer(context=16)
    elif kind == "open_clip":
        tokenizer = Tokenizer("open_clip:x", open_clip.SimpleTokenizer(), 49408, 77)
    else:
        tokenizer = theirs(tmp_path)
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


def test_spawned_workers_tokenize(tmp_path):
    (tmp_path / "loader.py").write_text(SPAWNED)
    subprocess.run([sys.executable, str(tmp_path / "loader.py")], check=True)
