"""The commands, one row each: the settings that make its flags, and what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rwkv_clip.errors import SETTING

from . import outputs, run
from .composers import make_client
from .composers.openai import Asking
from .demo import DemoSettings, write_demo
from .doctor import Finding, diagnose, format_findings
from .export import ExportSettings
from .instruct import InstructSettings
from .job import parse_shard
from .prompt import Prompt
from .select import Selection
from .settings import (
    CaptionSettings,
    CheckpointSettings,
    ComposeSettings,
    DedupSettings,
    InputSettings,
    JobSettings,
    PriceSettings,
    ServerSettings,
    TaggerSettings,
    TagSettings,
    TextSettings,
    VerifySettings,
    parse_extra,
)
from .status import describe_status


class Tables:
    """Several tables of settings as one, with the problems of each."""

    def problems(self) -> list[str]:
        """Problems of all tables."""
        mro = type(self).__mro__
        tables = [table for table in mro if not issubclass(table, Tables) and "problems" in vars(table)]
        return [problem for table in tables for problem in vars(table)["problems"](self)]


@dataclass(frozen=True, kw_only=True)
class RunSettings(
    Tables,
    JobSettings,
    InputSettings,
    ComposeSettings,
    VerifySettings,
    CaptionSettings,
    TagSettings,
    TaggerSettings,
    DedupSettings,
    ExportSettings,
    Selection,
):
    """All stages, the report and the texts to train on. With --shard the stages of some parts only."""


@dataclass(frozen=True, kw_only=True)
class CaptionCommand(Tables, JobSettings, InputSettings, CaptionSettings):
    """Captions for pictures that have none: of a file, a server or a model."""


@dataclass(frozen=True, kw_only=True)
class TagCommand(Tables, JobSettings, InputSettings, TagSettings, TaggerSettings):
    """Tags for pictures that have none: of a file or a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ComposeCommand(Tables, JobSettings, InputSettings, ComposeSettings):
    """The third text, or why there is none."""


@dataclass(frozen=True, kw_only=True)
class VerifyCommand(Tables, JobSettings, InputSettings, VerifySettings):
    """What is wrong with the composed texts, and the texts that are taken in the end."""


@dataclass(frozen=True, kw_only=True)
class DedupCommand(Tables, JobSettings, InputSettings, DedupSettings):
    """Which texts repeat an earlier one."""


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Tables, JobSettings, InputSettings, PriceSettings, CheckpointSettings, Selection):
    """report.html and report.json; with --checkpoint also how well the texts fit the pictures."""


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Tables, JobSettings, InputSettings, ExportSettings, Selection):
    """The texts as Parquet, JSON lines or tars."""


@dataclass(frozen=True, kw_only=True)
class OriginSettings:
    """Where samples come from: one of the two."""

    output: str | None = None
    """Folder of a job."""
    instructions: str | None = None
    """Instruction file of others, alpaca or sharegpt, or JSONL with raw, synthetic, tags and answer."""

    def problems(self) -> list[str]:
        """None or both."""
        one = (self.output is None) != (self.instructions is None)
        return [] if one else ["output: give the folder of a job, or --instructions FILE, one of the two"]


@dataclass(frozen=True, kw_only=True)
class InstructCommand(Tables, OriginSettings, TextSettings, InstructSettings, Selection):
    """A training set for a composer of your own, of texts that a language model wrote."""

    folder: str
    """Where it is written."""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand(Tables, ServerSettings, TextSettings):
    """What a server really supports, found out in seconds. Exit code 2 where something is bad."""

    def problems(self) -> list[str]:
        """What is missing, and the problems of its tables."""
        missing = [name for name in ("base_url", "model") if not getattr(self, name)]
        return [f"{name}: not set; say which server and which model to ask" for name in missing] + super().problems()


@dataclass(frozen=True, kw_only=True)
class StatusCommand(Tables):
    """How far a job is."""

    output: str
    """Folder of the job."""


@dataclass(frozen=True)
class Command:
    """settings: its table. run: does it, and returns the exit code or None for 0."""

    settings: type
    run: Callable[[Any], int | None]


def _owning(work: Callable[[Any], None]) -> Callable[[Any], None]:
    """`work` on a job that no other command works on."""

    def do(settings: Any) -> None:
        with run.own_job(settings):
            work(settings)

    return do


def _run_all(settings: RunSettings) -> None:
    run.need_scores(run.open_job(settings), settings)
    if settings.captions or settings.captioner != "none":
        run.caption(settings)
    if settings.tags or settings.tagger != "none":
        run.tag(settings)
    run.compose(settings)
    run.verify(settings)
    if settings.checkpoint:
        run.score(settings)
    if parse_shard(settings.shard)[1] > 1:
        print(f"shard {settings.shard} is done; when all are, the same command without --shard finishes the job")
        return
    run.dedup(settings)
    outputs.make_report(settings)
    outputs.make_export(settings)


def _on_job(work: Callable[[Any], Any]) -> Callable[[Any], None]:
    """`work` on a job whose input has been read."""

    def do(settings: Any) -> None:
        run.open_job(settings)
        work(settings)

    return _owning(do)


def _report(settings: ReportCommand) -> None:
    run.open_job(settings)
    if settings.checkpoint:
        run.score(settings)
    outputs.make_report(settings)


def _doctor(settings: DoctorCommand) -> int:
    findings = asyncio.run(_diagnose(settings))
    print(format_findings(findings))
    return SETTING if any(finding.ok is False for finding in findings) else 0


async def _diagnose(settings: DoctorCommand) -> list[Finding]:
    client = make_client(settings)
    try:
        asking = Asking(settings.model or "", extra=parse_extra(settings.extra_body), context=settings.context)
        return await diagnose(client, Prompt.load(settings.prompt), asking)
    finally:
        await client.close()


def _status(settings: StatusCommand) -> None:
    print(describe_status(settings.output))


def _demo(settings: DemoSettings) -> None:
    print(f"demo: {write_demo(settings)}")


COMMANDS = {
    "run": Command(RunSettings, _owning(_run_all)),
    "caption": Command(CaptionCommand, _on_job(run.caption)),
    "tag": Command(TagCommand, _on_job(run.tag)),
    "compose": Command(ComposeCommand, _on_job(run.compose)),
    "verify": Command(VerifyCommand, _on_job(run.verify)),
    "dedup": Command(DedupCommand, _on_job(run.dedup)),
    "report": Command(ReportCommand, _owning(_report)),
    "export": Command(ExportCommand, _on_job(outputs.make_export)),
    "instruct": Command(InstructCommand, outputs.make_training_set),
    "doctor": Command(DoctorCommand, _doctor),
    "status": Command(StatusCommand, _status),
    "demo": Command(DemoSettings, _demo),
}
