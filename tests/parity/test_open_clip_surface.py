"""The table of open_clip's calls: each row gives the same result here as there, or the error that says what to use.

A row is a call on a library, a model and a tokenizer. It runs with open_clip and with ours on one tiny ViT, from the
same folder of weights, and the results are equal to the last bit. Rows of models also run on RWKV and BERT towers,
which open_clip does not have: there the result has the same form (keys, ranks, lengths).
"""

import copy
import inspect
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import rwkv_clip
from rwkv_clip.config import ConfigError
from rwkv_clip.models.positions import resize_grid, resize_line

VIT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2},
}
RWKV = {
    "embed_dim": 24,
    "image": {"image_size": [32, 32], "patch": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64},
    "text": {"context": 12, "width": 48, "depth": 2, "heads": 2, "ffn_width": 64},
}
RWKV_CLASS = {**RWKV, "image": {**RWKV["image"], "class_token": True}}
BERT = {
    "embed_dim": 24,
    "image": {"kind": "open_clip", **VIT["vision_cfg"]},
    "text": {"kind": "bert", "context": 12, "width": 48, "depth": 2, "heads": 2, "ffn_width": 64},
}
NAME = "surface-tiny"
TEXTS = ["a dog", "two cats on a mat, and a very long story about a mouse that they did not see"]


@dataclass
class Side:
    """What a row calls: one of the two libraries."""

    lib: ModuleType
    folder: Path

    @property
    def place(self) -> str:
        return f"local-dir:{self.folder}"

    @property
    def weights(self) -> str:
        return str(self.folder / "open_clip_model.safetensors")

    @property
    def model(self) -> Any:
        return self.lib.create_model(self.place).eval()

    @property
    def tokenizer(self) -> Any:
        return self.lib.get_tokenizer(self.place)


@pytest.fixture(scope="module")
def sides(new_folder) -> dict[str, Side]:
    folder = new_folder("surface")
    torch.manual_seed(0)
    model = rwkv_clip.create_model(VIT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rwkv_clip.save_pretrained(model, folder / "vit")
    (folder / f"{NAME}.json").write_text(json.dumps(VIT))
    open_clip.add_model_config(folder / f"{NAME}.json")
    rwkv_clip.add_model_config(folder / f"{NAME}.json")
    return {lib.__name__: Side(lib, folder / "vit") for lib in (rwkv_clip, open_clip)}


def pixels(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def ids(width: int = 12) -> Tensor:
    text = torch.randint(1, 20_000, (2, width), generator=torch.Generator().manual_seed(2))
    text[:, -1] = 49407
    return text


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), np.uint8))


def run(model: Any, size: int = 32, width: int = 12) -> Any:
    with torch.no_grad():
        return model(pixels(size), ids(width))


