"""The switch between the library's own operators and plain PyTorch, for the whole process.

Tools that record or rewrite a model (torch.jit.trace, the ONNX exporters, torch.ao.quantization, torch.func, counters
of operations) know PyTorch's operators only.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

BACKENDS = ("auto", "torch")
_chosen = "auto"
_FUSED = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp", "math_sdp")  # PyTorch's own forms of attention
_allowed: list[bool] | None = None  # which of them were, while the choice is "torch"
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the former since torch 2.7


class set_backend:  # called like a function, with or without `with`
    """Compute all operators by `name` from here on, or inside a `with` block; returns after it to what was before.

    "auto": native kernels and registered operators wherever they run (the default). "torch": formulas of PyTorch's own
    operators everywhere, WKV6 by `ops/wkv/plain.py`, attention by PyTorch's unfused form: the same values to rounding,
    slower, differentiable in every way, and nothing in a graph that another program does not know. All threads of the
    process are meant. ValueError for another name.

    What needs "torch": second derivatives (torch.func.hessian, gradients of gradients), which are refused in words
    without it, and forward mode (torch.func.jvp, jacfwd) of towers with attention, refused as well. What is right
    without it: forward mode of RWKV towers, torch.func's transforms and torch.jit.trace (by the recurrence, slowly,
    with a warning), both exporters of ONNX (which take the plain forms by themselves), quantize_dynamic of
    torch.ao.quantization (linear maps are replaced, operators stay), torch.export and torch.compile (operators stay in
    the graph).
    """

    def __init__(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
        self._before = _chosen
        _choose(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choose(self._before)


def _choose(name: str) -> None:
    global _chosen, _allowed
    _chosen = name
    switches: Any = torch.backends.cuda  # they hold on a CPU as well
    if name == "torch" and _allowed is None:
        _allowed = [getattr(switches, f"{form}_enabled")() for form in _FUSED]
        for form in _FUSED:
            getattr(switches, f"enable_{form}")(form == "math_sdp")
    elif name == "auto" and _allowed is not None:
        for form, allowed in zip(_FUSED, _allowed):
            getattr(switches, f"enable_{form}")(allowed)
        _allowed = None


def get_backend() -> str:
    """What `set_backend` chose last."""
    return _chosen


def is_plain() -> bool:
    """Whether operators are to be formulas of PyTorch's own operators: by choice, or because either ONNX exporter is at
    work, which has no others."""
    if _chosen == "torch":
        return True
    if torch.compiler.is_compiling() and not _is_exporting():
        return False  # the rest would break a compiled graph
    return (_is_exporting() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()
