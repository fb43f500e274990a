"""The native CPU kernels of `pointwise.py`: built at the first call, bound with ctypes.

`supports` says whether they take a tensor. Without a compiler they take none; the first question then warns, once.
A kernel reads values of x's dtype, and weights in float32; a backward returns the gradients of its tensors in order.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..build import CSRC, BuildError, build_library, host_flags, load_library

_DTYPES = (torch.float32, torch.bfloat16)
_C_TYPES = {int: ctypes.c_long, float: ctypes.c_float}  # everything else is a pointer
_kernels: dict[tuple[str, torch.dtype], Callable] = {}
_WORTH_A_THREAD = 1 << 14  # elements that are written; below, starting threads costs more than they save


@lru_cache
def _library() -> ctypes.CDLL | None:
    sources, headers = [CSRC / "cpu" / "block.cpp"], [CSRC / "cpu" / "numbers.h"]
    try:
        return load_library(build_library("block_cpu", sources, flags=host_flags(), compiler="c++", depends=headers))
    except BuildError as error:
        warnings.warn(f"RWKV blocks run as plain torch operations, which are slower: {error}", stacklevel=2)
        return None


def _available() -> bool:
    return _library() is not None


# torch.compile must not trace a build. This is torch.compiler.assume_constant_result, which imports all of dynamo: one
# second more for every `import rwkv_clip`.
_available._dynamo_marked_constant = True


def supports(x: Tensor) -> bool:
    """Whether the native kernels take a tensor of this dtype and device on this machine."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and _available()


def _call(name: str, x: Tensor, *arguments: object, work: int = 1) -> None:
    """Run a kernel of x's dtype. Tensors (contiguous, held by the caller) become pointers; int is C's long. work: how
    many times the elements of x are written, or as much done to them."""
    threads = min(torch.get_num_threads(), max(1, work * x.numel() // _WORTH_A_THREAD))
    kernel = _kernels.get((name, x.dtype)) or _find_kernel(name, x.dtype, (*arguments, threads))
    kernel(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), threads)


def _find_kernel(name: str, dtype: torch.dtype, arguments: Sequence[object]) -> Callable:
    find = getattr(_library(), f"find_{name}")
    find.argtypes, find.restype = [ctypes.c_long], ctypes.c_void_p
    types = (_C_TYPES.get(type(a), ctypes.c_void_p) for a in arguments)
    kernel = _kernels[name, dtype] = ctypes.CFUNCTYPE(None, *types)(find(dtype == torch.bfloat16))
    return kernel


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _weights(*tensors: Tensor) -> list[Tensor]:
    return [x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous() for x in tensors]


def _values(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Tensors as kernels read them beside x: contiguous, in its dtype."""
    dtype = x.dtype
    return [
        other if other is None or (other.dtype == dtype and other.is_contiguous()) else other.to(dtype).contiguous()
        for other in (x, *others)
    ]


def _as_inputs(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad.to(x.dtype) for grad, x in zip(grads, inputs) if grad is not None and x is not None]


def _shift(x: Tensor, mixtures: int, heads: int, grid: Sequence[int]) -> ctypes.Array:
    """`struct Shift` of block.cpp."""
    return _make_shift(x.shape, mixtures, heads, tuple(grid))


@lru_cache(maxsize=64)
def _make_shift(shape: torch.Size, mixtures: int, heads: int, grid: tuple[int, ...]) -> ctypes.Array:
    b, t, c = shape
    return (ctypes.c_long * 8)(mixtures, b, t, grid[-1], math.prod(grid), c, heads, 2 * len(grid))


def mix(x: Tensor, coefficients: Tensor, offsets: Tensor | None, heads: int, grid: Sequence[int]) -> list[Tensor]:
    """`pointwise.mix_tokens`."""
    (x, offsets), (weights,) = _values(x, offsets), _weights(coefficients)
    outs = [torch.empty_like(x) for _ in range(len(coefficients))]
    _call("mix", x, x, weights, offsets, _pointers(outs), _shift(x, len(outs), heads, grid), work=len(outs))
    return outs


def mix_backward(
    grads: Sequence[Tensor], x: Tensor, coefficients: Tensor, offsets: Tensor | None, heads: int, grid: Sequence[int]
) -> list[Tensor]:
    """Gradients of x, coefficients and, if there are any, offsets."""
    inputs = (x, coefficients, offsets)
    (x, offsets, *grads), (weights,) = _values(x, offsets, *grads), _weights(coefficients)
    gx, gweights = torch.empty_like(x), torch.empty_like(weights)
    goffsets = None if offsets is None else torch.empty_like(offsets)
    scratch = torch.empty(2, *x.shape, dtype=torch.float32)
    outs = (gx, gweights, goffsets)
    _call("mix_backward", x, _pointers(grads), x, weights, offsets, *outs, scratch, _shift(x, len(grads), heads, grid))
    return _as_inputs(outs, inputs)


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """`pointwise.norm_gate`."""
    (y, gate), weights = _values(y, gate), _weights(weight, bias)
    out = torch.empty_like(y)
    _call("norm_gate", y, y, gate, *weights, out, *_rows(y, heads), float(eps), work=2)
    return out


def norm_gate_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> list[Tensor]:
    """Gradients of y, gate, weight and bias."""
    inputs = (y, gate, weight, bias)
    (y, gate, grad), weights = _values(y, gate, grad), _weights(weight, bias)
    outs = [torch.empty_like(x) for x in (y, gate, *weights)]
    _call("norm_gate_backward", y, grad, y, gate, *weights, *outs, *_rows(y, heads), float(eps))
    return _as_inputs(outs, inputs)


def _rows(y: Tensor, heads: int) -> tuple[int, int, int]:
    """Rows, heads and head size."""
    return y.shape[0] * y.shape[1], heads, y.shape[2] // heads


def relu_square(x: Tensor) -> Tensor:
    """`pointwise.relu_square`."""
    return _run_elementwise("relu_square", x, x)[0]


def relu_square_backward(grad: Tensor, x: Tensor) -> list[Tensor]:
    """Gradient of x."""
    return _run_elementwise("relu_square_backward", x, grad, x)


def sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    """`pointwise.sigmoid_gate`."""
    return _run_elementwise("sigmoid_gate", x, gate, x)[0]


def sigmoid_gate_backward(grad: Tensor, gate: Tensor, x: Tensor) -> list[Tensor]:
    """Gradients of gate and x."""
    return _as_inputs(_run_elementwise("sigmoid_gate_backward", x, grad, gate, x, outputs=2), (gate, x))


def _run_elementwise(name: str, x: Tensor, *inputs: Tensor, outputs: int = 1) -> list[Tensor]:
    _, *inputs = _values(x, *inputs)
    outs = [torch.empty_like(inputs[0]) for _ in range(outputs)]
    _call(name, x, *inputs, *outs, x.numel())
    return outs
