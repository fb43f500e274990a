"""Settings: typed, checked before any work, the same in JSON presets, on the command line and in checkpoints.

`parse` turns a dict into one of the dataclasses below and reports every mistake at once: unknown key (with the nearest
valid name), wrong type, value out of range. Presets are data: `configs/models/*.json` describe towers,
`configs/training/*.json` describe training runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .files import parse_json, read_bytes

CONFIGS = Path(__file__).parent / "configs"
MAX_JSON = 1 << 24  # bytes of a preset or model description that are read
LARGEST = (1 << 63) - 1  # that a tensor, a file and a seed can hold
T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that the user has to change; the message lists every problem found."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def flat(table: type) -> Any:
    """A dataclass field that is a table of settings, whose names are those of the table around it: in JSON, on the
    command line and in messages there is one level."""
    return field(default=table(), metadata={"flat": True})


def ranged(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A dataclass field with limits: minimum, above (exclusive), maximum, below (exclusive)."""
    return field(default=default, metadata={"limits": limits})


def parse(cls: type[T], data: dict[str, Any], base: T | None = None, where: str = "") -> T:
    """dict -> cls; missing keys come from `base` or the defaults. ConfigError lists every problem at once."""
    problems: list[str] = []
    value = _parse(cls, data, base, where, problems)
    if not problems:
        problems = check(value, where)
    if problems:
        raise ConfigError(problems)
    return value


def check(value: Any, where: str = "") -> list[str]:
    """Problems of a settings object: limits first, then constraints between fields."""
    found, tables = [], []
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if f.metadata.get("flat"):
            tables.append(item)
        elif dataclasses.is_dataclass(item):
            found += check(item, f"{where}{f.name}.")
        elif item is not None:
            found += _beyond_limits(f"{where}{f.name}", item, f.metadata.get("limits", {}))
    found += [problem for table in tables for problem in check(table, where)]
    return found or value.problems()


def to_dict(value: Any) -> dict[str, Any]:
    """Settings as plain JSON data."""
    return json.loads(json.dumps(_to_dict(value)))


def _to_dict(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item):
            item = _to_dict(item)
        data |= item if f.metadata.get("flat") else {f.name: item}
    return data


def flat_names(cls: type) -> dict[str, str]:
    """Name of every setting -> name of the flat table that holds it, or "" where cls itself does."""
    hints = get_type_hints(cls)
    names: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        names |= dict.fromkeys(flat_names(hints[f.name]), f.name) if f.metadata.get("flat") else {f.name: ""}
    return names


def _parse(cls: type, data: Any, base: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        problems.append(f"{where.rstrip('.') or cls.__name__}: expected a table of settings, got {data!r}")
        return None
    hints, homes = get_type_hints(cls), flat_names(cls)
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(cls)} if base is not None else {}
    tables: dict[str, dict[str, Any]] = {}
    for key, item in data.items():
        if key not in homes:
            near = difflib.get_close_matches(str(key), homes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(homes)}"
            problems.append(f"{where}{key}: unknown setting; {hint}")
        elif homes[key]:
            tables.setdefault(homes[key], {})[key] = item
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _parse(hints[key], item, values.get(key), f"{where}{key}.", problems)
        else:
            values[key] = _convert(hints[key], item, f"{where}{key}", problems)
    for name, table in tables.items():
        values[name] = _parse(hints[name], table, values.get(name), where, problems)
    return cls(**values) if not problems else None


def _convert(hint: Any, item: Any, where: str, problems: list[str]) -> Any:
    """Accept only what the type says; an int where a float is expected, a list where a tuple is expected."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if item is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), item, where, problems)
    if origin is Literal:
        if item in args:
            return item
        problems.append(f"{where}: {item!r} is not one of {', '.join(map(repr, args))}")
    elif origin is tuple:
        size = None if args[-1] is Ellipsis else len(args)
        if isinstance(item, (list, tuple)) and size in (None, len(item)):
            return tuple(_convert(args[0], x, where, problems) for x in item)
        problems.append(f"{where}: {item!r} is not a list{f' of {size} values' if size else ''}")
    elif hint is float and isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(max(-LARGEST, min(item, LARGEST))) if isinstance(item, int) else item
    elif isinstance(item, hint) and (hint is bool or not isinstance(item, bool)):
        return item
    else:
        problems.append(f"{where}: {item!r} is not of type {hint.__name__}")
    return None


def _beyond_limits(where: str, item: Any, limits: dict[str, float]) -> list[str]:
    if isinstance(item, float) and not math.isfinite(item):
        return [f"{where}: {item} is not a finite number"]
    if isinstance(item, int) and abs(item) > LARGEST:
        return [f"{where}: a number of {len(str(item))} digits; use at most {LARGEST}"]
    if isinstance(item, str) and "\0" in item:
        return [f"{where}: {item!r} holds a NUL character; leave it out"]
    if isinstance(item, tuple):
        return [problem for part in item for problem in _beyond_limits(where, part, limits)]
    tests = {
        "minimum": (lambda a, b: a >= b, "at least"),
        "above": (lambda a, b: a > b, "more than"),
        "maximum": (lambda a, b: a <= b, "at most"),
        "below": (lambda a, b: a < b, "less than"),
    }
    return [
        f"{where}: {item} must be {tests[kind][1]} {bound}"
        for kind, bound in limits.items()
        if not tests[kind][0](item, bound)
    ]


# ---- presets -------------------------------------------------------------------------------------------------------


def list_presets(kind: str) -> list[str]:
    """Names of the shipped presets of a kind: `models` or `training`."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.json"))


def load_preset(kind: str, name: str) -> Any:
    """JSON data of a preset: a shipped name or the path of a JSON file. ConfigError."""
    shipped = list_presets(kind)
    if name in shipped:
        return load_json(CONFIGS / kind / f"{name}.json")
    if Path(name).suffix == ".json":
        return load_json(name)
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped)}"
    raise ConfigError([f"preset: {name!r} is neither a shipped preset nor a .json file; {hint}"])


def load_json(path: str | Path) -> Any:
    """Read JSON; ConfigError names the file when it is absent or broken."""
    try:
        return parse_json(read_bytes(Path(path), MAX_JSON), str(path))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except ValueError as error:
        named = str(error).startswith(f"{path}: ")  # unlike a path that no file can have
        raise ConfigError([str(error) if named else f"{path!r}: cannot be read ({error})"]) from None
