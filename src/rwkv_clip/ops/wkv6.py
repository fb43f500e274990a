"""The bidirectional WKV6 operator: argument checks, choice of backend, registration with torch.

The fast form is registered as `rwkv_clip::wkv6` and `rwkv_clip::wkv6_backward`, so that torch.compile, meta tensors and
activation checkpointing see one opaque operator each. It has dtype rules of its own (the decay keeps its dtype, sums
are float32 or float64), therefore no autocast rule: ambient autocast neither casts its inputs nor its inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import wkv6_reference
from .tree import tree_backward, tree_forward

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BACKENDS = ("tree", "reference")


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that run on `device` here, the default first."""
    torch.device(device)  # an impossible device is an error, not an empty list
    return _BACKENDS


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str | None = None) -> Tensor:
    """Bidirectional WKV6 (RWKV-6 linear attention, both directions, diagonal weighted by u once).

    r, k, v: (B, T, H, N), one dtype of float32, float64, bfloat16, float16; any strides; T >= 1; B may be 0.
    w: (B, T, H, N), the RAW decay; the factor per step is exp(-exp(w)). u: (H, N). Both may have another float dtype.
    Returns y (B, T, H, N), contiguous, in v's dtype; accumulated in float32 (float64 for float64 input).
    Differentiable once in all five. `backend`: a name of `available_backends(device)`; None takes the first.
    ValueError for wrong shapes, dtypes, devices or backend. Maths: `ops/reference.py`.
    """
    _check(r, k, v, w, u)
    backends = available_backends(r.device)
    if backend is None:
        backend = backends[0]
    elif backend not in backends:
        raise ValueError(f"backend: {backend!r} is not available on {r.device}; available: {', '.join(backends)}")
    if backend == "reference":
        return wkv6_reference(r, k, v, w, u)
    return _wkv6(r, k, v, w, u)


def _check(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    named = {"r": r, "k": k, "v": v, "w": w, "u": u}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name}: dtype {x.dtype} is not supported; use float32, bfloat16, float16 or float64")
        if x.device != r.device:
            raise ValueError(f"{name}: on {x.device}, but r is on {r.device}; move all five to one device")
    if r.dim() != 4:
        raise ValueError(f"r: expected 4 dimensions (B, T, H, N), got shape {tuple(r.shape)}")
    for name in ("k", "v", "w"):
        if named[name].shape != r.shape:
            raise ValueError(f"{name}: shape {tuple(named[name].shape)} differs from r's {tuple(r.shape)}")
    for name in ("k", "v"):
        if named[name].dtype != r.dtype:
            raise ValueError(f"{name}: dtype {named[name].dtype} differs from r's {r.dtype}")
    if r.shape[1] < 1 or r.shape[2] < 1 or r.shape[3] < 1:
        raise ValueError(f"r: shape {tuple(r.shape)} needs T, H and N of at least 1")
    if u.shape != r.shape[2:]:
        raise ValueError(f"u: shape {tuple(u.shape)}, expected (H, N) = {tuple(r.shape[2:])}")


@torch.library.custom_op("rwkv_clip::wkv6", mutates_args=())
def _wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    if r.shape[0] == 0:
        return torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with torch.autocast(r.device.type, enabled=False):
        return tree_forward(r, k, v, w, u)


@_wkv6.register_fake
def _(r, k, v, w, u):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("rwkv_clip::wkv6_backward", mutates_args=())
def _wkv6_backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if r.shape[0] == 0:
        return (
            *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w)),
            torch.zeros_like(u),
        )
    with torch.autocast(r.device.type, enabled=False):
        return tree_backward(gy, r, k, v, w, u)


@_wkv6_backward.register_fake
def _(gy, r, k, v, w, u):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w, u))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, gy):
    return _wkv6_backward(gy, *ctx.saved_tensors)


_wkv6.register_autograd(_differentiate, setup_context=_save)
