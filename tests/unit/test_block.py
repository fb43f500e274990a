"""The block around WKV6: native kernels against their formulas, drop path, checkpointing, compilation, weights."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import rwkv_clip
from rwkv_clip.factory import cast_weights
from rwkv_clip.models.rwkv_block import DropPath
from rwkv_clip.ops.block import native as kernels
from rwkv_clip.ops.block import pointwise
from rwkv_clip.ops.build import BuildError

OPS = torch.ops.rwkv_clip
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# grid, tokens behind it, heads, width
SHAPES = {
    "image": ((7, 7), 0, 8, 640),
    "class token": ((3, 5), 1, 2, 64),
    "text": ((77,), 0, 10, 640),
    "narrow": ((5,), 2, 3, 30),
    "one token": ((1, 1), 0, 1, 4),
}


@pytest.fixture(scope="module", autouse=True)
def native():
    if not kernels.supports(torch.zeros(1)):
        pytest.skip("no C++ compiler: the native kernels of a block cannot be built here")


def small(depth=2, **image):
    image = {"image_size": [32, 48], "patch": 16, "width": 32, "depth": depth, "heads": 2, "ffn_width": 80, **image}
    text = {"context": 12, "vocab": 50, "width": 32, "depth": depth, "heads": 2, "ffn_width": 48}
    torch.manual_seed(0)
    model = rwkv_clip.create_model({"image": image, "text": text})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def compare(native, formula, inputs, rest, dtype):
    """Values and gradients of a native form in `dtype` against its formula in float64."""
    narrow = [x if x is None else x.to(dtype).requires_grad_() for x in inputs]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in narrow]
    outs, expected = native(*narrow, *rest), formula(*exact, *rest)
    outs, expected = (x if isinstance(x, list) else [x] for x in (outs, expected))
    grads = [torch.randn_like(x) for x in outs]
    for out, other in zip(outs, expected, strict=True):
        assert out.dtype == dtype and relative(out.detach(), other.detach()) <= BOUNDS[dtype]
    wanted = torch.autograd.grad(outs, [x for x in narrow if x is not None], grads)
    true = torch.autograd.grad(expected, [x for x in exact if x is not None], [g.double() for g in grads])
    for i, (ours, theirs) in enumerate(zip(wanted, true, strict=True)):
        assert ours.dtype == dtype and relative(ours, theirs) <= BOUNDS[dtype], f"gradient {i}"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_native_mixing_is_the_formula(dtype, shape, shared):
    torch.manual_seed(0)
    grid, behind, heads, c = SHAPES[shape]
    x = torch.randn(3, torch.Size(grid).numel() + behind, c)
    offsets = torch.randn(5, *x.shape) if shared else None
    inputs = (x, torch.rand(5, c), offsets)
    compare(pointwise._mix, pointwise._mix_formula, inputs, (heads, list(grid)), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_native_gates_are_their_formulas(dtype):
    torch.manual_seed(0)
    y, gate = torch.randn(2, 7, 60), 4 * torch.randn(2, 7, 60)
    inputs = (y, gate, torch.randn(60), torch.randn(60))
    compare(pointwise._norm_gate, pointwise._norm_gate_formula, inputs, (3, 1e-5), dtype)
    compare(pointwise._relu_square, pointwise._relu_square_formula, (gate,), (), dtype)
    compare(pointwise._sigmoid_gate, pointwise._sigmoid_gate_formula, (gate, y), (), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_extreme_values(dtype):
    gate = torch.tensor([-3e38, -200.0, -80.0, 0.0, 80.0, 200.0, 3e38]).to(dtype)
    out = pointwise.sigmoid_gate(gate, torch.ones_like(gate))
    torch.testing.assert_close(out, torch.sigmoid(gate), rtol=1e-2, atol=1e-37)
    bad = torch.tensor([float("nan"), -1.0, 2.0], dtype=dtype)
    assert pointwise.relu_square(bad).isnan().tolist() == [True, False, False]
    assert pointwise.sigmoid_gate(bad, bad).isnan().tolist() == [True, False, False]
    assert pointwise.relu_square(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)


def test_operators_are_registered_soundly():
    x, offsets = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
    weights = torch.rand(2, 8, requires_grad=True)
    cases = [(OPS.mix_tokens, (x, weights, offsets, 1, [2, 3])), (OPS.mix_tokens, (x, weights, None, 2, [6])),
             (OPS.norm_gate, (x, x.detach(), weights[0], weights[1], 2, 1e-5)),
             (OPS.relu_square, (x,)), (OPS.sigmoid_gate, (x, offsets[0]))]  # fmt: skip
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments)


def test_without_a_compiler_the_formula_takes_over_and_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise BuildError("no C++ compiler; install one")

    x = torch.randn(2, 5, 8)
    native = pointwise.relu_square(x)
    monkeypatch.setattr(kernels, "build_library", fail)
    kernels._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install one"):
            assert torch.equal(pointwise.relu_square(x), native)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            mixed = pointwise.mix_tokens(x, torch.rand(2, 8), None, 1, (5,))
    finally:
        kernels._library.cache_clear()
    assert len(mixed) == 2


class Recorder(TorchDispatchMode):
    """Counts operators and the dtypes that matrix products see."""

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.dtypes[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


INPUTS = torch.randn(4, 3, 32, 48), torch.arange(48).view(4, 12)


def test_every_matrix_product_is_in_bfloat16():
    model = small()
    with Recorder() as training, torch.autocast("cpu", torch.bfloat16):
        image, text, _ = model.train()(*INPUTS)
        (image * text).sum().backward()
    with Recorder() as inference, torch.no_grad():
        cast_weights(model, torch.bfloat16).eval()(*INPUTS)
    for recorder in (training, inference):
        assert recorder.dtypes.keys() == {torch.bfloat16} and recorder.dtypes.total() > 40


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), 0.1).step()


CHANGES = {  # all that has been seen in soups, merges and scripts
    "load_state_dict": lambda m: m.load_state_dict({key: value * 1.5 for key, value in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True),
    "copy_": lambda m: [p.copy_(p * 1.5) for p in m.parameters()],
    "add_": lambda m: [p.add_(0.1) for p in m.parameters()],
    "data.copy_": lambda m: [p.data.copy_(p.data * 1.5) for p in m.parameters()],
    "data =": replace_data,
    "foreach": lambda m: torch._foreach_mul_([*m.parameters()], 1.5),
    "numpy": lambda m: [p.data.view(torch.uint8).numpy().fill(60) for p in m.parameters() if p.dim()],
    "state_dict's tensors": lambda m: [value.mul_(1.5) for value in m.state_dict().values()],
    "optimizer": step,
    "to and back": lambda m: [m.float(), [p.mul_(1.5) for p in m.parameters()], cast_weights(m, torch.bfloat16)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_counts_at_once(change):
    model, image = cast_weights(small(), torch.bfloat16).eval(), INPUTS[0]
    with torch.no_grad():
        before = model.encode_image(image)
        CHANGES[change](model)
        after = model.encode_image(image)
        fresh = cast_weights(small(), torch.bfloat16).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(after, fresh.encode_image(image)) and not torch.equal(after, before)
        assert torch.equal(copy.deepcopy(model).encode_image(image), after)


def test_drop_path_keeps_the_mean_and_computes_kept_samples_only():
    drop, rows = DropPath(0.3).train(), []

    def branch(x):
        rows.append(len(x))
        return x.new_full(x.shape, 2.0)

    torch.manual_seed(0)
    x = torch.ones(4000, 1, 3)
    out = drop(x, branch)
    values = torch.tensor([1.0, 1 + 2 / 0.7])  # dropped; kept and scaled up
    assert ((out.flatten()[:, None] - values).abs().min(1).values < 1e-6).all()
    assert abs(float(out.mean()) - 3) < 0.1 and rows == [int((out[:, 0, 0] > 1).sum())]
    torch.manual_seed(0)
    assert torch.equal(drop(x, branch), out), "the draw follows the seed"
    assert not torch.equal(drop(x, branch), out)
    assert torch.equal(drop.eval()(x, branch), x + 2)


def test_a_branch_that_all_samples_drop_has_zero_gradients():
    model = small(depth=2, drop_path=0.999999).train()  # the last layer's rate
    torch.manual_seed(0)
    model.encode_image(INPUTS[0]).sum().backward()
    first, last = model.image_model.layers
    assert all(p.grad is not None and not p.grad.any() for p in last.parameters())
    assert first.ffn.value.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_gives_the_same_gradients_without_a_second_wkv(autocast):
    model, found, calls = small(drop_path=0.3).train(), [], []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(3)
        with Recorder() as recorder:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                image, text, _ = model(*INPUTS)
            (image * text).float().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        calls.append(recorder.calls)
    assert all(map(torch.equal, *found))
    assert calls[0][OPS.wkv6.default] == calls[1][OPS.wkv6.default] == 4
    assert calls[1][OPS.mix_tokens.default] == 2 * calls[0][OPS.mix_tokens.default]


def test_one_graph_serves_every_batch_size():
    torch._dynamo.reset()
    model, counter = small(drop_path=0.3).train(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (4, 3, 7):
        inputs = torch.randn(batch, 3, 32, 48), torch.zeros(batch, 12, dtype=torch.int64)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.autocast("cpu", torch.bfloat16):
            image, text, _ = compiled(*inputs)
        (image * text).sum().backward()
    assert counter.frame_count == 1


def test_compiled_training_has_the_gradients_of_eager():
    torch._dynamo.reset()
    model, found = small(depth=1), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)):
        model.zero_grad()
        image, text, scale = run(*INPUTS)
        (scale * image @ text.T).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
