"""How this process gets memory on a CPU."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _GROW = -1, 2**28  # never given back; bytes that are asked for at a time


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, for the next step's tensors; True if the C library can (glibc on Linux).

    glibc maps every large block anew and gives it back when it is freed; the kernel then has to fault in and zero each
    page of each activation in each step: a quarter of a training step on a CPU, and far more under memory pressure.
    The price: the process keeps its peak. Memory on a GPU is not concerned.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TOP_PAD, _GROW), mallopt(_TRIM_THRESHOLD, _NEVER)])
