"""An exponential moving average of the weights, kept beside them: validated, saved and resumed with the run.

After step s (0, 1, ..) the average becomes d * average + (1 - d) * weights with d = --ema-decay, and with --ema-warmup
d = min(--ema-decay, (1 + s) / (10 + s)): that of tf.train.ExponentialMovingAverage with num_updates. Averaged is what
timm's ModelEmaV3 averages: parameters, and saved buffers of floating point, such as the running means of batch norms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from .faults.signals import Interrupted
from .parallel import Shards, own_shard, whole_tensors
from .settings import OptimizerSettings

PREFIX = "ema_"  # of the metrics of the average


def make_average(shards: Shards, settings: OptimizerSettings) -> Average | None:
    """The average that --ema-decay asks for; None without it."""
    return None if settings.ema_decay is None else Average(shards, settings.ema_decay, settings.ema_warmup)


class Average:
    """The average of what this rank holds of a model's trained parameters and its saved buffers, by name. Frozen ones
    are their own average."""

    def __init__(self, shards: Shards, decay: float, warmup: bool):
        self._shards, self._decay, self._warmup = shards, decay, warmup
        parameters = {name: shards.own[name] for name, _ in shards.model.named_parameters()}
        saved = shards.model.state_dict().keys()  # not constants such as open_clip's mask, whose -inf would become NaN
        named = shards.model.named_buffers()
        buffers = {name: buffer for name, buffer in named if name in saved and buffer.is_floating_point()}
        trained = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad}
        self._current = trained | buffers  # in the memory of the model
        self.kept = {name: tensor.clone() for name, tensor in self._current.items()}

    def decay_at(self, step: int) -> float:
        """Weight of the old average in step `step`: a pure function of it."""
        return min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Take in the weights after step `step`; nothing where `skip`, a float scalar on the device, is 1."""
        share = (1 - skip) * (1 - self.decay_at(step))
        shares = {dtype: share.to(dtype) for dtype in {tensor.dtype for tensor in self.kept.values()}}
        for name, kept in self.kept.items():
            kept.lerp_(self._current[name], shares[kept.dtype])

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        for name, kept in self.kept.items():
            kept.copy_(self._current[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; all ranks call this. Memory: one more copy of the largest
        tensor."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def validated(
        self, validate: Callable[[], dict[str, float]], agree: Callable[[], int]
    ) -> Callable[[], dict[str, float]]:
        """The validation of the weights, then of the average: its metrics with PREFIX before their names.

        agree: a signal that some rank has received, else 0; all ranks call it. A signal in the first half interrupts
        all of them (Interrupted), also those that only helped to gather the weights: none waits in the second half."""

        def validate_both() -> dict[str, float]:
            found: dict[str, float] | None = None
            with contextlib.suppress(Interrupted):
                found = validate()
            if agree() or found is None:
                raise Interrupted
            with self.applied():
                averaged = validate()
            return {**found, **{f"{PREFIX}{name}": value for name, value in averaged.items()}}

        return validate_both

    def gather(self, weights: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole weights of the averaged model where `keep` is true, nothing elsewhere; all ranks call this. weights:
        those of the model, whole, for what is not averaged."""
        marked = self._shards.mark_state({f"{name}/ema": tensor for name, tensor in self.kept.items()})
        whole = whole_tensors({key.rpartition("/")[0]: tensor for key, tensor in marked.items()}, keep)
        if not keep:
            return {}
        first = {parameter: name for name, parameter in self._shards.model.named_parameters()}
        shared = {
            name: first[parameter] for name, parameter in self._shards.model.named_parameters(remove_duplicate=False)
        }
        return {name: whole.get(shared.get(name, name), tensor) for name, tensor in weights.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], begin: Collection[str] = ()) -> None:
        """Inverse of `gather`. ValueError for tensors of another model. begin: names of weights that, where they are
        absent, begin as they are now."""
        parameters = dict(self._shards.whole())
        for name, kept in self.kept.items():
            if name in begin and name not in tensors:
                kept.copy_(self._current[name])
                continue
            shape = parameters[name].shape if name in parameters else kept.shape
            if name not in tensors or tensors[name].shape != shape:
                raise ValueError(f"ema.safetensors: {name} is missing or has another shape than {tuple(shape)}")
            kept.copy_(own_shard(tensors[name], parameters.get(name, kept)))

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, kept in self.kept.items():
            before = kept.clone()
            kept.copy_(self._current[name])
            self._current[name].copy_(before)
