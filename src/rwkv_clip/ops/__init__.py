"""Operators: the bidirectional WKV6 and the token shifts."""

from .shift import shift_tokens
from .wkv6 import available_backends, wkv6

__all__ = ["available_backends", "shift_tokens", "wkv6"]
