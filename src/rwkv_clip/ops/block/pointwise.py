"""The pointwise parts of a block: token mixing, group norm with gate, squared ReLU, sigmoid gate.

Each is written once as a formula in torch, in float32 inside whatever the dtype outside. The formula is the
specification, and on a GPU it is what torch.compile fuses. On a CPU, where every eager operation is a pass over memory,
float32 and bfloat16 go through custom operators with one native kernel forward and one backward (`native.py`),
but for calls that PyTorch watches (`ops/watched.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..watched import is_watched, refuse_forward_mode
from . import native
from .shift import check_grid, describe, shift_tokens


def mix_tokens(x: Tensor, coefficients: Tensor, shares: Tensor | None, heads: int, grid: Sequence[int]) -> list[Tensor]:
    """J mixtures of every token with its shifted self: x + (shift(x) - x) * (coefficients[j] + shares[j]).

    x: (B, T, C). coefficients: (J, C). shares: (J, B, T, C) in x's dtype, or None for none. heads, grid: as for
    `shift_tokens`. Returns J tensors like x. ValueError for what does not fit, here and in the other operators: the
    native kernels take pointers and would read and write beyond the tensors.
    """
    check_grid(x, heads, grid)
    _check("x", x, x)
    _check("coefficients", coefficients, x)
    if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != x.shape[2]:
        raise ValueError(f"coefficients: {describe(coefficients)}, expected (J, {x.shape[2]}) with J at least 1")
    if shares is not None:
        _check("shares", shares, x, coefficients.shape[:1] + x.shape)
    if not _takes_native(x):
        return _mix_formula(x, coefficients, shares, heads, grid)
    return (native.mix if _plain(x) else _mix)(x, coefficients, shares, heads, grid)


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """Group norm over every head of y, times silu(gate). y, gate: (B, T, C), one dtype; weight, bias: (C,)."""
    _check("y", y, y)
    if y.dim() != 3 or heads < 1 or y.shape[2] % heads:
        raise ValueError(f"y: {describe(y)}, expected (B, T, C) with C a multiple of {heads} heads")
    _check("gate", gate, y, y.shape)
    _check("weight", weight, y, y.shape[2:])
    _check("bias", bias, y, y.shape[2:])
    if not _takes_native(y):
        return _norm_gate_formula(y, gate, weight, bias, heads, eps)
    return (native.norm_gate if _plain(y) else _norm_gate)(y, gate, weight, bias, heads, eps)


def relu_square(x: Tensor) -> Tensor:
    """relu(x) ** 2."""
    _check("x", x, x)
    if not _takes_native(x):
        return _relu_square_formula(x)
    return (native.relu_square if _plain(x) else _relu_square)(x)


def sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) * x, both of one shape and dtype."""
    _check("x", x, x)
    _check("gate", gate, x, x.shape)
    if not _takes_native(x):
        return _sigmoid_gate_formula(gate, x)
    return (native.sigmoid_gate if _plain(x) else _sigmoid_gate)(gate, x)


def _check(name: str, value: Tensor, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """ValueError unless `value` is a floating-point tensor of this shape on x's device."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != x.device:
        raise ValueError(f"{name}: {describe(value)}, expected a floating-point tensor on x's device")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: {describe(value)}, expected the shape {tuple(shape)}")


def _takes_native(x: Tensor) -> bool:
    """Whether the native kernels can do what is asked of this call."""
    return native.supports(x) and not is_watched()


def _plain(x: Tensor) -> bool:
    """Whether nothing but the value is wanted: then the kernel is called as it is, for a registered operator's way
    through the dispatcher costs as much as the kernel at batch 1."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is Tensor


# ---- formulas ---------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mix_formula(
    x: Tensor, coefficients: Tensor, shares: Tensor | None, heads: int, grid: Sequence[int]
) -> list[Tensor]:
    own = _wide(x)
    step = _wide(shift_tokens(x, heads, tuple(grid))) - own
    parts = _wide(coefficients).unbind(0)
    if shares is not None:
        parts = [part + _wide(share) for part, share in zip(parts, shares.unbind(0))]
    return [(own + step * part).to(x.dtype) for part in parts]


