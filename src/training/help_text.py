"""What --help prints: usage, examples and groups on the first screen, then every flag of each group, with its default.

Made from the settings: name, type, default, and the string below each field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rwkv_clip.config import list_presets

from .settings import Settings

PROGRAM = "python -m rwkv_clip.training.main"
HOMES = {
    "freezing": "model",
    "loss": "objective",
    "faults": "safety",
}  # a table of another group; others have their own
ORDER = ("run", "data", "model", "objective", "optimizer", "parallel", "safety", "log")  # others come last
WIDEST = 120
PRESET = "Settings to start from, which the other flags change: {}, or the path of a JSON file."

EXAMPLES = (
    ("a published recipe on records of mine", f"{PROGRAM} --preset rwkv-clip-b32-yfcc15m --train-data out/train"),
    (
        "any model of open_clip's, in its words",
        f"{PROGRAM} --train-data out/train --model ViT-B-32 --batch-size 320 --epochs 30 --warmup 2000",
    ),
    (
        "8 GPUs; the same command continues (a lone -- before our flags)",
        "torchrun --nproc_per_node 8 -m rwkv_clip.training.main -- --preset clip-b32-yfcc15m --train-data out/train "
        "--name b32 --resume latest",
    ),
)
CODES = (
    "exit codes: 0 done, 2 a setting or a checkpoint, 3 the data, 4 non-finite numbers, 5 another rank is lost, 75 "
    "stopped by a signal with everything saved, 76 the run folder is in use or cannot be written, 1 a bug"
)


@dataclass(frozen=True)
class Flag:
    """One flag as it is shown: `--lr`, `X`, what it is, `0.001`."""

    name: str
    metavar: str
    text: str
    default: str

    @property
    def shown(self) -> str:
        return f"{self.name} {self.metavar}".rstrip()


def show_help(group: str | None = None, settings: Settings = Settings()) -> str:
    """The text of --help, or of --help GROUP; with the values of `settings`. ValueError for no group of ours."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    groups = list_groups(settings)
    if group is not None:
        if group not in groups:
            raise ValueError(f"help: {group!r} is no group; there are {', '.join(groups)}")
        groups = {group: groups[group]}
    parts = [] if group else [*_first_screen(groups, width)]
    for name, (about, flags) in groups.items():
        parts += ["", *textwrap.wrap(f"{name}: {about}", width)]
        parts += [line for flag in flags for line in _show_flag(flag, width)]
    return "\n".join(parts).lstrip("\n")


def list_groups(settings: Settings = Settings()) -> dict[str, tuple[str, list[Flag]]]:
    """Name of each group -> what it is about, and its flags."""
    found: dict[str, tuple[str, list[Flag]]] = {name: ("", []) for name in ORDER}
    hints = get_type_hints(Settings)
    for table in dataclasses.fields(Settings):
        kind, home, values = hints[table.name], HOMES.get(table.name, table.name), getattr(settings, table.name)
        about, flags = found.get(home, ("", []))
        found[home] = about or _one_line(kind.__doc__), [*flags, *_list_flags(kind, values)]
    presets = PRESET.format(", ".join(list_presets("training")))
    found["run"][1].insert(0, Flag("--preset", "NAME", presets, ""))
    return {name: group for name, group in found.items() if group[1]}


def _list_flags(table: type, values: Any, prefix: str = "") -> Iterator[Flag]:
    hints, texts = get_type_hints(table), read_texts(table)
    for setting in dataclasses.fields(table):
        kind, value = hints[setting.name], getattr(values, setting.name)
        name = f"{prefix}{setting.name.replace('_', '-')}"
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _list_flags(kind, value, f"{name}.")
        else:
            flag = f"--no-{name}" if value is True else f"--{name}"
            yield Flag(flag, _name_values(kind), texts.get(setting.name, ""), _show_value(value))


def read_texts(table: type) -> dict[str, str]:
    """Field -> the string below it, which Python itself does not keep, on one line."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(table))).body
    assert isinstance(made, ast.ClassDef)
    return {
        line.target.id: _one_line(below.value.value)
        for line, below in zip(made.body, made.body[1:])
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def _name_values(kind: Any) -> str:
    """N, X, TEXT, a|b, or several of them."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _name_values(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return f"{_name_values(args[0])} .." if args[-1] is Ellipsis else " ".join(map(_name_values, args))
    return {bool: "", int: "N", float: "X"}.get(kind, "TEXT")


def _show_value(value: Any) -> str:
    if value is None or isinstance(value, bool) or value in ((), ""):
        return ""  # none, off, nothing: what the text says
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _show_flag(flag: Flag, width: int) -> list[str]:
    column = 34 if width >= 100 else 26
    text = " ".join(filter(None, (flag.text, f"[{flag.default}]" if flag.default else "")))
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    head = f"  {flag.shown}"
    if len(head) > column - 2:
        return [head, *(" " * column + line for line in lines if line)]
    return [f"{head:{column}}{lines[0]}".rstrip(), *(" " * column + line for line in lines[1:])]


def _first_screen(groups: dict[str, tuple[str, list[Flag]]], width: int) -> list[str]:
    lines = [f"usage: {PROGRAM} --train-data DATA [--flag value ..]", ""]
    for about, command in EXAMPLES:
        lines += [f"  # {about}", *_wrap_command(command, width)]
    lines += ["", *textwrap.wrap("groups (--help GROUP shows one; open_clip's flags are understood, too):", width)]
    for name, (about, flags) in groups.items():
        text = f"{about} ({len(flags)})"
        lines += textwrap.wrap(text, width, initial_indent=f"  {name:11}", subsequent_indent=" " * 13)
    return [*lines, "", *textwrap.wrap(CODES, width, break_on_hyphens=False), ""]


def _wrap_command(command: str, width: int) -> list[str]:
    """Lines that can be pasted: cut before a flag, with a backslash."""
    pieces = command.replace(" --", "\n--").replace("\n-- ", " -- ").split("\n")
    lines = [f"  {pieces[0]}"]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"      {piece}")
        else:
            lines[-1] += f" {piece}"
    return lines


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(argument in ("-h", "--help") for argument in arguments)


def answer_help(arguments: Sequence[str], settings: Settings = Settings()) -> str:
    """The text that a command line with --help asks for. ValueError."""
    place = next(i for i, argument in enumerate(arguments) if argument in ("-h", "--help"))
    following = [argument for argument in arguments[place + 1 : place + 2] if not argument.startswith("-")]
    return show_help(following[0] if following else None, settings)
