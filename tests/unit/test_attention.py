"""Attention on a CPU: torch's forward pass in every bit, a backward pass in float32 where torch's is in bfloat16."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.tiny import make_tiny
from rwkv_clip.config import parse
from rwkv_clip.training import main
from rwkv_clip.training.attention import wide_backward
from rwkv_clip.training.settings import Settings

SHAPES = {"image": (3, 2, 50, 64), "text": (2, 4, 9, 16), "one token": (2, 1, 1, 8)}

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def attend(dtype: torch.dtype, shape: tuple[int, ...], mask: str) -> list[Tensor]:
    """Output and the three gradients, for the same numbers whatever the dtype."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]
    query, key, value, gradient = (x.to(dtype) for x in numbers)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    tokens = shape[2]
    added = torch.full((tokens, tokens), -torch.inf).triu(1).to(dtype) if mask == "added" else None
    out = F.scaled_dot_product_attention(*inputs, attn_mask=added, is_causal=mask == "causal")
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-9)) for a, b in zip(found[1:], exact[1:]))


@pytest.mark.parametrize("mask", ["none", "causal", "added"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_forward_bits_stay_and_gradients_are_nearer_to_the_formula(shape, mask):
    plain, exact = (attend(dtype, shape, mask) for dtype in (torch.bfloat16, torch.float64))
    with wide_backward():
        found = attend(torch.bfloat16, shape, mask)
    assert torch.equal(found[0], plain[0]) and all(x.dtype == torch.bfloat16 for x in found)
    assert error(found, exact) <= min(error(plain, exact) * 1.05, 1e-2) + 1e-9


@pytest.mark.parametrize("mask", ["none", "causal", "added"])
def test_float32_keeps_its_bits(mask):
    plain = attend(torch.float32, SHAPES["image"], mask)
    with wide_backward():
        found = attend(torch.float32, SHAPES["image"], mask)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))


def test_it_ends_with_the_block():
    plain = attend(torch.bfloat16, SHAPES["image"], "none")
    with pytest.raises(KeyError), wide_backward():
        raise KeyError
    with wide_backward(wanted=False):
        again = attend(torch.bfloat16, SHAPES["image"], "none")
    assert all(torch.equal(a, b) for a, b in zip(again, plain))


@pytest.mark.parametrize(("precision", "steps_alike"), [("amp_bf16", 1), ("fp32", 3)])
def test_a_run_takes_it_where_it_autocasts(precision, steps_alike, tmp_path, monkeypatch):
    (tmp_path / "vit.json").write_text(json.dumps(MODEL))
    data = make_tiny(tmp_path) | {"model": str(tmp_path / "vit.json"), "precision": precision}
    data |= {"max_steps": 3, "log_every_n_steps": 1}
    logs = []
    for name in ("wide", "plain"):
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr(main, "wide_backward", lambda wanted: wide_backward(False))
            folder = main.run(parse(Settings, data | {"name": name}))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines if "loss" in line])
    alike = [a == b for a, b in zip(*logs)]
    assert alike[:steps_alike] == [True] * steps_alike and (precision == "fp32" or not all(alike))
