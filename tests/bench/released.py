"""The released RWKV-CLIP code as a contender: loaded from a checkout that the user names, for measuring only.

Its kernels need an NVIDIA GPU and nvcc. mmcv and mmcls, which it takes four small classes from, are replaced by the
stand-ins below where they are not installed: what they compute is the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIGS = {"RWKV-CLIP-B-32": "RWKV_CLIP_B32.json", "RWKV-CLIP-B-16": "RWKV_CLIP_B16.json"}


class Base(nn.Module):
    """mmcv's BaseModule and mmcls's BaseBackbone."""

    def __init__(self, init_cfg: Any = None):
        super().__init__()


class Patches(nn.Module):
    """mmcv's PatchEmbed, without padding."""

    def __init__(self, in_channels, input_size, embed_dims, conv_type, kernel_size, stride, bias):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, bias=bias)
        self.init_out_size = (input_size // stride, input_size // stride)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.projection(image)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


class Registry:
    """mmcls's BACKBONES."""

    def register_module(self):
        return lambda cls: cls


def keep_positions(table: Tensor, source: tuple, target: tuple, **_: Any) -> Tensor:
    """mmcls's resize_pos_embed at the trained size."""
    if tuple(source) != tuple(target):
        raise ValueError(f"positions {source} -> {target}: the stand-in of mmcls does not resize; install mmcls 0.x")
    return table


def install_stand_ins() -> None:
    contents = {
        "mmcv": {},
        "mmcv.runner": {},
        "mmcv.runner.base_module": {"BaseModule": Base, "ModuleList": nn.ModuleList},
        "mmcv.cnn": {},
        "mmcv.cnn.bricks": {},
        "mmcv.cnn.bricks.transformer": {"PatchEmbed": Patches},
        "mmcls": {},
        "mmcls.models": {},
        "mmcls.models.builder": {"BACKBONES": Registry()},
        "mmcls.models.utils": {"resize_pos_embed": keep_positions},
        "mmcls.models.backbones": {},
        "mmcls.models.backbones.base_backbone": {"BaseBackbone": Base},
    }
    for name, members in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)


class Released(nn.Module):
    """A released model with the surface of ours: normalised features and the scale."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale = self.inner(image, text)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale


def load_released(checkout: Path, name: str, drop_path: float, device: torch.device) -> Released:
    """The released model of a preset, with its own initial values. Compiles its kernels (a minute).

    One preset per process: the code reads its sizes from the environment while it is imported.
    """
    checkout = checkout.resolve()
    config = Namespace(**json.loads((checkout / "model_config" / CONFIGS[name]).read_text()))
    os.environ |= {
        "RWKV_HEAD_SIZE": str(config.head_size),
        "RWKV_FLOAT_MODE": "bf16",
        "RWKV_CTXLEN": str(config.ctx_len),
        "Image_T_max": str((config.input_size // config.image_patch_size) ** 2),
        "Text_T_max": "256",
        "Image_HEAD_SIE": str(config.image_embed_dims // config.image_num_heads),
    }
    if importlib.util.find_spec("mmcv") is None:
        install_stand_ins()
    here = Path.cwd()
    os.chdir(checkout)  # the sources of its kernels are named relative to it
    sys.path.insert(0, str(checkout))
    try:
        from model import Image_RWKV, Text_RWKV, get_model
    finally:
        sys.path.remove(str(checkout))
        os.chdir(here)
    image = Image_RWKV(
        img_size=config.input_size,
        patch_size=config.image_patch_size,
        embed_dims=config.image_embed_dims,
        hidden_rate=config.image_hidden_rate,
        depth=config.image_depth,
        num_heads=config.image_num_heads,
        output_cls_token=config.image_output_cls_token,
        with_cls_token=config.image_with_cls_token,
        drop_path_rate=drop_path,
    )
    return Released(get_model(image, Text_RWKV(config), image_cls_token=config.image_output_cls_token)).to(device)
