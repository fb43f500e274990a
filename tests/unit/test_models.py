"""Models by family: towers chosen apart, features by name, descriptions that are read and written."""

import copy
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from helpers.tiny import MODEL, make_tiny
from rwkv_clip.checkpoint import read_description, save_checkpoint
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.recordio import Header, RecordWriter, pack
from rwkv_clip.data.records import RecordSet
from rwkv_clip.factory import parse_spec
from rwkv_clip.models.freezing import FreezeSettings, freeze_parameters
from rwkv_clip.models.specification import FAMILIES, Encoded
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.training.checks import check_records
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

RWKV_IMAGE = {"image_size": [32, 48], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 8, "width": 48, "depth": 2, "heads": 2, "ffn_width": 64}
VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TRANSFORMER = {"context_length": 8, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2}
DIM = 24
MODELS = {
    "one width": {"image": RWKV_IMAGE, "text": RWKV_TEXT | {"width": 32}},
    "class token": {"image": RWKV_IMAGE | {"class_token": True}, "text": RWKV_TEXT | {"width": 32}},
    "two widths": {"embed_dim": DIM, "image": RWKV_IMAGE, "text": RWKV_TEXT},
    "open_clip text": {"embed_dim": DIM, "image": RWKV_IMAGE, "text": {"kind": "open_clip", **TRANSFORMER}},
    "open_clip image": {"embed_dim": DIM, "image": {"kind": "open_clip", **VIT}, "text": RWKV_TEXT},
    "both kinds named": {
        "embed_dim": DIM,
        "image": {"kind": "open_clip", **VIT, "pool_type": "avg", "quick_gelu": True},
        "text": {"kind": "open_clip", **TRANSFORMER, "pool_type": "last", "proj_bias": True},
    },
    "ViT": {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
    "custom text": {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "custom_text": True},
    "ViT with a bias": {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "init_logit_bias": -10.0},
    "ResNet": {"embed_dim": DIM, "vision_cfg": RESNET, "text_cfg": TRANSFORMER},
}
MIXTURES = ["two widths", "open_clip text", "open_clip image", "both kinds named"]
WIDTHS = {"one width": (32, 32), "class token": (32, 32), "two widths": (32, 48), "open_clip text": (32, 48)}
WIDTHS |= dict.fromkeys(["open_clip image", "both kinds named", "ViT", "custom text", "ViT with a bias"], (64, 48))
EXTRAS = ("image_pooled", "text_pooled", "image_tokens", "text_tokens")


def build(name: str) -> torch.nn.Module:
    """A model of seed 0 whose parameters have left their initial zeros."""
    torch.manual_seed(0)
    model = rwkv_clip.create_model(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs(model: torch.nn.Module, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 3, *model.spec.image_size, generator=generator)
    return image, torch.randint(1, model.spec.vocabulary, (count, model.context_length), generator=generator)


# ---- features by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_dict_holds_the_features_of_the_tuple(name):
    model = build(name)
    image, text = inputs(model)
    expected, found = model(image, text), model(image, text, needs=("image", "text"))
    names = ["image", "text", "logit_scale", "logit_bias"][: len(expected)]
    assert list(found) == names and all(torch.equal(found[key], value) for key, value in zip(names, expected))
    width = 32 if name in ("one width", "class token") else DIM
    assert found["image"].shape == found["text"].shape == (3, width)
    assert found["logit_scale"].shape == () and found["logit_scale"] == model.logit_scale.exp()
    torch.testing.assert_close(found["text"].norm(dim=-1), torch.ones(3))
    for side, alone in (("image", model(image, needs=["image"])), ("text", model(text=text, needs=["image", "text"]))):
        assert [key for key in alone if "logit" not in key] == [side] and torch.equal(alone[side], found[side])
    assert model(image, None)[1] is None and model(None, text)[0] is None


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("training", [False, True])
def test_pooled_and_tokens_of_one_pass(name, training):
    """The tower runs once, and its features keep their bits."""
    model = build(name).train(training)
    image, text = inputs(model)
    blocks = [module for module in model.modules() if type(module).__name__ in ("Block", "ResidualAttentionBlock")]
    calls = []
    hooks = [block.register_forward_hook(lambda block, *_: calls.append(block)) for block in blocks]
    found = model(image, text, needs=("image", "text", *EXTRAS))
    assert sorted(map(id, calls)) == sorted(map(id, blocks))
    for hook in hooks:
        hook.remove()
    plain = model(image, text)
    assert torch.equal(found["image"], plain[0]) and torch.equal(found["text"], plain[1])
    patches = 6 if model.spec.image_size == (32, 48) else 4
    lengths = {"text": 8, "image": patches + (patches == 4 or name == "class token")}
    for side, width in zip(("image", "text"), WIDTHS[name]):
        assert found[f"{side}_tokens"].shape == (3, lengths[side], width)
        assert found[f"{side}_pooled"].shape == (3, width)
    assert torch.equal(model(image, needs=["image_tokens"])["image_tokens"], found["image_tokens"])
    sum(value.float().square().sum() for value in found.values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "logit_bias" not in name)


def test_what_pooled_and_tokens_are():
    model = build("two widths")
    image, text = inputs(model)
    found = model(image, text, needs=EXTRAS)
    assert torch.equal(found["image_tokens"], model.image_model.forward_tokens(image))
    torch.testing.assert_close(found["image_pooled"], found["image_tokens"].mean(1))
    torch.testing.assert_close(found["text_pooled"], F.normalize(found["text_tokens"], dim=-1).mean(1))
    torch.testing.assert_close(found["image"], F.normalize(found["image_pooled"] @ model.image_model.proj, dim=-1))
    vit = build("ViT")
    image, text = inputs(vit)
    found = vit(image, text, needs=EXTRAS)
    assert torch.equal(found["image_pooled"], found["image_tokens"][:, 0]), "the class token comes first"
    assert torch.equal(found["text_pooled"], found["text_tokens"][torch.arange(3), text.argmax(-1)])
    torch.testing.assert_close(found["text"], F.normalize(found["text_pooled"] @ vit.text_projection, dim=-1))


def test_names_that_are_not_known_or_not_given():
    model, resnet = build("one width"), build("ResNet")
    with pytest.raises(
        ValueError, match=r"needs: unknown 'image_token'; valid names: image, text, image_pooled, .*text_tokens"
    ):
        model(*inputs(model), needs=["image", "image_token"])
    image, text = inputs(resnet)
    assert {"text_tokens", "image"} <= resnet(image, text, needs=["text_tokens"]).keys()
    for name in ("image_pooled", "image_tokens"):
        with pytest.raises(ValueError, match="open_clip's ModifiedResNet does not give image_pooled or image_tokens"):
            resnet(image, text, needs=[name])
    for change in ({"final_ln_after_pool": True}, {"attentional_pool": True, "attn_pooler_heads": 2}):
        vit = rwkv_clip.create_model({"embed_dim": DIM, "vision_cfg": VIT | change, "text_cfg": TRANSFORMER})
        with pytest.raises(ValueError, match="does not give image_pooled"):
            vit(*inputs(vit), needs=["image_tokens"])


def test_open_clips_classes_stay_theirs(monkeypatch):
    """Also of a model by name: deep copies, pickles and isinstance work, and nothing is bound to the instance."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", MODELS["ViT"])
    coca = {
        **MODELS["ViT"],
        "vision_cfg": VIT | {"attentional_pool": True, "output_tokens": True, "attn_pooler_heads": 2},
    }
    coca |= {"text_cfg": TRANSFORMER | {"embed_cls": True, "output_tokens": True}, "custom_text": True}
    coca |= {"multimodal_cfg": {"context_length": 8, "width": 48, "heads": 2, "layers": 1}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "coca_base", coca)
    for name, theirs in (("ViT-B-32", open_clip.CLIP), ("coca_base", open_clip.CoCa)):
        model = rwkv_clip.create_model(name)
        assert isinstance(model, theirs) and type(model).__name__ == theirs.__name__
        image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 8))
        kept = io.BytesIO()
        torch.save(model, kept)
        kept.seek(0)
        for copied in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
            found = copied(image, text, needs=["image", "text"])
            assert torch.equal(found["text"], model.encode_text(text, normalize=True))
        assert not {"forward", "encode_image"} & vars(model).keys()


def test_features_by_name_of_a_compiled_model():
    model = build("open_clip text").train()
    image, text = inputs(model)
    expected = model(image, text, needs=EXTRAS)
    model.compile(backend="aot_eager")
    found = model(image, text, needs=EXTRAS)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


# ---- towers chosen apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_trains_and_comes_back(name, tmp_path):
    model = build(name).train()
    model.set_grad_checkpointing(True)
    image, text = inputs(model)
    features, texts, scale = model(image, text)
    F.cross_entropy(scale * features @ texts.T, torch.arange(3)).backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent and model.image_model.proj.grad.abs().max() > 0
    state = {"model": "mixture", "spec": model.spec.to_json(), "samples_seen": 0}
    path = save_checkpoint(tmp_path, 1, model.state_dict(), {}, state, keep=2)
    loaded = rwkv_clip.load_for_inference(path)
    model.eval()
    assert loaded.model.spec == model.spec and loaded.model.spec.to_json() == read_description(path)["spec"]
    assert all(torch.equal(*pair) for pair in zip(loaded.model(image, text), model(image, text)))
    assert loaded.tokenizer(["a dog"]).shape == (1, 8) and loaded.tokenizer.name == "clip-bpe"
    half = rwkv_clip.create_model(MODELS[name], precision="bf16")
    assert half(image.bfloat16(), text)[0].dtype == torch.bfloat16


def test_projections_are_named_and_drawn_as_clips():
    wide = {
        "embed_dim": 512,
        "image": RWKV_IMAGE | {"width": 128, "heads": 4},
        "text": RWKV_TEXT | {"width": 192, "heads": 4},
    }
    torch.manual_seed(0)
    parameters = dict(rwkv_clip.create_model(wide).named_parameters())
    torch.manual_seed(0)
    ours = rwkv_clip.create_model({key: wide[key] | {"width": 128, "heads": 4} for key in ("image", "text")})
    assert {key for key in parameters if "proj" in key.rsplit(".", 1)[-1]} == {"image_model.proj", "text_model.proj"}
    for side, width in (("image", 128), ("text", 192)):
        projection = parameters[f"{side}_model.proj"].detach()
        assert projection.shape == (width, 512) and projection.std() == pytest.approx(width**-0.5, rel=0.02)
    assert not [key for key, _ in ours.named_parameters() if key.endswith("proj")], "none where none is asked for"
    mixed = dict(build("open_clip text").named_parameters())
    assert mixed["text_model.text_projection"].shape == (48, DIM), "open_clip's towers bring theirs"


def test_records_and_vocabulary_of_a_mixture(tmp_path):
    small = MODELS["open_clip text"] | {"text": {"kind": "open_clip", **TRANSFORMER, "vocab_size": 99}}
    assert parse_spec(MODELS["open_clip text"]).vocabulary == 49408 and parse_spec(small).vocabulary == 99
    with RecordWriter(tmp_path / "x") as writer:
        for i in range(3):
            writer.write(i, pack(Header(0, np.full(24, i, np.float32), i, 0), b"picture"))
    side = {"views": ["raw", "synthetic", "generated"], "context": 8, "tokenizer": "clip-bpe", "vocab_size": 49408}
    (tmp_path / "x.json").write_text(json.dumps({"schema": 1, **side}))
    check_records(RecordSet(tmp_path / "x"), parse_spec(MODELS["open_clip text"]), "x")
    with pytest.raises(ConfigError, match="a vocabulary of 49408, the model's has 99"):
        check_records(RecordSet(tmp_path / "x"), parse_spec(small), "x")


def test_a_run_of_a_mixture_resumes(tmp_path):
    data = make_tiny(tmp_path)
    image = MODELS["open_clip text"]["image"] | {"image_size": [32, 32], "drop_path": 0.2}
    (tmp_path / "model.json").write_text(json.dumps(MODELS["open_clip text"] | {"image": image}))
    short = {**data, "name": "run", "max_steps": 6, "schedule": "constant", "cycle_beta1": False}
    run(parse(Settings, short))
    folder = run(parse(Settings, {**short, "max_steps": 6, "resume": "latest"}))
    assert rwkv_clip.load_for_inference(folder).model.spec.text.context == 8


class ToySpec:
    """A family of text towers: what its file has to hold."""

    own_width, default_tokenizer, context, vocabulary = None, "clip-bpe", 8, 49408

    @classmethod
    def parse(cls, table):
        assert table == {"size": 3}
        return cls()

    def to_json(self):
        return {"kind": "toy", "size": 3}

    def build(self, embed_dim):
        tower = torch.nn.EmbeddingBag(self.vocabulary, embed_dim)
        tower.lock = lambda unlocked: tower.requires_grad_(False)
        tower.set_grad_checkpointing = lambda enable: None
        return tower

    def encode(self, tower, text):
        return Encoded(tower(text), tower(text), tower.weight[text])

    def tokenizer(self, name):
        return make_tokenizer(name, self.context)


def test_a_new_family_is_one_file_and_one_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "rwkv_clip.models.toy", SimpleNamespace(TOWERS={"text": ToySpec}))
    monkeypatch.setitem(FAMILIES, "toy", "toy")
    description = {"embed_dim": DIM, "image": RWKV_IMAGE, "text": {"kind": "toy", "size": 3}}
    model = rwkv_clip.create_model(description)
    found = model(*inputs(model), needs=["image_tokens", "text_tokens"])
    assert found["text_tokens"].shape == (3, 8, DIM) and found["text"].shape == found["image"].shape
    assert model.spec.to_json()["text"] == description["text"] and rwkv_clip.get_tokenizer(description).context == 8
    assert "text_model.weight" in freeze_parameters(model, FreezeSettings(lock_text=True))
    with pytest.raises(ConfigError, match=r"image\.kind: 'toy' has no image tower, only text"):
        rwkv_clip.create_model(description | {"image": {"kind": "toy"}})


# ---- descriptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_descriptions_survive_json(name):
    spec = parse_spec(MODELS[name])
    written = json.loads(json.dumps(spec.to_json()))
    assert written == spec.to_json() and parse_spec(written) == spec and parse_spec(written).to_json() == written
    model = build(name)
    assert model.spec == spec and spec.image_size == model.spec.image_size


def test_descriptions_are_written_as_ever():
    """Checkpoints hold them and resumption compares them; caches of features are found by their repr."""
    spec = parse_spec({})
    image = {"image_size": [224, 224], "patch": 32, "width": 640, "depth": 12, "heads": 8, "ffn_width": 3200}
    image |= {"norm_eps": 1e-05, "drop_path": 0.0, "class_token": False}
    text = {"context": 77, "vocab": 49408, "width": 640, "depth": 6, "heads": 10, "ffn_width": 2240}
    text |= {"norm_eps": 0.00064, "rwkv_init": True}
    assert json.dumps(spec.to_json()) == json.dumps({"image": image, "text": text, "tokenizer": "clip-bpe"})
    assert repr(spec) == (
        "ModelConfig(image=ImageTowerConfig(image_size=(224, 224), patch=32, width=640, depth=12, heads=8, "
        "ffn_width=3200, norm_eps=1e-05, drop_path=0.0, class_token=False), text=TextTowerConfig(context=77, "
        "vocab=49408, width=640, depth=6, heads=10, ffn_width=2240, norm_eps=0.00064, rwkv_init=True), "
        "tokenizer='clip-bpe')"
    )
    named = parse_spec({"open_clip": "ViT-B-32"})
    assert named.to_json() == {"open_clip": "ViT-B-32"} and repr(named) == "{'open_clip': 'ViT-B-32'}"
    assert parse_spec(MODELS["ViT"]).to_json() == {"open_clip": MODELS["ViT"]}
    assert (named.image_size, named.vocabulary) == ((224, 224), 49408)
    assert parse_spec({"open_clip": "ViT-SO400M-14-SigLIP"}).vocabulary == 32000
    assert parse_spec({"open_clip": "xlm-roberta-base-ViT-B-32"}).vocabulary is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": {"kind": "rwkw"}}, r"image\.kind: 'rwkw' is not a family of towers; did you mean 'rwkv'\?"),
        ({"text": {"kind": "mamba"}}, r"text\.kind: 'mamba' is not a family of towers; valid names: rwkv, open_clip"),
        ({"text": {"kind": ["rwkv"]}}, r"text\.kind: \['rwkv'\] is not a family"),
        ({"image": {"kind": "open_clip", "witdh": 3}}, r"image\.witdh: unknown setting; did you mean 'width'\?"),
        ({"text": {"kind": "open_clip", "hf_model_name": "x"}}, r"text\.hf_model_name: unknown setting"),
        (
            {"text": {"kind": "open_clip", "width": 50, "heads": 3}},
            r"text: open_clip cannot build \['heads', 'width'\]",
        ),
        ({"image": {"kind": "open_clip", "patch_size": 0}}, r"image: open_clip cannot build \['patch_size'\]"),
        ({"image": {"kind": "open_clip", "width": "wide"}}, r"image\.width: 'wide' is not a positive whole number"),
        (
            {"text": {"kind": "open_clip", "context_length": 0}},
            r"text\.context_length: 0 is not a positive whole number",
        ),
        ({"image": {"kind": "open_clip", "patch_size": "x"}}, r"image: open_clip cannot build \['patch_size'\]"),
        ({"image": {"pixels": 3}}, r"image\.pixels: unknown setting"),
        ({"text": {"side": "image"}}, r"text\.side: unknown setting"),
        ({"imgae": {}}, r"imgae: unknown setting; did you mean 'image'\?"),
        ({"embed_dim": 0}, r"embed_dim: 0 must be at least 1"),
        ({"embed_dim": None}, r"text\.width: 48 differs from image\.width 32; .*embed_dim"),
        ({"embed_dim": None, "text": {"kind": "open_clip"}}, r"embed_dim: missing; the text tower"),
        ({"text": 3}, r"text: expected a table of settings, got 3"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        rwkv_clip.create_model(MODELS["two widths"] | change)


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"open_clip": "ViT-B-33"},
            r"open_clip: 'ViT-B-33' is neither a model of open_clip's nor a table; did you mean",
        ),
        ({"open_clip": 3}, r"open_clip: 3 is neither"),
        ({"open_clip": "ViT-B-32", "pixel": 3}, r"pixel: unknown setting; did you mean 'pixels'"),
        ({"open_clip": "ViT-B-32", "pixels": [0.5]}, r"pixels: \[0\.5\] is not two lists"),
        ({"embed_dim": 3}, r"vision_cfg: missing in a model in open_clip's form; add a table"),
        (MODELS["ViT"] | {"junk": 3}, r"model: open_clip cannot build .*junk"),
    ],
)
def test_mistakes_in_open_clips_form_are_named(data, message):
    with pytest.raises(ConfigError, match=message):
        rwkv_clip.create_model(data)


def test_drop_path_is_for_towers_that_have_it():
    assert rwkv_clip.create_model(MODELS["open_clip text"], drop_path=0.25).spec.to_json()["image"]["drop_path"] == 0.25
    for name in ("open_clip image", "ViT"):
        with pytest.raises(ConfigError, match=r"drop_path: .*only RWKV towers take this setting"):
            rwkv_clip.create_model(MODELS[name], drop_path=0.25)


def test_scalars_may_be_asked_for_and_a_name_may_stand_alone():
    model = rwkv_clip.create_model(MODEL)
    image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 1000, (2, 8))
    plain = model(image, text, needs=("image", "text"))
    assert model(image, text, needs=("image", "text", "logit_scale")).keys() == plain.keys()
    assert model(image, text, needs="image_tokens").keys() == plain.keys() | {"image_tokens"}
    with pytest.raises(ValueError, match="needs: unknown 'image_depth'"):
        model(image, text, needs="image_depth")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resnet_in_half_precision(precision):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 1, "layers": 1}
    spec = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = rwkv_clip.create_model(spec, precision=precision)
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = model.encode_image(image.to(model.visual.conv1.weight.dtype)).float()
        expected = model.float().encode_image(image)
    assert found.isfinite().all() and torch.cosine_similarity(found, expected).min() > 0.99
