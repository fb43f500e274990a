"""The native CPU kernels of `pointwise.py`: built at the first call, bound with ctypes.

`supports` says whether they take a tensor. Without a compiler they take none; the first question then warns, once.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..build import CSRC, BuildError, build_library, host_flags, load_library

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_WORTH_A_THREAD = 1 << 14  # elements; below, starting threads costs more than they save
_LONG, _FLOAT, _INT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_int, ctypes.c_void_p
_SIGNATURES = {
    "mix": [_POINTER] * 4 + [_LONG] * 8 + [_INT] * 2,
    "mix_backward": [_POINTER] * 8 + [_LONG] * 8 + [_INT] * 2,
    "norm_gate": [_POINTER] * 5 + [_LONG] * 3 + [_FLOAT, _INT, _INT],
    "norm_gate_backward": [_POINTER] * 9 + [_LONG] * 3 + [_FLOAT, _INT, _INT],
    "relu_square": [_POINTER] * 2 + [_LONG, _INT],
    "relu_square_backward": [_POINTER] * 3 + [_LONG, _INT],
    "sigmoid_gate": [_POINTER] * 3 + [_LONG, _INT],
    "sigmoid_gate_backward": [_POINTER] * 5 + [_LONG, _INT],
}


@lru_cache
def _library() -> ctypes.CDLL | None:
    try:
        path = build_library("block_cpu", [CSRC / "cpu" / "block.cpp"], flags=host_flags(), compiler="c++")
        library = load_library(path)
    except BuildError as error:
        warnings.warn(f"RWKV blocks run on plain torch, several times slower here: {error}", stacklevel=2)
        return None
    for name, types in _SIGNATURES.items():
        for suffix in _SUFFIXES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = types, None
    return library


def _available() -> bool:
    return _library() is not None


# torch.compile must not trace a build. This is torch.compiler.assume_constant_result, which imports all of dynamo: one
# second more for every `import rwkv_clip`.
_available._dynamo_marked_constant = True


def supports(x: Tensor) -> bool:
    """Whether the native kernels take a tensor of this dtype and device on this machine."""
    return x.device.type == "cpu" and x.dtype in _SUFFIXES and _available()


def _call(name: str, x: Tensor, *arguments: object) -> None:
    """Run a kernel of x's dtype. Tensors become pointers: they are contiguous, and the caller holds them."""
    threads = min(torch.get_num_threads(), max(1, x.numel() // _WORTH_A_THREAD))
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(_library(), f"{name}_{_SUFFIXES[x.dtype]}")(*values, threads)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (_POINTER * len(tensors))(*(x.data_ptr() for x in tensors))


def _weights(*tensors: Tensor) -> tuple[list[Tensor], bool]:
    """Small vectors as the kernels read them, and whether they are bfloat16 (all of them)."""
    narrow = all(x.dtype == torch.bfloat16 for x in tensors)
    return [(x if narrow else x.float()).contiguous() for x in tensors], narrow


def _shape(x: Tensor, count: int, heads: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Integer arguments of the mixing kernels."""
    b, t, c = x.shape
    return count, b, t, grid[-1], math.prod(grid), c, heads, 2 if len(grid) == 1 else 4


def mix(x: Tensor, coefficients: Tensor, shares: Tensor | None, heads: int, grid: Sequence[int]) -> list[Tensor]:
    """`pointwise.mix_tokens`."""
    x, ([held], narrow) = x.contiguous(), _weights(coefficients)
    shares = shares if shares is None else shares.to(x.dtype).contiguous()
    outs = [torch.empty_like(x) for _ in range(coefficients.shape[0])]
    _call("mix", x, x, held, shares, _pointers(outs), *_shape(x, len(outs), heads, grid), narrow)
    return outs


def mix_backward(
    grads: Sequence[Tensor], x: Tensor, coefficients: Tensor, shares: Tensor | None, heads: int, grid: Sequence[int]
) -> list[Tensor]:
    """Gradients of `mix` in x, coefficients and, if there are any, shares."""
    x, ([held], narrow) = x.contiguous(), _weights(coefficients)
    grads = [grad.to(x.dtype).contiguous() for grad in grads]
    same = shares if shares is None else shares.to(x.dtype).contiguous()
    scratch = torch.empty(2, *x.shape, dtype=torch.float32)
    gx, gcoefficients = torch.empty_like(x), torch.empty(coefficients.shape, dtype=torch.float32)
    gshares = same if same is None else torch.empty_like(same)
    shape = _shape(x, len(grads), heads, grid)
    _call("mix_backward", x, _pointers(grads), x, held, same, gx, gcoefficients, gshares, scratch, *shape, narrow)
    out = [gx, gcoefficients.to(coefficients.dtype)]
    return out if gshares is None else [*out, gshares.to(shares.dtype)]


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """`pointwise.norm_gate`."""
    y, gate, (held, narrow) = y.contiguous(), gate.to(y.dtype).contiguous(), _weights(weight, bias)
    out = torch.empty_like(y)
    _call("norm_gate", y, y, gate, *held, out, *_rows(y, heads), eps, narrow)
    return out


def norm_gate_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> list[Tensor]:
    """Gradients of `norm_gate` in y, gate, weight and bias."""
    y, same, (held, narrow) = y.contiguous(), gate.to(y.dtype).contiguous(), _weights(weight, bias)
    grad = grad.to(y.dtype).contiguous()
    gy, ggate = torch.empty_like(y), torch.empty_like(same)
    gweight, gbias = (torch.empty(x.shape, dtype=torch.float32) for x in held)
    outs = (gy, ggate, gweight, gbias)
    _call("norm_gate_backward", y, grad, y, same, *held, *outs, *_rows(y, heads), eps, narrow)
    return [gy, ggate.to(gate.dtype), gweight.to(weight.dtype), gbias.to(bias.dtype)]


def _rows(y: Tensor, heads: int) -> tuple[int, int, int]:
    """Integer arguments of the norm's kernels."""
    return y.shape[0] * y.shape[1], heads, y.shape[2] // heads


def relu_square(x: Tensor) -> Tensor:
    """`pointwise.relu_square`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("relu_square", x, x, out, x.numel())
    return out


def relu_square_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `relu_square`."""
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    out = torch.empty_like(x)
    _call("relu_square_backward", x, grad, x, out, x.numel())
    return out


def sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    """`pointwise.sigmoid_gate`."""
    gate, x = gate.to(x.dtype).contiguous(), x.contiguous()
    out = torch.empty_like(x)
    _call("sigmoid_gate", x, gate, x, out, x.numel())
    return out


def sigmoid_gate_backward(grad: Tensor, gate: Tensor, x: Tensor) -> list[Tensor]:
    """Gradients of `sigmoid_gate` in gate and x."""
    held, x, grad = gate.to(x.dtype).contiguous(), x.contiguous(), grad.to(x.dtype).contiguous()
    ggate, gx = torch.empty_like(held), torch.empty_like(x)
    _call("sigmoid_gate_backward", x, grad, held, x, ggate, gx, x.numel())
    return [ggate.to(gate.dtype), gx]
