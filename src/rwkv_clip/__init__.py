"""RWKV-CLIP: contrastive image-text training with RWKV-6 towers.

What is named here, and torch with it, is loaded when it is first used: commands that read and write texts and pictures
start at once and stay small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip import (
        IMAGENET_CLASSNAMES,
        OPENAI_DATASET_MEAN,
        OPENAI_DATASET_STD,
        OPENAI_IMAGENET_TEMPLATES,
        SIMPLE_IMAGENET_TEMPLATES,
        ClipLoss,
        SimpleTokenizer,
        build_zero_shot_classifier,
        decode,
        image_transform,
        list_openai_models,
        tokenize,
    )

    from .factory import (
        add_model_config,
        create_model,
        create_model_and_transforms,
        create_model_from_pretrained,
        get_model_config,
        get_tokenizer,
        list_models,
        load_checkpoint,
        load_for_inference,
    )
    from .hub import push_to_hub, save_pretrained
    from .models.two_tower import RWKVCLIP
    from .pretrained import list_pretrained

__all__ = [
    "IMAGENET_CLASSNAMES",
    "OPENAI_DATASET_MEAN",
    "OPENAI_DATASET_STD",
    "OPENAI_IMAGENET_TEMPLATES",
    "RWKVCLIP",
    "SIMPLE_IMAGENET_TEMPLATES",
    "ClipLoss",
    "SimpleTokenizer",
    "add_model_config",
    "build_zero_shot_classifier",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "decode",
    "get_model_config",
    "get_tokenizer",
    "image_transform",
    "list_models",
    "list_openai_models",
    "list_pretrained",
    "load_checkpoint",
    "load_for_inference",
    "push_to_hub",
    "save_pretrained",
    "tokenize",
]
# Module -> the names that are found there; all others of __all__ are in .factory.
_HOMES = {
    ".models.two_tower": {"RWKVCLIP"},
    ".hub": {"push_to_hub", "save_pretrained"},
    ".pretrained": {"list_pretrained"},
    "open_clip": {  # as they are
        *("IMAGENET_CLASSNAMES", "OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD", "OPENAI_IMAGENET_TEMPLATES"),
        *("SIMPLE_IMAGENET_TEMPLATES", "ClipLoss", "SimpleTokenizer", "build_zero_shot_classifier", "decode"),
        *("image_transform", "list_openai_models", "tokenize"),
    },
}
# What open_clip has and this library does not, or by another name: what to use instead.
_POINTERS = {
    "trace_model": "torch.export.export(model, ..), which keeps the model's operators",
    "load_openai_model": 'create_model(NAME, pretrained="openai")',
    "push_to_hf_hub": "push_to_hub(model, repository)",
    "push_pretrained_to_hf_hub": "push_to_hub(checkpoint, repository)",
    "create_loss": "rwkv_clip.losses, whose objectives a training run takes by name, or ClipLoss",
    "list_pretrained_models_by_tag": "list_pretrained()",
    "list_pretrained_tags_by_model": "list_pretrained()",
    "is_pretrained_cfg": "list_pretrained()",
    "get_pretrained_cfg": "list_pretrained(), whose released files have .url and .sha256",
    "get_pretrained_url": "list_pretrained(), whose released files have .url",
    "download_pretrained": "rwkv_clip.pretrained.locate(name)",
    "download_pretrained_from_url": "rwkv_clip.pretrained.locate(name)",
    "convert_weights_to_lp": 'create_model(.., precision="bf16")',
    "convert_weights_to_fp16": 'create_model(.., precision="fp16")',
    "get_cast_dtype": "create_model(.., precision=), and the dtype of the weights",
    "get_input_dtype": "any float pixels: models cast them",
    "get_model_preprocess_cfg": "model.visual.preprocess_cfg",
    "set_model_preprocess_cfg": "create_model(.., image_mean=, image_std=)",
    "get_model_tokenize_cfg": "model.context_length and model.vocab_size",
    "AugmentationCfg": "settings of rwkv_clip.training (--crop-area, --flip, --auto-augment)",
    **dict.fromkeys(("CLIP", "CustomTextCLIP", "CoCa"), "create_model, which builds open_clip's models, too"),
    **dict.fromkeys(("CLIPTextCfg", "CLIPVisionCfg"), "a table of a model JSON, see get_model_config(name)"),
    **dict.fromkeys(("CoCaLoss", "DistillClipLoss"), "open_clip's own, or an objective of rwkv_clip.losses"),
    "build_zero_shot_classifier_legacy": "build_zero_shot_classifier",
}
__version__ = "0.9.0"


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a module of the library such as `rwkv_clip.ops`. AttributeError that says what to use in
    place of a name of open_clip's."""
    if name in __all__:
        home = next((home for home, names in _HOMES.items() if name in names), ".factory")
        return getattr(import_module(home, __name__), name)
    if name in _POINTERS:
        raise AttributeError(f"module {__name__!r} has no {name}; use {_POINTERS[name]}")
    if not name.startswith("_"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