def frozen(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def lock(model: Any, method: str, *arguments: Any, **named: Any) -> list[str]:
    getattr(model, method)(*arguments, **named)
    return frozen(model)


def gradients(model: Any) -> list[Tensor]:
    model.set_grad_checkpointing()
    image, text, scale = model.train()(pixels(), ids())
    open_clip.ClipLoss()(image, text, scale).backward()
    return [parameter.grad for _, parameter in sorted(model.named_parameters())]


def classify(side: Side) -> Tensor:
    return side.lib.build_zero_shot_classifier(side.model, side.tokenizer, ["dog", "cat"], ["a {}", "the {}"])


def preprocess(side: Side, **named: Any) -> list[Tensor]:
    """The evaluation transform by either function, and its picture."""
    first = side.lib.create_model_and_transforms(side.place, **named)[2]
    second = side.lib.create_model_from_pretrained(side.place, **named)[1]
    return [first(picture()), second(picture())]


# What is built, and by which arguments.
FACTORY = {
    "create_model": lambda s: run(s.model),
    "create_model(device=)": lambda s: run(s.lib.create_model(s.place, device="cpu").eval()),
    "create_model(name, pretrained=file)": lambda s: run(s.lib.create_model(NAME, pretrained=s.weights).eval()),
    "create_model(precision=amp)": lambda s: run(s.lib.create_model(s.place, precision="amp").eval()),
    "create_model(precision=amp_bf16)": lambda s: run(s.lib.create_model(s.place, precision="amp_bf16").eval()),
    "create_model(load_weights=False)": lambda s: sorted(s.lib.create_model(s.place, load_weights=False).state_dict()),
    "create_model(output_dict=True)": lambda s: run(s.lib.create_model(s.place, output_dict=True).eval()),
    "create_model(force_quick_gelu=True)": lambda s: run(s.lib.create_model(s.place, force_quick_gelu=True).eval()),
    "create_model(force_image_size=48)": lambda s: run(s.lib.create_model(s.place, force_image_size=48).eval(), 48),
    "create_model(force_image_size=16)": lambda s: run(s.lib.create_model(s.place, force_image_size=16).eval(), 16),
    "create_model(name, pretrained=, force_image_size=)": lambda s: run(
        s.lib.create_model(NAME, pretrained=s.weights, force_image_size=40).eval(), 40
    ),
    "create_model(force_context_length=8)": lambda s: run(
        s.lib.create_model(s.place, force_context_length=8).eval(), width=8
    ),
    "create_model(force_context_length=20)": lambda s: run(
        s.lib.create_model(s.place, force_context_length=20).eval(), width=20
    ),
    "create_model(open_clip's defaults)": lambda s: run(
        s.lib.create_model(
            s.place,
            None,
            jit=False,
            force_patch_dropout=None,
            pretrained_image=False,
            pretrained_text=True,
            pretrained_image_path=None,
            cache_dir=None,
            weights_only=True,
            force_custom_text=False,
        ).eval()
    ),
    "create_model_and_transforms": lambda s: [len(s.lib.create_model_and_transforms(s.place)), *preprocess(s)],
    "create_model_and_transforms(image_mean=, image_std=)": lambda s: preprocess(
        s, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.6, 0.7)
    ),
    "create_model_and_transforms(image_interpolation=)": lambda s: preprocess(s, image_interpolation="bilinear"),
    "create_model_and_transforms(image_resize_mode=)": lambda s: preprocess(s, image_resize_mode="squash"),
    "create_model_and_transforms(force_image_size=)": lambda s: preprocess(s, force_image_size=40),
    "create_model_from_pretrained(return_transform=False)": lambda s: run(
        s.lib.create_model_from_pretrained(s.place, return_transform=False).eval()
    ),
    "get_model_config(name)": lambda s: s.lib.get_model_config(NAME),
    "get_model_config(local-dir:)": lambda s: s.lib.get_model_config(s.place),
    "get_model_config(unknown)": lambda s: s.lib.get_model_config("no such model"),
    "add_model_config, list_models": lambda s: NAME in s.lib.list_models(),
    "list_openai_models": lambda s: s.lib.list_openai_models(),
    "image_transform": lambda s: s.lib.image_transform(32, is_train=False)(picture()),
    "build_zero_shot_classifier": classify,
    "ClipLoss": lambda s: s.lib.ClipLoss()(*run(s.model)),
    "templates and class names": lambda s: (
        [one("dog") for one in s.lib.OPENAI_IMAGENET_TEMPLATES],
        len(s.lib.SIMPLE_IMAGENET_TEMPLATES),
        s.lib.IMAGENET_CLASSNAMES,
        s.lib.OPENAI_DATASET_MEAN,
        s.lib.OPENAI_DATASET_STD,
    ),
}
# What a model has: these also run on towers that open_clip does not know.
MODEL: dict[str, Any] = {
    "model(image, text)": run,
    "model(image=, text=)": lambda m: m(image=pixels(), text=ids()),
    "model(image)": lambda m: m(pixels()),
    "model(text=)": lambda m: m(text=ids()),
    "model.output_dict": lambda m: (setattr(m, "output_dict", True), m(pixels(), ids()), m(text=ids()))[1:],
    "encode_image": lambda m: [m.encode_image(pixels()), m.encode_image(pixels(), normalize=True)],
    "encode_text": lambda m: [m.encode_text(ids()), m.encode_text(ids(), normalize=True)],
    "get_logits": lambda m: m.get_logits(pixels(), ids()),
    "visual(image)": lambda m: m.visual(pixels()),
    "visual.image_size": lambda m: tuple(m.visual.image_size),
    "visual.image_mean, image_std": lambda m: [list(m.visual.image_mean), list(m.visual.image_std)],
    "visual.preprocess_cfg": lambda m: {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in m.visual.preprocess_cfg.items()
    },
    "open_clip.get_model_preprocess_cfg": lambda m: sorted(open_clip.get_model_preprocess_cfg(m)),
    "open_clip.get_model_tokenize_cfg": lambda m: sorted(open_clip.get_model_tokenize_cfg(m)),
    "context_length": lambda m: m.context_length,
    "vocab_size": lambda m: type(m.vocab_size),
    "logit_scale, logit_bias": lambda m: [m.logit_scale, m.logit_bias],
    "lock_image_tower": lambda m: bool(lock(m, "lock_image_tower")),
    "lock_text_tower": lambda m: bool(lock(m, "lock_text_tower", 1)),
    "lock_text_tower(freeze_layer_norm=True)": lambda m: bool(lock(m, "lock_text_tower", 0, freeze_layer_norm=True)),
    "set_grad_checkpointing": lambda m: m.set_grad_checkpointing(True),
    "no_weight_decay": lambda m: isinstance(m.no_weight_decay(), set),
    "forward_intermediates": lambda m: m.forward_intermediates(pixels(), ids()),
    "forward_intermediates(image)": lambda m: m.forward_intermediates(pixels()),
    "forward_intermediates(text=)": lambda m: m.forward_intermediates(text=ids()),
    "forward_intermediates(NLC, indices, norm)": lambda m: m.forward_intermediates(
        pixels(), ids(), image_indices=1, text_indices=[0], image_output_fmt="NLC", normalize_intermediates=True
    ),
    "forward_intermediates(normalize=False)": lambda m: m.forward_intermediates(pixels(), ids(), normalize=False),
    "forward_intermediates(intermediates_only)": lambda m: m.forward_intermediates(
        pixels(), ids(), intermediates_only=True
    ),
    "forward_intermediates(output_logits)": lambda m: m.forward_intermediates(
        pixels(), ids(), output_logits=True, output_logit_scale_bias=True
    ),
    "deepcopy, pickle": lambda m: [run(copy.deepcopy(m)), run(pickle.loads(pickle.dumps(m)))],
}
# Exact on the ViT only: lists of names and of gradients have the lengths of the model.
VIT_ONLY = {
    "lock_image_tower(1)": lambda m: lock(m, "lock_image_tower", 1),
    "lock_image_tower(unlocked_groups=2)": lambda m: lock(m, "lock_image_tower", unlocked_groups=2),
    "lock_text_tower(2)": lambda m: lock(m, "lock_text_tower", 2),
    "no_weight_decay, names": lambda m: m.no_weight_decay(),
    "set_grad_checkpointing, gradients": gradients,
    "state_dict": lambda m: sorted(m.state_dict()),
    "forward_intermediates(extra tokens)": lambda m: m.forward_intermediates(pixels(), image_output_extra_tokens=True),
}
TOKENIZER = {
    "tokenizer(list)": lambda t: t(TEXTS),
    "tokenizer(str)": lambda t: t("a dog"),
    "tokenizer(tuple)": lambda t: t(tuple(TEXTS)),
    "tokenizer(array)": lambda t: t(np.array(TEXTS)),
    "tokenizer(context_length=)": lambda t: t(TEXTS, context_length=30),
    "context_length": lambda t: t.context_length,
    "vocab_size": lambda t: t.vocab_size,
    "sot_token_id, eot_token_id": lambda t: [t.sot_token_id, t.eot_token_id],
    "encode": lambda t: [t.encode(text) for text in TEXTS],
    "decode(encode)": lambda t: [t.decode(t.encode(text)) for text in TEXTS],
    "pickle": lambda t: pickle.loads(pickle.dumps(t))(TEXTS),
}
LIBRARY_TOKENS = {
    "tokenize": lambda s: s.lib.tokenize(TEXTS),
    "tokenize(context_length=)": lambda s: s.lib.tokenize(TEXTS, context_length=20),
    "decode": lambda s: s.lib.decode(s.lib.tokenize("a dog")[0]),
    "SimpleTokenizer": lambda s: s.lib.SimpleTokenizer()(TEXTS),
    "get_tokenizer(context_length=)": lambda s: s.lib.get_tokenizer(s.place, context_length=7)(TEXTS),
    "get_tokenizer(name)": lambda s: s.lib.get_tokenizer(NAME)(TEXTS),
}


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the last bit, whatever it is; lists and tuples are one."""
    if isinstance(theirs, Tensor):
        return torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def form(value: Any) -> Any:
    """What callers take for granted: keys, lengths, ranks."""
    if isinstance(value, Tensor):
        return value.dim(), value.is_floating_point()
    if isinstance(value, dict):
        return {key: form(one) for key, one in value.items()}
    return [form(one) for one in value] if isinstance(value, (list, tuple)) else type(value)


@pytest.mark.parametrize("row", [*FACTORY, *LIBRARY_TOKENS])
def test_calls_on_the_library(sides, row):
    ours, theirs = map({**FACTORY, **LIBRARY_TOKENS}[row], sides.values())
    assert same(ours, theirs)


@pytest.mark.parametrize("row", [*MODEL, *VIT_ONLY])
def test_calls_on_a_model(sides, row):
    ours, theirs = ({**MODEL, **VIT_ONLY}[row](side.model) for side in sides.values())
    assert same(ours, theirs)


@pytest.mark.parametrize("row", TOKENIZER)
def test_calls_on_a_tokenizer(sides, row):
    ours, theirs = (TOKENIZER[row](side.tokenizer) for side in sides.values())
    assert same(ours, theirs)


@pytest.mark.parametrize("towers", [RWKV, RWKV_CLASS, BERT], ids=["RWKV", "RWKV with a class token", "ViT and BERT"])
@pytest.mark.parametrize("row", MODEL)
def test_towers_of_ours_give_the_same_form(sides, row, towers):
    """Token ids are below every vocabulary."""
    model = rwkv_clip.create_model(towers)
    if towers is BERT:
        model.text_model.embeddings.word_embeddings = nn.Embedding(49408, 48)
    assert form(MODEL[row](model)) == form(MODEL[row](sides["open_clip"].model))


# ---- errors that point -----------------------------------------------------------------------------------------------


def public_names() -> list[str]:
    """Functions, classes and constants of open_clip's; its modules are not meant to be called."""
    return [name for name in dir(open_clip) if name[0] != "_" and not inspect.ismodule(getattr(open_clip, name))]


