"""The CUDA kernels, run thread by thread on a CPU, against float64 autograd of the recurrence; and compiled by nvcc.

What cannot be seen here: speed, and whether the GPU's instructions do what cuda_emulator.h says they do (tests/gpu).
"""

import re
import subprocess

import pytest
import torch
from emulated import emulated_kernels

from rwkv_clip.ops import build
from rwkv_clip.ops.wkv import cuda
from rwkv_clip.ops.wkv.reference import wkv6_reference

NAMES = ("y", "gr", "gk", "gv", "gw", "gu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOUNDS = {F32: 2e-6, BF16: 6e-3, F16: 6e-3}


def has(find):
    try:
        return bool(find())
    except build.BuildError:
        return False


pytestmark = pytest.mark.skipif(not has(build.find_compiler), reason="no C++ compiler")


def make_inputs(b, t, h, n, dtype, low=-6.0, high=-1.0):
    g = torch.Generator().manual_seed(t * n)
    r, k, v, gy = (torch.randn(b, t, h, n, generator=g).to(dtype) for _ in range(4))
    w = torch.rand(b, t, h, n, generator=g) * (high - low) + low
    return gy, r, k, v, w, torch.randn(h, n, generator=g)


def exact_results(gy, *inputs):
    leaves = [x.double().requires_grad_() for x in inputs]
    y = wkv6_reference(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.double(), allow_unused=True, materialize_grads=True)]


def all_results(kernels, gy, *inputs):
    return [kernels.forward(*inputs), *kernels.backward(gy, *inputs)]


def relative(ours, theirs):
    difference, size = (ours.double() - theirs).norm(), theirs.norm()
    return float(difference / size) if size > 1e-30 else float(difference)


def check(inputs, shared_limit=232_448, bound=None):
    dtype = inputs[1].dtype
    kernels = emulated_kernels(inputs[1].shape[-1], cuda.KINDS[dtype], shared_limit)
    ours, theirs = all_results(kernels, *inputs), exact_results(*inputs)
    for name, a, b in zip(NAMES, ours, theirs):
        assert relative(a, b) <= (bound or BOUNDS[dtype]), name
    assert (ours[4][:, 0] == 0).all() and (ours[4][:, -1] == 0).all()
    return kernels, ours, theirs


@pytest.mark.parametrize("t", [1, 2, 3, 15, 16, 17, 49, 50, 77, 196, 257])
def test_any_length_in_float32(t):
    check(make_inputs(1, t, 2, 16, F32))


@pytest.mark.parametrize(
    "b, t, h, n, dtype",
    [
        (2, 49, 1, 80, BF16),  # B/32 images
        (1, 77, 2, 64, BF16),  # texts
        (1, 196, 1, 80, BF16),  # B/16 images
        (1, 257, 1, 16, BF16),
        (1, 100, 1, 128, BF16),
        (1, 33, 2, 48, F32),
        (1, 49, 1, 80, F32),
        (2, 60, 1, 16, F16),
    ],
)
def test_the_towers_shapes(b, t, h, n, dtype):
    check(make_inputs(b, t, h, n, dtype))


@pytest.mark.parametrize("limit, plan", [(40_000, (2, 5)), (24_000, (1, 9))])
def test_chunks_of_any_size(limit, plan):
    """A GPU with little shared memory gets smaller chunks; states carry what lies beyond them."""
    inputs = make_inputs(1, 130, 1, 32, F32)
    kernels, _, _ = check(inputs, limit)
    assert kernels._plan(inputs[1], gradient=False) == plan


def test_too_little_shared_memory_is_known_before():
    """Then the same method in PyTorch runs on the GPU."""
    r = torch.zeros(1, 130, 1, 32)
    assert emulated_kernels(32, "Fp32", 24_000).fit(r) and not emulated_kernels(32, "Fp32", 10_000).fit(r)


@pytest.mark.parametrize("low, high", [(-80, -20), (0, 3), (-6, 4), (5, 88), (80, 1e4)])
@pytest.mark.parametrize("t", [70, 257])
def test_any_decay(t, low, high):
    """Elementwise too: the gradient of a strongly decaying channel is small, but not noise."""
    _, ours, theirs = check(make_inputs(1, t, 1, 16, F32, low, high))
    assert all(torch.isfinite(x).all() for x in ours)
    error = (ours[4].double() - theirs[4]).abs()
    big = theirs[4].abs() > 1e-30
    if big.any():
        assert float((error[big] / theirs[4].abs()[big]).quantile(0.99)) < 1e-4


