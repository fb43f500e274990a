"""The CUDA kernels' own source, compiled for the host with cuda_emulator.h in the place of the GPU's instructions."""

from collections.abc import Callable
from pathlib import Path

from rwkv_clip.ops.build import build_library, load_library
from rwkv_clip.ops.wkv import cuda

HERE = Path(__file__).parent
H200_SHARED = 232_448  # bytes of shared memory that a block may have


def emulated_kernels(
    head_size: int, kind: str, shared_limit: int = H200_SHARED, change: Callable[[str], str] | None = None, folder=None
) -> cuda.Kernels:
    """Kernels that take CPU tensors. `change` edits the kernels' source (kept in `folder`): do tests notice?"""
    source, headers = cuda.SOURCE, cuda.HEADERS
    if change:
        for path in (source, *headers):
            (folder / path.name).write_text(change(path.read_text()))
        source, headers = folder / source.name, [folder / path.name for path in headers]
    flags = ["-x", "c++", "-std=c++17", "-O2", "-w", "-DWKV6_EMULATE", f"-I{HERE}"]
    library = build_library(
        f"wkv6_emulated_n{head_size}_{kind.lower()}",
        [source],
        flags=[*flags, f"-DHEAD_SIZE={head_size}", f"-DKIND={kind}"],
        compiler="c++",
        depends=[*headers, HERE / "cuda_emulator.h"],
        cache=folder,
    )
    return cuda.Kernels(load_library(library), shared_limit, None)