@pytest.mark.parametrize("name", public_names())
def test_every_name_of_open_clip_is_here_or_points_to_what_is(name):
    if name in rwkv_clip.__all__:
        assert getattr(rwkv_clip, name) is not None
        return
    with pytest.raises(AttributeError, match=f"has no {name}; use .+"):
        getattr(rwkv_clip, name)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"jit": True}, "jit: True is not supported; .*torch.export"),
        ({"weights_only": False}, "weights_only: False .*safetensors"),
        ({"force_custom_text": True}, "custom_text"),
        ({"aug_cfg": {"scale": (0.9, 1)}}, "aug_cfg: .*crop-area"),
        ({"pretrained_image": True}, "pretrained_image: True names no weights"),
        ({"force_imagesize": 3}, "force_imagesize: .* did you mean 'force_image_size'"),
        ({"precision": "int4"}, "precision: 'int4' is not one of fp32, .*amp"),
        ({"image_resize_mode": "longest"}, "resize_mode: 'longest' is not one of shortest, squash"),
        ({"image_interpolation": "nearest"}, "interpolation: 'nearest' is not one of bicubic, bilinear"),
        ({"force_preprocess_cfg": {"fill": 1}}, "force_preprocess_cfg: fill is none of"),
        ({"require_pretrained": True, "load_weights": False}, "pretrained: not set"),
        ({"pretrained": "openai"}, "has weights of its own"),
    ],
)
def test_arguments_that_are_refused_in_words(sides, named, message):
    with pytest.raises(ConfigError, match=message):
        rwkv_clip.create_model(sides["rwkv_clip"].place, **named)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"force_quick_gelu": True}, "force_quick_gelu: the model has no tower of open_clip's"),
        ({"image_mean": (0.5, 0.5, 0.5)}, "image_mean: .* is not this model's"),
        ({"image_interpolation": "bilinear"}, "image_interpolation: 'bilinear' is not this model's"),
    ],
)
def test_what_towers_of_ours_do_not_have(named, message):
    with pytest.raises(ConfigError, match=message):
        rwkv_clip.create_model(RWKV, **named)


