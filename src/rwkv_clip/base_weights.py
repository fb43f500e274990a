"""Base weights of checkpoints that hold adapters (LoRA): where they are, that they are the same, what both make.

A checkpoint names the file by path and sha256. A copy of that file in the run folder, as `base.safetensors` or
`base.pt`, serves as well.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import SUFFIX, find_checkpoint, read_description, read_weights
from .config import ConfigError
from .files import hash_file
from .models.adapters import merge
from .pretrained import find_weights
from .serialization import CheckpointError, read_tensors

COPIES = ("base.safetensors", "base.pt")  # in the run folder
Renaming = Callable[[dict[str, Tensor], Iterable[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Base:
    """A file of whole weights that adapters belong to."""

    path: Path
    sha256: str

    def describe(self, scale: float) -> dict[str, Any]:
        """What state.json says of it and of the adapters."""
        return {"base": str(self.path), "sha256": self.sha256, "scale": scale}


def find_base(place: str | Path) -> Base:
    """The file of weights that adapters are to be trained on: of a checkpoint or run folder, or what `find_weights`
    finds. ConfigError for what is no such file, as a tag of open_clip's, or has adapters itself."""
    path = find_weights(place)
    if not path.exists() and not path.name.endswith(SUFFIX):
        raise ConfigError(
            [
                f"pretrained: {place} is no file, and adapters (lora_rank) need one to belong to; for a tag save it "
                "first: rwkv_clip.save_pretrained(rwkv_clip.create_model(NAME, TAG), FOLDER), --pretrained FOLDER"
            ]
        )
    found = find_checkpoint(path)
    if found.is_dir():
        if adapters_of(found):
            merged = f"python -m rwkv_clip.convert {place} merged.safetensors --to safetensors"
            raise ConfigError([f"pretrained: {place} holds adapters; merge them into whole weights first: {merged}"])
        found /= "model.safetensors"
    return Base(found.resolve(), hash_file(found))


def adapters_of(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint folder says of its adapters; empty without them. CheckpointError for a damaged entry."""
    about = (read_description(checkpoint) or {}).get("adapters") or {}
    kinds = (("base", str), ("sha256", str), ("scale", float))
    if about and not all(type(about.get(key)) is kind for key, kind in kinds):
        raise CheckpointError(f"{checkpoint / 'state.json'}: adapters needs base, sha256 and scale; it is damaged")
    return about


def read_whole(path: str | Path, rename: Renaming) -> dict[str, Tensor]:
    """What `read_weights` reads, adapters merged with their base. rename: keys of the base's layout -> those of the
    model that the given keys belong to.

    CheckpointError when the base is gone or has changed, ValueError when both do not fit."""
    found = find_checkpoint(path)
    about = adapters_of(found) if found.is_dir() else {}
    if not about:
        return read_weights(found) if found.is_file() else read_tensors(found / "model.safetensors")
    kept = read_tensors(found / "model.safetensors")
    base = rename(read_weights(locate_base(found, about)), kept)
    try:
        return merge(base, kept, about["scale"])
    except ValueError as error:
        raise CheckpointError(f"{found}: {error}") from None


def locate_base(checkpoint: Path, about: Mapping[str, Any]) -> Path:
    """The file that the adapters belong to, by its sha256. CheckpointError where none is there."""
    run = checkpoint.absolute().parent.parent
    named, problem = Path(about["base"]), "is not there"
    for path in (named, *(run / name for name in COPIES)):
        if os.path.isfile(path):  # False for names too long
            if hash_file(path) == about["sha256"]:
                return path
            problem = "has changed" if path == named else problem
    raise CheckpointError(
        f"{checkpoint}: holds adapters of {named}, which {problem}; put it back, or copy it to {run / COPIES[0]}"
    )


def digest_of(path: Path) -> str:
    """sha256 of the weights in a file or checkpoint folder; of adapters and base together where there are some."""
    if not path.is_dir():
        return hash_file(path)
    own, about = hash_file(path / "model.safetensors"), adapters_of(path)
    return hashlib.sha256(f"{own} {about['sha256']} {about['scale']}".encode()).hexdigest() if about else own
