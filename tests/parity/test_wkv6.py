"""WKV6 against numbers computed with the released kernel in float64, and against its own specification."""

import itertools
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_clip.ops import available_backends, build, wkv6
from rwkv_clip.ops.build import BuildError
from rwkv_clip.ops.wkv import chunked, cpu
from rwkv_clip.ops.wkv import dispatch as DISPATCH
from rwkv_clip.ops.wkv.reference import wkv6_reference

BACKENDS = available_backends("cpu")
EXACT = [name for name in BACKENDS if name != "cpp"]  # those that compute in float64
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ compiler")
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


PRECISIONS = pytest.mark.parametrize(
    "backend, dtype, bound",
    [(name, torch.float64, 2e-13) for name in EXACT] + [(name, torch.float32, 2e-6) for name in BACKENDS],
)


@PRECISIONS
@pytest.mark.parametrize("name", SHIPPED)
def test_matches_released_kernel(name, backend, dtype, bound):
    check_case(SMALL, name, dtype, bound, backend)


@PRECISIONS
@pytest.mark.parametrize("name", LARGE)
def test_matches_released_kernel_at_real_sizes(shared, name, backend, dtype, bound):
    check_case(shared / "parity" / "wkv6.pt", name, dtype, bound, backend)


def check_against(exact, backend, inputs, bound):
    """Forward and all gradients of a backend, against another one in float64, for the same input values."""
    gy = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1)).to(inputs[2].dtype)
    ours = value_and_gradients(inputs, gy, backend)
    theirs = value_and_gradients([x.double() for x in inputs], gy.double(), exact)
    for name, a, b in zip(("y", "r", "k", "v", "w", "u"), ours, theirs):
        assert relative(a, b) <= bound, name
    assert (ours[4][:, 0] == 0).all() and (ours[4][:, -1] == 0).all()


ODD_SIZES = [(t, n) for t in (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 49, 50, 77, 130) for n in (1, 3, 16, 80)]
LONG = [(196, 80), (255, 16), (256, 16), (257, 16), (257, 80), (500, 5), (1024, 16)]


@pytest.mark.parametrize("t, n", ODD_SIZES + LONG)
def test_tree_equals_recurrence(t, n):
    b, h = (2, 3) if t < 150 else (1, 2)
    check_against("reference", "tree", random_inputs(b, t, h, n, seed=t * 100 + n), 1e-12)


@pytest.mark.parametrize("t, n", [(257, 80), (1024, 16)])
def test_tree_keeps_its_precision_on_long_sequences(t, n):
    check_against("reference", "tree", random_inputs(1, t, 2, n, dtype=torch.float32), 1e-6)


def test_tree_is_linear_on_long_sequences():
    """Elements that all operations write, forward and backward: twice the length, twice the work."""

    class Count(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    counts = []
    for t in (512, 1024, 2048):
        inputs = random_inputs(1, t, 1, 16, dtype=torch.float32)
        with Count() as count:
            chunked.forward(*inputs)
            chunked.backward(inputs[2], *inputs)
        counts.append(count.elements)
    assert counts[1] < 2.02 * counts[0] and counts[2] < 2.02 * counts[1]


@needs_cpp
@pytest.mark.parametrize("low, high", [(-6.0, -1.0), (-8.0, 4.0), (3.0, 3.0)])
@pytest.mark.parametrize(
    "t, n", ODD_SIZES + LONG + [(t, n) for t in (49, 120, 300) for n in (32, 33, 64, 96, 127, 128)]
)
def test_cpp_equals_tree(t, n, low, high):
    check_against("tree", "cpp", random_inputs(2, t, 2, n, low, high, torch.float32, seed=t * 100 + n), 1e-6)


@needs_cpp
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("decay_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 50, 300])
def test_cpp_reads_and_writes_half_precision(t, decay_dtype, dtype, bound):
    """The bound is the rounding of the result alone: 8 or 11 bits of mantissa."""
    r, k, v, w, u = random_inputs(2, t, 2, 33, -6.0, 1.0, torch.float32)
    inputs = [*(x.to(dtype) for x in (r, k, v)), w.to(decay_dtype), u.to(decay_dtype)]
    check_against("tree", "cpp", inputs, max(bound, 3e-3 if decay_dtype == torch.bfloat16 else 0))
    assert [x.dtype for x in value_and_gradients(inputs, inputs[2], "cpp")] == [dtype, *(x.dtype for x in inputs)]


@needs_cpp
def test_cpp_passes_not_a_number_on():
    for position in range(5):
        inputs = random_inputs(1, 20, 1, 16, dtype=torch.float32)
        (inputs[position][0, 10] if position < 4 else inputs[position])[0, 5] = float("nan")
        gradients = value_and_gradients(inputs, torch.ones_like(inputs[2]), "cpp")
        expected = value_and_gradients(inputs, torch.ones_like(inputs[2]), "tree")
        assert all(a.isnan().any() == b.isnan().any() for a, b in zip(gradients, expected)), position
        half = [x.bfloat16() for x in inputs]
        assert wkv6(*half, backend="cpp").isnan().any() == expected[0].isnan().any(), position


@needs_cpp
@pytest.mark.parametrize("t", [49, 300])
def test_cpp_gives_the_same_bits_for_any_number_of_threads(t):
    inputs = random_inputs(3, t, 3, 16, dtype=torch.float32)
    one = value_and_gradients(inputs, inputs[2], "cpp")
    torch.set_num_threads(3)
    try:
        three = value_and_gradients(inputs, inputs[2], "cpp")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three))


