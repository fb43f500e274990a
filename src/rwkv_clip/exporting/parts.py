"""The two parts of a model that are exported, each a module of standard operators with one input and one output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config

from ..config import ConfigError
from ..models.bert import BertTower
from ..models.rwkv import ImageTower, TextTower
from ..models.specification import ContrastiveModel
from ..ops import set_backend
from .rwkv import FlatImageTower, FlatTextTower

SIDES = ("image", "text")
LEAST_COSINE = 0.99999  # between exported and original features, for every picture and text
TRIED = (1, 3)  # batch sizes that a finished file is run with; the graph is recorded with another
RECORDED = 2


@dataclass
class Part:
    """What becomes one file.

    module: `input` -> `output` (B, D), features that are not normalised. encode: the model's own features for the same
    input. dynamic: names of the axes of `input` that may have any size. make_input(batch, wide): an input of this
    batch size, normally distributed pixels or token ids, at another size of the picture or length of the text where
    `wide` and the part takes any.
    """

    side: str
    file: str  # without its ending
    input: str
    output: str
    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    dynamic: dict[int, str]
    make_input: Callable[[int, bool], Tensor]

    def examples(self) -> list[Tensor]:
        """Inputs that a finished file is compared with."""
        return [self.make_input(batch, wide) for batch in TRIED for wide in {False, len(self.dynamic) > 1}]


class _ImageEncoder(nn.Module):
    """The image side of a model as it is. (A graph keeps the names of arguments.)"""

    def __init__(self, model: ContrastiveModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _TextEncoder(_ImageEncoder):
    """The text side."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def make_parts(model: ContrastiveModel, size: tuple[int, int] | None) -> list[Part]:
    """Image and text part of a float32 model in evaluation mode. size: height and width of the pictures; None for any.

    ConfigError where the image tower has one size only.
    """
    tower = getattr(model, "image_model", None)
    own = tuple(model.spec.image_size)
    shape = size or own
    dynamic, patch = {0: "batch"}, 1
    if isinstance(tower, ImageTower):
        module: nn.Module = FlatImageTower(tower, size)
        patch = tower.config.patch
        dynamic |= {} if size else {2: "height", 3: "width"}
    else:
        if size != own:
            kind = type(tower if tower is not None else getattr(model, "visual", model)).__name__
            wanted = "any" if size is None else f"{size[0]} x {size[1]}"
            remedy = (
                "set it in the model (force_image_size of create_model, then save_pretrained), and export that"
                if size
                else "leave image_size out, or export a file for each size"
            )
            raise ConfigError(
                [
                    f"image_size: {wanted} is not possible for {model.spec.name}, whose {kind} has positions for "
                    f"{own[0]} x {own[1]} only; {remedy}"
                ]
            )
        module = _ImageEncoder(model)

    def make_pixels(batch: int, wide: bool) -> Tensor:
        height, width = (9 * patch + 1, 8 * patch + 3) if wide else shape  # more than one chunk of tokens
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))

    return [
        Part("image", "vision_model", "pixel_values", "image_embeds", module, model.encode_image, dynamic, make_pixels),
        _make_text_part(model),
    ]


def _make_text_part(model: ContrastiveModel) -> Part:
    tokenizer = model.spec.tokenizer()
    tower: Any = getattr(model, "text_model", None)
    context, vocab = tokenizer.context, model.spec.vocabulary or tokenizer.vocab_size
    module: nn.Module = FlatTextTower(tower) if isinstance(tower, TextTower) else _TextEncoder(model)
    # In all others padding counts, or the length of a text is fixed by a mask.
    dynamic = {0: "batch", 1: "tokens"} if isinstance(tower, BertTower) else {0: "batch"}

    def make_ids(batch: int, wide: bool) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(1, vocab, (batch, context), generator=generator)
        padding = tokenizer("")[0, -1]
        for row in range(batch):  # texts of every length, the last one full
            ids[row, (row + 1) * context // batch :] = padding
        return ids[:, : max(2, context // 2)].clone() if wide else ids  # a view would be recorded as one

    return Part("text", "text_model", "input_ids", "text_embeds", module, model.encode_text, dynamic, make_ids)


@torch.no_grad()
def compare(part: Part, run: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """(least cosine, largest difference) between the features of `run` and those of the model, over `part.examples()`.

    The difference is relative to the largest feature of its input. NaN where a feature is not finite.
    """
    cosines, differences = [], []
    for inputs in part.examples():
        expected, found = part.encode(inputs).double(), run(inputs).double()
        if found.shape != expected.shape or not found.isfinite().all():
            return float("nan"), float("nan")
        cosines.append(torch.cosine_similarity(found, expected).min().item())
        differences.append(((found - expected).abs().max() / expected.abs().max()).item())
    return min(cosines), max(differences)


def record(part: Part) -> torch.export.ExportedProgram:
    """The part as a program of PyTorch's own operators (`torch.export`). ConfigError where it cannot be recorded."""
    axes = {axis: torch.export.Dim.DYNAMIC for axis in part.dynamic}
    inputs = part.make_input(RECORDED, len(part.dynamic) > 1)
    try:
        # Sizes of 1 are not special: without this a graph is recorded for batches from 2 on.
        patched = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), set_backend("torch"), quiet(), patched:
            program = torch.export.export(part.module.eval(), (inputs,), dynamic_shapes=(axes,), strict=False)
    except Exception as error:  # of any kind: this is another library's reading of a whole model
        raise ConfigError([f"{part.side} tower: torch.export cannot record it ({first_line(error)})"]) from error
    if guards := getattr(program, "_guards_code", None):
        # "Not 1", of sizes that may well be: it was recorded as if they were not, which is right for both.
        program._guards_code = [guard for guard in guards if "!=" not in guard]
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and advice of libraries, which are for those who call them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # torch.export prints a whole graph before it raises.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """Of the error that began it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
