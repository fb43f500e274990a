"""Packed linear layers: what nn.Linear computes, moved, cast, copied and saved like one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv_clip import create_model
from rwkv_clip.models import packed
from rwkv_clip.models.packed import PackedLinear, pack_weights, sizes_of
from rwkv_clip.models.rwkv_block import Mixing
from rwkv_clip.ops.backend import set_backend

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here"),
    ),
]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    monkeypatch.setattr(packed, "_gains", lambda: True)


def make(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    plain = nn.Linear(40, 24, bias=bias).to(dtype)
    return plain, PackedLinear(copy.deepcopy(plain))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (2, 3, 40), (1, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape, bias):
    plain, layer = make(dtype, bias)
    with torch.inference_mode():
        for x in (torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 80, dtype=dtype)[..., ::2]):
            found = layer(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found, plain(x), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_kept_to_the_bit(dtype):
    plain, layer = make(dtype)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu"), layer.to(dtype)):
        assert one._packed is not None
        state = one.state_dict()
        assert state.keys() == {"weight", "bias"}
        assert all(torch.equal(state[name], plain.state_dict()[name]) for name in state)
    wide = layer.double()
    assert wide._packed is None and wide.weight.dtype == torch.float64
    x = torch.randn(3, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), copy.deepcopy(plain).double()(x))
    with pytest.raises(RuntimeError, match=r"^weight: is packed.*create_model"):
        layer.load_state_dict(plain.state_dict())


def test_training_is_refused():
    _, layer = make()
    layer.eval()
    with pytest.raises(RuntimeError, match=r"packed for encoding are not trained.*create_model"):
        nn.Sequential(layer).train()


def test_gradients_pass_through():
    plain, layer = make()
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(found, expected)


def calls_of(layer, x):
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    return {event.key for event in profile.key_averages()}


def test_the_packed_product_is_what_runs():
    _, layer = make()
    x = torch.randn(3, 40)
    assert "mkldnn::_linear_pointwise" in calls_of(layer, x)
    with set_backend("torch"):
        assert "mkldnn::_linear_pointwise" not in calls_of(layer, x)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"cannot be recorded.*create_model"):
            torch.export.export(layer, (x,))
        traced = torch.jit.trace(layer, x)  # it reads what modules have, and so gets the weight plain
        torch.testing.assert_close(traced(x + 1), layer(x + 1))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here")
def test_under_autocast():
    plain, layer = make(torch.bfloat16)
    x = torch.randn(3, 40)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        torch.testing.assert_close(found, plain(x), **CLOSE[torch.bfloat16])
        wide = make()[1]
        assert wide(x).dtype == torch.bfloat16  # weights in float32: as nn.Linear
        torch.testing.assert_close(wide(x), make()[0](x))


@pytest.mark.parametrize("name", ["RWKV-CLIP-Ti-8", "ViT-Ti-8", "CN-CLIP-Ti-8"])
def test_features_of_a_model(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    image, text = torch.rand(2, 3, *model.spec.image_size), torch.randint(1, 90, (2, model.context_length))
    with torch.inference_mode():
        expected = model.encode_image(image), model.encode_text(text)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        assert pack_weights(model) is model and any(isinstance(module, PackedLinear) for module in model.modules())
        assert not any(
            isinstance(child, PackedLinear)
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention)
            for child in module.children()
        )
        for found, wanted in zip((model.encode_image(image), model.encode_text(text)), expected):
            assert F.cosine_similarity(found, wanted).min() > 1 - 1e-6
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_who_reads_a_weight_gets_it_plain_from_then_on():
    plain, layer = make()
    layer.state_dict(), copy.deepcopy(layer), layer(torch.randn(3, 40))  # with gradients
    assert layer._packed is not None
    assert torch.equal(layer.weight, plain.weight) and layer.weight is layer.weight and layer._packed is None
    x = torch.randn(3, 40)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


def test_wrong_sizes_are_refused_as_by_a_linear_layer():
    plain, layer = make()
    for shape in [(3, 39), (0, 39), ()]:
        said = []
        for one in (plain, layer):
            with torch.no_grad(), pytest.raises(RuntimeError) as error:
                one(torch.zeros(shape))
            said.append(str(error.value))
        assert said[0] == said[1]


def test_a_resnet_is_packed_but_for_its_pool():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 1, "layers": 1}
    model = create_model({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode_image(image)
        pack_weights(model)
        torch.testing.assert_close(model.encode_image(image), expected)
    assert all(layer._packed is None for name, layer in model.visual.attnpool.named_children())


@pytest.mark.parametrize("name", ["RWKV-CLIP-Ti-8", "ViT-Ti-8"])
def test_parameters_are_counted_as_before(name):
    model = create_model(name)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sizes_of(model) == sizes == sizes_of(pack_weights(model))


@pytest.mark.parametrize("way", ["train", "with gradients", "load"])
def test_coefficients_follow_weights_that_change(monkeypatch, way):
    monkeypatch.setattr(packed, "_gains", lambda: False)
    torch.manual_seed(0)
    model, image = pack_weights(create_model("RWKV-CLIP-Ti-8")), torch.rand(1, 3, 32, 32)
    other = create_model("RWKV-CLIP-Ti-8")
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if way == "load":
        model.load_state_dict(other.state_dict())
    else:
        model.train(way == "train")
        model.encode_image(image).sum().backward()
        for parameter, wanted in zip(model.parameters(), other.parameters()):
            parameter.data.copy_(wanted)
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(image), other.eval().encode_image(image))


def test_other_processors_keep_their_layers(monkeypatch):
    monkeypatch.setattr(packed, "_gains", lambda: False)
    model = create_model("RWKV-CLIP-Ti-8")
    assert not any(isinstance(module, PackedLinear) for module in pack_weights(model).modules())


@pytest.mark.parametrize("processor", ["packs", "does not"])
def test_coefficients_are_found_once_without_gradients(monkeypatch, processor):
    monkeypatch.setattr(packed, "_gains", lambda: processor == "packs")
    model = create_model("RWKV-CLIP-Ti-8").eval()
    image = torch.rand(2, 3, *model.spec.image_size)
    keys = model.state_dict().keys()
    with torch.no_grad():
        expected = model.encode_image(image)
    mixing = [module for module in pack_weights(model).modules() if isinstance(module, Mixing)]
    assert len(mixing) == 2 * (model.image_model.config.depth + model.text_model.config.depth)
    assert model.state_dict().keys() == keys
    monkeypatch.setattr(torch, "cat", None)  # what they are made with
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    model.encode_image(image).sum().backward()
    att = model.image_model.layers[0].att
    assert all(getattr(att, f"time_maa_{name}").grad is not None for name in "xwkvrg")
