"""Linear probe: logistic regression on frozen image features, tested on the sets of zero-shot classification.

The protocol of the CLIP paper (arXiv 2103.00020, appendix A): the penalty is chosen on the official validation part
where there is one, else on pictures held out of the training part; then all training pictures are used, and the test
part is looked at once. NOTE(parity): features have length 1 here; the paper's have not, which moves its penalties.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rwkv_clip.dist import rank_and_size
from rwkv_clip.metrics import accuracy

from .cache import encode_labelled
from .datasets import IMAGEFOLDER, Asked, ClassificationSet, load_classification, load_each
from .known import KNOWN, TRAIN, VAL
from .logistic import Classifier, find_strength, fit, hold_out
from .report import Report, start_report
from .settings import LinearProbeSettings

SEED = 0  # of what is held out


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
    """The parts of every set asked for, or why they are not here. ValueError where there is none at all."""
    hint = "" if settings.split_test else "; or test on a part of the test pictures with --split-test 0.5"

    def make(dataset: str) -> list[ClassificationSet]:
        return [part.checked() for part in load_parts(dataset, settings)]

    return load_each(settings.dataset, make, device, hint)


def run(settings: LinearProbeSettings, sets: list[Asked], loaded, device: torch.device) -> Report:
    """Probe every set of `load`. One that is missing is reported as skipped, one that fails as failed.

    Ranks share the encoding of all sets; then the others end, and the main rank computes what is left.
    """
    report = start_report("linear_probe", settings, loaded, device)
    report.rows = probe_rows
    encoded = []
    for dataset, parts in sets:
        try:
            encoded.append(parts if isinstance(parts, dict) else _encode(parts, settings, loaded, device))
        except (ValueError, OSError) as error:
            encoded.append({"dataset": dataset, "status": "failed", "reason": str(error)})
    for found in encoded if rank_and_size()[0] == 0 else ():
        report.add(found if isinstance(found, dict) else _probe(*found, settings, device))
    return report


def load_parts(dataset: str, settings: LinearProbeSettings) -> list[ClassificationSet]:
    """The test part of a set, its training part and, if it has one, its validation part; the test part alone for
    `split_test`. MissingData and ValueError as `load_classification`, and where there are no training pictures."""
    folder = Path(settings.data)
    if settings.split_test is not None:
        return [load_classification(dataset, folder)]
    if dataset != IMAGEFOLDER:
        if settings.train:
            raise ValueError(f"train: goes with imagefolder; {dataset} has a training part of its own, leave train out")
        parts = [load_classification(dataset, folder)]
        parts += [load_classification(dataset, folder, part=p) for p in (TRAIN, VAL) if p in KNOWN[dataset].parts]
    else:
        train, test = settings.train or folder / "train", folder if settings.train else folder / "test"
        if not (Path(train).is_dir() and test.is_dir()):
            raise ValueError(
                f"data: {folder} has no folders train and test; make them, name the folder of training pictures with "
                "--train, or test on a part of what is there with --split-test 0.5"
            )
        parts = [load_classification(dataset, path) for path in (test, train)]
    for part in parts[1:]:
        strange = set(part.class_names) ^ set(parts[0].class_names)
        if list(part.class_names) != list(parts[0].class_names):
            which = f"{min(strange)!r} is in one only" if strange else "they come in another order"
            raise ValueError(f"{dataset}: {part.path} and {parts[0].path} have different classes; {which}")
    return parts


def choose_and_fit(
    train: Samples,
    validation: Samples | None,
    class_names: Sequence[str],
    headline: str,
    device: torch.device,
    *,
    part: float = 0.2,
    strength: float | None = None,
) -> tuple[Classifier, dict]:
    """The classifier of all training samples for the best penalty, and how that was found.

    headline: the metric that the penalty is chosen by; part: how much of each class is held out where there is no
    validation part; strength: this penalty, and no search.
    """
    everything, tried = train if validation is None else train + validation, []
    if validation is None:
        kept, held = hold_out(train.labels, part, SEED)
        train, validation = train[kept], train[held]
    if strength is None:
        if not len(validation.labels):
            raise ValueError("no class has two training pictures, so none can be held out; give --strength")
        with tqdm(desc="penalties", unit=" fits", disable=None, leave=False) as bar:

            def score(candidate: float) -> float:
                found = fit(train.features, train.labels, len(class_names), candidate, device)
                ranks = found.ranks(validation.features, validation.labels)
                value = accuracy(ranks, validation.labels, class_names)[headline]
                fact = {"strength": candidate, "validation": value, "converged": found.converged}
                tried.append(fact | {"iterations": found.iterations})
                bar.update()
                return value

            strength, _ = find_strength(score)
    found = fit(everything.features, everything.labels, len(class_names), strength, device)
    facts = {"strength": strength, "scikit_learn_C": 1 / strength, "converged": found.converged}
    counts = {"train_samples": len(everything.labels), "validation_samples": len(validation.labels) if tried else 0}
    return found, {**facts, "iterations": found.iterations, **counts, "tried": tried}


def probe_rows(results: Sequence[dict], model: str) -> list[list[str]]:
    """Header and one row for each data set; no published figures, which are of other sets of this name."""
    header = ["data set", "split", "trained on", "samples", "classes", "headline", model]
    rows = [[*header, "top-1", "top-5", "mean per class", "penalty", "note"]]
    for result in results:
        if result["status"] != "done":
            reason = textwrap.shorten(f"{result['status']}: {result['reason']}", 100)
            rows.append([result["dataset"], *["-"] * 10, reason])
            continue
        metrics, headline, probe = result["metrics"], result["headline"], result["probe"]
        notes = [result["note"]] if result["note"] else []
        if not probe["converged"]:
            notes.append(f"not converged after {probe['iterations']} iterations")
        if metrics["classes_without_samples"]:
            notes.append(f"no samples, left out: {', '.join(metrics['classes_without_samples'])}")
        ours = [f"{100 * metrics[key]:.1f}" for key in (headline, "top1", "top5", "mean_per_class")]
        numbers = [str(probe["train_samples"]), str(metrics["samples"]), str(metrics["classes"])]
        place = [result["dataset"], result["split"]]
        rows.append([*place, *numbers, headline, *ours, f"{probe['strength']:.3g}", "; ".join(notes)])
    return rows


def _encode(parts: list[ClassificationSet], settings: LinearProbeSettings, loaded, device: torch.device) -> tuple:
    """The parts of a set with their samples; all ranks call it."""
    started = time.monotonic()
    work = {"device": device, "batch_size": settings.batch_size, "workers": settings.workers}
    samples = [Samples(*encode_labelled(settings.cache_folder, loaded, part, **work)) for part in parts]
    return parts, samples, time.monotonic() - started


def _probe(
    parts: list[ClassificationSet],
    samples: list[Samples],
    seconds: float,
    settings: LinearProbeSettings,
    device: torch.device,
) -> dict:
    started = time.monotonic()
    data, test, train = parts[0], samples[0], samples[1] if len(samples) > 1 else None
    note, split = "; ".join(dict.fromkeys(part.note for part in parts if part.note)), data.split
    if settings.split_test is not None:
        places = hold_out(test.labels, settings.split_test, SEED)
        train, test = test[places[0]], test[places[1]]
        split = f"{settings.split_test:g} of {split}"
        note = "; ".join(filter(None, [note, "trained on the rest of the same part: no published protocol"]))
    validation = samples[2] if len(samples) > 2 else None
    try:
        classifier, probe = choose_and_fit(
            train,
            validation,
            data.class_names,
            data.headline,
            device,
            part=settings.hold_out,
            strength=settings.strength,
        )
        metrics = accuracy(classifier.ranks(test.features, test.labels), test.labels, data.class_names)
    except ValueError as error:
        return {"dataset": data.name, "status": "failed", "reason": str(error)}
    return {
        "dataset": data.name,
        "status": "done",
        "path": data.path,
        "split": split,
        "headline": data.headline,
        "metrics": metrics,
        "probe": probe,
        "class_names": list(data.class_names),
        "note": note,
        "seconds_encoding": round(seconds, 3),
        "seconds": round(seconds + time.monotonic() - started, 3),
    }
