"""Chinese-CLIP's towers beside others: files of transformers, warm starts, freezing, dropped patches, tokenizers."""

import json

import pytest
import torch

import rwkv_clip
from rwkv_clip.config import ConfigError
from rwkv_clip.factory import create_model, load_for_inference, resolve_spec
from rwkv_clip.models import bert, chinese_clip, hugging_face
from rwkv_clip.models.bert import BertConfig, find_layout
from rwkv_clip.models.freezing import FreezeSettings, freeze_parameters
from rwkv_clip.models.patch_dropout import PatchDropout
from rwkv_clip.tokenizer import BERT_CHINESE

VIT = {"kind": "open_clip", "image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
RESNET = {"kind": "open_clip", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
BERT = {
    "kind": "bert",
    "context": 12,
    "vocab": 21128,
    "width": 32,
    "depth": 3,
    "heads": 2,
    "ffn_width": 48,
    "positions": 20,
}
RWKV_TEXT = {"context": 12, "vocab": 21128, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
CLIP_TEXT = {"kind": "open_clip", "context_length": 12, "vocab_size": 21128, "width": 32, "heads": 2, "layers": 2}
CHINESE = {"image": VIT | {"quick_gelu": True}, "text": BERT, "embed_dim": 24, "resize_mode": "squash"}
TEXTS = ["杰出的红色连衣裙，夏季新款", "好", "两只狗在草地上跑", ""]


def ids(spec=CHINESE):
    return rwkv_clip.get_tokenizer(spec)(TEXTS)


# ---- the tower -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["packed", "padded"])
def way(request, monkeypatch):
    if request.param == "padded":
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    return request.param


@pytest.mark.parametrize("training", [False, True])
def test_transformers_has_the_same_tower(way, training):
    transformers = pytest.importorskip("transformers")
    config = BertConfig.parse(
        {k: v for k, v in BERT.items() if k != "kind"} | {"dropout": 0.0, "attention_dropout": 0.0}
    )
    sizes = {theirs: getattr(config, ours) for theirs, (ours, _) in hugging_face._TEXT.items()}
    theirs = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).train(training)
    own = config.build(None).train(training)
    own.load_state_dict(theirs.state_dict())
    text = ids()
    text[2, 3] = 0  # padding in the middle
    found = own.encode(text)
    wanted = theirs(text, attention_mask=(text != 0).long()).last_hidden_state
    torch.testing.assert_close(found.pooled, wanted[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.tokens, wanted * (text != 0)[..., None], rtol=1e-5, atol=1e-6)
    assert torch.equal(own(text), found.features)
    assert (find_layout(text).places is None) == (way == "padded")
    torch.manual_seed(0)
    weights = torch.randn_like(found.pooled)
    for pooled in (found.pooled, wanted[:, 0]):
        (pooled * weights).sum().backward()
    for (name, a), b in zip(own.named_parameters(), theirs.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() + 1e-6, name


@pytest.mark.parametrize("rows", [[[0, 0, 0]], [[0, 0, 0], [5, 6, 0]], [[0, 7, 0], [5, 0, 8]], [[5, 0, 0]], [[5]]])
def test_packed_is_padded(rows, monkeypatch):
    """Rows of nothing, padding first, in the middle and last."""
    torch.manual_seed(0)
    tower = BertConfig(vocab=9, width=16, depth=2, heads=2, ffn_width=20, context=4, positions=4).build(8).eval()
    text = torch.tensor(rows)
    packed = tower.encode(text)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    padded = tower.encode(text)
    for a, b in zip(packed, padded):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_is_read_whole(monkeypatch):
    """The released mask is finite, so that nothing is hidden where all would be."""
    tower = BertConfig(vocab=9, width=16, depth=2, heads=2, ffn_width=20, context=4, positions=4).build(8).eval()
    nothing, beside = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 0, 0], [5, 6, 0]])
    found = tower(beside)[:1]
    monkeypatch.setattr(bert, "find_layout", lambda text: bert.Layout((1, 3), None, None))
    torch.testing.assert_close(found, tower(nothing), rtol=1e-5, atol=1e-6)


def test_dropout_follows_torch():
    model, text = create_model(CHINESE).train(), ids()
    torch.manual_seed(3)
    first, second = model.encode_text(text), model.encode_text(text)
    torch.manual_seed(3)
    model.set_grad_checkpointing()
    again = model.encode_text(text)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(model.eval().encode_text(text), model.encode_text(text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, text = create_model(CHINESE), ids()
    exact = model.encode_text(text, normalize=True)
    with torch.autocast("cpu", dtype):
        assert (model.encode_text(text, normalize=True) - exact).norm() < 0.05
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert create_model(CHINESE, precision=name).encode_text(text).dtype == dtype


def test_initial_values():
    torch.manual_seed(0)
    state = BertConfig(vocab=2000, width=128, depth=1, heads=2, ffn_width=256).build(96).state_dict()
    for key, value in state.items():
        if "LayerNorm" in key or key.endswith("bias"):
            assert (value == (1 if key.endswith("LayerNorm.weight") else 0)).all(), key
        else:
            std = 128**-0.5 if key == "proj" else 0.02
            assert value.numel() < 1000 or abs(value.std() / std - 1) < 0.05, key


@pytest.mark.parametrize("unlocked, trained", [(0, 0), (1, 1), (2, 2), (4, 4), (5, 5), (99, 5)])
def test_lock(unlocked, trained):
    """Groups from the end: projection, layers, embeddings."""
    model = create_model(CHINESE)
    settings = FreezeSettings(lock_text=True, lock_text_unlocked_layers=unlocked, lock_text_freeze_layer_norm=True)
    freeze_parameters(model, settings)
    names = [n for n, p in model.text_model.named_parameters() if p.requires_grad]
    groups = ["proj", *(f"encoder.layer.{i}." for i in (2, 1, 0)), "embeddings."][:trained]
    assert (
        names == [n for n, _ in model.text_model.named_parameters() if n.startswith(tuple(groups))]
        if groups
        else not names
    )


def test_mistakes_of_descriptions():
    for change, message in (
        ({"heads": 5}, r"text\.heads: 5 does not divide text\.width 32"),
        ({"context": 21}, r"text\.context: 21 is more than text\.positions 20"),
        ({"widht": 5}, r"text\.widht: unknown setting; did you mean 'width'"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_model(CHINESE | {"text": BERT | change})
    with pytest.raises(ConfigError, match=r"image\.kind: 'bert' has no image tower"):
        create_model(CHINESE | {"image": {"kind": "bert"}})
    with pytest.raises(ConfigError, match="tokenizer: 'clip-bpe' has no padding"):
        rwkv_clip.get_tokenizer(CHINESE | {"tokenizer": "clip-bpe"})
    with pytest.raises(ConfigError, match="resize_mode: 'crop' is not one of"):
        create_model(CHINESE | {"resize_mode": "crop"})


# ---- any image tower with any text tower -----------------------------------------------------------------------------


@pytest.mark.parametrize("image", [VIT, RESNET, RWKV_IMAGE], ids=["vit", "resnet", "rwkv"])
@pytest.mark.parametrize("text", [BERT, RWKV_TEXT, CLIP_TEXT], ids=["bert", "rwkv", "clip"])
def test_mixtures(image, text):
    spec = {"image": image, "text": text, "embed_dim": 24, "tokenizer": BERT_CHINESE}
    model = create_model(spec)
    assert resolve_spec(model.spec.to_json())[1] == model.spec
    tokenizer = model.spec.tokenizer()
    assert tokenizer.name == BERT_CHINESE and tokenizer.context == 12
    features = model(torch.rand(4, 3, 32, 32), tokenizer(TEXTS))
    assert features[0].shape == features[1].shape == (4, 24)
    needs = model(text=tokenizer(TEXTS), needs=["text_pooled", "text_tokens"])
    assert torch.allclose(needs["text"], features[1], atol=1e-6)


def test_clip_towers_pool_where_bert_ends_a_text():
    spec = {"image": VIT, "text": CLIP_TEXT, "embed_dim": 24}
    chinese, plain = create_model(spec | {"tokenizer": BERT_CHINESE}), create_model(spec)
    assert "pool_type" not in plain.spec.to_json()["text"]
    text = chinese.spec.tokenizer()(TEXTS)
    encoded = chinese.encode_parts("text", text)
    ends = (text == 102).int().argmax(1)
    assert torch.equal(encoded.pooled, encoded.tokens[torch.arange(4), ends])
    told = create_model(spec | {"text": CLIP_TEXT | {"pool_type": "last"}, "tokenizer": BERT_CHINESE})
    assert told.spec.to_json()["text"]["pool_type"] == "last"


# ---- images ----------------------------------------------------------------------------------------------------------


def test_squash_keeps_no_aspect():
    from PIL import Image
    from torchvision import transforms as T

    picture = Image.linear_gradient("L").rotate(90).convert("RGB").resize((90, 40))
    mean, std = rwkv_clip.transform.CLIP_MEAN, rwkv_clip.transform.CLIP_STD
    plain = T.Compose([T.Resize((32, 32), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(mean, std)])
    own = rwkv_clip.factory.preprocess_of(create_model(CHINESE))
    assert torch.equal(own(picture), plain(picture))
    shortest = {key: value for key, value in CHINESE.items() if key != "resize_mode"}
    assert not torch.equal(rwkv_clip.factory.preprocess_of(create_model(shortest))(picture), plain(picture))
    assert "resize_mode" not in create_model(shortest).spec.to_json()


@pytest.mark.parametrize("ratio, kept", [(0.25, 12), (0.5, 8), (0.99, 1)])
def test_patches_are_left_out_in_training_only(ratio, kept):
    model = create_model(CHINESE, force_patch_dropout=ratio)
    image, seen = torch.rand(3, 3, 32, 32), []
    model.image_model.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert torch.equal(model.encode_image(image), model.encode_image(image)) and seen == [17, 17]
    model.train()
    torch.manual_seed(1)
    first, second = model.encode_image(image), model.encode_image(image)
    torch.manual_seed(1)
    assert torch.equal(first, model.encode_image(image)) and not torch.equal(first, second)
    assert seen[2:] == [1 + kept] * 3


def test_each_patch_is_kept_equally_often_and_once():
    torch.manual_seed(0)
    x = torch.arange(17.0).expand(4000, 17)[..., None]
    out = PatchDropout(0.25)(x)[..., 0]
    assert (out[:, 0] == 0).all() and all(len(set(row)) == 13 for row in out[:200].tolist())
    counts = torch.bincount(out[:, 1:].flatten().long(), minlength=17)[1:]
    assert ((counts - 3000).abs() < 5 * (4000 * 0.75 * 0.25) ** 0.5).all()


@pytest.mark.parametrize("image", [RESNET, RWKV_IMAGE])
def test_other_towers_drop_no_patches(image):
    with pytest.raises(
        ConfigError, match=r"force_patch_dropout: 0\.5 needs a ViT of open_clip's; the image tower is a"
    ):
        create_model(CHINESE | {"image": image}, force_patch_dropout=0.5)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(new_folder):
    """A ChineseCLIPModel of transformers, with every value random, and what it computes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    spec = resolve_spec(CHINESE)[1]
    data = hugging_face.write_configuration(spec)
    config = transformers.ChineseCLIPConfig(
        **{k: v for k, v in data.items() if k not in ("model_type", "architectures")}
    )
    model = transformers.ChineseCLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    path = new_folder("hub") / "model"
    model.save_pretrained(path)
    return path, model


def features_of_theirs(model, image, text):
    out = model(input_ids=text, pixel_values=image, attention_mask=(text != 0).long())
    return out.image_embeds, out.text_embeds


def test_a_folder_of_transformers_describes_itself(folder):
    path, theirs = folder
    loaded = load_for_inference(path)
    text, image = loaded.tokenizer(TEXTS, 12), torch.rand(4, 3, 32, 32)
    assert loaded.tokenizer.context == 12 and loaded.model.spec.resize_mode == "squash" and len(loaded.digest) == 64
    with torch.no_grad():
        for a, b in zip(loaded.model(image, text), features_of_theirs(theirs, image, text)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    config = json.loads((path / "config.json").read_text())
    assert config.pop("context_length") == 12  # the released models' folders have none
    assert hugging_face.convert_configuration(config, "x").text.context == 20
    assert hugging_face.to_state(hugging_face.from_state(theirs.state_dict())).keys() == theirs.state_dict().keys()
    for key, value in hugging_face.to_state(loaded.model.state_dict()).items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    with pytest.raises(ConfigError, match="model_type is 'clip'"):
        hugging_face.convert_configuration(config | {"model_type": "clip"}, "x")


def test_released_files_of_known_shapes_are_told_by_them():
    for image, text in (("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"), ("RN50", "RBT3-chinese"), ("ViT-L-14-336",) * 2):
        text = text if text in chinese_clip.TEXT_TOWERS else "RoBERTa-wwm-ext-base-chinese"
        with torch.device("meta"):
            state = chinese_clip.to_released(chinese_clip.parse_structure(f"{image}@{text}").build().state_dict())
        assert chinese_clip.infer_configuration(state)[0] == f"{image}@{text}"
    tiny = chinese_clip.to_released(create_model(CHINESE).state_dict())
    with pytest.raises(ConfigError, match="not the shapes of a released model"):
        chinese_clip.infer_configuration(tiny)


def test_a_released_file_without_description_asks_for_its_model(tmp_path):
    torch.save(chinese_clip.to_released(create_model(CHINESE).state_dict()), tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="name theirs"):
        load_for_inference(tmp_path / "x.pt")
    (tmp_path / "m.json").write_text(json.dumps(CHINESE))
    assert load_for_inference(tmp_path / "x.pt", model=str(tmp_path / "m.json")).tokenizer.name == BERT_CHINESE


@pytest.mark.parametrize("prefix, norms", [("bert.", ("gamma", "beta")), ("", ("weight", "bias"))])
def test_warm_start_from_two_files(tmp_path, prefix, norms):
    torch.manual_seed(1)
    source, target = create_model(CHINESE), create_model(CHINESE)
    clip = {
        k.replace("image_model.", "visual."): v + 1 for k, v in source.state_dict().items() if "text_model" not in k
    }
    clip |= {"input_resolution": torch.tensor(32), "transformer.resblocks.0.ln_1.bias": torch.zeros(3)}
    clip["logit_scale"] = torch.tensor(3.5)
    bert = {k.removeprefix("text_model."): v + 2 for k, v in source.text_model.state_dict().items() if k != "proj"}

    def rename(key):
        for ours, theirs in zip(("weight", "bias"), norms):
            key = key.replace(f"LayerNorm.{ours}", f"LayerNorm.{theirs}")
        return key

    bert = {prefix + rename(key): value for key, value in bert.items()}
    bert |= {f"{prefix}pooler.dense.bias": torch.zeros(2), "cls.predictions.bias": torch.zeros(2)}
    torch.save(clip, tmp_path / "clip.pt")
    torch.save(bert, tmp_path / "bert.bin")
    torch.manual_seed(1)
    create_model(CHINESE)
    model = create_model(CHINESE, pretrained_image=tmp_path / "clip.pt", pretrained_text=tmp_path / "bert.bin")
    fresh = target.state_dict()
    for key, value in model.state_dict().items():
        if key == "logit_scale":
            assert value == 3.5
        elif key == "text_model.proj":
            assert torch.equal(value, fresh[key])
        else:
            assert torch.equal(value, source.state_dict()[key] + (1 if key.startswith("image") else 2)), key


def test_warm_start_is_strict(tmp_path):
    torch.save({"visual.proj": torch.zeros(32, 24)}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"(?s)does not fit.*missing: image_model.class_embedding"):
        create_model(CHINESE, pretrained_image=tmp_path / "clip.pt")
    torch.save({"bert.pooler.dense.bias": torch.zeros(3)}, tmp_path / "bert.pt")
    with pytest.raises(ValueError, match=r"(?s)missing: text_model.embeddings.word"):
        create_model(CHINESE, pretrained_text=tmp_path / "bert.pt")
    with pytest.raises(ValueError, match="it holds no such tower; the model's text tower is an RWKV text tower"):
        create_model(CHINESE | {"text": RWKV_TEXT}, pretrained_text=tmp_path / "bert.pt")
