"""The commands, one row each: the settings that make its flags, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """settings: its table. run: does it, and returns the exit code or None for 0."""

    settings: type
    run: Callable[[Any], int | None]


COMMANDS: dict[str, Command] = {}
