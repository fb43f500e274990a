"""Texts for pictures: raw text + caption + tags -> a composer -> the third text.

    python -m rwkv_clip.describe run --input captions.jsonl --output out
    python -m rwkv_clip.describe run --input rows.parquet --output out --composer openai \\
        --base-url http://localhost:8000/v1 --model M
    python -m rwkv_clip.describe status --output out
    python -m rwkv_clip.describe doctor --base-url http://localhost:8000/v1 --model M

The same command goes on where an earlier one stopped. Exit codes: 0 done, 2 a setting or a server that refuses, 3 the
input, 75 or 130 stopped by a signal with everything kept, 76 the folder cannot be written or is in use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rwkv_clip.config import ConfigError, check
from rwkv_clip.errors import run_command
from rwkv_clip.processes import work_until_stopped

from .commands import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do what it says; returns the exit code."""
    from .flags import parse_flags

    kinds = {name: command.settings for name, command in COMMANDS.items()}
    settings = parse_flags(kinds, arguments, "python -m rwkv_clip.describe", __doc__ or "")
    return run_command(lambda: _run(settings), "describe", memory="use fewer --workers", one_line=True)


def _run(settings: Any) -> int:
    if problems := check(settings):
        raise ConfigError(problems)
    command = next(command for command in COMMANDS.values() if command.settings is type(settings))
    told = "describe: stopped; the same command goes on, and no finished row is lost"
    return work_until_stopped(lambda: command.run(settings), told)


if __name__ == "__main__":
    sys.exit(main())