@pytest.mark.parametrize("towers", [RWKV, BERT], ids=["RWKV", "BERT"])
def test_options_of_intermediates_that_do_not_exist(towers):
    model = rwkv_clip.create_model(towers)
    with pytest.raises(ValueError, match=r"image_indexes: not an option .* did you mean 'image_indices'"):
        model.forward_intermediates(pixels(), image_indexes=1)
    with pytest.raises(ValueError, match="text_indices: 3 does not fit 2 blocks"):
        model.forward_intermediates(text=ids() % 20_000, text_indices=3)


def arguments_of_open_clip() -> list[tuple[str, str]]:
    """Function and argument, of those that have a default."""
    names = ("create_model", "create_model_and_transforms", "create_model_from_pretrained", "get_tokenizer")
    return [
        (name, argument.name)
        for name in (*names, "list_pretrained", "tokenize")
        for argument in inspect.signature(getattr(open_clip, name)).parameters.values()
        if argument.default is not inspect.Parameter.empty and argument.name != "model_name"
    ]


@pytest.mark.parametrize(("name", "argument"), arguments_of_open_clip())
def test_every_argument_of_open_clip_is_taken_with_its_default(sides, name, argument):
    default = inspect.signature(getattr(open_clip, name)).parameters[argument].default
    first = {"list_pretrained": (), "tokenize": (TEXTS,)}.get(name, (sides["rwkv_clip"].place,))
    assert getattr(rwkv_clip, name)(*first, **{argument: default}) is not None


