"""Linear probe: logistic regression on frozen image features, tested on the sets of zero-shot classification.

The protocol of the CLIP paper (arXiv 2103.00020, appendix A): the penalty is chosen on the official validation split
where there is one, else on pictures held out of the training split; then all training pictures are used, and the test
split is used once. NOTE(parity): features have length 1 here, unlike the paper's, which shifts its penalties.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import arg

from rwkv_clip.config import ranged
from rwkv_clip.datasets import IMAGEFOLDER, ClassificationSet, load_classification
from rwkv_clip.datasets.benchmarks import BENCHMARKS, TRAIN, VAL
from rwkv_clip.dist import rank_and_size
from rwkv_clip.metrics import accuracy

from ..cache import encode_labelled
from ..encoder import Encoder
from ..logistic import Classifier, find_l2, fit, hold_out
from ..report.run import start_report
from ..sets import Asked, load_each, on_each
from ..settings import ClassesSettings

SEED = 0  # of what is held out


@dataclass(frozen=True, kw_only=True)
class LinearProbeSettings(ClassesSettings):
    """Linear probe: logistic regression on frozen image features, its penalty chosen on held-out training pictures."""

    data: str = "data"
    """Root in which torchvision looks for a benchmark, or a folder with `train` and `test`, each of class folders;
    with `train` or `split_test` class folders themselves."""
    train: str | None = None
    """With imagefolder: the folder of class folders to train on; default: DATA/train."""
    hold_out: float = ranged(0.2, above=0, below=1)
    """Fraction of each class of the training pictures held out to choose the penalty; sets with an official validation
    split use that."""
    split_test: float | None = ranged(None, above=0, below=1)
    """Where there are no training pictures: test on this fraction of each class, train on the others, drawn with seed
    0. No published protocol."""
    l2: Annotated[float | None, arg(aliases=("--strength",))] = ranged(None, above=0)
    """This L2 penalty (1 / C of scikit-learn) instead of the search from 1e-6 to 1e6."""

    def problems(self) -> list[str]:
        both = self.split_test is not None and self.train is not None
        found = [f"split_test: {self.split_test} and train: {self.train}; leave one of them out"] if both else []
        return super().problems() + found


@dataclass(frozen=True)
class Samples:
    """Features (n, C) and labels (n,) of pictures."""

    features: Tensor
    labels: Tensor

    def __getitem__(self, places: Tensor) -> Samples:
        return Samples(self.features[places], self.labels[places])

    def __add__(self, other: Samples) -> Samples:
        return Samples(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


def load(settings: LinearProbeSettings, device: torch.device) -> list[Asked]:
    """The splits of every requested set, or why they are missing. ValueError where there is none at all."""
    hint = "" if settings.split_test else "; or test on a fraction of the test pictures with --split-test 0.5"
    return load_each(settings.dataset, lambda dataset: load_splits(dataset, settings), device, hint)


def run(settings: LinearProbeSettings, sets: list[Asked], encoder: Encoder) -> int:
    """Probe every set of `load`. One that is missing is reported as skipped, one that fails as failed.

    All ranks encode; then the main rank fits and tests, while the others exit.
    """
    report = start_report("linear_probe", settings, encoder)
    encoded = list(on_each(sets, lambda splits: _encode(splits, encoder)))
    if rank_and_size()[0] == 0:
        for _, result in on_each(encoded, lambda found: _probe(*found, settings, encoder.device)):
            report.add(result)
    return report.finish()


def load_splits(dataset: str, settings: LinearProbeSettings) -> list[ClassificationSet]:
    """The test split of a set, its training split and, if it has one, its validation split; the test split alone for
    `split_test`. MissingData and ValueError as `load_classification`, and where there are no training pictures."""
    folder = Path(settings.data)
    if settings.split_test is not None:
        return [load_classification(dataset, folder)]
    if dataset != IMAGEFOLDER:
        if settings.train:
            raise ValueError(f"train: only for imagefolder; {dataset} has its own training split, leave train out")
        sets = [load_classification(dataset, folder)]
        more = [split for split in (TRAIN, VAL) if split in BENCHMARKS[dataset].splits]
        sets += [load_classification(dataset, folder, split=split) for split in more]
    else:
        train, test = Path(settings.train or folder / "train"), folder if settings.train else folder / "test"
        if not (train.is_dir() and test.is_dir()):
            raise ValueError(
                f"data: {folder} has no folders train and test; make them, name the folder of training pictures with "
                "--train, or test on a fraction of what is there with --split-test 0.5"
            )
        sets = [load_classification(dataset, path) for path in (test, train)]
    for other in sets[1:]:
        strange = set(other.class_names) ^ set(sets[0].class_names)
        if list(other.class_names) != list(sets[0].class_names):
            which = f"{min(strange)!r} is in one only" if strange else "their order differs"
            raise ValueError(f"{dataset}: {other.path} and {sets[0].path} have different classes; {which}")
    return sets


def choose_and_fit(
    train: Samples,
    validation: Samples | None,
    class_names: Sequence[str],
    headline: str,
    device: torch.device,
    *,
    fraction: float = 0.2,
    l2: float | None = None,
) -> tuple[Classifier, dict]:
    """The classifier trained on all training samples with the best penalty, and how that was found.

    headline: the metric that the penalty is chosen by; fraction: how much of each class is held out where there is no
    validation split; l2: use this penalty, without a search.
    """
    everything, tried = train if validation is None else train + validation, []
    if validation is None:
        kept, held = hold_out(train.labels, fraction, SEED)
        train, validation = train[kept], train[held]
    if l2 is None:
        if not len(validation.labels):
            raise ValueError("no class has two training pictures, so none can be held out; give --l2")
        with tqdm(desc="penalties", unit=" fits", disable=None, leave=False) as bar:

            def score(candidate: float) -> float:
                found = fit(train.features, train.labels, len(class_names), candidate, device)
                ranks = found.ranks(validation.features, validation.labels)
                value = accuracy(ranks, validation.labels, class_names)[headline]
                fact = {"strength": candidate, "validation": value, "converged": found.converged}
                tried.append(fact | {"iterations": found.iterations})
                bar.update()
                return value

            l2 = find_l2(score)
    found = fit(everything.features, everything.labels, len(class_names), l2, device)
    facts = {"strength": l2, "scikit_learn_C": 1 / l2, "converged": found.converged}
    counts = {"train_samples": len(everything.labels), "validation_samples": len(validation.labels) if tried else 0}
    return found, {**facts, "iterations": found.iterations, **counts, "tried": tried}


def _encode(splits: list[ClassificationSet], encoder: Encoder) -> tuple:
    """The splits of a set, their samples, and the seconds that encoding took; all ranks call it."""
    started = time.monotonic()
    samples = [Samples(encode_labelled(encoder, split), split.labels) for split in splits]
    return splits, samples, time.monotonic() - started


def _probe(
    splits: list[ClassificationSet],
    samples: list[Samples],
    seconds: float,
    settings: LinearProbeSettings,
    device: torch.device,
) -> dict:
    started = time.monotonic()
    data, (test, train, validation) = splits[0], (*samples, None, None)[:3]
    note, reported = "; ".join(dict.fromkeys(split.note for split in splits if split.note)), data.split
    if settings.split_test is not None:
        kept, held = hold_out(test.labels, settings.split_test, SEED)
        train, test = test[kept], test[held]
        reported = f"{settings.split_test:g} of {reported}"
        note = "; ".join(filter(None, [note, "trained on the rest of the same split: no published protocol"]))
    options = {"fraction": settings.hold_out, "l2": settings.l2}
    classifier, probe = choose_and_fit(train, validation, data.class_names, data.headline, device, **options)
    return {
        "dataset": data.name,
        "status": "done",
        "path": data.path,
        "split": reported,
        "headline": data.headline,
        "metrics": accuracy(classifier.ranks(test.features, test.labels), test.labels, data.class_names),
        "probe": probe,
        "class_names": list(data.class_names),
        "note": note,
        "seconds_encoding": round(seconds, 3),
        "seconds": round(seconds + time.monotonic() - started, 3),
    }
