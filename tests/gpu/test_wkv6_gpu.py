"""WKV6 on a real GPU: the kernels against float64, and under autograd, streams, graphs and torch.compile."""

import pytest
import torch

from rwkv_clip.ops import available_backends, wkv6
from rwkv_clip.ops.wkv.cuda import OLDEST

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() < OLDEST
    or "cuda" not in available_backends("cuda"),
    reason="needs an NVIDIA GPU from Ampere on, and nvcc",
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOUNDS = {F32: 2e-6, BF16: 6e-3, F16: 6e-3}


def make_inputs(b, t, h, n, dtype, low=-6.0, high=-1.0):
    g = torch.Generator("cuda").manual_seed(t * n)
    r, k, v, gy = (torch.randn(b, t, h, n, generator=g, device="cuda").to(dtype) for _ in range(4))
    w = torch.rand(b, t, h, n, generator=g, device="cuda") * (high - low) + low
    return gy, [r, k, v, w, torch.randn(h, n, generator=g, device="cuda")]


def results(gy, inputs, backend):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = wkv6(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def check(gy, inputs, bound):
    ours = results(gy, inputs, "cuda")
    theirs = results(gy.double(), [x.double() for x in inputs], "tree")
    for name, a, b in zip(("y", "r", "k", "v", "w", "u"), ours, theirs):
        assert float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) <= bound, name
    return ours


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("t, h, n", [(49, 8, 80), (77, 10, 64), (196, 8, 80), (1, 2, 16), (257, 2, 32), (1000, 3, 48)])
def test_matches_float64(t, h, n, dtype):
    check(*make_inputs(4, t, h, n, dtype), BOUNDS[dtype])


@pytest.mark.parametrize("n", range(16, 129, 16))
def test_every_head_size(n):
    check(*make_inputs(2, 100, 2, n, BF16), BOUNDS[BF16])


@pytest.mark.parametrize("low, high", [(-80, -20), (0, 3), (-6, 4), (5, 88)])
@pytest.mark.parametrize("t", [70, 257])
def test_any_decay(t, low, high):
    assert all(torch.isfinite(x).all() for x in check(*make_inputs(2, t, 2, 16, F32, low, high), BOUNDS[F32]))


def test_same_bits_every_time_and_on_another_stream():
    gy, inputs = make_inputs(64, 196, 8, 80, BF16)
    first = results(gy, inputs, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = results(gy, inputs, "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_in_a_cuda_graph_and_compiled():
    _, inputs = make_inputs(8, 49, 8, 80, BF16)
    expected = wkv6(*inputs)
    compiled = torch.compile(lambda *x: wkv6(*x) * 2, fullgraph=True)
    assert torch.equal(compiled(*inputs), expected * 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = wkv6(*inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_other_head_sizes_take_the_tree():
    _, inputs = make_inputs(2, 20, 2, 24, F32)
    with pytest.raises(ValueError, match="does not support"):
        wkv6(*inputs, backend="cuda")
    exact = wkv6(*(x.double() for x in inputs), backend="tree")
    assert float((wkv6(*inputs).double() - exact).norm() / exact.norm()) < 1e-4  # the GPU's float32 products
