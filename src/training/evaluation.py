"""Evaluation during a run: what is measured besides the loss, when, and by whom.

The sets of --eval are opened before training, and evaluated by all ranks, each of which encodes its share; counts are
those of one process. Between evaluations nothing is kept of them but names, labels and the tokens of prompts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_clip.classification import class_weights, describe_prompts, evaluate_classification, tokenize_prompts
from rwkv_clip.config import ConfigError
from rwkv_clip.data.retrieval_set import RetrievalSet, load_retrieval
from rwkv_clip.datasets import ELEVATER, ClassificationSet, MissingData, load_classification
from rwkv_clip.device import autocast_dtype
from rwkv_clip.dist import World, gather
from rwkv_clip.factory import preprocess_of
from rwkv_clip.features import FeatureExtractor, on_all_ranks
from rwkv_clip.models.specification import ContrastiveModel, ModelSpec
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.tokenizer import BERT_CHINESE

from .faults.signals import Interrupted, Preemption
from .parallel import WholeModel
from .settings import Settings
from .settings.evaluation import METRICS, EvalTask

DESCRIBED = 10_000  # prompts of a set that are looked at before training; more take a minute
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Something that is measured in the course of a run: every so many steps, every so many epochs (None: not so, 0:
    not even at the end), and at the end.

    `measure()` returns metrics on the main rank and, if `shared`, on all of them; Interrupted, on each rank that shares
    the work, when a signal ends it early. `prefix` is put before their names in the log.
    """

    name: str
    measure: Callable[[], dict[str, float]]
    steps: int | None
    epochs: int | None
    prefix: str = ""


@dataclass
class EvalSet:
    """A task of --eval with its data. tokens: of all prompts, int32, once they were needed; ImageNet's 80,000 take half
    a minute."""

    task: EvalTask
    data: RetrievalSet | ClassificationSet
    tokens: Tensor | None = None

    def measure(self, extractor: FeatureExtractor, prefix: str) -> dict[str, float]:
        """The task's metrics as they are logged. prefix: of captions. All ranks call it."""
        found: Any
        if isinstance(self.data, RetrievalSet):
            found = evaluate_retrieval(extractor, self.data, prefix).metrics
        else:
            if self.tokens is None:
                self.tokens = tokenize_prompts(self.data, extractor.tokenizer).to(torch.int32)
            weights = class_weights(extractor, self.tokens, len(self.data.class_names))
            found = evaluate_classification(extractor, self.data, weights).metrics
        return {f"{self.task.name}/{metric}": float(found[metric]) for metric in METRICS[self.task.task]}

    def facts(self) -> Iterator[str]:
        """What must be the same on all ranks."""
        if isinstance(self.data, RetrievalSet):
            yield from self.data.image_names
            yield str(self.data.right_images.tolist())
        else:
            yield str(self.data.labels.tolist())
            yield from self.data.class_names


def open_sets(settings: Settings, spec: ModelSpec, world: World) -> list[EvalSet]:
    """The sets of --eval, read and checked; all ranks call it. ConfigError, on all of them, lists every set that cannot
    be read, or that ranks see differently."""
    sets, problems, tokenizer = [], [], spec.tokenizer()
    for task in settings.evaluation.tasks():
        try:
            data = on_all_ranks(partial(_open, task, tokenizer, settings.data.val_prefix), world.device)
        except (ValueError, OSError) as error:
            problems.append(f"eval: {task.text!r}: {error}")
        else:
            sets.append(EvalSet(task, data))
    for one in sets if world.size > 1 else ():
        digest = hashlib.sha256("\0".join(one.facts()).encode("utf-8", "backslashreplace")).digest()[:8]
        seen = gather(torch.tensor([int.from_bytes(digest, "big") >> 1], device=world.device)).tolist()
        if other := next((rank for rank, found in enumerate(seen) if found != seen[0]), 0):
            problems.append(f"eval: {one.task.text!r}: rank {other} sees other data than rank 0; give all the same")
    if problems:
        raise ConfigError(problems)
    for one in sets if world.is_main else ():
        if note := _describe(one.data, tokenizer):
            log.warning("eval: %s: %s", one.task.text, note)
    return sets


def _open(task: EvalTask, tokenizer: Callable, prefix: str) -> RetrievalSet | ClassificationSet:
    data: RetrievalSet | ClassificationSet
    if task.task == "retrieval":
        data = load_retrieval(task.place, split=task.what or None)
        if data.captions is None:
            data.tokenize(tokenizer, prefix)  # tokens of records may not fit
    else:
        reads_chinese = getattr(tokenizer, "name", None) == BERT_CHINESE
        language = "zh" if reads_chinese and task.what in ("imagenet", ELEVATER) else "en"
        try:
            data = load_classification(task.what, task.place, language=language)
        except MissingData as error:
            raise ValueError(str(error)) from None
    data.open(0)
    return data


def _describe(data: RetrievalSet | ClassificationSet, tokenizer: Callable) -> str:
    if isinstance(data, RetrievalSet) or len(data.class_names) * len(data.templates) > DESCRIBED:
        return data.note
    return describe_prompts(data, tokenizer)


def make_evaluator(
    sets: list[EvalSet], settings: Settings, model: ContrastiveModel, whole: WholeModel, preemption: Preemption
) -> Callable[[], dict[str, float]]:
    """All metrics of the sets; all ranks call the result, and all of them get the metrics.

    A set that cannot be read any more is logged as an error and left out: no run ends by it. A signal ends the
    evaluation before the next block of pictures or texts (Interrupted): the time left until the process is killed is
    for saving.
    """
    parallel, world = settings.parallel, whole.world
    preprocess, tokenizer = preprocess_of(model), model.spec.tokenizer()
    autocast = autocast_dtype(parallel.precision, world.device)

    def stop() -> None:
        if preemption.signal:
            raise ValueError("told to stop")  # of which the other ranks learn as of any other error

    def evaluate() -> dict[str, float]:
        found: dict[str, float] = {}
        with whole.gathered() as net:
            assert net is not None, "whole on all ranks"
            extractor = FeatureExtractor(
                net, preprocess, tokenizer, world.device, parallel.batch_size, autocast, before_block=stop
            )
            for one in sets:
                try:
                    found |= one.measure(extractor, settings.data.val_prefix)
                except (ValueError, OSError) as error:
                    if preemption.agree(world):
                        raise Interrupted from None
                    if world.is_main:
                        log.error("eval: %s: not evaluated this time (%s)", one.task.text, error)
        return found

    return evaluate
