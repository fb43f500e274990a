"""RWKV-CLIP: contrastive image-text training with RWKV-6 towers.

What is named here, and torch with it, is loaded when it is first used: commands that read and write texts and pictures
start at once and stay small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .factory import (
        create_model,
        create_model_and_transforms,
        get_tokenizer,
        list_models,
        load_checkpoint,
        load_for_inference,
    )
    from .models.two_tower import RWKVCLIP

__all__ = [
    "RWKVCLIP",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "list_models",
    "load_checkpoint",
    "load_for_inference",
]
__version__ = "0.8.0"


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a module of the library such as `rwkv_clip.ops`."""
    if name in __all__:
        return getattr(import_module(".models.two_tower" if name == "RWKVCLIP" else ".factory", __name__), name)
    if not name.startswith("_"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
