"""Search in pictures.

    python -m rwkv_clip.search index --images FOLDER --checkpoint RUN --output INDEX
    python -m rwkv_clip.search serve --images FOLDER --checkpoint RUN
    python -m rwkv_clip.search query --features INDEX --text "a dog on a beach"
    python -m rwkv_clip.search export --features INDEX --to clip-retrieval --output FOLDER

The same command goes on where an earlier one stopped. Exit codes: 0 done, 2 a setting, 3 the input, 75 or 130 stopped
by a signal with everything kept, 76 the folder cannot be written or is in use.
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
    import tyro

    kinds: dict[str, Any] = {name: command.settings for name, command in COMMANDS.items()}
    settings = tyro.extras.subcommand_cli_from_dict(
        kinds, args=arguments, prog="python -m rwkv_clip.search", description=__doc__
    )
    return run_command(lambda: _run(settings), "search", memory="use a smaller --batch-size", one_line=True)


def _run(settings: Any) -> int:
    if problems := check(settings):
        raise ConfigError(problems)
    command = next(command for command in COMMANDS.values() if command.settings is type(settings))
    return work_until_stopped(lambda: command.run(settings), "search: stopped; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
