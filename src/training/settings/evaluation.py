"""What is evaluated during a run, and how often."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

from rwkv_clip.datasets import BENCHMARKS, ELEVATER, IMAGEFOLDER, IMAGENET_V2, SETS
from rwkv_clip.metrics import RECALL_AT

RECALLS = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT)
# Task -> its metrics, all of them fractions.
METRICS = {"retrieval": (*RECALLS, "mean_recall"), "classification": ("top1", "top5", "mean_per_class")}
VALIDATION = (*METRICS["retrieval"], "loss", "image_to_text_acc", "text_to_image_acc")  # of --val-data, after `val_`
SPLITS = ("train", "test", "val")  # which say little as the name of a folder
FORM = "write retrieval:[SPLIT@]FILE or classification:SET@FOLDER, with NAME= before it to name its metrics"


@dataclass(frozen=True)
class EvalTask:
    """One entry of --eval. Its metrics are logged as `name/metric`."""

    name: str
    task: str  # a key of METRICS
    what: str  # classification: the set; retrieval: the split, "" for none
    place: str  # of its data
    text: str  # as it was written

    @property
    def metrics(self) -> list[str]:
        """As they are logged."""
        return [f"{self.name}/{metric}" for metric in METRICS[self.task]]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated during the run, and how often."""

    eval: tuple[str, ...] = ()
    """Tasks: retrieval:[SPLIT@]FILE, with a file as of --val-data, and classification:SET[@FOLDER] with a benchmark
    (cifar10, cifar100, food101, pets, flowers, sun397, stanford_cars, dtd, caltech101, aircraft, imagenet, imagenetv2),
    imagefolder (a folder per class) or elevater; FOLDER is `data` unless given. NAME= before a task names its metrics:
    NAME/top1, NAME/top5, NAME/mean_per_class; NAME/image_to_text_R@1, .., NAME/mean_recall."""
    imagenet_val: str | None = None
    """Folder of ImageNet's validation pictures, a folder per class, or val.rec: --eval classification:imagenet@FOLDER.
    """
    imagenet_v2: str | None = None
    """Folder of ImageNet-V2: --eval classification:imagenetv2@FOLDER."""
    zeroshot_frequency: int | None = field(default=None, metadata={"limits": {"minimum": 0}})
    """Epochs between evaluations of --eval; default: only at the end; 0: not even then."""
    eval_every_n_steps: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Steps between evaluations of --eval, besides --zeroshot-frequency."""
    keep_best: str | None = None
    """Metric (cifar10/top1, val_mean_recall ..) whose best checkpoint stays, whatever its age, as checkpoints/best."""

    def problems(self) -> list[str]:
        tasks, found = [], []
        for text in self.texts():
            try:
                tasks.append(read_task(text))
            except ValueError as error:
                found.append(str(error))
        first: dict[str, EvalTask] = {}
        twice = [(first[task.name], task) for task in tasks if first.setdefault(task.name, task) is not task]
        if self.eval_every_n_steps is not None and not self.texts():
            found.append("eval_every_n_steps: has no effect without eval; name what to evaluate, too")
        return found + [
            f"eval: {task.text!r} and {other.text!r} are both called {task.name!r}; give one a name: {task.name}-2="
            f"{task.text}"
            for other, task in twice
        ]

    def texts(self) -> list[str]:
        """All entries of --eval, those of the shorthands first."""
        given = {"imagenet": self.imagenet_val, IMAGENET_V2: self.imagenet_v2}
        short = [f"classification:{name}@{folder}" for name, folder in given.items() if folder is not None]
        return [*short, *self.eval]

    def tasks(self) -> list[EvalTask]:
        """All tasks; of settings that were checked."""
        return [read_task(text) for text in self.texts()]

    def best_problems(self, validates: bool, averages: bool) -> list[str]:
        """Why --keep-best names no metric; whether there is --val-data; whether weights are averaged (--ema-decay)."""
        if self.keep_best is None:
            return []
        own = [("", metric) for task in self.tasks() for metric in task.metrics]
        own += [("val_", metric) for metric in VALIDATION] if validates else []
        known = [f"{before}{mark}{metric}" for mark in ("", "ema_")[: 1 + averages] for before, metric in own]
        if not known:
            return [f"keep_best: {self.keep_best!r} is never measured; give --eval or --val-data"]
        if self.keep_best in known:
            return []
        return [f"keep_best: {self.keep_best!r} is not measured; {nearest(self.keep_best, known)}"]


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest valid name, or all of them, in words."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(known)}"


def read_task(text: str) -> EvalTask:
    """An entry of --eval. ValueError says what is wrong with it."""
    name, equals, rest = text.partition("=")
    if not equals or ":" in name:
        name, rest = "", text
    task, colon, data = rest.partition(":")
    if not colon and task.partition("@")[0] in SETS:
        raise ValueError(f"eval: {text!r} names no task; write classification:{rest}")
    if not colon or not data:
        raise ValueError(f"eval: {text!r} is no task with its data; {FORM}")
    if task not in METRICS:
        raise ValueError(f"eval: {text!r}: {task!r} is not a task; {nearest(task, METRICS)}")
    if equals and rest != text and not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"eval: {text!r}: {name!r} is no name; use letters, digits, '.', '-' and '_'")
    what, at, place = data.partition("@")
    if task == "retrieval":
        if not at or not what or "/" in what:  # an @ of the path
            what, place = "", data
    elif what not in SETS:
        raise ValueError(f"eval: {text!r}: {what!r} is not a set of classes; {nearest(what, SETS)}")
    elif not at and what in BENCHMARKS:
        place = "data"
    if not place:
        raise ValueError(f"eval: {text!r} says not where the data are; {FORM}")
    return EvalTask(name or _name_task(task, what, place), task, what, place, text)


def _name_task(task: str, what: str, place: str) -> str:
    """What the metrics of a task are called that was given no name."""
    if task == "classification" and what not in (IMAGEFOLDER, ELEVATER):
        return what
    path = PurePath(place)
    name = path.stem if task == "retrieval" else path.name
    if name in SPLITS and path.parent.name:
        name = f"{path.parent.name}-{name}"
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or task
