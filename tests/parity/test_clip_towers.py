"""CLIP's towers, which open_clip builds, against what the released ALIP code says of them: names, shapes, function and
initial values; and the files that hold their weights: ALIP's, open_clip's, OpenAI's."""

import json
import math
import re
import warnings

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import rwkv_clip
from rwkv_clip.config import ConfigError
from rwkv_clip.factory import preprocess_of, resolve_spec
from rwkv_clip.models.openclip import QUICK, name_for_tag
from rwkv_clip.serialization import CheckpointError

HALF = (0.5, 0.5, 0.5)
TEXT = {"context_length": 9, "vocab_size": 60, "width": 24, "heads": 3, "layers": 2}
SMALL = {
    "ViT-B-32": {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3},
        "text_cfg": TEXT,
    },
    "RN50": {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
}


@pytest.fixture
def small(monkeypatch):
    """open_clip's ViT-B-32 and RN50, and their QuickGELU twins, are small; -> their descriptions."""
    for name, config in SMALL.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name + QUICK, config | {"quick_gelu": True})
    return SMALL


# ---- names and shapes, written down from the specification ----------------------------------------------------------


def norm(prefix, width):
    return {f"{prefix}.{part}": (width,) for part in ("weight", "bias")}


def linear(prefix, out, into):
    return {f"{prefix}.weight": (out, into), f"{prefix}.bias": (out,)}


def blocks(prefix, width, depth):
    shapes = {}
    for i in range(depth):
        p = f"{prefix}transformer.resblocks.{i}"
        shapes |= norm(f"{p}.ln_1", width) | norm(f"{p}.ln_2", width) | linear(f"{p}.attn.out_proj", width, width)
        shapes |= {f"{p}.attn.in_proj_weight": (3 * width, width), f"{p}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{p}.mlp.c_fc", 4 * width, width) | linear(f"{p}.mlp.c_proj", width, 4 * width)
    return shapes


def text_tower(embed, context=77, vocab=49408, width=512, depth=12):
    shapes = {"positional_embedding": (context, width), "text_projection": (width, embed), "logit_scale": ()}
    return shapes | {"token_embedding.weight": (vocab, width)} | norm("ln_final", width) | blocks("", width, depth)


