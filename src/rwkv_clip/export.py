"""A model -> files that other programs run: one for images, one for texts, and the facts about their inputs.

    python -m rwkv_clip.export onnx --checkpoint logs/my-run --output exported
    python -m rwkv_clip.export onnx --checkpoint logs/my-run --output exported --image-size any
    python -m rwkv_clip.export onnx --checkpoint logs/my-run --output exported --quantize static --calibration val.jsonl
    python -m rwkv_clip.export torch-export --checkpoint logs/my-run --output exported

OUTPUT is a new folder: vision_model.onnx (pixel_values -> image_embeds), text_model.onnx (input_ids -> text_embeds),
with --quantize also vision_model_int8.onnx and text_model_int8.onnx, and export.json: mean, std, size and resizing of
pictures, the tokenizer, the scale of scores. torch-export writes .pt2 files (torch.export.load) instead. Every file is
run and compared with the model before the folder appears; features are not normalised.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

import rwkv_clip

from .config import ConfigError
from .errors import run_command
from .exporting import graphs
from .exporting.calibration import read_calibration
from .exporting.parts import LEAST_COSINE, Part, compare, make_parts, record
from .factory import Loaded, load_for_inference
from .files import hash_file, write_json

Format = Literal["onnx", "torch-export"]
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
FACTS = "export.json"


@dataclass(frozen=True)
class Wanted:
    """What to write. ConfigError for what does not go together."""

    to: Format
    image_size: str | int | None = None  # height and width of the pictures; "any"; None: the model's own
    quantize: graphs.Quantization | None = None
    calibration: str | None = None
    calibration_split: str | None = None

    def __post_init__(self) -> None:
        if self.quantize and self.to != "onnx":
            raise ConfigError([f"quantize: {self.to} has no int8 here; write onnx, or leave it out"])
        if self.quantize == "static" and not self.calibration:
            raise ConfigError(["calibration: missing; static quantisation measures ranges: give pictures and texts"])
        if self.calibration and self.quantize != "static":
            raise ConfigError(["calibration: only --quantize static reads it; leave it out"])

    def find_size(self, own: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width; None for any."""
        if self.image_size is None:
            return own
        if self.image_size == "any":
            return None
        try:
            size = int(self.image_size)
        except ValueError:
            size = 0
        if size < 1:
            raise ConfigError([f"image_size: {self.image_size!r} is neither a number of pixels from 1 on nor 'any'"])
        return size, size