@pytest.mark.parametrize(
    "name",
    [
        "create_model",
        "create_model_and_transforms",
        "create_model_from_pretrained",
        "get_tokenizer",
        "get_model_config",
    ],
)
def test_the_model_may_be_called_model_name(sides, name):
    assert getattr(rwkv_clip, name)(model_name=sides["rwkv_clip"].place) is not None
    with pytest.raises(TypeError):
        getattr(rwkv_clip, name)()


# ---- pictures --------------------------------------------------------------------------------------------------------


def preprocessings() -> list[dict[str, Any]]:
    """Each one that weights of open_clip's were trained with, and forms that a configuration may have."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    tables = [open_clip.get_pretrained_cfg(*pair) for pair in open_clip.list_pretrained()]
    found = [{key: table[key] for key in keys if table.get(key)} for table in tables]
    found += [{}, {"mean": 0.5, "std": 0.25, "resize_mode": "squash"}, {"size": 64}, {"size": [32, 32], "mode": "RGB"}]
    found += [{"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "shortest"}]
    return list({json.dumps(one): one for one in found}.values())


@pytest.mark.parametrize("table", preprocessings(), ids=lambda table: str(sorted(map(str, table.values()))))
def test_pictures_go_through_what_the_configuration_says(sides, table, tmp_path):
    """Such as SigLIP's: squashed, mean and deviation of one half. Every shape of picture, to the bit, here and there;
    and again after the model was saved."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in sides["rwkv_clip"].folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": table}))
    model, ours = rwkv_clip.create_model_from_pretrained(f"local-dir:{folder}")
    theirs = open_clip.create_model_from_pretrained(f"local-dir:{folder}")[1]
    rwkv_clip.save_pretrained(model, tmp_path / "again")
    again = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'again'}")[1]
    for height, width in ((50, 61), (20, 90), (32, 32), (7, 3)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        expected = theirs(Image.fromarray(pixels))
        assert torch.equal(ours(Image.fromarray(pixels)), expected)
        assert torch.equal(again(Image.fromarray(pixels)), expected)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"resize_mode": "longest"}, "resize_mode: 'longest' is not one of shortest, squash"),
        ({"interpolation": "random"}, "interpolation: 'random' is not one of bicubic, bilinear"),
        ({"mode": "L"}, "mode: 'L' pictures are not read, only RGB"),
        ({"mean": [0.5, "x", 1]}, "pixels: .* is not two lists of three numbers"),
        ({"std": [0.5, 0.5]}, "pixels: .* is not two lists of three numbers"),
        ({"std": [0.5, 0.5, 0]}, "pixels: .* is not two lists of three numbers"),
    ],
)
def test_other_ways_are_refused_in_words(sides, table, message, tmp_path):
    config = json.loads((sides["rwkv_clip"].folder / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": table}))
    (tmp_path / "open_clip_model.safetensors").write_bytes(Path(sides["rwkv_clip"].weights).read_bytes())
    with pytest.raises(ConfigError, match=message) as caught:
        rwkv_clip.create_model(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_every_tag_of_open_clip_brings_its_own_preprocessing():
    """Without their weights: what `find_tag` says of each."""
    from rwkv_clip.models.openclip import OpenClipConfig

    plain = open_clip.get_pretrained_cfg("ViT-B-32", "laion400m_e32")
    for name, tag in open_clip.list_pretrained():
        table = open_clip.get_pretrained_cfg(name, tag)
        quick = table.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu")
        if quick and f"{name}-quickgelu" not in open_clip.list_models():
            continue  # refused: open_clip has no such model
        spec = OpenClipConfig(name).find_tag(tag)[0]
        mean, std = (tuple(table.get(key) or plain[key]) for key in ("mean", "std"))
        assert spec.pixels == (mean, std), (name, tag)
        assert spec.resize_mode == (table.get("resize_mode") or "shortest"), (name, tag)
        assert spec.interpolation == (table.get("interpolation") or "bicubic"), (name, tag)


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(7, 7), (2, 2), (3, 6), (4, 4), (9, 2)], ids=str)
def test_grids_are_resized_as_open_clip_does(grid):
    table = torch.randn(17, 6, generator=torch.Generator().manual_seed(0))
    holder = nn.Module()
    holder.visual = nn.Module()
    holder.visual.grid_size = grid
    state = {"visual.positional_embedding": table}
    open_clip.model.resize_pos_embed(state, holder)
    expected = state["visual.positional_embedding"]
    assert grid == (4, 4) or torch.equal(resize_grid(table, (4, 4), grid), expected)
    assert torch.equal(resize_grid(table.bfloat16(), (4, 4), grid)[:1], table[:1].bfloat16())


@pytest.mark.parametrize("count", [5, 12, 77])
def test_lines_are_resized_as_open_clip_does(count):
    table = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    holder = nn.Module()
    holder.positional_embedding = nn.Parameter(torch.zeros(count, 6))
    state = {"positional_embedding": table}
    open_clip.model.resize_text_pos_embed(state, holder)
    assert torch.equal(resize_line(table, count), state["positional_embedding"])


@pytest.mark.parametrize("size", [48, 16, (24, 40)], ids=str)
@pytest.mark.parametrize("towers", [RWKV, RWKV_CLASS], ids=["mean", "class token"])
def test_rwkv_at_another_size_is_the_model_that_reads_such_pictures(towers, size, tmp_path):
    """The table is resized once instead of in each pass, by the same rule. (open_clip's has another cubic: it resizes
    antialiased, which torch does with a coefficient of -0.5 in place of -0.75.)"""
    torch.manual_seed(0)
    model = rwkv_clip.create_model(towers)
    nn.init.normal_(model.image_model.pos_embed)
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export")
    other = rwkv_clip.create_model(folder, force_image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert other.visual.image_size == other.spec.image_size == (height, width)
    image = torch.randn(2, 3, height, width)
    assert torch.equal(other.encode_image(image), model.encode_image(image))


def test_bert_at_another_context_and_its_vit_at_another_size(tmp_path):
    """Positions of a ViT beside BERT are resized as the released Chinese-CLIP code does."""
    from rwkv_clip.models.chinese_clip import fit_positions

    model = rwkv_clip.create_model(BERT)
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export")
    other = rwkv_clip.create_model(folder, force_image_size=48, force_context_length=20)
    assert other.context_length == 20 == rwkv_clip.get_tokenizer(folder, context_length=20).context_length
    assert torch.equal(other.visual.positional_embedding, fit_positions(model.visual.positional_embedding, 37))
    text = ids() % 20_000
    assert torch.equal(other.encode_text(text), model.encode_text(text))


@pytest.mark.parametrize("named", [{"force_image_size": 48}, {"force_quick_gelu": True}, {"image_mean": (0.5,) * 3}])
def test_weights_of_a_tag_take_the_same_arguments(sides, named, monkeypatch):
    """With a file in place of the download that a tag stands for."""
    from rwkv_clip.models.openclip import OpenClipConfig

    make = open_clip.create_model
    weights = sides["rwkv_clip"].weights

    def create(name, pretrained=None, **options):
        return make(name, pretrained=weights if pretrained == "tag" else pretrained, **options)

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(OpenClipConfig, "find_tag", lambda spec, tag: (OpenClipConfig(NAME), tag))
    size = named.get("force_image_size", 32)
    ours = rwkv_clip.create_model({"open_clip": NAME}, pretrained="tag", **named)
    theirs = make(NAME, pretrained=weights, **{k: v for k, v in named.items() if k[0] == "f"}).eval()
    assert same(run(ours, size), run(theirs, size))
    assert ours.spec.image_size == (size, size) and ours.visual.image_mean == named.get(
        "image_mean", ours.spec.pixels[0]
    )


# ---- beside open_clip's calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RWKV-CLIP-B-32", "CN-CLIP-Ti-8", "ViT-Ti-8", "ViT-B-32"])
def test_a_preset_can_be_built_on_the_meta_device(name):
    with torch.device("meta"):
        model = rwkv_clip.create_model(name)
    assert all(value.is_meta for value in model.parameters())
    assert not name.endswith("Ti-8") or sorted(model.state_dict()) == sorted(rwkv_clip.create_model(name).state_dict())


def test_the_meta_device_takes_no_weights(sides):
    with torch.device("meta"), pytest.raises(ConfigError, match="meta device holds no numbers"):
        rwkv_clip.create_model(sides["rwkv_clip"].place)


@pytest.mark.parametrize("towers", [RWKV, BERT, VIT], ids=["RWKV", "ViT and BERT", "ViT"])
def test_layer_decay_of_timm(towers):
    """Both towers end at the same layer; blocks at equal distance from the end have the same rate."""
    from timm.optim import param_groups_layer_decay

    model = rwkv_clip.create_model({**towers})
    decay = 0.5
    undecayed = model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.1, undecayed, layer_decay=decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    weight = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    assert {scale[name] for name in scale if "proj" in name and name.count(".") <= 1} <= {1.0}
    block = {f".{kind}.{i}.": decay ** (2 - i) for i in (0, 1) for kind in ("layers", "blocks", "resblocks", "layer")}
    for name, value in scale.items():
        expected = [one for part, one in block.items() if part in name]
        assert not expected or value == expected[0], name
    embeddings = ("pos_embed", "emb.weight", "embeddings", "conv1", "token_embedding", "positional_embedding")
    assert {value for name, value in scale.items() if any(one in name for one in embeddings)} == {decay**3}
    assert scale["logit_scale"] == 1.0
    assert all(weight[name] == 0 for name in undecayed) and any(weight.values())
    assert not [n for n, v in weight.items() if v and ("time_maa_x" in n or ("pos" in n and "proj" not in n))]


def test_layer_decay_of_one_tower():
    from timm.optim import param_groups_layer_decay

    tower = rwkv_clip.create_model(RWKV).visual
    groups = param_groups_layer_decay(tower, 0.1, tower.no_weight_decay(), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("towers", [RWKV, RWKV_CLASS, BERT], ids=["RWKV", "class token", "ViT and BERT"])
def test_intermediates_end_in_the_dense_tokens(towers):
    """The last block, through the tower's last norm, is what `needs` calls tokens; features are those of the model."""
    model = rwkv_clip.create_model(towers)
    text = ids() % 20_000
    found = model.forward_intermediates(pixels(), text, normalize_intermediates=True, image_output_fmt="NLC")
    named = model(pixels(), text, needs=("image_tokens", "text_tokens"))
    patches = found["image_intermediates"][-1]
    start = int(towers is BERT)  # open_clip's class token comes first
    torch.testing.assert_close(patches, named["image_tokens"][:, start : start + 16])
    torch.testing.assert_close(found["text_intermediates"][-1], named["text_tokens"])
    assert torch.equal(found["image_features"], named["image"]) and torch.equal(found["text_features"], named["text"])
    grid = model.forward_intermediates(pixels(), normalize_intermediates=True)["image_intermediates"][-1]
    assert torch.equal(grid, patches.transpose(1, 2).unflatten(2, (4, 4)))
    if towers is RWKV_CLASS:
        extra = model.forward_intermediates(pixels(), image_output_extra_tokens=True)
        assert extra["image_intermediates_prefix"][0].shape == (2, 1, 32)


def test_unlocked_norms_of_a_text_tower():
    model = rwkv_clip.create_model(RWKV)
    left = set(frozen(model.text_model)) ^ set(lock(model, "lock_text_tower", 0, freeze_layer_norm=False))
    assert left and not [name for name in frozen(model) if ".ln" in name and "ln_x" not in name]


def test_decoding_leaves_out_what_encoding_adds():
    for name, texts in (("RWKV-CLIP-B-32", TEXTS[:1]), ("CN-CLIP-Ti-8", ["一只狗", "hello 30 cm"])):
        tokenizer = rwkv_clip.get_tokenizer(name)
        for text in texts:
            row = tokenizer(text)[0]
            assert tokenizer.decode(row).strip() == text
            start, end = row.tolist().index(tokenizer.sot_token_id), row.tolist().index(tokenizer.eot_token_id)
            assert row[start + 1 : end].tolist() == tokenizer.encode(text)


def test_features_of_a_normalised_model_are_unit_vectors(sides):
    image, text, _ = run(sides["rwkv_clip"].model)
    torch.testing.assert_close(F.normalize(image, dim=-1), image)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))
