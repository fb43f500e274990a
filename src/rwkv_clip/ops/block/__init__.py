"""The parts of a block around WKV6 and the matrix products: token shifts, mixing, norm and gates."""

from .pointwise import mix_tokens, norm_gate, relu_square, sigmoid_gate
from .shift import shift_tokens

__all__ = ["mix_tokens", "norm_gate", "relu_square", "shift_tokens", "sigmoid_gate"]
