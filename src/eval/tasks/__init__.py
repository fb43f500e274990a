"""The tasks of the evaluation's command line, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import classification, features, invert, knn, linear_probe, recall, report, retrieval, search


@dataclass(frozen=True)
class Task:
    """A command.

    settings: its table, which defines its flags. run(settings, data, encoder) -> exit code, on all ranks, with data =
    load(settings, device), read before the model. Without `load` there are no data, model or ranks: run(settings).
    """

    settings: type
    run: Callable[..., int]
    load: Callable | None = None


TASKS = {
    "retrieval": Task(retrieval.RetrievalSettings, retrieval.run, retrieval.load),
    "classification": Task(classification.ClassificationSettings, classification.run, classification.load),
    "linear-probe": Task(linear_probe.LinearProbeSettings, linear_probe.run, linear_probe.load),
    "features": Task(features.FeaturesSettings, features.run, features.load),
    "search": Task(search.SearchSettings, search.run),
    "knn": Task(knn.KnnSettings, knn.run),
    "recall": Task(recall.RecallSettings, recall.run),
    "invert": Task(invert.InvertSettings, invert.run),
    "report": Task(report.ReportSettings, report.run),
}
