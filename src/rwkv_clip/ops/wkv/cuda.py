"""WKV6 on CUDA: tensor-core kernels (csrc/cuda/), compiled for the head size and the GPU at their first use.

r, k, v in bfloat16 or float16 are multiplied as bfloat16 with float32 sums (relative error about 3e-3, the rounding of
the result itself); in float32 every product is made of bfloat16 parts to float32's precision. Factors of the decay are
float32 throughout. Results do not depend on timing: no atomics, sums in a fixed order.

A sequence of up to 208 tokens (128 for N > 80) is one thread block per sample and head; a longer one is cut into chunks
of 64 that meet in states, so that time and memory are linear in T. tests/emulator runs the same source on a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..build import CSRC, architecture_flags, build_library, find_nvcc, load_library
from . import chunked

HEAD_SIZES = tuple(range(16, 129, 16))
OLDEST = (8, 0)  # the first with bfloat16 products and asynchronous copies
SOURCE = CSRC / "cuda" / "wkv6.cu"
HEADERS = sorted((CSRC / "cuda").glob("*.cuh"))
KINDS = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "Fp32"}


def supports(r: Tensor) -> bool:
    """Whether the kernels take tensors like r (B, T, H, N): an NVIDIA GPU from Ampere on, N and dtype as above."""
    return (
        r.device.type == "cuda"
        and torch.version.hip is None
        and r.dtype in KINDS
        and r.shape[-1] in HEAD_SIZES
        and torch.cuda.get_device_capability(r.device) >= OLDEST
    )


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """r, k, v, w (B, T, H, N), w the raw decay; u (H, N) -> y (B, T, H, N) in v's dtype. BuildError without nvcc."""
    with torch.cuda.device(r.device):
        kernels = _kernels_for(r)
        return (kernels if kernels.fit(r) else chunked).forward(r, k, v, w, u)


def backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w (raw decay) and u, each in the dtype of its input."""
    with torch.cuda.device(r.device):
        kernels = _kernels_for(r)
        return (kernels if kernels.fit(r) else chunked).backward(gy, r, k, v, w, u)


def compiler_flags(head_size: int, kind: str, capabilities: Sequence[tuple[int, int]], nvcc: Path) -> list[str]:
    """nvcc's flags for the kernels of one head size and kind of numbers (a value of KINDS) on these GPUs."""
    return ["-std=c++17", "-O3", f"-DHEAD_SIZE={head_size}", f"-DKIND={kind}", *architecture_flags(capabilities, nvcc)]


@lru_cache
def _library(head_size: int, kind: str, capability: tuple[int, int]) -> ctypes.CDLL:
    return load_library(
        build_library(
            f"wkv6_cuda_n{head_size}_{kind.lower()}",
            [SOURCE],
            flags=compiler_flags(head_size, kind, [capability], find_nvcc()),
            compiler="nvcc",
            depends=HEADERS,
        )
    )


def _kernels_for(r: Tensor) -> Kernels:
    library = _library(r.shape[-1], KINDS[r.dtype], torch.cuda.get_device_capability(r.device))
    shared_limit = torch.cuda.get_device_properties(r.device).shared_memory_per_block_optin
    return Kernels(library, shared_limit, torch.cuda.current_stream(r.device).cuda_stream)


class Kernels:
    """Calls into a library made from csrc/cuda/wkv6.cu. Makes inputs contiguous, allocates results and scratch."""

    def __init__(self, library: ctypes.CDLL, shared_limit: int, stream: int | None):
        for name in ("wkv6_forward", "wkv6_states", "wkv6_backward"):
            getattr(library, name).restype = ctypes.c_char_p
        self.library, self.shared_limit, self.stream = library, shared_limit, stream

    def fit(self, r: Tensor) -> bool:
        """Whether the GPU's shared memory suffices; some have too little for large heads in float32."""
        return all(self._plan(r, gradient) is not None for gradient in (False, True))

    def forward(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        r, k, v, w, u = _ready(r), _ready(k), _ready(v), _ready(w.float()), _ready(u.float())
        row_tiles, chunks = self._plan(r, gradient=False)
        states = self._states(r, k, v, w, row_tiles, chunks)
        y = torch.empty_like(v)
        self._call("wkv6_forward", r, row_tiles, chunks, r, k, v, w, u, states, y)
        return y

    def backward(
        self, gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtypes = w.dtype, u.dtype
        gy, r, k, v, w, u = (
            _ready(gy.to(r.dtype)),
            _ready(r),
            _ready(k),
            _ready(v),
            _ready(w.float()),
            _ready(u.float()),
        )
        row_tiles, chunks = self._plan(r, gradient=True)
        states = self._states(r, k, v, w, row_tiles, chunks)
        gradient_states = self._states(r, r, gy, w, row_tiles, chunks)
        gr, gk, gv, gw = (torch.empty_like(x) for x in (r, k, v, w))
        gu = w.new_empty(r.shape[0], r.shape[2], chunks, r.shape[3])
        inputs = (gy, r, k, v, w, u, states, gradient_states)
        self._call("wkv6_backward", r, row_tiles, chunks, *inputs, gr, gk, gv, gw, gu)
        return gr, gk, gv, gw.to(dtypes[0]), gu.sum((0, 2)).to(dtypes[1])

    def _plan(self, r: Tensor, gradient: bool) -> tuple[int, int] | None:
        """(row tiles of 16 tokens per block, chunks of the sequence); None where not even one row tile fits."""
        row_tiles, chunks = ctypes.c_int(), ctypes.c_int()
        numbers = (r.shape[1], gradient, self.shared_limit)
        if self.library.wkv6_plan(*numbers, ctypes.byref(row_tiles), ctypes.byref(chunks)):
            return row_tiles.value, chunks.value
        return None

    def _states(self, like: Tensor, y: Tensor, z: Tensor, w: Tensor, row_tiles: int, chunks: int) -> Tensor | None:
        """States of the pair (y, z) at the chunks' borders; None for an uncut sequence."""
        if chunks == 1:
            return None
        b, _, h, n = like.shape
        summaries = w.new_empty(b * h, chunks, 2, n, n)
        wholes = w.new_empty(b * h, chunks, n)
        states = torch.empty_like(summaries, dtype=torch.float32 if like.dtype == torch.float32 else torch.bfloat16)
        self._call("wkv6_states", like, row_tiles, chunks, y, z, w, summaries, wholes, states)
        return states

    def _call(self, name: str, like: Tensor, row_tiles: int, chunks: int, *tensors: Tensor | None) -> None:
        b, t, h, _ = like.shape
        pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
        numbers = (b, t, h, row_tiles, chunks)
        error = getattr(self.library, name)(*numbers, *pointers, ctypes.c_void_p(self.stream))
        if error:
            raise RuntimeError(f"{name} failed on {tuple(like.shape)} {like.dtype}: {error.decode()}")


def _ready(x: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes, as the kernels' copies need."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
