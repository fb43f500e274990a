"""When an operator runs as the plain PyTorch formula instead: PyTorch wants more of the call than its value.

A native operator is one opaque call with one derivative, that of backward, and its kernel reads memory by pointers.
`torch.jit.trace` (and its users: the older ONNX exporter, counters of operations) would record what a pointer leads to
as a constant, forward-mode differentiation would take the result for a constant, and transforms of `torch.func` pass
tensors without memory. The formula is right in all of these cases, only slower.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

FORWARD_MODE = (
    "forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual numbers) inside torch.compile would take this "
    "operator for a constant; differentiate outside torch.compile, or backward (torch.func.grad, jacrev)"
)


def is_watched() -> bool:
    """Whether `torch.jit.trace`, forward-mode differentiation or a transform of `torch.func` is at work; not
    torch.compile and torch.export, which know the operators."""
    return not torch.compiler.is_compiling() and (
        torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def refuse_forward_mode() -> None:
    """For the inside of an operator, which forward-mode differentiation reaches through torch.compile alone.
    RuntimeError."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(FORWARD_MODE)
