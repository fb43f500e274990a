"""The bidirectional WKV6 operator: argument checks, choice of backend, registration with torch.

The fast forms are registered as `rwkv_clip::wkv6` and `rwkv_clip::wkv6_backward`, so that torch.compile, meta tensors
and activation checkpointing see one opaque operator each; which backend runs is decided inside, at the call. The
operator has dtype rules of its own (the decay keeps its dtype, sums are float32 or float64), therefore no autocast
rule: ambient autocast neither casts its inputs nor its inside.

A backend is a module with `supports(r) -> bool` (compiles nothing), `forward(r, k, v, w, u) -> y` and
`backward(gy, r, k, v, w, u) -> (gr, gk, gv, gw, gu)`, called without gradients and with a batch of at least 1. A native
one compiles at its first call; if that raises BuildError, the product tree takes over, after one warning.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..backend import is_plain
from ..build import BuildError, find_compiler, find_nvcc
from ..watched import is_for_value, is_watched, refuse_forward_mode, register_once
from . import chunked, cpu, cuda
from .plain import wkv6_plain
from .reference import wkv6_reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NATIVE = {"cpu": ("cpp", cpu, find_compiler), "cuda": ("cuda", cuda, find_nvcc)}  # by device: name, module, tool
_TRACED = (
    "WKV6 is traced as its plain recurrence, several operations per token, which is right and slow; torch.export and "
    "torch.compile keep the operator, and under rwkv_clip.ops.set_backend('torch') it is a few products"
)
_failed: set[str] = set()  # native backends that could not be built in this process


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that run on `device` here, the default first. Compiles nothing: a native backend is listed where its
    compiler is, and no longer after its build has failed."""
    name, _, find_tool = _NATIVE.get(torch.device(device).type, (None, None, None))
    if name is None or name in _failed:
        return ("tree", "reference")
    try:
        find_tool()
    except BuildError:
        return ("tree", "reference")
    return (name, "tree", "reference")


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str | None = None) -> Tensor:
    """Bidirectional WKV6 (RWKV-6 linear attention, both directions, diagonal weighted by u once).

    r, k, v: (B, T, H, N), one dtype of float32, float64, bfloat16, float16; any strides; T >= 1; B may be 0.
    w: (B, T, H, N), the RAW decay; the factor per step is exp(-exp(w)). u: (H, N). Both may have another float dtype.
    Returns y (B, T, H, N), contiguous, in v's dtype; accumulated in float32 (float64 for float64 input).
    Differentiable once in all five, and in every way by "reference". `backend`: a name of `available_backends(device)`,
    for forward and backward; None takes the first that supports the input. Under torch.jit.trace, torch.func and
    forward-mode differentiation it is always "reference" (see `ops/watched.py`), but after
    `set_backend("torch")` and for the ONNX exporters it is `wkv/plain.py`. ValueError for wrong shapes, dtypes, devices
    or backend. Maths: `ops/wkv/reference.py`.
    """
    _check(r, k, v, w, u)
    if r.is_cpu and backend != "reference" and is_for_value(r):
        return _compute(r, k, v, w, u, backend or "")
    if backend is None and is_plain():
        return wkv6_plain(r, k, v, w, u)
    if backend == "reference" or is_watched():
        if torch.jit.is_tracing():
            warnings.warn(_TRACED, RuntimeWarning, stacklevel=2)
        return wkv6_reference(r, k, v, w, u)
    return _wkv6(r, k, v, w, u, backend or "")


def _run(step: str, backend: str, r: Tensor, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """`step` ("forward", "backward") of a backend by name, or with "" of the first one that can; r tells the kind."""
    name, module, _ = _NATIVE.get(r.device.type, (None, None, None))
    if backend not in ("", "tree", name):
        names = ", ".join(available_backends(r.device))
        raise ValueError(f"backend: {backend!r} is not available on {r.device}; available: {names}")
    native = backend != "tree" and module is not None and module.supports(r)
    if backend == name and not native:
        raise ValueError(f"backend: {name!r} does not support {r.dtype} with N = {r.shape[-1]}; use 'tree'")
    with torch.autocast(r.device.type, enabled=False):
        if native and (backend or name not in _failed):
            try:
                return getattr(module, step)(*tensors)
            except BuildError as error:
                if backend:
                    raise
                _failed.add(name)
                warnings.warn(f"WKV6 runs on its slower form in PyTorch: {error}", RuntimeWarning, stacklevel=2)
        return getattr(chunked, step)(*tensors)


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


def _compute(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str) -> Tensor:
    if r.shape[0] == 0:
        return torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return _run("forward", backend, r, r, k, v, w, u)


@torch.library.custom_op("rwkv_clip::wkv6", mutates_args=())
def _wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str = "") -> Tensor:
    refuse_forward_mode()
    return _compute(r, k, v, w, u, backend)


@_wkv6.register_fake
def _(r, k, v, w, u, backend=""):
    refuse_forward_mode()
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("rwkv_clip::wkv6_backward", mutates_args=())
def _wkv6_backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if r.shape[0] == 0:
        return (
            *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w)),
            torch.zeros_like(u),
        )
    return _run("backward", backend, r, gy, r, k, v, w, u)


@_wkv6_backward.register_fake
def _(gy, r, k, v, w, u, backend=""):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w, u))


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gy):
    return *_wkv6_backward(gy, *ctx.saved_tensors, ctx.backend), None


_wkv6.register_autograd(_differentiate, setup_context=_save)
register_once(_wkv6_backward)
