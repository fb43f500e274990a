"""The gradients of a global batch, computed in micro-batches: every pair is a negative of every other, however the
batch is divided.

The towers see one micro-batch at a time, the objective sees all features: first the micro-batches are encoded, then the
objective is differentiated with respect to the features, then every micro-batch is backpropagated from there. With
--accum-freq the first pass keeps no activations and each micro-batch is encoded again (feature caching: Gao et al.
2021, arXiv 2101.06983), so memory is that of --batch-size pairs while the negatives are all pairs. Randomness in a
tower is a function of the sample or of the micro-batch's number, so the second pass repeats the first.

`deterministic.py` has the variant whose bits do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rwkv_clip.config import ConfigError
from rwkv_clip.device import autocast_dtype
from rwkv_clip.dist import World
from rwkv_clip.losses import FACTS, Objective
from rwkv_clip.models.outputs import SCALARS
from rwkv_clip.models.specification import ContrastiveModel

from .data.augment import hash64
from .parallel import average_gradients, synchronized
from .settings import ParallelSettings

Features = dict[str, Tensor]  # by name: one row per sample, or scalars of the whole model (logit_scale)


@dataclass(frozen=True)
class MicroBatches:
    """How a rank's rows of a global batch are divided: `count` micro-batches of `size` rows, numbered from `first`."""

    size: int
    count: int
    first: int

    def rows(self, number: int) -> slice:
        """Rows of this rank that a micro-batch covers."""
        return slice(number * self.size, (number + 1) * self.size)


@dataclass
class Inputs:
    """A rank's rows of a global batch on its device. image: uint8 (B, 3, h, w), or (B, V, 3, h, w) for V views of each;
    text: int64 (B, T), or (B, V, T) for V texts; drop_numbers: float32 (branches, B), or (branches, B, V) for V image
    views, on the CPU, or None; facts: those of `losses.FACTS` that the objective needs, one row per sample."""

    image: Tensor
    text: Tensor
    drop_numbers: Tensor | None
    facts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Computed:
    """Results of a step besides the gradients: losses by name, the objective's report, and this rank's features."""

    losses: dict[str, Tensor]
    report: dict[str, Tensor]
    features: Features


