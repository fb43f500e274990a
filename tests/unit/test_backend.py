"""The switch to PyTorch's own operators: the same values, and what tools of PyTorch make of a whole model with it."""

import pytest
import torch

import rwkv_clip
from rwkv_clip.ops import get_backend, set_backend, wkv6
from rwkv_clip.ops.wkv.plain import BLOCK, CHUNK, wkv6_plain
from rwkv_clip.ops.wkv.reference import wkv6_reference

IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
TEXT = {"context": 12, "vocab": 50, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64}


def make_model():
    torch.manual_seed(0)
    model = rwkv_clip.create_model({"image": IMAGE | {"class_token": True}, "text": TEXT})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


class Tower(torch.nn.Module):
    def __init__(self, model, side):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x):
        return getattr(self.model, f"encode_{self.side}")(x)


def make_inputs(batch, side, size=32):
    g = torch.Generator().manual_seed(batch)
    return (
        torch.randn(batch, 3, size, size, generator=g)
        if side == "image"
        else torch.randint(50, (batch, 12), generator=g)
    )


@pytest.fixture(params=["image", "text"])
def side(request):
    return request.param


# ---- the switch ------------------------------------------------------------------------------------------------------


def test_the_choice_ends_with_its_block():
    assert get_backend() == "auto"
    with set_backend("torch"):
        assert get_backend() == "torch"
        with set_backend("auto"):
            assert get_backend() == "auto"
        with pytest.raises(KeyError), set_backend("auto"):
            raise KeyError
        assert get_backend() == "torch"
    assert get_backend() == "auto"
    before = set_backend("torch")  # for good
    assert get_backend() == "torch"
    before.__exit__(None, None, None)
    assert get_backend() == "auto"


def test_another_name_changes_nothing():
    with pytest.raises(ValueError, match="backend: 'plain' is not one of auto, torch"):
        set_backend("plain")
    assert get_backend() == "auto"


# ---- WKV6 ------------------------------------------------------------------------------------------------------------

LENGTHS = [1, 2, 6, BLOCK, BLOCK + 1, 49, 77, 2 * CHUNK, 2 * CHUNK + 1, 197, 300]
DECAYS = [(-6, -1), (-6, 4), (0, 3), (2, 3), (30, 100), (-100, -80)]


