"""WKV6 against numbers computed with the released kernel in float64, and against its own specification."""

import itertools
from pathlib import Path

import pytest
import torch

from rwkv_clip.ops import available_backends, wkv6
from rwkv_clip.ops.reference import wkv6_reference

BACKENDS = available_backends("cpu")
SMALL = Path(__file__).parent / "data" / "wkv6_small.pt"
SHIPPED, LARGE = ["T1", "T2", "T3", "short", "extreme"], ["image_b32", "text", "image_b16"]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference, size = (ours - theirs).norm(), theirs.norm()
    return float(difference / size) if size else float(difference)


def random_inputs(b, t, h, n, low=-8.0, high=3.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(b, t, h, n, generator=g, dtype=torch.float64) for _ in range(3))
    w = low + (high - low) * torch.rand(b, t, h, n, generator=g, dtype=torch.float64)
    u = torch.randn(h, n, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (r, k, v, w, u)]


def value_and_gradients(inputs, gy, backend):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = wkv6(*leaves, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, gy, allow_unused=True, materialize_grads=True)]


def check_case(path, name, dtype, bound, backend):
    case = next(c for c in torch.load(path, weights_only=True)["cases"] if c["name"] == name)
    shape = (case["B"], case["T"], case["H"], case["N"])
    inputs = [case[key].view(shape).to(dtype) for key in ("r", "k", "v", "ww")] + [case["u"].to(dtype)]
    found = value_and_gradients(inputs, case["gy"].view(shape).to(dtype), backend)
    for key, ours in zip(("y", "gr", "gk", "gv", "gww", "gu"), found):
        assert relative(ours.flatten(), case[key].flatten()) <= bound, key


PRECISIONS = pytest.mark.parametrize("dtype, bound", [(torch.float64, 2e-13), (torch.float32, 2e-6)])


