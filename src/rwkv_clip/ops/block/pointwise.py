"""The pointwise parts of a block: token mixing, group norm with gate, squared ReLU, sigmoid gate.

Each is written once as a formula in torch, in float32 inside whatever the dtype outside. The formula is the
specification, and on a GPU it is what torch.compile fuses. On a CPU, where every eager operation is a pass over memory,
float32 and bfloat16 go through custom operators with one native kernel forward and one backward (`native.py`), except
for calls that PyTorch watches (`ops/watched.py`) and where PyTorch's own operators were asked for (`ops/backend.py`).

Why kernels of our own, although inductor makes a compiled block as fast (`tests/bench/block.py --compile`; figures in
shell/README.md): compiling takes seconds to minutes per shape and process, so nothing is compiled unless asked for, and
eager formulas are slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import is_plain
from ..watched import is_for_value, is_watched, refuse_forward_mode, register_once
from . import native
from .shift import check_grid, describe, shift_tokens


def mix_tokens(
    x: Tensor, coefficients: Tensor, offsets: Tensor | None, heads: int, grid: Sequence[int]
) -> list[Tensor]:
    """J mixtures of every token with its shifted self: x + (shift(x) - x) * (coefficients[j] + offsets[j]).

    x: (B, T, C). coefficients: (J, C). offsets: (J, B, T, C) in x's dtype, or None for none. heads, grid: as for
    `shift_tokens`. Returns J tensors like x. ValueError for what does not fit, here and in the other operators: the
    native kernels take pointers and would read and write beyond the tensors.
    """
    check_grid(x, heads, grid)
    _check("x", x, x)
    _check("coefficients", coefficients, x)
    if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != x.shape[2]:
        raise ValueError(f"coefficients: {describe(coefficients)}, expected (J, {x.shape[2]}) with J at least 1")
    if offsets is not None:
        _check("offsets", offsets, x, coefficients.shape[:1] + x.shape)
    return _run(x, _mix_formula, native.mix, _mix, x, coefficients, offsets, heads, grid)


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """Group norm over every head of y, times silu(gate). y, gate: (B, T, C), one dtype; weight, bias: (C,)."""
    _check("y", y, y)
    if y.dim() != 3 or heads < 1 or y.shape[2] % heads:
        raise ValueError(f"y: {describe(y)}, expected (B, T, C) with C a multiple of {heads} heads")
    _check("gate", gate, y, y.shape)
    _check("weight", weight, y, y.shape[2:])
    _check("bias", bias, y, y.shape[2:])
    return _run(y, _norm_gate_formula, native.norm_gate, _norm_gate, y, gate, weight, bias, heads, eps)


def relu_square(x: Tensor) -> Tensor:
    """relu(x) ** 2."""
    _check("x", x, x)
    return _run(x, _relu_square_formula, native.relu_square, _relu_square, x)


def sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) * x, both of one shape and dtype."""
    _check("x", x, x)
    _check("gate", gate, x, x.shape)
    return _run(x, _sigmoid_gate_formula, native.sigmoid_gate, _sigmoid_gate, gate, x)


def _check(name: str, value: Tensor, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """ValueError unless `value` is a floating-point tensor of this shape on x's device."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != x.device:
        raise ValueError(f"{name}: {describe(value)}, expected a floating-point tensor on x's device")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: {describe(value)}, expected the shape {tuple(shape)}")


def _run(x: Tensor, formula: Callable, kernel: Callable, operator: Callable, *arguments: Any) -> Any:
    """The operator where the native kernels take x and nobody watches, or its kernel as it is; else the formula."""
    if is_for_value(x):
        return (kernel if native.supports(x) else formula)(*arguments)
    return (formula if is_plain() or not native.supports(x) or is_watched() else operator)(*arguments)


# ---- formulas ---------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mix_formula(
    x: Tensor, coefficients: Tensor, offsets: Tensor | None, heads: int, grid: Sequence[int]
) -> list[Tensor]:
    own = _wide(x)
    step = _wide(shift_tokens(x, heads, tuple(grid))) - own
    parts = _wide(coefficients).unbind(0)
    if offsets is not None:
        parts = [part + _wide(offset) for part, offset in zip(parts, offsets.unbind(0))]
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


def _register(name: str, inputs: str, outputs: str, kernel: Callable, backward: Callable, fake: Callable) -> Callable:
    """Make kernels known to torch as `rwkv_clip::name` and, for its derivative, `rwkv_clip::name_backward`.

    inputs, outputs: the operator's schema, tensors before other inputs. backward(grad, *inputs) returns the gradients
    of all tensors that are not None. fake(*inputs) returns empty outputs.
    """

    def run(*arguments):
        refuse_forward_mode()
        return kernel(*arguments)

    def describe_outputs(*arguments):
        refuse_forward_mode()
        return fake(*arguments)

    def save(ctx, inputs, output):
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.rest = inputs[len(tensors) :]

    def differentiate(ctx, grad):
        tensors = ctx.saved_tensors  # once: activation checkpointing allows no second reading
        grads = iter(derivative(grad, *tensors, *ctx.rest))
        return *(None if x is None else next(grads) for x in tensors), *(None for _ in ctx.rest)

    def define(name: str, schema: str, function: Callable) -> Callable:
        return torch.library.custom_op(
            f"rwkv_clip::{name}", function, mutates_args=(), device_types="cpu", schema=schema
        )

    operator = define(name, f"({inputs}) -> {outputs}", run)
    operator.register_fake(describe_outputs)
    derivative = define(f"{name}_backward", f"({outputs} grad, {inputs}) -> Tensor[]", backward)
    derivative.register_fake(lambda _, *rest: [x.new_empty(x.shape) for x in rest if isinstance(x, Tensor)])
    operator.register_autograd(differentiate, setup_context=save)
    register_once(derivative)
    return operator


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_mix = _register(
    "mix_tokens",
    "Tensor x, Tensor coefficients, Tensor? offsets, int heads, int[] grid",
    "Tensor[]",
    native.mix,
    native.mix_backward,
    lambda x, coefficients, *_: [x.new_empty(x.shape) for _ in range(coefficients.shape[0])],
)
_norm_gate = _register(
    "norm_gate",
    "Tensor y, Tensor gate, Tensor weight, Tensor bias, int heads, float eps",
    "Tensor",
    native.norm_gate,
    native.norm_gate_backward,
    _like_first,
)
_relu_square = _register(
    "relu_square", "Tensor x", "Tensor", native.relu_square, native.relu_square_backward, _like_first
)
_sigmoid_gate = _register(
    "sigmoid_gate",
    "Tensor gate, Tensor x",
    "Tensor",
    native.sigmoid_gate,
    native.sigmoid_gate_backward,
    lambda gate, x: _like_first(x),
)