def export(checkpoint: str | Path, output: str | Path, wanted: Wanted, model: str | None = None) -> list[str]:
    """Write the folder `output`, which must not exist; returns lines that say what was written and how exact it is.

    checkpoint, model: as for `load_for_inference`. The folder appears when all of it is written and compared.
    ConfigError for what cannot be exported, ValueError where a file's features are not the model's, ImportError where
    the extra is missing, OSError.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError([f"output: {output} exists; name a new folder"])
    if wanted.to == "onnx":
        graphs.import_libraries()
    loaded = load_for_inference(checkpoint, model=model)
    height, width = loaded.model.spec.image_size
    size = wanted.find_size((height, width))
    parts = make_parts(loaded.model, size)
    examples = read_calibration(wanted.calibration, loaded, wanted.calibration_split) if wanted.calibration else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f"{output.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        lines: list[str] = []
        files: dict[str, Any] = {}
        for part in parts:
            made = _write_part(part, folder, wanted, examples.get(part.side))
            lines += [_describe(output / name, about) for name, about in made.items()]
            files |= made
        write_json(folder / FACTS, {**collect_facts(loaded, size), "format": wanted.to, "files": files})
        os.rename(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return lines


def _write_part(part: Part, folder: Path, wanted: Wanted, examples: list[Tensor] | None) -> dict[str, dict[str, Any]]:
    """Write the files of a part; file name -> what is known of it. ValueError where the features differ."""
    path, program, found = folder / f"{part.file}{ENDINGS[wanted.to]}", record(part), {}
    run: Callable[[Tensor], Tensor]
    if wanted.to == "onnx":
        graphs.write_graph(program, part, path)
        run = graphs.open_graph(path, part)
    else:
        torch.export.save(program, str(path))
        run = torch.no_grad()(torch.export.load(str(path)).module())
    about = found[path.name] = _examine(part, path, run)
    if not about["cosine"] > LEAST_COSINE:  # NaN, too
        raise ValueError(
            f"{path.name}: its features are not the model's (least cosine {about['cosine']:.7f}, largest difference "
            f"{about['difference']:.1e}); nothing was written"
        )
    if wanted.quantize:
        # Pictures without texts measure no ranges of the text tower.
        way: graphs.Quantization = wanted.quantize if examples or wanted.quantize == "dynamic" else "dynamic"
        int8 = folder / f"{part.file}_int8.onnx"
        count = graphs.quantize_graph(path, int8, part, way, examples or ())
        about = _examine(part, int8, graphs.open_graph(int8, part))
        found[int8.name] = {**about, "quantized": way, "products": count}
    return found


def _examine(part: Part, path: Path, run: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    cosine, difference = compare(part, run)
    return {
        "side": part.side,
        "input": part.input,
        "output": part.output,
        "dynamic": list(part.dynamic.values()),
        "bytes": path.stat().st_size,
        "sha256": hash_file(path),
        "cosine": cosine,
        "difference": difference,
    }


def _describe(path: Path, about: dict[str, Any]) -> str:
    more = f", {about['products']} products in int8, {about['quantized']}" if "quantized" in about else ""
    return (
        f"{path}: {about['bytes'] / 1e6:.1f} MB, any {', '.join(about['dynamic'])}{more}; least cosine "
        f"{about['cosine']:.7f}, largest difference {about['difference']:.1e} of the largest feature"
    )


def collect_facts(loaded: Loaded, size: tuple[int, int] | None) -> dict[str, Any]:
    """What a program needs to know to give the files the right inputs, as JSON data."""
    spec, tokenizer = loaded.model.spec, loaded.tokenizer
    mean, std = spec.pixels
    start, *_, padding = tokenizer("")[0].tolist()
    end = tokenizer("")[0, 1].item()
    facts = {
        "model": loaded.name,
        "spec": spec.to_json(),
        "weights_sha256": loaded.digest,
        "rwkv_clip": rwkv_clip.__version__,
        "image": {
            "size": list(size or spec.image_size),  # height, width
            "any_size": size is None,
            "channels": "RGB",
            "rescale": 1 / 255,
            "mean": list(mean),
            "std": list(std),
            "resize_mode": getattr(spec, "resize_mode", "shortest"),
            "interpolation": getattr(spec, "interpolation", "bicubic"),
            "crop": "center",
        },
        "text": {
            "tokenizer": tokenizer.name,
            "context": tokenizer.context,
            "vocabulary": tokenizer.vocab_size,
            "start": start,
            "end": end,
            "padding": padding,
        },
        "normalized": False,
        "logit_scale": loaded.model.logit_scale.exp().item(),
    }
    if (bias := getattr(loaded.model, "logit_bias", None)) is not None:
        facts["logit_bias"] = bias.item()
    return facts


@dataclass(frozen=True)
class Command:
    """The command line."""

    to: Annotated[tyro.conf.Positional[Format], tyro.conf.arg(metavar="{onnx,torch-export}")]
    checkpoint: str
    """Run folder, checkpoint folder, weights file, or open_clip:NAME[:TAG]."""
    output: str
    """Folder to write; it must not exist."""
    model: str | None = None
    """Preset name or JSON of the model, where the checkpoint does not describe it."""
    image_size: str | None = None
    """Pixels of a side of the pictures, or "any" (slower); by default the model's own size."""
    quantize: graphs.Quantization | None = None
    """Also write int8 files: ranges measured at each call, or once with --calibration."""
    calibration: str | None = None
    """Pictures for static quantisation: a folder, or a set with captions (as --val-data), which serves both towers."""
    calibration_split: str | None = None
    """Which split of that set."""


def main() -> int:
    """Read the command line and export; returns the exit code."""
    return run_command(_command, "export", one_line=True)


def _command() -> int:
    command = tyro.cli(Command, prog="rwkv_clip.export", description=__doc__)
    wanted = Wanted(command.to, command.image_size, command.quantize, command.calibration, command.calibration_split)
    print("\n".join(export(command.checkpoint, command.output, wanted, command.model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
