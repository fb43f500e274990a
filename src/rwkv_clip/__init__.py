"""RWKV-CLIP: contrastive image-text training with RWKV-6 towers."""

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
__version__ = "0.7.0"
