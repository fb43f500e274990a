"""Files of class names and templates: {"names": {folder: name} or list, "templates": ["a photo of a {}."]}."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..files import parse_json
from .benchmarks import say
from .labelled import ClassificationSet


def find_names(folder: Path, names: str | Path | None) -> Path | None:
    """The names file that was given, else names.json of the folder, if it has one."""
    path = Path(names) if names is not None else folder / "names.json"
    return path if names is not None or path.is_file() else None


def read_names(path: str | Path, folders: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names and templates from a JSON file: ({folder: class name} in label order, templates; () for none).

    {"names": {folder: name} or a list with the name of each of the `folders` in their order (by number where all are
    numbers), "templates": ["a {}.", ...]}, both optional; "classes" is read as "names". A class of the file without a
    folder stays a candidate.
    """
    content = read_names_file(path)
    folders = sorted(folders, key=int) if are_numbers(folders) else folders
    names = content.get("names", {folder: say(folder) for folder in folders})
    if isinstance(names, list):
        if len(names) != len(folders):
            raise ValueError(f"{path}: {len(names)} names for {len(folders)} class folders; give one for each")
        names = dict(zip(folders, names))
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) and n for n in names.values()):
        raise ValueError(f'{path}: "names" must be {{folder: name}} or a list of names')
    unnamed = [folder for folder in folders if folder not in names]
    if unnamed:
        raise ValueError(f'{path}: "names" lacks the class folders {", ".join(unnamed[:5])}; name every one')
    templates = content.get("templates", [])
    if not isinstance(templates, list) or not all(isinstance(t, str) and "{}" in t for t in templates):
        raise ValueError(f'{path}: "templates" must be a list of texts with {{}} for the class name')
    return names, tuple(templates)


def read_names_file(path: str | Path) -> dict:
    """What the file holds, with "names" for "classes"."""
    try:
        content = parse_json(Path(path).read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as JSON ({error}); write {{"names": ..., ...}}') from error
    if not isinstance(content, dict) or not content.keys() <= {"names", "classes", "templates"}:
        raise ValueError(f'{path}: write an object with "names" and "templates" and nothing else')
    return {"names": content["classes"]} | content if "classes" in content else content


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a text file, one a line, with {} for the class name. ValueError names the line that has none."""
    lines = Path(path).read_bytes().decode("utf-8-sig", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip() and ("{}" not in line or "\ufffd" in line):
            raise ValueError(f"{path}:{number}: a template needs {{}} for the class name, and UTF-8")
    if not (templates := tuple(line.strip() for line in lines if line.strip())):
        raise ValueError(f"{path}: holds no template; write one a line, with {{}} for the class name")
    return templates


def rename_classes(data: ClassificationSet, classes: Sequence[str], names: str | Path | None) -> ClassificationSet:
    """A set whose classes are originally called `classes`, with the names, order and templates of a names file (None:
    unchanged)."""
    if names is None:
        return data
    named, templates = read_names(names, classes)
    label = {name: place for place, name in enumerate(named)}
    labels = torch.tensor([label[name] for name in classes], dtype=torch.int64)[data.labels]
    return replace(data, labels=labels, class_names=list(named.values()), templates=templates or data.templates)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether every name is a number, in digits."""
    return all(name.isascii() and name.isdigit() for name in names)
