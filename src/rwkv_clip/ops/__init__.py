"""Operators: the bidirectional WKV6 (`wkv/`), and token shifts and the pointwise parts of a block (`block/`)."""

from .backend import get_backend, set_backend
from .block import mix_tokens, norm_gate, relu_square, shift_tokens, sigmoid_gate
from .wkv import available_backends, wkv6

__all__ = [
    "available_backends",
    "get_backend",
    "mix_tokens",
    "norm_gate",
    "relu_square",
    "set_backend",
    "shift_tokens",
    "sigmoid_gate",
    "wkv6",
]
