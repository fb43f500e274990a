"""Operators: the bidirectional WKV6, token shifts, and the pointwise parts of a block."""

from .pointwise import mix_tokens, norm_gate, relu_square, sigmoid_gate
from .shift import shift_tokens
from .wkv6 import available_backends, wkv6

__all__ = [
    "available_backends",
    "mix_tokens",
    "norm_gate",
    "relu_square",
    "shift_tokens",
    "sigmoid_gate",
    "wkv6",
]
