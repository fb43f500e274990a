"""Linear layers for encoding on a CPU, with weights laid out once as the processor's matrix product reads them.

torch lays a weight out anew at every call, which for few tokens takes as long as the product itself, and multiplies
float32 by a library that leaves the wide vectors of AMD's processors unused. `tests/bench/encode.py` measures both
forms. Processors with AMX keep the plain form: on the one that was measured it was the faster one at batch 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.watched import is_for_value
from .rwkv_block import Mixing

_DTYPES = (torch.float32, torch.bfloat16)


def pack_weights(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model or tower by `PackedLinear`, in place, where this processor gains by it, and
    keep what blocks of RWKV make of their parameters; returns the model. Its features are the same to rounding; the
    layers' weights become no parameters any more."""
    for module in model.modules():
        if isinstance(module, Mixing):
            module.keep_static()
    if not _gains():
        return model
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention):
            continue  # its fast path reads the weights themselves
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and _fits(layer.weight):
                setattr(module, name, PackedLinear(layer))
    return model


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Numbers in each parameter of a model by its name, whether its weights are packed or not."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            state = module.state_dict(prefix=f"{name}." if name else "")
            sizes |= {key: value.numel() for key, value in state.items()}
    return sizes


class PackedLinear(nn.Module):
    """What an nn.Linear computes, for inference. Moved, cast, copied and saved like one; with gradients, in
    another dtype than the weight's, or by PyTorch's own operators (`set_backend`), the weight is laid out back for each
    call. RuntimeError where the call is recorded, as by torch.compile (not by torch.jit.trace, which reads weights)."""

    bias: Tensor | None
    _packed: Tensor | None
    _plain: Tensor | None

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach(), persistent=False)
        self._set(layer.weight.detach())
        self.training = layer.training

    @property
    def weight(self) -> Tensor:
        """(out, in). Whoever asks gets it plain from then on: some modules read it at every call, as the pools of
        ResNets do, and to lay it out back each time takes longer than packing saves."""
        self._plain, self._packed = self._dense(), None
        return self._plain

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., in) -> (.., out)."""
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        packed = self._packed
        if packed is None or not is_for_value(x) or x.dtype != packed.dtype or x.shape[-1:] != (self.in_features,):
            return F.linear(x, self._dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")

    def train(self, mode: bool = True) -> PackedLinear:
        """RuntimeError for training: the weight is no parameter, and would stay as it is without a word."""
        if mode:
            raise RuntimeError("weights packed for encoding are not trained; train a model of create_model")
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _dense(self) -> Tensor:
        """(out, in), a copy where it is packed."""
        packed, plain = self._packed, self._plain
        if packed is not None:
            if torch.compiler.is_compiling() or torch._C._is_tracing():
                raise RuntimeError("weights packed for encoding cannot be recorded; record a model of create_model")
            return packed.to_dense()
        assert plain is not None, "one of the two is set"
        return plain

    def _set(self, weight: Tensor) -> None:
        fits = _fits(weight) and _gains()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight) if fits else None
        self._plain = None if fits else weight

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedLinear:
        self._set(fn(self._dense()))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        raise RuntimeError(f"{prefix}weight: is packed for inference; load the weights into a model of create_model")

    def __getstate__(self) -> dict[str, Any]:  # packed tensors can be neither copied nor pickled
        return {**self.__dict__, "_packed": None, "_plain": self._dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set(self._dense())


def _gains() -> bool:
    """Whether this processor is of those on which the packed form was faster."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and vectors == "AVX512" and not torch.cpu._is_amx_tile_supported()


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _DTYPES and weight.numel() > 0
