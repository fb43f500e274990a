"""Operators under what looks into a call: traces, forward-mode differentiation, transforms of torch.func.

Once a trace ended the process, and jvp was off by as much as the operators contribute, without a word.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import rwkv_clip
from rwkv_clip.ops import mix_tokens, norm_gate, relu_square, sigmoid_gate, wkv6

B, T, H, N = 2, 6, 2, 4
C = H * N


def operators(dtype: torch.dtype) -> dict:
    """name -> function of x (B, T, C), everything else held."""
    torch.manual_seed(0)
    (k, v, w), u = torch.randn(3, B, T, H, N).to(dtype), torch.randn(H, N).to(dtype)
    coefficients, shares = torch.randn(3, C).to(dtype), torch.randn(3, B, T, C).to(dtype)
    gate, weight, bias = torch.randn(B, T, C).to(dtype), torch.randn(C).to(dtype), torch.randn(C).to(dtype)
    cut = (B, T, H, N)
    return {
        "wkv6, r": lambda x: wkv6(x.view(cut), k, v, w, u),
        "wkv6, w": lambda x: wkv6(k, v, w, x.view(cut), u),
        "mix_tokens": lambda x: torch.stack(mix_tokens(x, coefficients, shares, H, (T,))),
        "norm_gate": lambda x: norm_gate(x, gate, weight, bias, H, 1e-5),
        "relu_square": relu_square,
        "sigmoid_gate": lambda x: sigmoid_gate(x, gate),
    }


def dual(f, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def sum_of_squares(f):
    return lambda x: f(x).square().sum()


WAYS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "dual numbers": dual,
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    "grad": lambda f, x, t: torch.func.grad(sum_of_squares(f))(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](f(t))[0],
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
    "forward over reverse": lambda f, x, t: torch.func.jvp(torch.func.grad(sum_of_squares(f)), (x,), (t,))[1],
    "hessian": lambda f, x, t: torch.func.hessian(sum_of_squares(f))(x),
    "trace": lambda f, x, t: torch.jit.trace(f, x)(t),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", operators(torch.float32))
def test_every_transform_of_an_operator_is_right(name, way, gradients):
    x, t = torch.randn(2, B, T, C, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(gradients or way == "hessian"):  # torch's group norm has no hessian without gradients
        found = WAYS[way](operators(torch.float32)[name], x, t)
    if way == "vmap":
        expected = torch.stack([operators(torch.float32)[name](z) for z in (x, t)])
    elif way == "trace":
        expected = operators(torch.float32)[name](t)
    else:  # float64 never reaches a native kernel, and the plain recurrence is torch's to differentiate
        f = operators(torch.float64)[name]
        expected = WAYS[way](f, x.double(), t.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_reference_of_this_test_is_right():
    """float64 by finite differences: what the test above compares with owes nothing to a formula's derivative."""
    x, t = torch.randn(2, B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for f in operators(torch.float64).values():
        expected = (f(x + 1e-6 * t) - f(x - 1e-6 * t)) / 2e-6
        torch.testing.assert_close(WAYS["jvp"](f, x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", operators(torch.float32))
def test_second_derivatives_backward_are_refused(name):
    f, x = operators(torch.float32)[name], torch.randn(B, T, C, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum_of_squares(f)(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"can be differentiated once; .* rwkv_clip.ops.set_backend"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", operators(torch.float32))
def test_forward_mode_inside_a_compiled_graph_is_refused(name):
    f, x = operators(torch.float32)[name], torch.randn(B, T, C)
    compiled = torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="eager")
    with pytest.raises(RuntimeError, match=r"differentiate outside torch\.compile"):
        compiled(x)
    torch._dynamo.reset()


TRACE = """
import sys, torch, warnings, rwkv_clip
warnings.simplefilter("ignore")
model = rwkv_clip.create_model("RWKV-CLIP-Ti-8")
class Tower(torch.nn.Module):
    def __init__(self, encode):
        super().__init__()
        self.model, self.encode = model, encode
    def forward(self, x):
        return getattr(self.model, self.encode)(x)
image, text = torch.randn(2, 3, 48, 48), rwkv_clip.get_tokenizer("RWKV-CLIP-Ti-8")(["a dog", "two cats"])
for encode, x in (("encode_image", image), ("encode_text", text)):
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            tower = Tower(encode).eval()
            traced = torch.jit.trace(tower, x[:1], check_trace=False)
            print((traced(x) - tower(x)).abs().max().item() < 1e-5)
"""


def test_towers_are_traced():
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.mark.filterwarnings("ignore")
def test_a_trace_says_that_it_is_slow():
    with pytest.warns(RuntimeWarning, match=r"plain recurrence.*torch\.export and torch\.compile keep the operator"):
        torch.jit.trace(operators(torch.float32)["wkv6, r"], torch.randn(B, T, C))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators(torch.float32)["wkv6, r"](torch.randn(B, T, C))


def tiny():
    image = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64}
    text = {"context": 12, "vocab": 50, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64}
    torch.manual_seed(0)
    return rwkv_clip.create_model({"image": image, "text": text})


@pytest.mark.parametrize("way", ["jvp", "jvp of the weights", "vmap", "per-sample gradients"])
def test_towers_under_transforms(way):
    model, pictures = tiny(), torch.randn(2, 3, 32, 32)

    def found(model, x):
        weights = dict(model.named_parameters())

        def encode(weights, x):
            return torch.func.functional_call(model, weights, (x, torch.arange(24).view(2, 12)))[0]

        def loss(weights, x):
            return encode(weights, x.expand(2, -1, -1, -1)).square()[:, :5].sum()

        if way == "jvp":
            return torch.func.jvp(lambda x: encode(weights, x), (x,), (x.flip(0),))[1]
        if way == "jvp of the weights":
            return torch.func.jvp(lambda w: encode(w, x), (weights,), ({k: v.sin() for k, v in weights.items()},))[1]
        if way == "vmap":
            return torch.func.vmap(lambda x: encode(weights, x))(torch.stack([x, x.flip(0)]))
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        return torch.cat([gradients[key].reshape(2, -1) for key in sorted(gradients)], 1)

    expected = found(tiny().double(), pictures.double()).float()
    torch.testing.assert_close(found(model, pictures), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_takes_the_linear_maps():
    model, pictures = tiny(), torch.randn(2, 3, 32, 32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert sum("dynamic" in type(module).__module__ for module in quantised.modules()) == 16
    with torch.no_grad():
        pairs = torch.cosine_similarity(quantised.encode_image(pictures), model.encode_image(pictures))
    assert pairs.min() > 0.99 and pairs.max() < 1.0


@pytest.mark.parametrize("gradients", [True, False])
def test_recorders_below_torch_record_operators(gradients):
    from torch.fx.experimental.proxy_tensor import make_fx

    model, pictures = tiny(), torch.randn(2, 2, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        graph = make_fx(lambda x: model.encode_image(x))(pictures[0])
        torch.testing.assert_close(graph(pictures[1]), model.encode_image(pictures[1]))
