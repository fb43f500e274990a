"""What every forked rank would make again, and need not: imported once by the process that they are forked from."""

import pytest
import safetensors.torch
import tyro

import rwkv_clip.data.build
from rwkv_clip.tokenizer import make_tokenizer

make_tokenizer()  # keeps its 50,000 merges
__all__ = ["pytest", "rwkv_clip", "safetensors", "tyro"]
