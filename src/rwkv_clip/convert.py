"""Weights -> a file or folder that another program reads, without the optimizer; every number stays as it is.

    python -m rwkv_clip.convert logs/my-run model.safetensors --to safetensors
    python -m rwkv_clip.convert logs/my-run clip_cn_mine.pt --to chinese-clip
    python -m rwkv_clip.convert clip_cn_vit-b-16.pt hub/vit-b-16 --to transformers
    python -m rwkv_clip.convert logs/my-run export --to hub --license mit

INPUT is whatever --checkpoint takes: a run folder, a checkpoint folder, a weights file, a folder with a configuration
(transformers', open_clip's, ours), hf-hub:org/name. OUTPUT is a .safetensors file (every model, described inside, so
that it loads by its name alone), a .pt file (Chinese-CLIP's layout) or a new folder: for transformers ChineseCLIPModel,
or, for other pairs of towers, the model with its code (AutoModel, trust_remote_code); for the hub configuration,
weights and a model card, which open_clip opens where the model is one of its own.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from .config import ConfigError
from .errors import run_command
from .factory import DESCRIPTION, describe, read_fitting_weights
from .files import write_whole
from .hub import kinds_of, new_folder, save_pretrained, write_chinese_clip
from .models import chinese_clip
from .models.specification import ModelSpec
from .models.two_tower import ModelConfig
from .serialization import encode_tensors

Layout = Literal["chinese-clip", "transformers", "safetensors", "hub"]
SUFFIXES = {"chinese-clip": ".pt", "safetensors": ".safetensors"}


def convert(
    source: str | Path, output: str | Path, to: Layout, model: str | None = None, license: str | None = None
) -> str:
    """Write the weights in `source` to `output` in the layout `to`; returns a line that says what was written.

    model: preset name or JSON of a source that does not describe its model. license: for the model card. An existing
    file is replaced when the new one is whole; a folder must not exist. ConfigError for what the layout cannot hold,
    ValueError for weights that do not fit the model, OSError.
    """
    output = Path(output)
    if to in SUFFIXES and (output.suffix != SUFFIXES[to] or output.is_dir()):
        raise ConfigError([f"output: {output} is not the name of a {SUFFIXES[to]} file, which {to} is; change it"])
    if to in ("transformers", "hub") and output.exists():
        raise ConfigError([f"output: {output} exists; name a new folder"])
    if license and to != "hub":
        raise ConfigError([f"license: {license!r} has no effect in {to}, which has no model card; leave it out"])
    name, spec, path = describe(source, model)
    code = to == "transformers" and kinds_of(spec) != ("open_clip", "bert")
    if to == "hub" or code:
        folder = save_pretrained(source, output, license=license, structure=model, transformers=code)
        return f"{output}: {', '.join(sorted(path.name for path in folder.iterdir()))}"
    state = read_fitting_weights(spec.build(), path)
    output.parent.mkdir(parents=True, exist_ok=True)
    if to == "safetensors":
        about = {"format": "pt", DESCRIPTION: json.dumps({"model": name, "spec": spec.to_json()})}
        write_whole(output, encode_tensors(state, about))
    elif to == "chinese-clip":
        write_released(output, name, spec, state)
    else:
        write_folder(output, spec, state)
    return f"{output}: {sum(value.numel() for value in state.values()):,} numbers of {name}, as {to}"


def write_released(output: Path, name: str, spec: ModelSpec, state: dict[str, Tensor]) -> None:
    """Chinese-CLIP's layout: a dict of torch.save, keys with `module.`; epoch and step 0, as at a start.

    ConfigError for towers that it does not have."""
    kinds = kinds_of(spec)
    if kinds != ("open_clip", "bert"):
        raise ConfigError(
            [f"to: chinese-clip has CLIP's image towers with BERT, not {' with '.join(kinds)}; write safetensors"]
        )
    weights = {f"module.{key}": value for key, value in chinese_clip.to_released(state).items()}
    packed = io.BytesIO()
    torch.save({"epoch": 0, "step": 0, "name": name, "state_dict": weights}, packed)
    write_whole(output, [packed.getbuffer()])


def write_folder(output: Path, spec: ModelSpec, state: dict[str, Tensor]) -> None:
    """A folder of transformers' ChineseCLIPModel: config.json, model.safetensors and the vocabulary; it appears when
    all of it is written. ConfigError for a model that transformers does not have."""
    assert isinstance(spec, ModelConfig), "an image tower of open_clip's, and BERT"
    with new_folder(output) as part:
        write_chinese_clip(part, spec, state)


@dataclass(frozen=True)
class Command:
    """The command line."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INPUT")]
    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]
    to: Layout
    """Layout of the output."""
    model: str | None = None
    """Preset name or JSON of the model, where INPUT does not describe it."""
    license: str | None = None
    """Licence in the model card of --to hub, by the hub's identifier: mit, apache-2.0, .."""


def main() -> int:
    """Read the command line and convert; returns the exit code."""
    return run_command(_command, "convert")


def _command() -> int:
    command = tyro.cli(Command, prog="rwkv_clip.convert", description=__doc__)
    print(convert(command.source, command.output, command.to, command.model, command.license))
    return 0


if __name__ == "__main__":
    sys.exit(main())
