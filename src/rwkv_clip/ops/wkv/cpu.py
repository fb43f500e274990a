"""WKV6 in C++ on a CPU (csrc/cpu/wkv6.cpp): compiled at the first call, in a few seconds and once per machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..build import CSRC, build_library, host_flags, load_library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128  # of csrc/cpu/inner.h


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("b", "t", "h", "n")]


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("b", "t", "h", "is_bfloat16"))]


@lru_cache
def _library() -> ctypes.CDLL:
    path = build_library(
        "wkv6_cpu",
        [CSRC / "cpu" / "wkv6.cpp"],
        flags=host_flags(),
        compiler="c++",
        depends=sorted((CSRC / "cpu").glob("*.h")),
    )
    library = load_library(path)
    library.wkv6_forward_scratch.restype = library.wkv6_backward_scratch.restype = ctypes.c_int64
    return library


def supports(r: Tensor) -> bool:
    """Whether the kernels take tensors like r (B, T, H, N): any T, N up to 128, every dtype but float64."""
    return r.dtype in _DTYPES and r.shape[-1] <= MAX_HEAD_SIZE


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """r, k, v, w (B, T, H, N), w raw decay; u (H, N) -> y (B, T, H, N), contiguous, in v's dtype. BuildError."""
    inputs = [_readable(x) for x in (r, k, v, w)]
    u = u.float().contiguous()
    y = torch.empty(v.shape, dtype=inputs[2].dtype, device=v.device)
    shape, threads, library = _Shape(*r.shape), torch.get_num_threads(), _library()
    scratch = _scratch(library.wkv6_forward_scratch(ctypes.byref(shape)), r, threads)
    library.wkv6_forward(
        ctypes.byref(shape), _views(inputs), _pointer(u), _views([y]), _pointer(scratch), ctypes.c_int64(threads)
    )
    return y.to(v.dtype)


def backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w (raw decay) and u, contiguous, each in the dtype of its input."""
    inputs = [_readable(x) for x in (gy, r, k, v, w)]
    u32 = u.float().contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[1:]]
    gu = torch.empty(r.shape[0], *u.shape, dtype=torch.float32, device=r.device)
    shape, threads = _Shape(*r.shape), torch.get_num_threads()
    scratch = _scratch(_library().wkv6_backward_scratch(ctypes.byref(shape)), r, threads)
    _library().wkv6_backward(
        ctypes.byref(shape),
        _views(inputs),
        _pointer(u32),
        _views(grads),
        _pointer(gu),
        _pointer(scratch),
        ctypes.c_int64(threads),
    )
    gr, gk, gv, gw = (g.to(x.dtype) for g, x in zip(grads, (r, k, v, w)))
    return gr, gk, gv, gw, gu.sum(0).to(u.dtype)


def _readable(x: Tensor) -> Tensor:
    """x as the kernel reads it: float32 or bfloat16, channels adjacent, any other strides."""
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _views(tensors: Sequence[Tensor]) -> ctypes.Array:
    views = ((x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16) for x in tensors)
    return (_View * len(tensors))(*views)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _scratch(floats: int, r: Tensor, threads: int) -> Tensor:
    return torch.empty(floats * min(threads, r.shape[0] * r.shape[2]), dtype=torch.float32, device=r.device)
