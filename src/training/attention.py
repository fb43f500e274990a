"""Attention on a CPU in bfloat16: torch's forward pass, and its backward pass in float32.

torch's kernel for the backward pass in bfloat16 took 17 ms where the one for float32 takes 4.5 (AMD EPYC with
AVX512-BF16, torch 2.14, 256 heads of 65 x 64), 40 % of a ViT's training step. What is kept for the backward pass stays
bfloat16, so that memory does not grow; gradients are rounded once, at the end.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rwkv_clip.device import autocast_dtype
from rwkv_clip.dist import World

from .settings import ParallelSettings

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"  # what F.scaled_dot_product_attention calls on a CPU


class _Attention(torch.autograd.Function):
    """The operator with its arguments in order; (out, logsumexp)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        is_causal: bool,
        mask: Tensor | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
            )
        ctx.save_for_backward(query, key, value, out, logsumexp, mask)
        ctx.options = dropout_p, is_causal, scale
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, mask = ctx.saved_tensors
        dropout_p, is_causal, scale = ctx.options
        wide = [tensor.float() for tensor in (gradient, query, key, value, out)]
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, logsumexp, dropout_p, is_causal, attn_mask=mask, scale=scale
        )
        return (*(tensor.to(query.dtype) for tensor in found), None, None, None, None)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return _Attention.apply(query, key, value, dropout_p, is_causal, attn_mask, scale)


def pays(settings: ParallelSettings, world: World) -> bool:
    """Whether a run computes attention in half precision on a CPU, by operators that run as they are called: compiled
    ones are inductor's."""
    half = autocast_dtype(settings.precision, world.device) is not None
    return half and world.device.type == "cpu" and not settings.torchcompile


@contextlib.contextmanager
def wide_backward(wanted: bool = True) -> Iterator[None]:
    """Inside, attention on CPUs has this backward pass, in the whole process; nothing changes unless `wanted`. Values
    of the forward pass, and with float32 the gradients, keep their bits."""
    if not wanted:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, as it is meant
        library.impl(FORWARD, _attend, "AutogradCPU")
    try:
        yield
    finally:
        library._destroy()
