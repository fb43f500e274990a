"""One training step. It knows no method by name: model, objective, choice of texts and schedule come from the settings.

A step is a pure function of (weights, optimizer state, step): the batch follows from the position, and its randomness
from the samples or from (seed, step, micro-batch), so no random state has to be saved for an exact resume.

A step only queues work: nothing in it waits for a GPU, which computes one step while the host prepares the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from rwkv_clip.losses import FACTS
from rwkv_clip.losses.pairs import measure_duplicates, rank_own_first
from rwkv_clip.models.outputs import SCALARS, SIDES
from rwkv_clip.transform import normalize

from .data.augment import draw_drops, draw_texts, hash_rows
from .data.batch import Batch
from .deterministic import DeterministicStep
from .faults.nonfinite import Statistics
from .gradients import Computed, GradientStep, Inputs
from .optim import Schedule, set_step, update_weights
from .parameter_groups import Rates
from .state import TrainState

ACCURACIES = ("image_to_text_acc", "text_to_image_acc")  # in log.jsonl, after val_ those of the validation


class Trainer:
    """Takes the steps of one run on this rank."""

    def __init__(self, state: TrainState):
        self.state, self.data, self.seed = state, state.settings.data, state.settings.run.seed
        self.schedule = Schedule.from_settings(state.settings.optimizer, state.total_steps, state.epoch_steps)
        self.rates = Rates(state.shards, state.settings.optimizer).named()
        settings, world, model = state.settings.parallel, state.world, state.model
        step = DeterministicStep if settings.deterministic else GradientStep
        self.gradients = step(model, state.parallel, state.objective, settings, world, self.normalize, self.seed)
        # On the device from the start: a constant made inside a step would be a copy that the host waits for.
        self.pixel_statistics = [torch.tensor(values, device=world.device) for values in model.spec.pixels]
        self._last: tuple[dict[str, Tensor], Tensor | None, Tensor] | None = None  # features, image keys and texts
        self.copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None

    def normalize(self, image: Tensor) -> Tensor:
        """Stored pixels, uint8, as the model expects them."""
        return normalize(image, *self.pixel_statistics)

    def choose_texts(self, batch: Batch) -> Tensor:
        """(B, V, T) -> one text per image, drawn by (seed, epoch, sample), or the first: (B, T); or all of them. Only
        the first --texts texts are used."""
        text = batch.text[:, : self.data.texts]
        if self.data.text_choice == "all":
            return text
        if self.data.text_choice == "first":
            return text[:, 0]
        drawn = draw_texts(self.seed, batch.epochs.numpy(), batch.ids.numpy(), text.shape[1], self.data.text_probs)
        return text[torch.arange(len(drawn)), torch.from_numpy(drawn)]

    def draw_drops(self, batch: Batch) -> Tensor | None:
        """Stochastic depth's numbers for every branch, sample and image view: float32 (branches, B) or (branches, B,
        V); None for a model without it."""
        branches = getattr(self.state.model, "drop_branches", 0)
        if not branches:
            return None
        views = batch.image.shape[1:-3]  # () or (V,)
        drawn = draw_drops(self.seed, batch.epochs.numpy(), batch.ids.numpy(), branches * math.prod(views))
        numbers = torch.from_numpy(drawn.astype(np.float32))
        return numbers.unflatten(0, (*views, branches)).permute(1, 2, 0) if views else numbers

    def step(self, batch: Batch) -> dict[str, Tensor | float]:
        """One optimizer step. Returns what the log shows; tensors stay on the device.

        NumericsError when the previous step was not finite; for this one `check` raises it.
        """
        return self._step(batch, void=False)

    def measure(self) -> dict[str, Tensor]:
        """What the log shows of the last step's batch, and too costly for every step; all ranks call this.

        `duplicates`: see `measure_duplicates`; with --report-training-batch-acc the fractions of own images and texts
        that score highest with their own, by the features before the update: `image_to_text_acc`, `text_to_image_acc`.
        What the objective leaves out of the negatives is left out here."""
        assert self._last is not None, "called after a step"
        features, image_keys, text = self._last
        facts = find_facts(image_keys, text, FACTS)
        facts = dict(zip(facts, self._to_device(*facts.values())))
        found = {"duplicates": measure_duplicates(facts.get("image_keys"), facts["text_keys"])}
        if self.state.settings.log.report_training_batch_acc:
            image = features["image"] if features["image"].dim() == 2 else features["image"][:, 0]
            masked = {name: value for name, value in facts.items() if name in self.state.objective.needs}
            hits = rank_own_first(image.contiguous(), features["text"], **masked)
            found |= {name: hit.float().mean() for name, hit in zip(ACCURACIES, hits)}
        return found

    def sit_out(self, blank: Batch) -> dict[str, Tensor | float]:
        """Take part in a step for which this rank, having received a signal, has no data: it is void on all ranks."""
        return self._step(blank, void=True)

    def check(self) -> int:
        """Wait for the last step, and undo the count of void steps. Returns a signal that some rank has received, else
        0. NumericsError as raised by the watch."""
        watch = self.state.watch
        watch.check()
        if watch.first_void is not None:
            self.state.take_back(watch.first_void)
        return watch.signal

    def _step(self, batch: Batch, void: bool) -> dict[str, Tensor | float]:
        state, progress = self.state, self.state.progress
        set_step(state.optimizer, self.schedule, progress.step)
        text = self.choose_texts(batch)
        facts = find_facts(batch.image_keys, text, state.objective.needs)
        facts |= state.objective.recall(find_facts(batch.image_keys, text, state.objective.recalls))
        image, tokens, *found = self._to_device(batch.image, text, *facts.values())
        inputs = Inputs(image, tokens, self.draw_drops(batch), dict(zip(facts, found)))
        state.shards.zero_gradients()
        statistics = Statistics(state.model, state.objective)
        computed = self.gradients.run(progress.step, inputs, state.scaler.scale)
        self._last = {name: computed.features[name] for name in SIDES}, batch.image_keys, text  # not the pixels
        losses = {name: value.detach() for name, value in computed.losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "grad_norm": self._update(loss, batch, computed, statistics, void),
            "logit_scale": state.model.logit_scale.detach().exp(),
            "lr": self.schedule.lr(progress.step),
        }
        values |= {name: scale * self.schedule.lr(progress.step) for name, scale in self.rates.items()}
        if len(losses) > 1:
            values |= losses
        progress.step += 1
        progress.samples_seen += state.global_batch
        return {**values, **{name: value for name, value in computed.report.items() if name not in values}}

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy on a separate stream, while the GPU still computes the previous step."""
        device = self.state.world.device
        if self.copies is None:
            return [tensor.to(device) for tensor in tensors]
        now = torch.cuda.current_stream(device)
        with torch.cuda.stream(self.copies):
            pinned = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
            sent = [tensor.to(device, non_blocking=True) for tensor in pinned]
        now.wait_stream(self.copies)
        for tensor in sent:
            tensor.record_stream(now)  # allocated on one stream, used on the other
        return sent

    def _update(self, loss: Tensor, batch: Batch, computed: Computed, statistics: Statistics, void: bool) -> Tensor:
        state = self.state
        state.shards.take_gradients()
        state.scaler.unscale_(state.optimizer)
        limit = state.settings.optimizer.grad_clip_norm or float("inf")
        norms = state.shards.gradient_norms()
        grad_norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        nn.utils.clip_grads_with_norm_(state.shards.own.values(), limit, grad_norm)
        skip = state.watch.judge(loss, grad_norm, may_overflow=state.scaler.is_enabled(), void=void)
        update_weights(state.optimizer, skip)
        statistics.restore(skip)
        self._update_scale()
        with torch.no_grad():
            state.model.logit_scale.clamp_(*state.objective.scale_limits)
        if state.average:
            state.average.update(state.progress.step, skip)
        features = [value for name, value in computed.features.items() if name not in SCALARS]
        epoch = state.progress.samples_seen // state.epoch_samples
        state.watch.report(state.progress.step, batch.ids, loss, grad_norm, norms, features, epoch)
        return grad_norm

    def _update_scale(self) -> None:
        """A bad step lowers the scale, a void one leaves it. (Private attributes, as `state_dict` waits for the
        device.)"""
        scaler, void = self.state.scaler, self.state.watch.void
        if scaler.is_enabled():
            own = scaler._scale, scaler._growth_tracker  # there since the loss was scaled
            kept = [(tensor, tensor.clone()) for tensor in own if tensor is not None]
            scaler.update()
            for tensor, before in kept:
                tensor.copy_(torch.where(void > 0, before, tensor))


def find_facts(image_keys: Tensor | None, text: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the named facts that a batch has, by name. text: token ids as `choose_texts` returns them."""
    facts = {}
    if "image_keys" in names and image_keys is not None:
        facts["image_keys"] = image_keys
    if "text_keys" in names:
        facts["text_keys"] = torch.from_numpy(hash_rows(text.numpy()))
    return facts
