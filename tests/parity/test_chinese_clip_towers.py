"""Chinese-CLIP's models against numbers of the released code: names, features, loss, all gradients, files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from rwkv_clip.config import ConfigError
from rwkv_clip.factory import load_checkpoint, parse_spec, resolve_spec
from rwkv_clip.models.chinese_clip import IMAGE_TOWERS, PREFIX, TEXT_TOWERS, fit_positions, rename, to_released

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


PART = Path(__file__).parent / "cn_clip" / "cn_clip_tiny_vit.pt"  # the ViT of cn_clip_tiny.pt; its ResNet has 4 MB


@pytest.fixture(scope="module")
def numbers():
    return torch.load(PART, weights_only=True)


@pytest.fixture(scope="module")
def resnet(shared):
    return torch.load(shared / "parity" / "cn_clip" / "cn_clip_tiny.pt", weights_only=True)["rn"]


@pytest.fixture(scope="module", params=["vit", "rn"])
def given(request, numbers):
    return numbers["vit"] if request.param == "vit" else request.getfixturevalue("resnet")


def build(given, tmp_path, **content):
    path = Path(tmp_path) / "clip_cn.pt"
    state = {f"module.{key}": value for key, value in given["state_dict"].items()}
    torch.save({"epoch": 15, "step": 0, "name": "x", "state_dict": state | content}, path)
    return rwkv_clip.create_model(given["config"], path)


def test_features_logits_and_loss(given, tmp_path):
    model = build(given, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(given["image"]), given["encode_image"], **CLOSE)
        torch.testing.assert_close(model.encode_text(given["text"]), given["encode_text"], **CLOSE)
        for side in ("image", "text"):  # as the README says
            own, theirs = getattr(model, f"encode_{side}")(given[side]), given[f"encode_{side}"]
            assert (own - theirs).norm() < 1e-6 * theirs.norm()
        image, text, scale = model(given["image"], given["text"])
    torch.testing.assert_close(image, given["image_features"], **CLOSE)
    torch.testing.assert_close(text, given["text_features"], **CLOSE)
    torch.testing.assert_close(scale, given["logit_scale"], **CLOSE)
    torch.testing.assert_close(scale * image @ text.T, given["logits_per_image"], **CLOSE)


@pytest.mark.parametrize("recompute", [False, True])
def test_all_gradients(given, tmp_path, recompute):
    model = build(given, tmp_path)
    model.set_grad_checkpointing(recompute)
    image, text, scale = model(given["image"], given["text"])
    logits, target = scale * image @ text.T, torch.arange(len(image))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, given["loss"], **CLOSE)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == {rename(key) for key in given["grads"]}
    for key, grad in given["grads"].items():
        own = found[rename(key)]
        own = torch.zeros_like(grad) if own is None else own
        assert (own - grad).norm() <= 2e-5 * grad.norm() + 1e-7, key


def test_keys_are_the_released_ones_both_ways(given):
    model = rwkv_clip.create_model(given["config"])
    released = to_released(model.state_dict())
    assert {k: v.shape for k, v in released.items()} == {k: v.shape for k, v in given["state_dict"].items()}
    assert [rename(key) for key in released] == list(model.state_dict())


@pytest.mark.parametrize("half", [False, True])
def test_seed_era_files_with_pooler_and_optimizer(given, tmp_path, half):
    width = given["config"]["text_hidden_size"]
    pooler = {f"module.bert.pooler.dense.{p}": torch.zeros(s) for p, s in (("weight", (width, width)), ("bias", width))}
    path = tmp_path / "old.pt"
    state = {
        f"module.{key}": v.half() if half and v.is_floating_point() else v for key, v in given["state_dict"].items()
    }
    state["module.bert.embeddings.position_ids"] = torch.arange(40)[None]
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 1, "step": 2, "name": "x", "state_dict": state | pooler, "optimizer": optimizer}, path)
    model = rwkv_clip.create_model(given["config"], path)
    own = to_released(model.state_dict())
    for key, value in given["state_dict"].items():
        assert own[key].dtype == value.dtype
        assert torch.equal(own[key], value.half().float() if half and value.is_floating_point() else value), key


def test_loading_is_strict(given, tmp_path):
    model = rwkv_clip.create_model(given["config"])
    state = dict(given["state_dict"])
    state["bert.encoder.layer.9.output.dense.bias"] = state.pop("bert.encoder.layer.1.output.dense.bias")
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"(?s)missing: text_model.*layer\.1.*unexpected: text_model.*layer\.9"):
        load_checkpoint(model, tmp_path / "plain.pt")


def test_layers_as_a_string(numbers):
    config = numbers["vit"]["config"] | {"vision_layers": [1, 1, 2, 1], "vision_patch_size": None, "vision_width": 8}
    text = str(config["vision_layers"]).replace(" ", "")
    assert parse_spec(config | {"vision_layers": text}) == parse_spec(config)
    assert parse_spec(config).resize_mode == "squash"
    for wrong in ("[1, 2, __import__('os')]", "3;4", None):
        with pytest.raises(ConfigError, match="vision_layers"):
            parse_spec(config | {"vision_layers": wrong})
    with pytest.raises(ConfigError, match=r"vision_widht: unknown key.*did you mean 'vision_width'"):
        parse_spec(config | {"vision_widht": 3})


def test_positions_are_resized(numbers, tmp_path):
    old, new = (numbers["pos_embed_resize"][key] for key in ("old", "new"))
    torch.testing.assert_close(fit_positions(old, len(new)), new, **CLOSE)
    assert fit_positions(old, len(old)) is old
    vit = numbers["vit"]
    torch.save(vit["state_dict"], tmp_path / "small.pt")
    model = rwkv_clip.create_model(vit["config"] | {"image_resolution": 84}, tmp_path / "small.pt")
    assert torch.equal(
        model.image_model.positional_embedding, fit_positions(vit["state_dict"]["visual.positional_embedding"], 50)
    )
    with pytest.raises(ValueError, match="square grid"):
        fit_positions(old, 40)


def test_sizes_of_the_released_models():
    """Totals that the released README prints, as the specification's exact sums have them."""
    with torch.device("meta"):
        counts = {}
        for name in IMAGE_TOWERS:
            model = resolve_spec(PREFIX + name)[1].build()
            towers = (model, model.image_model, model.text_model)
            counts[name] = tuple(sum(p.numel() for p in part.parameters()) for part in towers)
    assert counts["ViT-B-16"] == (188_262_913, 86_192_640, 101_677_056 + 768 * 512)
    image = {name: round(sizes[1] / 1e6) for name, sizes in counts.items()}
    assert image == {"ViT-B-16": 86, "ViT-B-32": 88, "ViT-L-14": 304, "ViT-L-14-336": 304, "ViT-H-14": 632, "RN50": 38}
    text = {name: round(counts[name][2] / 1e6) for name in ("ViT-H-14", "RN50")}
    assert text == {"ViT-H-14": 326, "RN50": 39}


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_every_preset_runs(name):
    """Without numbers: shapes only, the large ones have 4 GB of weights."""
    with torch.device("meta"):
        model = resolve_spec(PREFIX + name)[1].build()
        inputs = torch.zeros(2, 3, *model.spec.image_size), torch.zeros(2, 52, dtype=torch.int64)
        image, text, _ = model(*inputs)
    assert image.shape == text.shape == (2, model.spec.embed_dim)
    assert model.spec.image_size == ((336, 336) if name.endswith("336") else (224, 224))
    assert model.spec.tokenizer()("好")[0, :4].tolist() == [101, 1962, 102, 0]


