"""The gradients of a global batch, computed in pieces: everybody is compared with everybody, however the batch is cut.

The towers see a piece at a time, the objective sees all features: first the pieces are encoded, then the objective is
differentiated down to the features, then every piece is differentiated from there. With --accum-freq the first pass
keeps no activations and each piece is encoded again (feature caching: Gao et al. 2021, arXiv 2101.06983), so that
memory is that of --batch-size pairs and the negatives are those of all. What is random in a tower is a function of the
sample or of the piece's number, so the second pass repeats the first.

--deterministic fixes the pieces whatever the number of ranks is, computes the objective on every rank in full and adds
the pieces' gradients as one binary tree: a step has the same bits on 1, 2, 4, .. ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_clip.config import ConfigError, Settings
from rwkv_clip.device import autocast_dtype
from rwkv_clip.dist import World, gather, single_process

from .data.augment import hash64
from .deterministic import TreeSum, sum_in_order
from .parallel import synchronized


@dataclass(frozen=True)
class Pieces:
    """How a rank's rows of a global batch are cut: `count` pieces of `size` rows, numbered from `first`."""

    size: int
    count: int
    first: int

    def rows(self, piece: int) -> slice:
        """Rows of this rank's share that a piece covers."""
        return slice(piece * self.size, (piece + 1) * self.size)


def cut_batch(settings: Settings, world: World) -> Pieces:
    """A piece per accumulation; with --deterministic --max-ranks over all ranks, fewer where those do not divide it.

    ConfigError where that many ranks, or this --batch-size, do not go with the pieces.
    """
    if not settings.deterministic:
        return Pieces(settings.batch_size, settings.accum_freq, world.rank * settings.accum_freq)
    whole = settings.batch_size * settings.accum_freq * world.size
    pieces = settings.max_ranks
    while whole % pieces:
        pieces //= 2
    size = whole // pieces
    if pieces % world.size:
        legal = ", ".join(str(2**i) for i in range(pieces.bit_length()))
        raise ConfigError(
            [
                f"deterministic: {world.size} ranks cannot share {pieces} pieces of a global batch of {whole} pairs; "
                f"use {legal} ranks, or another --max-ranks or batch"
            ]
        )
    if settings.accum_freq > 1 and size > settings.batch_size:
        raise ConfigError(
            [
                f"max_ranks: {pieces} pieces of {size} pairs, more than --batch-size {settings.batch_size} allows at a "
                f"time; use a power of two from {whole // settings.batch_size} on"
            ]
        )
    return Pieces(size, pieces // world.size, world.rank * (pieces // world.size))


@dataclass
class Inputs:
    """A rank's share of a global batch on its device; `text`: (B, T), or (B, V, T) for V texts an image;
    `drop_numbers`: float32 (branches, B) on the CPU, or None."""

    image: Tensor
    text: Tensor
    drop_numbers: Tensor | None


@dataclass
class Computed:
    """What a step knows besides the gradients: losses by name, the objective's report, and this rank's features."""

    losses: dict[str, Tensor]
    report: dict[str, Tensor]
    image_features: Tensor
    text_features: Tensor


class GradientStep:
    """Computes the gradients of a global batch into `.grad` of the model's parameters.

    parallel: the model as it is called, what `distribute_model` returns. normalize: pixels as stored -> as the model
    takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: nn.Module,
        objective: nn.Module,
        settings: Settings,
        world: World,
        normalize: Callable[[Tensor], Tensor],
    ):
        self.model, self.parallel, self.objective = model, parallel, objective
        self.seed, self.world, self.normalize = settings.seed, world, normalize
        self.pieces = cut_batch(settings, world)
        self.in_order, self.keeps_graphs = settings.deterministic, settings.accum_freq == 1
        self.caches_weights = settings.parallel == "ddp"
        self.dtype = autocast_dtype(settings.precision, world.device)
        if self.in_order and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            raise ConfigError(
                ["deterministic: the model's batch norms depend on the number of ranks; leave the flag out"]
            )
        # The temperature's gradient comes from the objective, which every rank computes in full.
        summed = [p for p in model.parameters() if p.requires_grad and p is not model.logit_scale]
        self.tree = TreeSum(summed) if self.in_order else None

    def run(self, step: int, inputs: Inputs, scale_loss: Callable[[Tensor], Tensor]) -> Computed:
        """Gradients of `scale_loss(sum of losses)`, averaged over ranks as DDP does. `step` seeds what is random."""
        pieces = range(self.pieces.count)
        with torch.set_grad_enabled(self.keeps_graphs), self._autocast():
            outputs = [self._encode(step, inputs, piece) for piece in pieces]
        image, text, scale = (part.detach() for part in _join(outputs))
        if not self.keeps_graphs:
            outputs = [None] * len(pieces)
        losses, report, *d_features, d_scale = self._compare(image, text, scale, scale_loss)
        with self._autocast():  # one for all pieces: weights are converted once
            for piece in pieces:
                rows, last = self.pieces.rows(piece), piece == pieces[-1]
                with synchronized(self.parallel, last):
                    output = outputs[piece] or self._encode(step, inputs, piece)
                    outputs[piece] = None  # its graph ends with this turn
                    gradients = [gradient[rows] for gradient in d_features]
                    with self._autocast(False):
                        if last:  # the temperature once
                            torch.autograd.backward(output, [*gradients, d_scale])
                        else:
                            torch.autograd.backward(output[:2], gradients)
        if self.tree:
            sum_in_order(self.tree.finish())
        return Computed(losses, report, image, text)

    def _encode(self, step: int, inputs: Inputs, piece: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image features, text features and scale of one piece, random numbers as its place in the run says."""
        torch.manual_seed(int(hash64(self.seed, step, self.pieces.first + piece)[0] >> 1))
        rows = self.pieces.rows(piece)
        if inputs.drop_numbers is not None:
            self.model.set_drop_numbers(inputs.drop_numbers[:, rows])
        call = self.parallel if torch.is_grad_enabled() and not self.in_order else self.model
        text = inputs.text[rows]
        image, texts, scale = call(self.normalize(inputs.image[rows]), text.flatten(0, -2))[:3]
        return image, texts.unflatten(0, text.shape[:-1]), scale  # one row per image, whatever the number of its texts

    def _compare(self, image: Tensor, text: Tensor, scale: Tensor, scale_loss: Callable[[Tensor], Tensor]):
        """Losses, report, and the gradients of this rank's image features and text features and of the scale."""
        # With a fixed order: everybody's features as one process would hold them, and nothing is exchanged after that.
        leaves = [gather(image), gather(text), scale] if self.in_order else [image, text, scale]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with single_process() if self.in_order else contextlib.nullcontext():
            losses, report = self.objective(*leaves)
            scale_loss(torch.stack(list(losses.values())).sum()).backward()
        start = self.world.rank * len(image) if self.in_order else 0
        d_image, d_text = (leaf.grad[start : start + len(image)] for leaf in leaves[:2])
        return losses, report, d_image, d_text, leaves[2].grad

    def _autocast(self, enabled: bool = True) -> contextlib.AbstractContextManager:
        """The towers' arithmetic; the objective switches it off for itself. A share of a model keeps no converted copy
        of the whole."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, self.dtype, enabled, cache_enabled=self.caches_weights)


def _join(outputs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    if len(outputs) == 1:
        return outputs[0]
    image, text, scale = zip(*outputs)
    return torch.cat(image), torch.cat(text), scale[-1]