def _norm_gate_formula(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    wide = _wide(y)
    normed = F.group_norm(wide.flatten(0, 1), heads, weight.to(wide.dtype), bias.to(wide.dtype), eps).view(y.shape)
    return (normed * F.silu(_wide(gate))).to(y.dtype)


def _relu_square_formula(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _sigmoid_gate_formula(gate: Tensor, x: Tensor) -> Tensor:
    return (torch.sigmoid(_wide(gate)) * _wide(x)).to(x.dtype)


# ---- operators on a CPU -----------------------------------------------------------------------------------------


@torch.library.custom_op("rwkv_clip::mix_tokens", mutates_args=(), device_types="cpu")
def _mix(x: Tensor, coefficients: Tensor, shares: Tensor | None, heads: int, grid: Sequence[int]) -> list[Tensor]:
    refuse_forward_mode()
    return native.mix(x, coefficients, shares, heads, grid)


@_mix.register_fake
def _(x, coefficients, shares, heads, grid):
    refuse_forward_mode()
    return [x.new_empty(x.shape) for _ in range(coefficients.shape[0])]


@torch.library.custom_op("rwkv_clip::mix_tokens_backward", mutates_args=(), device_types="cpu")
def _mix_backward(
    grads: Sequence[Tensor], x: Tensor, coefficients: Tensor, shares: Tensor | None, heads: int, grid: Sequence[int]
) -> list[Tensor]:
    return native.mix_backward(grads, x, coefficients, shares, heads, grid)


@_mix_backward.register_fake
def _(grads, x, coefficients, shares, heads, grid):
    return [z.new_empty(z.shape) for z in (x, coefficients, shares) if z is not None]


def _save_mix(ctx, inputs, output):
    x, coefficients, shares, ctx.heads, ctx.grid = inputs
    ctx.save_for_backward(x, coefficients, shares)


def _differentiate_mix(ctx, grads):
    x, coefficients, shares = ctx.saved_tensors
    grads = _mix_backward(grads, x, coefficients, shares, ctx.heads, ctx.grid)
    return grads[0], grads[1], grads[2] if shares is not None else None, None, None


_mix.register_autograd(_differentiate_mix, setup_context=_save_mix)


@torch.library.custom_op("rwkv_clip::norm_gate", mutates_args=(), device_types="cpu")
def _norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    refuse_forward_mode()
    return native.norm_gate(y, gate, weight, bias, heads, eps)


@_norm_gate.register_fake
def _(y, gate, weight, bias, heads, eps):
    refuse_forward_mode()
    return y.new_empty(y.shape)


@torch.library.custom_op("rwkv_clip::norm_gate_backward", mutates_args=(), device_types="cpu")
def _norm_gate_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> list[Tensor]:
    return native.norm_gate_backward(grad, y, gate, weight, bias, heads, eps)


@_norm_gate_backward.register_fake
def _(grad, y, gate, weight, bias, heads, eps):
    return [z.new_empty(z.shape) for z in (y, gate, weight, bias)]


def _save_norm_gate(ctx, inputs, output):
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_norm_gate(ctx, grad):
    return *_norm_gate_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.eps), None, None


_norm_gate.register_autograd(_differentiate_norm_gate, setup_context=_save_norm_gate)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@torch.library.custom_op("rwkv_clip::relu_square", mutates_args=(), device_types="cpu")
def _relu_square(x: Tensor) -> Tensor:
    refuse_forward_mode()
    return native.relu_square(x)


@_relu_square.register_fake
def _(x):
    refuse_forward_mode()
    return x.new_empty(x.shape)


@torch.library.custom_op("rwkv_clip::relu_square_backward", mutates_args=(), device_types="cpu")
def _relu_square_backward(grad: Tensor, x: Tensor) -> Tensor:
    return native.relu_square_backward(grad, x)


@_relu_square_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


_relu_square.register_autograd(lambda ctx, grad: _relu_square_backward(grad, *ctx.saved_tensors), setup_context=_save)


@torch.library.custom_op("rwkv_clip::sigmoid_gate", mutates_args=(), device_types="cpu")
def _sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    refuse_forward_mode()
    return native.sigmoid_gate(gate, x)


@_sigmoid_gate.register_fake
def _(gate, x):
    refuse_forward_mode()
    return x.new_empty(x.shape)


@torch.library.custom_op("rwkv_clip::sigmoid_gate_backward", mutates_args=(), device_types="cpu")
def _sigmoid_gate_backward(grad: Tensor, gate: Tensor, x: Tensor) -> list[Tensor]:
    return native.sigmoid_gate_backward(grad, gate, x)


@_sigmoid_gate_backward.register_fake
def _(grad, gate, x):
    return [gate.new_empty(gate.shape), x.new_empty(x.shape)]


_sigmoid_gate.register_autograd(
    lambda ctx, grad: tuple(_sigmoid_gate_backward(grad, *ctx.saved_tensors)), setup_context=_save
)
