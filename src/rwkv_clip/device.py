"""The device of a process: which one, its autocast dtype, deterministic arithmetic, and memory allocation on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# What the towers compute in, by open_clip's names; with bf16 and fp16 the weights have that type, too, else float32.
AUTOCAST = {
    "fp32": None,
    "amp_bf16": torch.bfloat16,
    "amp": torch.float16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _GROW = -1, 2**28  # never returned; bytes that are requested at once


def choose_device(wanted: str | None = None) -> torch.device:
    """The device asked for, or the best present (cuda, mps, cpu). ValueError where it cannot be used."""
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device: {wanted!r} cannot be used here ({reason}); leave it out for the best one") from None


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype of a precision by name, None for float32; `auto` is bfloat16 where the device computes in it."""
    if precision != "auto":
        return AUTOCAST[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # Without AVX512-BF16 a CPU emulates bfloat16, slower than float32. (Private, but torch has no public function for
    # this.)
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and native() else None


def fix_arithmetic(device: torch.device) -> None:
    """From now on the same operations give the same bits, in every process and in worlds of any size.

    On a CPU sums depend on the number of threads, and torchrun gives every rank one thread but a single process all: so
    one is used, unless OMP_NUM_THREADS is set. CUDA gets its deterministic algorithms.
    """
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # A guard against reading uninitialised memory; it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for the next step's tensors; True if the C library can (glibc on Linux).

    glibc maps every large block anew and returns it when it is freed; the kernel then has to fault in and zero each
    page of each activation in each step: a quarter of a training step on a CPU, and far more under memory pressure. The
    price: the process stays at its peak. GPU memory is not affected.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TOP_PAD, _GROW), mallopt(_TRIM_THRESHOLD, _NEVER)])
