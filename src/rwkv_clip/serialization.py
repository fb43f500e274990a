"""Files of tensors: safetensors, written in chunks and read, and foreign `.pt` files, read; none of them is trusted.

A tensor file is data, so no reader here can run code, and sizes that a file claims for itself are checked before memory
is spent on them.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import Bytes

CHUNK = 2**20  # bytes that are hashed and written at a time: they stay in the cache, and Python's lock is released
MAX_HEADER = 4 * 2**20  # bytes of a safetensors header or of a .pt's pickle; real ones have 1 MB at most
SAFE_TORCH = (2, 10)  # weights_only=True could be made to run code before: CVE-2025-32434 (2.6), CVE-2026-24747 (2.10)
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}


class CheckpointError(ValueError):
    """A checkpoint that is absent, incomplete, damaged or of another kind; names the file."""


def encode_tensors(tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> Iterator[Bytes]:
    """A safetensors file (8 bytes length, JSON header, data without gaps, wide types first) in chunks of about CHUNK.

    Large tensors are not copied: their chunks are views of their memory. about: texts beside them, see `read_about`.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    end = 0
    for key in order:
        tensor, begin = tensors[key], end
        end += tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pending = bytearray(len(text).to_bytes(8, "little") + text)
    for key in order:
        flat = tensors[key].detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data
        if len(pending) + len(data) <= CHUNK:
            pending += data
            continue
        yield pending
        pending = bytearray()
        yield from (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    yield pending


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file."""
    from safetensors import SafetensorError  # here: the library and its benches need only torch and numpy
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: claims a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
        return load_file(path)
    except (SafetensorError, OSError, KeyError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is not a readable safetensors file ({error})") from None


def read_about(path: Path) -> dict[str, str]:
    """The texts that a .safetensors file holds beside its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is not a readable safetensors file ({error})") from None


def read_torch(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of torch.save: a dict of them, plain or under the key `state_dict`."""
    state = _load_torch(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: expected a dict of tensors, with or without a `state_dict` key")
    size = path.stat().st_size
    for key, value in state.items():
        odd = value.is_quantized or value.is_meta or value.is_nested or value.is_complex()
        if odd or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {key} is no plain tensor of real numbers; save the weights of such a model")
        if value.numel() * value.element_size() > size:  # a few bytes, repeated by strides of 0
            raise CheckpointError(f"{path}: {key} of shape {tuple(value.shape)} is larger than the file")
    return state


def _load_torch(path: Path) -> Any:
    """What torch.save wrote into a zip file, plain tensors only."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_TORCH:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} cannot read foreign files safely (CVE-2026-24747, fixed in 2.10); "
            "update torch, or load a .safetensors file"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        remedy = "files of torch before 1.6 must be saved again"
        raise CheckpointError(f"{path}: is not a file of torch.save ({error}); {remedy}") from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            f"{path}: is a TorchScript archive, a program, which is not run; take OpenAI's models from open_clip by "
            f"the tag openai (open_clip:ViT-B-32:openai, --pretrained openai), or save the state_dict() of another"
        )
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)  # torch packs nothing
    outside = any(entry.filename.startswith("/") or ".." in entry.filename.split("/") for entry in entries)
    total = sum(entry.file_size for entry in entries)
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if packed or outside or total > path.stat().st_size or pickled > MAX_HEADER:
        raise CheckpointError(f"{path}: is not as torch.save writes it (packed, too large or with names like ../x)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here; each means: not a file of plain tensors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: is not a readable file of plain tensors ({reason})") from None
