"""A stand-in model that is right by construction: pictures and words both become the color they show."""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

COLORS = {"red": (230, 20, 20), "green": (20, 200, 30), "blue": (30, 40, 220), "yellow": (220, 220, 10)}
COLORS |= {"purple": (150, 20, 160), "teal": (10, 150, 150), "white": (250, 250, 250)}
WORDS = {word: index for index, word in enumerate(["", *COLORS], 0)}


class ColorTokenizer:
    """Text -> ids of the color words in it, zero padded."""

    name, vocab_size, context = "colors", len(WORDS), 4

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[WORDS[word] for word in text.replace(".", " ").split() if word in WORDS] for text in texts]
        return torch.tensor([row + [0] * (self.context - len(row)) for row in rows])


class ColorModel(torch.nn.Module):
    """Features are (r, g, b) in [-1, 1]; `calls` keeps every batch size."""

    def __init__(self):
        super().__init__()
        table = torch.tensor([(127.5,) * 3, *COLORS.values()]) / 127.5 - 1
        self.table = torch.nn.Parameter(table)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.659))
        self.calls: list[int] = []

    def encode_image(self, x: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.calls.append(len(x))
        features = x.mean((2, 3))
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.calls.append(len(tokens))
        features = self.table[tokens].sum(1)
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


def preprocess(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1


def save_color(path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), COLORS[color]).save(path)


def use_color_model(monkeypatch) -> SimpleNamespace:
    """Let every checkpoint be the stand-in, and return what it is loaded as."""
    found = loaded()
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", SimpleNamespace(load_for_inference=lambda *a, **n: found))
    return found


def loaded(model: torch.nn.Module | None = None) -> SimpleNamespace:
    """What rwkv_clip.factory.load_for_inference gives, with the stand-in inside."""
    return SimpleNamespace(
        model=model or ColorModel(),
        preprocess=preprocess,
        tokenizer=ColorTokenizer(),
        name="colors",
        digest="0" * 64,
        precision="fp32",
    )
