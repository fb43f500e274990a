"""The command line of a command: its flags in groups, one for each table of settings that declares them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro


def parse_flags(kinds: Mapping[str, type], arguments: Sequence[str] | None, prog: str, description: str) -> Any:
    """Settings of one of `kinds` (name of a command -> its dataclass) from the command line (None: the program's).

    Flags carry no name of a group, so a table may move without changing a command.
    """
    grouped: dict[str, Any] = {name: group(kind) for name, kind in kinds.items()}
    found = tyro.extras.subcommand_cli_from_dict(
        grouped, args=arguments, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )
    name = next(name for name, kind in grouped.items() if kind is type(found))
    flat: dict[str, Any] = {}
    for key, value in vars(found).items():
        flat.update(vars(value) if dataclasses.is_dataclass(value) else {key: value})
    return kinds[name](**flat)


def group(kind: type) -> type:
    """A dataclass with a table for each base of `kind` that declares settings; its own settings stay beside them. What
    two bases declare goes to the first, as in `kind`."""
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind, include_extras=True)
    tables: list[Any] = []
    for base in kind.__mro__:
        helps = _read_help(base) if dataclasses.is_dataclass(base) else {}
        own = [_make_flag(fields.pop(name), hints[name], text) for name, text in helps.items() if name in fields]
        if own and base is kind:
            tables += own
        elif own:
            space = {"__doc__": base.__doc__}
            table = make_dataclass(base.__name__, own, kw_only=True, frozen=True, namespace=space)
            needed = any(f.default is MISSING for f in dataclasses.fields(table))
            name = base.__name__.removesuffix("Settings").lower()
            tables.append((name, table, field() if needed else field(default_factory=table)))
    assert not fields, f"settings without a line that says what they are: {', '.join(fields)}"
    return make_dataclass(kind.__name__, tables, kw_only=True, frozen=True, namespace={"__doc__": kind.__doc__})


def _make_flag(setting: Any, hint: Any, text: str) -> tuple[str, Any, Any]:
    kept = field(default=setting.default, default_factory=setting.default_factory)
    return setting.name, Annotated[hint, tyro.conf.arg(help=text)], kept


def _read_help(table: type) -> dict[str, str]:
    """The string below each field of a class, which Python itself does not keep."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(table))).body
    assert isinstance(made, ast.ClassDef)
    return {
        line.target.id: " ".join(below.value.value.split())
        for line, below in zip(made.body, made.body[1:])
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