def test_heads():
    with torch.device("meta"):
        heads = {}
        for name in ("ViT-B-16", "ViT-L-14", "ViT-H-14"):
            heads[name] = resolve_spec(PREFIX + name)[1].build().image_model.transformer.resblocks[0].attn.num_heads
        assert resolve_spec(PREFIX + "RN50")[1].build().image_model.attnpool.num_heads == 32
    assert heads == {"ViT-B-16": 12, "ViT-L-14": 16, "ViT-H-14": 16}


@pytest.mark.parametrize("image", IMAGE_TOWERS)
@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_structures(image, text):
    name, spec = resolve_spec(f"{image}@{text}")
    assert name == f"{image}@{text}" and spec.tokenizer_name == "bert-chinese" and spec.text.context == 52
    assert spec.image == resolve_spec(PREFIX + image)[1].image
    assert resolve_spec(spec.to_json())[1] == spec


def test_unknown_structures():
    with pytest.raises(ConfigError, match=r"(?s)'ViT-B-15'.*did you mean 'ViT-B-16'.*'RBT4-chinese'.*'RBT3-chinese'"):
        resolve_spec("ViT-B-15@RBT4-chinese")


@pytest.mark.parametrize("ratio", ["0.25", "0.5"])
def test_patches_are_masked_by_the_given_noise(numbers, tmp_path, monkeypatch, ratio):
    given = numbers["vit"]
    masked = {str(key): value for key, value in given["masked"].items()}[ratio]
    torch.save(given["state_dict"], tmp_path / "plain.pt")
    model = rwkv_clip.create_model(given["config"], tmp_path / "plain.pt", force_patch_dropout=float(ratio))
    whole = model.encode_image(given["image"])
    torch.testing.assert_close(whole, given["encode_image"], **CLOSE)
    monkeypatch.setattr(torch, "rand", lambda *size, device: masked["noise"])
    found = model.train().encode_image(given["image"])
    wanted = masked["image_features"]
    if wanted.norm(dim=-1).allclose(torch.ones(len(wanted))):
        found = F.normalize(found, dim=-1)
    torch.testing.assert_close(found, wanted, **CLOSE)