@pytest.mark.parametrize("t", [1, 2, 7, 9, 18])
def test_gradcheck(t):
    inputs = [x.requires_grad_() for x in random_inputs(2, t, 2, 3, seed=t)]
    assert torch.autograd.gradcheck(wkv6, inputs)


@pytest.mark.parametrize("t", [49, 300])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_decay_gradient_is_exact_element_by_element(backend, t):
    """Strongly decaying channels have tiny gradients; a formula that cancels gets them wrong by orders of magnitude."""
    inputs = random_inputs(1, t, 2, 16, low=0.0, high=3.0, dtype=torch.float32)
    gy = torch.randn(1, t, 2, 16, generator=torch.Generator().manual_seed(2))
    ours = value_and_gradients(inputs, gy, backend)[4].double()
    exact = value_and_gradients([x.double() for x in inputs], gy.double(), "reference")[4]
    seen = exact.abs() > 1e-30  # float32 has nothing below
    assert ((ours - exact).abs() / exact.abs())[seen].quantile(0.99) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_special_cases(backend):
    r, k, v, w, u = random_inputs(2, 20, 2, 16, dtype=torch.float32 if backend == "cpp" else torch.float64)
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
@pytest.mark.parametrize("t", [33, 300])
@pytest.mark.parametrize("decay", [float("-inf"), -1e4, -80.0, 5.0, 88.0, 1e4, float("inf")])
def test_no_decay_makes_nan(decay, t, backend):
    inputs = random_inputs(1, t, 2, 16, dtype=torch.float32)
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


@pytest.mark.parametrize("t", [21, 300])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_fresh_memory_is_fully_written(backend, t, monkeypatch):
    """torch.empty full of NaN, results and scratch memory alike: a place that was read or not written shows."""
    inputs = random_inputs(2, t, 2, 18, dtype=torch.float32)
    gy = torch.ones_like(inputs[2])
    clean = value_and_gradients(inputs, gy, backend)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    found = value_and_gradients(inputs, gy, backend)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, clean))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_empty_inputs(backend):
    inputs = random_inputs(2, 10, 3, 16, dtype=torch.float32)
    r, k, v, w, u = inputs
    views = [
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (r, k, v, w)],
        [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (r, k, v, w)],
        [torch.cat([x, x], -1)[..., 16:] for x in (r, k, v, w)],
        [x.repeat_interleave(2, 1)[:, ::2] for x in (r, k, v, w)],
    ]
    dense = value_and_gradients(inputs, torch.ones_like(v), backend)
    for strided in views:
        found = value_and_gradients([*strided, u.T.contiguous().T], torch.ones(()).expand(v.shape), backend)
        assert all(relative(a, b) <= (1e-6 if backend == "reference" else 0) for a, b in zip(found, dense))
    leaves = [x[:0].clone().requires_grad_() for x in (r, k, v, w)] + [u.clone().requires_grad_()]
    y = wkv6(*leaves, backend=backend)
    assert y.shape == (0, 10, 3, 16)
    y.sum().backward()
    assert leaves[0].grad.shape == (0, 10, 3, 16)


def test_operator_is_registered_completely():
    inputs = [x.requires_grad_() for x in random_inputs(1, 9, 2, 4, dtype=torch.float32)]
    for backend in ("", "tree"):
        torch.library.opcheck(torch.ops.rwkv_clip.wkv6.default, (*inputs, backend))
    meta = wkv6(*(x.detach().to("meta") for x in inputs))
    assert meta.device.type == "meta" and meta.shape == (1, 9, 2, 4)