class GradientStep:
    """Computes the gradients of a global batch into `.grad` of the parameters of model and objective.

    parallel: the model to call, as returned by `distribute_model`. normalize: pixels as stored -> as the model expects
    them. seed: of the run.
    """

    def __init__(
        self,
        model: ContrastiveModel,
        parallel: nn.Module,
        objective: Objective,
        settings: ParallelSettings,
        world: World,
        normalize: Callable[[Tensor], Tensor],
        seed: int,
    ):
        lacking = [name for name in objective.needs if name in SCALARS and getattr(model, name, None) is None]
        if lacking:
            raise ConfigError([f"objective: needs {', '.join(lacking)}, which the model does not have; take another"])
        self.model, self.parallel, self.objective = model, parallel, objective
        self.seed, self.world, self.normalize = seed, world, normalize
        self.micro_batches = self.cut_batch(settings, world)
        self.keeps_graphs = settings.accum_freq == 1
        self.caches_weights = settings.parallel == "ddp"
        self.dtype = autocast_dtype(settings.precision, world.device)

    @staticmethod
    def cut_batch(settings: ParallelSettings, world: World) -> MicroBatches:
        """One micro-batch per accumulation."""
        return MicroBatches(settings.batch_size, settings.accum_freq, world.rank * settings.accum_freq)

    def run(self, step: int, inputs: Inputs, scale_loss: Callable[[Tensor], Tensor]) -> Computed:
        """Gradients of `scale_loss(sum of losses)`, averaged over ranks as DDP does. `step` seeds the randomness."""
        numbers = range(self.micro_batches.count)
        with torch.set_grad_enabled(self.keeps_graphs), self._autocast():
            outputs = {number: self._encode(step, inputs, number) for number in numbers}
        features = {name: value.detach() for name, value in _join(list(outputs.values())).items()}
        if not self.keeps_graphs:
            outputs.clear()
        facts = inputs.facts | self._observe(inputs)
        losses, report, gradients = self._compare(features, facts, scale_loss)
        with self._autocast():  # one for all micro-batches: weights are converted once
            for number in numbers:
                last = number == numbers[-1]
                with synchronized(self.parallel, last):
                    # Popped: its graph is freed with this iteration.
                    output = outputs.pop(number, None) or self._encode(step, inputs, number)
                    with self._autocast(False):
                        _differentiate(output, gradients, self.micro_batches.rows(number), last)
        self._finish()
        return Computed(losses, report, features)

    def _encode(self, step: int, inputs: Inputs, number: int) -> Features:
        """Features of one micro-batch; its random numbers follow from its place in the run."""
        torch.manual_seed(int(hash64(self.seed, step, self.micro_batches.first + number)[0] >> 1))
        rows = self.micro_batches.rows(number)
        if inputs.drop_numbers is not None:
            self.model.set_drop_numbers(inputs.drop_numbers[:, rows].flatten(1))
        image, text = inputs.image[rows], inputs.text[rows]
        rows_of = {"image": image.shape[:-3], "text": text.shape[:-1]}  # (B,) or (B, V)
        call = self._called()
        given = (*SCALARS, *FACTS, *self.objective.made)  # scalars are always there
        needs = [name for name in self.objective.needs if name not in given]
        output = call(self.normalize(image.flatten(0, -4)), text.flatten(0, -2), needs=needs)
        return {
            name: value if name in SCALARS else value.unflatten(0, rows_of[name.partition("_")[0]])
            for name, value in output.items()
        }

    def _observe(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the objective makes of the micro-batches by itself, one row per sample."""
        seen = []
        with torch.no_grad(), self._autocast():
            for number in range(self.micro_batches.count):
                rows = self.micro_batches.rows(number)
                seen.append(self.objective.observe(inputs.image[rows], inputs.text[rows]))
        return {name: torch.cat([facts[name] for facts in seen]) for name in seen[0]}

    def _called(self) -> nn.Module:
        """The module that encodes: the distributed one where gradients are computed."""
        return self.parallel if torch.is_grad_enabled() else self.model

    def _compare(
        self, features: Features, facts: dict[str, Tensor], scale_loss: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Features]:
        """Losses, report, and the gradients of this rank's features and of the scalars."""
        leaves = {name: value.detach().requires_grad_() for name, value in features.items()}
        losses, report = self.objective(**{name: {**leaves, **facts}[name] for name in self.objective.needs})
        _check_scalars(losses, report)
        scale_loss(torch.stack(list(losses.values())).sum()).backward()
        # What an objective does not use, parameters of its own or features, has a gradient of zeros: so all that trains
        # is reached, on all ranks, and has a state to resume with.
        for parameter in self.objective.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        average_gradients(self.objective)
        gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
        return losses, report, gradients

    def _finish(self) -> None:
        """Called after the last micro-batch."""

    def _autocast(self, enabled: bool = True) -> contextlib.AbstractContextManager:
        """Autocast for the towers; the objective turns it off for itself. A sharded model keeps no converted copy of
        the whole model."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, self.dtype, enabled, cache_enabled=self.caches_weights)


def _check_scalars(losses: dict[str, Tensor], report: dict[str, Tensor]) -> None:
    """ValueError unless an objective returned what it should."""
    if not losses:
        raise ValueError("objective: it returned no loss; at least one is needed")
    for name, value in {**report, **losses}.items():
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"objective: {name!r} has shape {tuple(value.shape)}, should be a scalar; take its mean")


def _join(outputs: list[Features]) -> Features:
    if len(outputs) == 1:
        return outputs[0]
    return {
        name: value if name in SCALARS else torch.cat([output[name] for output in outputs])
        for name, value in outputs[-1].items()
    }


def _differentiate(output: Features, gradients: Features, rows: slice, last: bool) -> None:
    """Backpropagate to the trained parameters; scalars once, with the last micro-batch."""
    reached = [name for name, value in output.items() if value.requires_grad and (last or name not in SCALARS)]
    if reached:
        torch.autograd.backward(
            [output[name] for name in reached],
            [gradients[name] if name in SCALARS else gradients[name][rows] for name in reached],
        )
