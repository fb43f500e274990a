"""Names and values of earlier versions, in settings that were saved and on the command line."""

from __future__ import annotations

import logging
from typing import Any

from rwkv_clip.config import ConfigError

log = logging.getLogger(__name__)

# Names before 0.6 -> current names. As flags they still work, with a warning.
RENAMED = {"views": "text_choice", "max_bad_share": "max_bad_fraction"}
AUTOCAST_BEFORE = {"bf16": "amp_bf16", "fp16": "amp"}  # values of `precision`


def update_names(data: dict[str, Any]) -> dict[str, Any]:
    """Flat settings with current names and meanings. Before 0.6 `warmup` was a fraction and `precision` named the
    autocast dtype. ConfigError for an old name beside its new one."""
    if not isinstance(data, dict):
        return data
    twice = [f"{old}: is called {new} since 0.6, which is set, too; leave it out" for old, new in RENAMED.items()]
    if found := [problem for problem, (old, new) in zip(twice, RENAMED.items()) if old in data and new in data]:
        raise ConfigError(found)
    data = {RENAMED.get(key, key): value for key, value in data.items()}
    if isinstance(data.get("warmup"), float) and "warmup_fraction" not in data:
        data["warmup_fraction"] = data.pop("warmup")
    if isinstance(data.get("precision"), str):
        data["precision"] = AUTOCAST_BEFORE.get(data["precision"], data["precision"])
    return data


def update_flags(arguments: list[str]) -> list[str]:
    """Arguments with current names."""
    updated = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        if name in RENAMED:
            new = f"--{RENAMED[name].replace('_', '-')}"
            log.warning("%s is called %s since 0.6", flag, new)
            argument = f"{new}{equals}{value}" if equals else new
        updated.append(argument)
    return updated
