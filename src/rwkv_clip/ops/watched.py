"""When an operator runs as the plain PyTorch formula instead: PyTorch wants more of the call than its value.

A native operator is one opaque call with one derivative, that of backward, and its kernel reads memory by pointers.
`torch.jit.trace` (and its users: the older ONNX exporter, counters of operations) would record what a pointer leads to
as a constant, forward-mode differentiation would take the result for a constant, and transforms of `torch.func` pass
tensors without memory. The formula is right in all of these cases, only slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import get_backend

FORWARD_MODE = (
    "forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual numbers) inside torch.compile would take this "
    "operator for a constant; differentiate outside torch.compile, or backward (torch.func.grad, jacrev)"
)

ATTENTION = (
    "forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual numbers) is not possible through PyTorch's "
    "fused attention; call it under rwkv_clip.ops.set_backend('torch')"
)
ONCE = (
    "this operator can be differentiated once; for second derivatives compute under rwkv_clip.ops.set_backend('torch')"
)


def is_watched() -> bool:
    """Whether `torch.jit.trace`, forward-mode differentiation or a transform of `torch.func` is at work; not
    torch.compile and torch.export, which know the operators."""
    return not torch.compiler.is_compiling() and (
        torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_for_value(x: Tensor) -> bool:
    """Whether nothing but the value of a call on x is wanted: no gradients, no torch.compile, nobody who watches, no
    other backend, no tensor of another type and no mode that sees each operator, such as make_fx, which would record
    what a kernel fills as what it was before. Then a kernel can be called as it is: a registered operator's way through
    the dispatcher takes longer than the kernel at batch 1, and its first call imports torch._dynamo, which takes a
    second."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and get_backend() == "auto"
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def refuse_forward_mode() -> None:
    """For the inside of an operator, which forward-mode differentiation reaches through torch.compile alone.
    RuntimeError."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(FORWARD_MODE)


def refuse_fused_attention() -> None:
    """For towers with attention in forward-mode differentiation, which needs the plain form. RuntimeError."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and get_backend() != "torch":
        raise RuntimeError(ATTENTION)


def register_once(derivative: Any) -> None:
    """Give a registered operator, the derivative of another, a derivative that is refused in words. RuntimeError when
    it is asked for."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(ONCE)

    derivative.register_autograd(refuse)
