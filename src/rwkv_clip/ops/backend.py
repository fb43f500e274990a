"""The switch between the library's own operators and plain PyTorch, for the whole process.

Tools that record or rewrite a model (torch.jit.trace, the ONNX exporters, torch.ao.quantization, torch.func, counters
of operations) know PyTorch's operators only.
"""

from __future__ import annotations

from types import TracebackType

import torch

BACKENDS = ("auto", "torch")
_chosen = "auto"
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the former since torch 2.7


class set_backend:  # called like a function, with or without `with`
    """Compute all operators by `name` from here on, or inside a `with` block; returns after it to what was before.

    "auto": native kernels and registered operators wherever they run (the default). "torch": formulas of PyTorch's own
    operators everywhere, WKV6 by `ops/wkv/plain.py`: the same values to rounding, slower, differentiable in every way,
    and nothing in a graph that another program does not know. All threads of the process are meant. ValueError for
    another name.
    """

    def __init__(self, name: str):
        global _chosen
        if name not in BACKENDS:
            raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
        self._before, _chosen = _chosen, name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._before


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