def test_compiles_without_graph_break():
    inputs = random_inputs(1, 9, 2, 4, dtype=torch.float32)
    for backend in (None, *BACKENDS):
        compiled = torch.compile(partial(wkv6, backend=backend), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), wkv6(*inputs, backend=backend))


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
    inputs = random_inputs(1, 2, 1, 4)
    with pytest.raises(ValueError, match=f"backend: 'magic' is not available on cpu; available: {', '.join(BACKENDS)}"):
        wkv6(*inputs, backend="magic")
    with pytest.raises(ValueError, match=r"backend: 'cpp' does not support torch\.float64 with N = 4; use 'tree'"):
        wkv6(*inputs, backend="cpp")


def test_backend_holds_for_forward_and_backward(monkeypatch):
    called = []
    for module in (cpu, chunked):
        for step in ("forward", "backward"):
            monkeypatch.setattr(
                module,
                step,
                lambda *x, name=f"{module.__name__.split('.')[-1]} {step}", run=getattr(module, step): (
                    called.append(name) or run(*x)
                ),
            )
    inputs = random_inputs(1, 5, 1, 4, dtype=torch.float32)
    value_and_gradients(inputs, inputs[2], "tree")
    assert called == ["chunked forward", "chunked backward"]
    if "cpp" in BACKENDS:
        value_and_gradients(inputs, inputs[2], None)
        assert called[2:] == ["cpu forward", "cpu backward"]
    called.clear()
    value_and_gradients(random_inputs(1, 5, 1, 4), inputs[2].double(), None)  # float64
    value_and_gradients(random_inputs(1, 5, 1, 129, dtype=torch.float32), torch.ones(1, 5, 1, 129), None)
    assert called == ["chunked forward", "chunked backward"] * 2


@pytest.fixture
def fresh_start(tmp_path, monkeypatch):
    """As in a process that has built nothing yet, with nothing in its cache."""
    monkeypatch.setattr(DISPATCH, "_failed", set())
    monkeypatch.setattr(build, "_cache_folder", lambda: tmp_path / "cache")
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_without_a_working_compiler_the_tree_takes_over_after_one_warning(compiler, fresh_start, tmp_path, monkeypatch):
    inputs = random_inputs(1, 20, 2, 16, dtype=torch.float32)
    expected = value_and_gradients(inputs, inputs[2], "tree")
    message = r"slower form in PyTorch: no C\+\+ compiler on PATH.*apt-get install g\+\+"
    if compiler == "broken":
        (tmp_path / "ninja").symlink_to(shutil.which("ninja") or build._find_ninja())
        (tmp_path / "c++").write_text("#!/bin/sh\n[ $1 = --version ] && echo c++ 0.1 || { echo error: no; exit 1; }\n")
        (tmp_path / "c++").chmod(0o755)
        message = r"(?s)slower form in PyTorch: .*c\+\+ cannot build wkv6_cpu:.*error: no"
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere" if compiler == "missing" else f"{tmp_path}:/bin")
    with pytest.warns(RuntimeWarning, match=message):
        first = value_and_gradients(inputs, inputs[2], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = value_and_gradients(inputs, inputs[2], None)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, first, again))
    assert available_backends() == ("tree", "reference")
    with pytest.raises(BuildError):
        wkv6(*inputs, backend="cpp")


@needs_cpp
def test_cpp_for_processors_without_wide_vectors(fresh_start, monkeypatch):
    """The code that a compiler without -march=native makes: smaller vectors, other shuffles."""
    monkeypatch.setattr(cpu, "host_flags", lambda: ["-std=c++17", "-O2"])
    for t, n in ((17, 33), (49, 80), (257, 16)):
        check_against("tree", "cpp", random_inputs(2, t, 2, n, -8.0, 4.0, torch.float32), 1e-6)


@needs_cpp
def test_listing_backends_compiles_nothing(fresh_start, monkeypatch):
    monkeypatch.setattr(cpu, "build_library", lambda *_, **__: pytest.fail("compiled"))
    assert available_backends() == ("cpp", "tree", "reference")
    assert available_backends("meta") == ("tree", "reference")
    with pytest.raises(RuntimeError, match="device"):
        available_backends("toaster")


def test_shapes_agree_over_all_small_sizes():
    for b, t, h, n in itertools.product((1, 2), (1, 4, 11), (1, 3), (2, 5)):
        inputs = random_inputs(b, t, h, n, seed=b + t + h + n)
        assert relative(wkv6(*inputs), wkv6(*inputs, backend="reference")) < 1e-12