def make_tensors(tokens, low, high, dtype):
    g = torch.Generator().manual_seed(tokens)
    r, k, v = torch.randn(3, 2, tokens, 3, 8, dtype=dtype, generator=g)
    w = torch.rand(2, tokens, 3, 8, dtype=dtype, generator=g) * (high - low) + low
    return r, k, v, w, torch.randn(3, 8, dtype=dtype, generator=g)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 4e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_recurrence_in_products(tokens, decay, dtype, limit):
    tensors = make_tensors(tokens, *decay, dtype)
    expected = wkv6_reference(*(x.double() for x in tensors))
    found = wkv6_plain(*tensors)
    assert found.dtype == dtype and found.is_contiguous()
    assert (found - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("tokens", [3, BLOCK, 30, 2 * CHUNK + 3])
def test_its_gradients_are_the_recurrences(tokens):
    tensors = [x.requires_grad_() for x in make_tensors(tokens, -4, 1, torch.float64)]
    grad = torch.randn(tensors[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(wkv6_reference(*tensors), tensors, grad)
    for found, right in zip(torch.autograd.grad(wkv6_plain(*tensors), tensors, grad), expected):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


def test_training_after_inference():
    """Constants that are kept between calls belong to no mode."""
    tensors = make_tensors(23, -4, 1, torch.float32)
    with torch.inference_mode():
        wkv6_plain(*tensors)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        wkv6_plain(*(mode.from_tensor(x) for x in make_tensors(24, -4, 1, torch.float32)))
    for tokens in (23, 24):
        tensors = [x.requires_grad_() for x in make_tensors(tokens, -4, 1, torch.float32)]
        wkv6_plain(*tensors).sum().backward()
        assert all(x.grad.isfinite().all() for x in tensors)


def test_a_strong_decay_beside_large_keys_stays_finite():
    r, k, v, w, u = make_tensors(40, 30, 80, torch.float32)
    assert wkv6_plain(100 * r, 100 * k, v, w, u).isfinite().all()


def test_half_precision_and_autocast_keep_the_dtype():
    r, k, v, w, u = make_tensors(20, -4, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), set_backend("torch"):
        y = wkv6(r.bfloat16(), k.bfloat16(), v.bfloat16(), w, u)
    expected = wkv6_reference(r.bfloat16(), k.bfloat16(), v.bfloat16(), w, u)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


# ---- whole models ----------------------------------------------------------------------------------------------------


def test_features_are_the_same(side):
    model, x = make_model(), make_inputs(3, side)
    expected = Tower(model, side)(x)
    with set_backend("torch"):
        torch.testing.assert_close(Tower(model, side)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_small_and_takes_any_batch(side):
    tower, x = Tower(make_model(), side).eval(), make_inputs(3, side)
    with torch.no_grad():
        plain = torch.jit.trace(tower, make_inputs(2, side), check_trace=False)
        with set_backend("torch"):
            traced = torch.jit.trace(tower, make_inputs(2, side))
        torch.testing.assert_close(traced(x), tower(x), rtol=1e-4, atol=1e-5)
    nodes = [sum(1 for _ in t.inlined_graph.nodes()) for t in (traced, plain)]
    assert side == "image" or nodes[0] < nodes[1], nodes


def operators_of(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_torch_export_holds_pytorchs_operators_only(side):
    tower, x = Tower(make_model(), side).eval(), make_inputs(2, side)
    with torch.no_grad():
        assert any(name.startswith("rwkv_clip") for name in operators_of(torch.export.export(tower, (x,))))
        with set_backend("torch"):
            program = torch.export.export(tower, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert not [name for name in operators_of(program) if name.startswith("rwkv_clip")]
        more = make_inputs(5, side)
        torch.testing.assert_close(program.module()(more), tower(more), rtol=1e-4, atol=1e-5)


def test_forward_mode_of_a_whole_model(side):
    if side == "text":
        pytest.skip("a text has no derivative by its ids")
    x, t = make_inputs(2, "image"), make_inputs(2, "image").flip(0)
    expected = torch.func.jvp(make_model().double().encode_image, (x.double(),), (t.double(),))[1]
    with set_backend("torch"):
        found = torch.func.jvp(make_model().encode_image, (x,), (t,))[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_takes_every_linear_map(side):
    model, x = make_model(), make_inputs(3, side)
    with set_backend("torch"), torch.no_grad():
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        found, expected = Tower(small, side)(x), Tower(model, side)(x)
    count = sum("dynamic" in type(module).__module__ for module in small.modules())
    assert count == sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert 0.98 < torch.cosine_similarity(found, expected).min() < 1 - 1e-7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("dynamo", [True, False])
def test_both_exporters_of_onnx_take_a_tower(tmp_path, side, dynamo, choice):
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    tower, file = Tower(make_model(), side).eval(), str(tmp_path / "tower.onnx")
    axes = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"x": {0: "b"}, "y": {0: "b"}}}
    names = {"input_names": ["x"], "output_names": ["y"]}
    with torch.no_grad(), set_backend(choice):
        torch.onnx.export(tower, (make_inputs(2, side),), file, dynamo=dynamo, opset_version=18, **names, **axes)
        x = make_inputs(5, side)
        (found,) = runtime.InferenceSession(file).run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), tower(x), rtol=1e-4, atol=1e-5)


# ---- every family of towers ------------------------------------------------------------------------------------------

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
CLIP_TEXT = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
FAMILIES = {
    "RWKV": {"image": IMAGE, "text": TEXT},
    "ViT and BERT": {
        "image": {"kind": "open_clip", **VIT},
        "text": {"kind": "bert", "context": 12, "vocab": 50, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
        "embed_dim": 24,
    },
    "CLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": CLIP_TEXT},
}
ATTENTION = pytest.mark.parametrize("family", ["ViT and BERT", "CLIP"])


def make_family(name):
    torch.manual_seed(0)
    model = rwkv_clip.create_model(FAMILIES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def second(model, x):
    """The gradient of a squared gradient: of the image by itself."""
    (first,) = torch.autograd.grad(model.encode_image(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_with_the_switch(family):
    """As finite differences of the first ones have it, in float64."""
    model, x = make_family(family).double(), make_inputs(2, "image").double().requires_grad_()
    with set_backend("torch"):
        found = second(model, x)

        def squared(value):
            value = value.detach().requires_grad_()
            return torch.autograd.grad(model.encode_image(value).square().sum(), value)[0].square().sum()

        step, direction = 1e-5, torch.randn_like(x)
        expected = (squared(x + step * direction) - squared(x - step * direction)) / (2 * step)
    torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-5, atol=1e-8)


def test_second_derivatives_without_it_name_it():
    model, x = make_family("RWKV"), make_inputs(2, "image").requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiated once; .* rwkv_clip.ops.set_backend\('torch'\)") as caught:
        second(model, x)
    assert "\n" not in str(caught.value)
    r, k, v, w, u = (x.requires_grad_() for x in make_tensors(9, -4, 1, torch.float32))
    (first,) = torch.autograd.grad(wkv6(r, k, v, w, u).square().sum(), r, create_graph=True)
    with pytest.raises(RuntimeError, match=r"set_backend\('torch'\)"):
        first.square().sum().backward()


@ATTENTION
def test_forward_mode_through_attention(family):
    """By dual numbers as by two backward passes; without the switch a line names it."""
    model, x = make_family(family), make_inputs(2, "image")
    tangent = make_inputs(2, "image").flip(0)
    with pytest.raises(RuntimeError, match=r"fused attention; .* rwkv_clip.ops.set_backend") as caught:
        torch.func.jvp(model.encode_image, (x,), (tangent,))
    assert "\n" not in str(caught.value)
    with set_backend("torch"):
        found = torch.func.jvp(model.encode_image, (x,), (tangent,))[1]
    model, x, tangent, step = model.double(), x.double(), tangent.double(), 1e-6
    expected = (model.encode_image(x + step * tangent) - model.encode_image(x - step * tangent)) / (2 * step)
    with set_backend("torch"):
        again = torch.func.jvp(model.encode_image, (x,), (tangent,))[1]
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.double(), again, rtol=1e-3, atol=1e-4)


def test_forward_mode_of_bert_is_refused_too():
    model = make_family("ViT and BERT")
    weight = model.text_model.embeddings.word_embeddings.weight

    def encode(value):
        return torch.func.functional_call(
            model.text_model, {"embeddings.word_embeddings.weight": value}, (make_inputs(2, "text"),)
        )

    with pytest.raises(RuntimeError, match=r"set_backend\('torch'\)"):
        torch.func.jvp(encode, (weight,), (torch.ones_like(weight),))


def test_attention_is_what_it_was_after_the_switch():
    forms = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp", "math_sdp")
    read = [getattr(torch.backends.cuda, f"{form}_enabled") for form in forms]
    before = [one() for one in read]
    torch.backends.cuda.enable_mem_efficient_sdp(not before[1])
    changed = [one() for one in read]
    try:
        with set_backend("torch"):
            assert [one() for one in read] == [False, False, False, True]
            with set_backend("auto"):
                assert [one() for one in read] == changed
            with set_backend("torch"):
                pass
            assert not read[0]()
        assert [one() for one in read] == changed
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(before[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_right_for_other_batches_and_shorter_texts(family, choice, side):
    tower, x = Tower(make_family(family), side).eval(), make_inputs(2, side)
    other = make_inputs(5, side)
    if side == "text":
        x[0, 4:] = 0
        other[1:, 7:] = 0
        other[2] = 0
    with torch.no_grad(), set_backend(choice):
        traced = torch.jit.trace(tower, x)
        torch.testing.assert_close(traced(other), tower(other), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["RWKV", "ViT and BERT"])
def test_dynamic_quantisation_needs_no_switch(family):
    model = make_family(family)
    with torch.no_grad():
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        for side in ("image", "text"):
            x = make_inputs(3, side)
            found, expected = Tower(small, side)(x), Tower(model, side)(x)
            assert 0.98 < torch.cosine_similarity(found, expected).min() < 1 - 1e-7
    linear = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert 0 < linear == sum("dynamic" in type(module).__module__ for module in small.modules())
