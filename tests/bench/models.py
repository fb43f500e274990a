"""Models that the benches of encoding and training compare: ours, checked against float64, and open_clip's."""

from __future__ import annotations

import copy
import importlib.util
import logging

import torch
import torch.nn.functional as F
from harness import Report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rwkv_clip

PEERS = {"RWKV-CLIP-B-32": "ViT-B-32", "RWKV-CLIP-B-16": "ViT-B-16"}
NO_PEER = "peer missing: open_clip_torch is not installed"


def has_open_clip() -> bool:
    return importlib.util.find_spec("open_clip") is not None


def make_ours(name: str, device: torch.device, precision: str = "fp32", **settings: float) -> nn.Module:
    """A fresh model of ours whose vectors have left their initial values, so that a gate sees them."""
    torch.manual_seed(0)
    model = rwkv_clip.create_model(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return rwkv_clip.factory.cast_weights(model, dtype).to(device)


def make_open_clip(name: str, device: torch.device, precision: str = "fp32", size: int | None = None) -> nn.Module:
    """open_clip's model of a name, fresh; `size` resizes its positions."""
    import open_clip

    logging.disable(logging.WARNING)  # "no pretrained weights"
    torch.manual_seed(0)
    spelled = {"fp32": "fp32", "bf16": "pure_bf16"}[precision]
    model = open_clip.create_model(name, precision=spelled, device=device, force_image_size=size)
    logging.disable(logging.NOTSET)
    return model.eval()


def make_inputs(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pixels (batch, 3, size, size) and token ids (batch, 77)."""
    g = torch.Generator().manual_seed(1)
    image, text = torch.randn(batch, 3, size, size, generator=g), torch.randint(1, 49407, (batch, 77), generator=g)
    return image.to(device, dtype), text.to(device)


def check(report: Report, name: str, model: nn.Module, size: int) -> None:
    """Features of a model of ours, in its precision, against the same weights in float64 without native kernels."""
    weight = model.image_model.patch_embed.projection.weight
    image, text = make_inputs(2, size, weight.device, weight.dtype)
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[weight.dtype]
    with torch.no_grad():
        exact = copy.deepcopy(model).double().eval()
        for what, ours, theirs in (
            ("image", model.encode_image(image), exact.encode_image(image.double())),
            ("text", model.encode_text(text), exact.encode_text(text)),
        ):
            error = (ours.double() - theirs).norm() / theirs.norm()
            report.gate(f"{name}: {what} features in {str(weight.dtype)[6:]} against float64", error, limit)


def count_flops(model: nn.Module, size: int) -> float:
    """Floating point operations of a pair's forward pass: matrix products, convolutions and attention (not WKV6)."""
    device = next(model.parameters()).device
    image, text = make_inputs(1, size, device, torch.float32)
    with FlopCounterMode(display=False) as counter:  # with gradients: torch's fused attention would not be counted
        model(image, text)
    return float(counter.get_total_flops())


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE in its plain form: the same small work for every contender."""
    scores, target = scale.float() * image.float() @ text.float().T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