@pytest.mark.parametrize("backend", BACKENDS)
@PRECISIONS
@pytest.mark.parametrize("name", SHIPPED)
def test_matches_released_kernel(name, dtype, bound, backend):
    check_case(SMALL, name, dtype, bound, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@PRECISIONS
@pytest.mark.parametrize("name", LARGE)
def test_matches_released_kernel_at_real_sizes(shared, name, dtype, bound, backend):
    check_case(shared / "parity" / "wkv6.pt", name, dtype, bound, backend)


@pytest.mark.parametrize("n", [1, 3, 16, 80])
@pytest.mark.parametrize("t", [1, 2, 5, 8, 9, 15, 16, 17, 31, 49, 50, 77, 130])
def test_tree_equals_recurrence_at_odd_sizes(t, n):
    inputs = random_inputs(2, t, 3, n, seed=t * 100 + n)
    gy = torch.randn(inputs[2].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = value_and_gradients(inputs, gy, "tree")
    for name, a, b in zip(("y", "r", "k", "v", "w", "u"), ours, value_and_gradients(inputs, gy, "reference")):
        assert relative(a, b) <= 1e-12, name


@pytest.mark.parametrize("t", [1, 2, 7, 9, 18])
def test_gradcheck(t):
    inputs = [x.requires_grad_() for x in random_inputs(2, t, 2, 3, seed=t)]
    assert torch.autograd.gradcheck(wkv6, inputs)


def test_decay_gradient_is_exact_element_by_element():
    """Strongly decaying channels have tiny gradients; a formula that cancels gets them wrong by orders of magnitude."""
    inputs = random_inputs(2, 49, 2, 16, low=0.0, high=3.0, dtype=torch.float32)
    gy = torch.randn(2, 49, 2, 16, generator=torch.Generator().manual_seed(2))
    ours = value_and_gradients(inputs, gy, "tree")[4].double()
    exact = value_and_gradients([x.double() for x in inputs], gy.double(), "reference")[4]
    seen = exact.abs() > 1e-30  # float32 has nothing below
    assert ((ours - exact).abs() / exact.abs())[seen].quantile(0.99) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_special_cases(backend):
    r, k, v, w, u = random_inputs(2, 20, 2, 16)
    one = wkv6(r[:, :1], k[:, :1], v[:, :1], w[:, :1], u, backend)
    torch.testing.assert_close(one, (r * u * k)[:, :1].sum(-1, keepdim=True) * v[:, :1])
    flipped = wkv6(*(x.flip(1) for x in (r, k, v, w)), u, backend).flip(1)
    torch.testing.assert_close(flipped, wkv6(r, k, v, w, u, backend))
    never_forgets = wkv6(r, k, v, torch.full_like(w, -80), u, backend)
    scores = torch.einsum("bthn,bshn->bhts", r, k)
    own = torch.diag_embed(torch.einsum("bthn,hn,bthn->bht", r, u - 1, k))
    torch.testing.assert_close(never_forgets, torch.einsum("bhts,bshn->bthn", scores + own, v))
    neighbours = scores * ((torch.arange(20)[:, None] - torch.arange(20)).abs() <= 1) + own
    only_neighbours = wkv6(r, k, v, torch.full_like(w, 20), u, backend)
    torch.testing.assert_close(only_neighbours, torch.einsum("bhts,bshn->bthn", neighbours, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [-80.0, 5.0, 88.0, 1e4, float("inf")])
def test_no_decay_makes_nan(decay, backend):
    inputs = random_inputs(1, 33, 2, 16, dtype=torch.float32)
    inputs[3] = torch.full_like(inputs[3], decay)
    found = value_and_gradients(inputs, torch.ones_like(inputs[2]), backend)
    assert all(torch.isfinite(x).all() for x in found)
    assert (found[4][:, 0] == 0).all() and (found[4][:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_accumulates_in_float32(dtype):
    exact = random_inputs(2, 49, 2, 80, dtype=torch.float32)
    half = [x.to(dtype) for x in exact[:3]] + exact[3:]
    y = wkv6(*half)
    assert y.dtype == dtype
    assert relative(y, wkv6_reference(*(x.double() for x in half))) < 4e-3  # the rounding of the output alone


def test_autocast_neither_casts_nor_breaks():
    inputs = random_inputs(2, 20, 2, 16, dtype=torch.float32)
    gy = torch.randn(2, 20, 2, 16, generator=torch.Generator().manual_seed(3))
    for backend in BACKENDS:
        outside = value_and_gradients(inputs, gy, backend)
        with torch.autocast("cpu", torch.bfloat16):
            inside = value_and_gradients(inputs, gy, backend)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside))


def test_fresh_memory_is_fully_written(monkeypatch):
    """torch.empty full of NaN: a result that was not written shows."""
    inputs = random_inputs(2, 21, 2, 16)
    gy = torch.ones(2, 21, 2, 16, dtype=torch.float64)
    clean = value_and_gradients(inputs, gy, "tree")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(inputs, gy, "tree"), clean))


def test_strided_and_empty_inputs():
    r, k, v, w, u = random_inputs(2, 10, 3, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (r, k, v, w)]
    assert torch.equal(wkv6(*strided, u.T.contiguous().T), wkv6(r, k, v, w, u))
    for backend in BACKENDS:
        leaves = [x[:0].clone().requires_grad_() for x in (r, k, v, w)] + [u.clone().requires_grad_()]
        y = wkv6(*leaves, backend=backend)
        assert y.shape == (0, 10, 3, 16)
        y.sum().backward()
        assert leaves[0].grad.shape == (0, 10, 3, 16)


def test_operator_is_registered_completely():
    inputs = [x.requires_grad_() for x in random_inputs(1, 9, 2, 4, dtype=torch.float32)]
    torch.library.opcheck(torch.ops.rwkv_clip.wkv6.default, inputs)
    meta = wkv6(*(x.detach().to("meta") for x in inputs))
    assert meta.device.type == "meta" and meta.shape == (1, 9, 2, 4)


def test_compiles_without_graph_break():
    inputs = random_inputs(1, 9, 2, 4, dtype=torch.float32)
    compiled = torch.compile(lambda *x: wkv6(*x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), wkv6(*inputs) * 2)


def test_activation_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    inputs = random_inputs(2, 9, 2, 4)
    plain = value_and_gradients(inputs, torch.ones_like(inputs[2]), "tree")
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = checkpoint(wkv6, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), leaves), plain[1:]))


def broken(change):
    inputs = dict(zip("rkvwu", random_inputs(2, 5, 2, 4, dtype=torch.float32)))
    change(inputs)
    return inputs


MISUSE = {
    "r: expected 4 dimensions": lambda x: x.update(r=x["r"][0]),
    "k: shape": lambda x: x.update(k=x["k"][:, :4]),
    "v: shape": lambda x: x.update(v=x["v"][..., :2]),
    "w: shape": lambda x: x.update(w=x["w"].flatten(2)),
    "u: shape": lambda x: x.update(u=x["u"].T),
    "k: dtype": lambda x: x.update(k=x["k"].double()),
    "v: dtype torch.int64": lambda x: x.update(v=x["v"].long()),
    "u: on meta": lambda x: x.update(u=x["u"].to("meta")),
    "w: expected a tensor": lambda x: x.update(w=1.0),
    "needs T, H and N": lambda x: x.update({name: x[name][:, :0] for name in "rkvw"}),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_a_clear_error(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        wkv6(**broken(MISUSE[message]))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend: 'magic' is not available on cpu; available: tree, reference"):
        wkv6(*random_inputs(1, 2, 1, 4), backend="magic")


def test_shapes_agree_over_all_small_sizes():
    for b, t, h, n in itertools.product((1, 2), (1, 4, 11), (1, 3), (2, 5)):
        inputs = random_inputs(b, t, h, n, seed=b + t + h + n)
        assert relative(wkv6(*inputs), wkv6(*inputs, backend="reference")) < 1e-12
