"""The commands, one row each: the settings that make its flags, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import run
from .settings import ComposeSettings, InputSettings, JobSettings, VerifySettings
from .status import describe_status


class Tables:
    """Several tables of settings as one, with the problems of each."""

    def problems(self) -> list[str]:
        """Problems of all tables."""
        tables = [table for table in type(self).__mro__ if table is not Tables and "problems" in vars(table)]
        return [problem for table in tables for problem in vars(table)["problems"](self)]


@dataclass(frozen=True, kw_only=True)
class RunSettings(Tables, JobSettings, InputSettings, ComposeSettings, VerifySettings):
    """All stages, the report and the texts to train on. With --shard all stages of some parts."""


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """How far a job is."""

    output: str
    """Folder of the job."""

    def problems(self) -> list[str]:
        """None are possible."""
        return []


@dataclass(frozen=True)
class Command:
    """settings: its table. run: does it, and returns the exit code or None for 0."""

    settings: type
    run: Callable[[Any], int | None]


def _run_all(settings: RunSettings) -> None:
    run.open_job(settings)
    run.compose(settings)
    run.verify(settings)


def _status(settings: StatusSettings) -> None:
    print(describe_status(settings.output))


COMMANDS = {
    "run": Command(RunSettings, _run_all),
    "status": Command(StatusSettings, _status),
}
