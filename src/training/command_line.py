"""The command line of training: a preset, then flags of ours and of open_clip's. Imports little: --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from rwkv_clip.config import ConfigError, check, list_presets, to_dict
from rwkv_clip.dist import count_lone_tasks, read_launch

from .help_text import PROGRAM, answer_help, wants_help
from .open_clip_command import Word, describe, evaluation_commands, split_words, understand
from .settings import Settings, load_settings, update_flags

RANKS = "torchrun .. -m rwkv_clip.training.main --"
EVALUATES = ("imagenet-val", "imagenet-v2", "val-data")  # what open_clip's trainer does without training data


def read_command_line(arguments: list[str]) -> Settings:
    """Preset (`--preset NAME or path`), then overrides. ConfigError lists every invalid value, and every flag that is
    not ours; what becomes of open_clip's is said on standard error, by the main rank."""
    if wants_help(arguments):
        print_help(arguments)
        raise SystemExit(0)
    # Some releases of torchrun pass the lone -- through.
    arguments = [argument for argument in arguments if argument != "--"]
    preset, words = _take_preset(split_words(update_flags(arguments)))
    default = load_settings(preset)
    found = understand(words, list_flags(Settings))
    problems = list(found.problems)
    if default.data.train_data is None and _only_evaluates(words):
        raise ConfigError(_propose_evaluation(words))
    rank, size = read_launch()
    if found.theirs and rank == 0:
        # A preset is a choice of all settings: then open_clip's defaults are not compared.
        defaults = to_dict(default) if preset is None else None
        print(describe(found, words, defaults, PROGRAM if size == 1 else RANKS), file=sys.stderr)
    settings = _parse(found.arguments, default, problems)
    problems += check(settings)
    if settings.data.train_data is None and not any(word.name == "train-data" for word in words):
        problems.append("train_data: not set; name records, a table, tars, Parquet files or a folder of them")
    if (tasks := count_lone_tasks()) > 1:
        problems.append(
            f"srun: {tasks} tasks would train the same model each; have it start torchrun once on every node"
        )
    if settings.run.resume == "latest" and settings.run.name is None:
        problems.append("name: --resume latest needs the run's name")
    if problems:
        raise ConfigError(problems)
    return settings


def print_help(arguments: list[str]) -> None:
    """What --help, or --help GROUP, asks for, with the values of the preset that may stand beside it. ValueError."""
    preset, _ = _take_preset(split_words(arguments))
    print(answer_help(arguments, load_settings(preset)))


def list_flags(table: type, prefix: str = "") -> Collection[str]:
    """Names of the flags that a table of settings makes, without dashes in front."""
    names: list[str] = []
    hints = get_type_hints(table)
    for setting in fields(table):
        kind, name = hints[setting.name], f"{prefix}{setting.name.replace('_', '-')}"
        if is_dataclass(kind):
            assert isinstance(kind, type)
            names += list_flags(kind, prefix if setting.metadata.get("flat") else f"{name}.")
        else:
            names += [name, f"no-{name}"] if kind is bool else [name]
    return names


def _take_preset(words: list[Word]) -> tuple[str | None, list[Word]]:
    """The preset's name (the last one counts), and the other words."""
    named = [word for word in words if word.name == "preset"]
    values = named[-1].values if named else ()
    if named and (not values or not values[0]):
        raise ConfigError([f"preset: needs a value; shipped: {', '.join(list_presets('training'))}"])
    if len(values) > 1:
        raise ConfigError([f"preset: {' '.join(values)} are {len(values)} values; give one"])
    return (values[0] if named else None), [word for word in words if word.name != "preset"]


def _only_evaluates(words: list[Word]) -> bool:
    names = {word.name for word in words}
    return "train-data" not in names and not names.isdisjoint(EVALUATES)


def _propose_evaluation(words: list[Word]) -> list[str]:
    return [
        "train_data: not set; evaluation alone has commands of its own:",
        *(f"  {command}" for command in evaluation_commands(words)),
    ]


def _parse(arguments: list[str], default: Settings, problems: list[str]) -> Settings:
    """As `parse_flags`, or `default` where values are wrong besides other problems; tyro has printed which."""
    try:
        return parse_flags(arguments, default)
    except SystemExit:
        if not problems:
            raise
        raise ConfigError(problems) from None


def parse_flags(arguments: list[str], default: Settings) -> Settings:
    """Settings from flags without table names; settings without a flag are those of `default`."""
    hints = get_type_hints(Settings)
    tables: list[Any] = [
        (table.name, Annotated[hints[table.name], tyro.conf.arg(name="")], field(default=getattr(default, table.name)))
        for table in fields(Settings)
    ]
    kind = make_dataclass("Settings", tables, frozen=True)
    return Settings(**vars(tyro.cli(kind, args=arguments, prog=PROGRAM, add_help=False)))
