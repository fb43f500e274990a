"""--precision amp: float16 in the towers, float32 weights, a scaler: a run stays finite."""

import json
import math

import pytest
import torch

from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import parse
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize("positives", ["pairs", "mask"])
def test_a_run_in_float16_stays_finite(tmp_path, positives):
    """Without gradient clipping, as in the recipes of fine-tuning. (Chinese-CLIP's fp16 mode has float16 weights, and
    users report NaN.)"""
    settings = make_smaller(make_tiny(tmp_path))
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    changes = {"model": str(tmp_path / "vit.json"), "precision": "amp", "max_steps": 40, "val_data": None}
    changes |= {"grad_clip_norm": None, "positives": positives, "text_choice": "first", "lr": 1e-3, "batch_size": 16}
    folder = run(parse(Settings, settings | changes | {"schedule": "constant", "cycle_beta1": False}))
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    weights = read_tensors(find_checkpoint(folder) / "model.safetensors")
    floats = [x for x in weights.values() if x.is_floating_point()]
    assert floats and all(x.dtype == torch.float32 and x.isfinite().all() for x in floats)
