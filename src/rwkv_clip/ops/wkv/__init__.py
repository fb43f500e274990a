"""Bidirectional WKV6: the recurrence that specifies it, two forms in PyTorch, native ones, and the choice of one."""

from .dispatch import available_backends, wkv6

__all__ = ["available_backends", "wkv6"]