def test_results_are_complete_deterministic_and_from_any_strides(monkeypatch):
    """Fresh memory is poisoned: a number that no thread writes stays NaN."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    for t, limit in ((50, 232_448), (130, 16_000)):
        inputs = make_inputs(2, t, 2, 16, BF16)
        kernels = emulated_kernels(16, "Bf16", limit)
        first = all_results(kernels, *inputs)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 4 else x for x in inputs]
        shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs]  # not aligned
        for other in (inputs, strided, shifted):
            for name, a, b in zip(NAMES, first, all_results(kernels, *other)):
                assert torch.equal(a, b) and torch.isfinite(a).all(), name


def test_dtypes_of_decay_and_bonus_are_kept():
    gy, r, k, v, w, u = make_inputs(1, 20, 1, 16, BF16)
    results = emulated_kernels(16, "Bf16").backward(gy.float(), r, k, v, w.bfloat16(), u.half())
    assert [x.dtype for x in results] == [BF16, BF16, BF16, BF16, F16]


# ---- the emulator itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("  sync_block();\n  add_side", "  add_side", "without a barrier between"),
        ("  wait_copies();\n  sync_warp();\n  if constexpr", "  sync_warp();\n  if constexpr", "barrier|wrong result"),
        ("  sync_warp();\n  if (kept) copy_row_tile", "  if (kept) copy_row_tile", "may still read"),
        ("sync_block();\n      add_enclosing", "add_enclosing", "without a barrier between"),
        ("constexpr int PAD = 8;", "constexpr int PAD = 0;", "meet in one bank"),
        ("take(shared.whole, row_tiles * N);", "take(shared.whole, 0);", "outside of shared|barrier|may still read"),
        ("sync_warp();  // the copied", "// the copied", "may still read"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, old, new, complaint):
    def plant(text):
        return text.replace(old, new)

    assert sum(path.read_text().count(old) for path in cuda.HEADERS) == 1
    inputs = make_inputs(1, 64, 1, 32, BF16)
    kernels = emulated_kernels(32, "Bf16", change=plant, folder=tmp_path)
    try:
        ours = all_results(kernels, *inputs)
    except RuntimeError as error:
        assert re.search(complaint, str(error)), error
    else:
        assert "wrong result" in complaint
        assert (
            max(relative(a, b) for a, b in zip(ours, exact_results(*inputs))) > 0.1 or not torch.isfinite(ours[0]).all()
        )


# ---- nvcc ----------------------------------------------------------------------------------------------------------

# Most bytes of registers that a kernel may spill: forward, backward. What spills is the backward of 13 row tiles,
# where 128 registers a thread are all there are.
AMPERE_AND_HOPPER, HOPPER = [(8, 0), (9, 0)], [(9, 0)]
SPILLS = {
    (80, "Bf16"): (AMPERE_AND_HOPPER, 0, 120),  # B/32 and B/16 images
    (64, "Bf16"): (AMPERE_AND_HOPPER, 0, 120),  # texts
    (128, "Bf16"): (HOPPER, 0, 120),
    (48, "Fp16"): (HOPPER, 0, 120),
    (16, "Fp32"): (HOPPER, 0, 400),  # the exact kind serves comparisons
}


@pytest.mark.skipif(not has(build.find_nvcc), reason="no nvcc: the CUDA kernels are not compiled")
@pytest.mark.parametrize("n, kind", SPILLS)
def test_nvcc_compiles_within_the_spill_budget(n, kind, tmp_path):
    """Machine code for Ampere and Hopper, linked and loaded; no GPU is needed for that."""
    nvcc, library = build.find_nvcc(), tmp_path / "kernels.so"
    capabilities, forward, backward = SPILLS[n, kind]
    flags = cuda.compiler_flags(n, kind, capabilities, nvcc)
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", *flags, cuda.SOURCE, "-o", library]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    spills = {"forward": [], "backward": []}
    for name, stores in re.findall(
        r"properties for \S*?(forward|backward)_kernel.*?(\d+) bytes spill stores", done.stderr, re.S
    ):
        spills[name].append(int(stores))
    assert min(len(x) for x in spills.values()) >= 3 * len(capabilities)  # that many variants at least
    assert max(spills["forward"]) <= forward and max(spills["backward"]) <= backward, spills
    cuda.Kernels(build.load_library(library), 232_448, None)
