"""A linear map that on a CPU can also hold its weight in the order in which oneDNN reads it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear without a bias, with `pack`."""

    packed: Tensor | None = None  # no parameter and no buffer: state dict, copies and pickles do not know it

    def __init__(self, columns: int, rows: int):
        super().__init__(columns, rows, bias=False)

    def pack(self) -> None:
        """Keep a bfloat16 weight on a CPU a second time, in oneDNN's blocked order, for calls without gradients.

        Otherwise oneDNN rearranges the weight at every call: a twentieth of a product's time at batch 8, a fifth at
        batch 1. The result is the same to the last bit. Moving the module or loading a state dict drops the copy; who
        changes the weight in another way packs again.
        """
        self.packed, weight = None, self.weight.detach()
        suits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        if suits and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.bfloat16:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "packed"}