def vit(embed, patch, size=224, width=768, depth=12):
    shapes = {"visual.class_embedding": (width,), "visual.proj": (width, embed)}
    shapes |= {"visual.positional_embedding": ((size // patch) ** 2 + 1, width)}
    shapes |= {"visual.conv1.weight": (width, 3, patch, patch)}
    return shapes | norm("visual.ln_pre", width) | norm("visual.ln_post", width) | blocks("visual.", width, depth)


def batch_norm(prefix, width):
    return norm(prefix, width) | {
        f"{prefix}.running_mean": (width,),
        f"{prefix}.running_var": (width,),
        f"{prefix}.num_batches_tracked": (),
    }


def resnet(embed, layers, size=224, width=64):
    shapes, into = {}, 3
    for i, out in enumerate((width // 2, width // 2, width), 1):
        shapes |= {f"visual.conv{i}.weight": (out, into, 3, 3)} | batch_norm(f"visual.bn{i}", out)
        into = out
    for layer, depth in enumerate(layers):
        inner = width * 2**layer
        for j in range(depth):
            p = f"visual.layer{layer + 1}.{j}"
            sizes = ((inner, into, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1))
            for i, shape in enumerate(sizes, 1):
                shapes |= {f"{p}.conv{i}.weight": shape} | batch_norm(f"{p}.bn{i}", shape[0])
            if j == 0:
                shapes |= {f"{p}.downsample.0.weight": (4 * inner, into, 1, 1)}
                shapes |= batch_norm(f"{p}.downsample.1", 4 * inner)
            into = 4 * inner
    shapes |= {"visual.attnpool.positional_embedding": ((size // 32) ** 2 + 1, into)}
    for part in "qkv":
        shapes |= linear(f"visual.attnpool.{part}_proj", into, into)
    return shapes | linear("visual.attnpool.c_proj", embed, into)


RELEASED = {
    "ViT-B-32": text_tower(512) | vit(512, 32),
    "ViT-B-16": text_tower(512) | vit(512, 16),
    "RN50": text_tower(1024) | resnet(1024, (3, 4, 6, 3)),
    "RN101": text_tower(512) | resnet(512, (3, 4, 23, 3)),
}
SMALL_SHAPES = {
    "ViT-B-32": text_tower(20, 9, 60, 24, 2) | vit(20, 8, 24, 32, 3),
    "RN50": text_tower(20, 9, 60, 24, 2) | resnet(20, (1, 2, 1, 1), 64, 8),
}


@pytest.mark.parametrize("name", RELEASED)
def test_keys_and_shapes_are_those_of_released_checkpoints(name):
    with torch.device("meta"):
        model = resolve_spec({"open_clip": open_clip.get_model_config(name)})[1].build()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == RELEASED[name]
    activations = [module for module in model.modules() if "GELU" in type(module).__name__]
    depth = sum(key.endswith("mlp.c_fc.bias") for key in RELEASED[name])
    assert len(activations) == depth and all(type(m) is nn.GELU and m.approximate == "none" for m in activations)
    count = sum(p.numel() for p in model.parameters())
    assert count == {"ViT-B-32": 151_277_313, "RN50": 102_007_137}.get(name, count)


# ---- files -----------------------------------------------------------------------------------------------------------


def draw(name) -> dict[str, torch.Tensor]:
    """Weights of a small model by the names of the specification."""
    generator, state = torch.Generator().manual_seed(7), {}
    for key, shape in SMALL_SHAPES[name].items():
        value = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            value = torch.tensor(1000)
        elif key.endswith("running_var"):
            value = value.abs() + 0.5
        elif len(shape) > 1:
            value = value / math.sqrt(value[0].numel())
        state[key] = value
    return state


def inputs(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = SMALL[name]["vision_cfg"]["image_size"]
    text = torch.randint(1, 50, (4, 9), generator=generator)
    text[torch.arange(4), torch.tensor([3, 8, 5, 2])] = 59  # the end of text, the largest id
    text[0, 4:] = 0
    return torch.randn(4, 3, size, size, generator=generator), text


def reference(state, image, text, heads, text_heads):
    """CLIP with ViT as the specification describes it, in the precision of the weights: image and text features."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def run(x, prefix, heads, mask):
        depth = sum(re.fullmatch(re.escape(prefix) + r"\d+\.ln_1\.weight", key) is not None for key in state)
        for p in (f"{prefix}{i}" for i in range(depth)):
            y = norm(x, f"{p}.ln_1") @ state[f"{p}.attn.in_proj_weight"].T + state[f"{p}.attn.in_proj_bias"]
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in y.chunk(3, -1))
            y = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v
            x = x + F.linear(y.transpose(1, 2).flatten(2), *linear(f"{p}.attn.out_proj"))
            y = F.linear(norm(x, f"{p}.ln_2"), *linear(f"{p}.mlp.c_fc"))
            x = x + F.linear(y * (1 + torch.erf(y / 2**0.5)) / 2, *linear(f"{p}.mlp.c_proj"))
        return x

    def linear(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    patches = F.conv2d(image, kernel := state["visual.conv1.weight"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(image), 1, -1), patches], 1)
    x = run(norm(x + state["visual.positional_embedding"], "visual.ln_pre"), "visual.transformer.resblocks.", heads, 0)
    of_image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    x = state["token_embedding.weight"][text] + state["positional_embedding"]
    mask = x.new_full((text.shape[1],) * 2, float("-inf")).triu(1)
    x = norm(run(x, "transformer.resblocks.", text_heads, mask), "ln_final")
    return of_image, x[torch.arange(len(text)), text.argmax(-1)] @ state["text_projection"]


def test_a_released_alip_checkpoint_computes_what_the_specification_says(small, tmp_path):
    state = draw("ViT-B-32")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "model_31.pt")
    loaded = rwkv_clip.load_for_inference(tmp_path / "model_31.pt", model="ViT-B/32")
    assert loaded.name == "ViT-B-32" and len(loaded.digest) == 64
    image, text = inputs("ViT-B-32")
    expected = reference({k: v.double() for k, v in state.items()}, image.double(), text, heads=4, text_heads=3)
    model = loaded.model.double()
    for ours, exact in zip((model.encode_image(image.double()), model.encode_text(text)), expected):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    ours = model(image.double(), text)
    torch.testing.assert_close(ours[0] @ ours[1].T, F.normalize(expected[0]) @ F.normalize(expected[1]).T)
    torch.testing.assert_close(ours[2], state["logit_scale"].double().exp())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["alip", "open_clip", "openai"])
def test_files_of_weights_load_strictly(small, tmp_path, kind, name):
    state, file = draw(name), tmp_path / "weights.pt"
    content = {f"module.{key}": value for key, value in state.items()}
    if kind == "open_clip":
        slots = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}
        optimizer = {"state": slots, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98), "params": [0]}]}
        content = {"epoch": 3, "name": "run", "state_dict": content, "optimizer": optimizer, "scaler": {"scale": 4.0}}
    if kind == "openai":
        content = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        content |= {key: torch.tensor(9) for key in ("input_resolution", "context_length", "vocab_size")}
        state, name = {key: value.half() for key, value in state.items()}, name + QUICK
    torch.save(content, file)
    model = rwkv_clip.create_model(name, pretrained=file)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in model.state_dict().items())
    image, text = inputs(name.removesuffix(QUICK))
    direct = open_clip.CLIP(**open_clip.get_model_config(name)).eval()
    direct.load_state_dict(model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(model(image, text), direct(image, text)))
    weights = content.get("state_dict", content)
    del weights[next(key for key in weights if "ln_final.bias" in key)]
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"missing: ln_final\.bias"):
        rwkv_clip.create_model(name, pretrained=file)


def test_openai_weights_in_a_model_of_exact_gelu_are_remarked(small, tmp_path, caplog):
    torch.save(draw("RN50") | {"input_resolution": torch.tensor(64)}, tmp_path / "openai.pt")
    rwkv_clip.create_model("RN50-quickgelu", pretrained=tmp_path / "openai.pt")
    assert "QuickGELU" not in caplog.text
    rwkv_clip.create_model("RN50", pretrained=tmp_path / "openai.pt")
    assert "trained with QuickGELU" in caplog.text and "openai.pt" in caplog.text


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive_is_refused(small, tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"ViT-B-32\.pt: is a TorchScript archive.*open_clip:ViT-B-32:openai"):
        rwkv_clip.load_for_inference(tmp_path / "ViT-B-32.pt", model="ViT-B-32")


# ---- tags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tag", "taken"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32"),
        ("RN50", "yfcc15m", "RN50-quickgelu"),
    ],
)
def test_weights_of_a_tag_get_the_function_that_they_were_trained_as(
    small, tmp_path, monkeypatch, caplog, name, tag, taken
):
    state = draw(name.removesuffix(QUICK))
    torch.save(state, tmp_path / "fetched.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "fetched.pt"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = rwkv_clip.load_for_inference(f"open_clip:{name}:{tag}")
    model, (_, text) = loaded.model, inputs(name.removesuffix(QUICK))
    assert not [w for w in warned if "GELU" in str(w.message)]
    assert ("using this model" in caplog.text) == (name != taken)
    kinds = {type(module).__name__ for module in model.modules() if "GELU" in type(module).__name__}
    assert kinds == {"QuickGELU" if taken.endswith(QUICK) else "GELU"} and model.spec.to_json() == {"open_clip": taken}
    again = rwkv_clip.create_model(model.spec)  # what a checkpoint of a run from these weights does
    again.load_state_dict(state)
    assert torch.equal(again.encode_text(text), model.encode_text(text))
    other = rwkv_clip.create_model(taken.removesuffix(QUICK) if taken.endswith(QUICK) else taken + QUICK)
    other.load_state_dict(state)
    assert not torch.allclose(other.encode_text(text), model.encode_text(text), rtol=1e-3)


def test_pixels_of_a_tag_are_those_of_its_checkpoints(small, tmp_path, monkeypatch):
    """Some weights (SigLIP) were trained on pixels from -1 to 1; a run that starts from them goes on so."""
    torch.save(draw("ViT-B-32"), tmp_path / "fetched.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "fetched.pt"))
    tag = open_clip.pretrained._PRETRAINED["ViT-B-32"]["laion2b_e16"]
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-32"], "laion2b_e16", {**tag, "mean": HALF, "std": HALF})
    model = rwkv_clip.create_model("ViT-B-32", "laion2b_e16")
    again = rwkv_clip.create_model(json.loads(json.dumps(model.spec.to_json())))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8))
    seen = preprocess_of(again)(picture)
    assert model.spec.pixels == again.spec.pixels == (again.visual.image_mean, again.visual.image_std) == (HALF, HALF)
    assert torch.equal(preprocess_of(model)(picture), seen) and seen.min() < -0.9
    assert rwkv_clip.create_model("ViT-B-32").spec.to_json() == {"open_clip": "ViT-B-32"}, "nothing for CLIP's own"


def test_every_tag_finds_its_function():
    for name, tag in open_clip.list_pretrained():
        taken, quick = name_for_tag(name, tag), open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        config, own = open_clip.get_model_config(taken), open_clip.get_model_config(name)
        if tag != "laion2b_s12b_b32k":  # of roberta-ViT-B-32, whose tag does not say; its description does
            assert config.pop("quick_gelu", False) == quick, (name, tag)
        own.pop("quick_gelu", None), config.pop("quick_gelu", None)
        assert config == own, f"{taken} differs from {name} in more than the activation"


def test_a_tag_that_fits_nothing_is_refused(small, monkeypatch, tmp_path):
    for name, tag, message in (
        ("ViT-B-32", "openia", "'openia' is neither a file nor a tag of ViT-B-32; open_clip's tags: openai, laion400m"),
        ("ViT-B-32", str(tmp_path / "none.pt"), "neither a file"),
        ("coca_base", "openai", "open_clip's tags: none"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            rwkv_clip.create_model(name, pretrained=tag)
    with pytest.raises(CheckpointError, match="no such file"):
        rwkv_clip.create_model(SMALL["ViT-B-32"], pretrained="openai")
    monkeypatch.delitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu")
    with pytest.raises(ConfigError, match=r"QuickGELU, which ViT-B-32 does not compute; .*\"quick_gelu\": true"):
        rwkv_clip.create_model("ViT-B-32", pretrained="openai")


# ---- initial values --------------------------------------------------------------------------------------------------

# Standard deviations by name, of weights of width w and depth L; the towers' biases and norms are not drawn by CLIP.
TEXT_STD = {
    r"token_embedding\.weight": 0.02,
    r"positional_embedding": 0.01,
    r"text_projection": 512**-0.5,
    r"transformer\..*attn\.in_proj_weight": 512**-0.5,
    r"transformer\..*(attn\.out_proj|mlp\.c_proj)\.weight": 512**-0.5 * 24**-0.5,
    r"transformer\..*mlp\.c_fc\.weight": 1024**-0.5,
}
STD = {
    "ViT-B-32": {
        r"visual\.(class_embedding|positional_embedding|proj)": 768**-0.5,
        r"visual\.conv1\.weight": (3 * 3072) ** -0.5,  # PyTorch's defaults from here on
        r"visual\..*attn\.in_proj_weight": (2 / (768 + 2304)) ** 0.5,
        r"visual\..*(attn\.out_proj|mlp\.c_fc)\.weight": (3 * 768) ** -0.5,
        r"visual\..*mlp\.c_proj\.weight": (3 * 3072) ** -0.5,
    },
    "RN50": {
        r"visual\.attnpool\.([qkvc]_proj\.weight|positional_embedding)": 2048**-0.5,
        r"visual\..*bn3\.weight": 0,
    },
}


@pytest.mark.parametrize("name", STD)
def test_initial_values(name):
    torch.manual_seed(0)
    parameters, seen = dict(resolve_spec(name)[1].build().named_parameters()), set()
    assert parameters.pop("logit_scale").item() == pytest.approx(math.log(1 / 0.07))
    for key, value in parameters.items():
        rules = [(rule, std) for rule, std in (TEXT_STD | STD[name]).items() if re.fullmatch(rule, key)]
        value = value.detach()
        if key == "visual.bn3.weight":  # of the stem; blocks begin as their shortcut, the stem has none
            assert (value == 1).all()
        elif rules:
            (rule, std), within = rules[0], 0.02 + 4 * (2 * value.numel()) ** -0.5
            seen.add(rule)
            assert len(rules) == 1 and value.std() == pytest.approx(std, rel=within), key
            assert abs(value.mean()) <= 5 * std / value.numel() ** 0.5, key
        elif key.endswith(("in_proj_bias", "out_proj.bias")) or re.search(r"(ln_\w+|bn\d|downsample\.1)\.bias", key):
            assert not value.any(), key
        elif re.search(r"(ln_\w+|bn\d|downsample\.1)\.weight", key):
            assert (value == 1).all(), key
        else:  # PyTorch's defaults
            fan_in = parameters[key.replace("bias", "weight")][0].numel()
            assert value.abs().max() <= fan_in**-0.5, key
    assert seen == {*TEXT_STD, *STD[name]}
