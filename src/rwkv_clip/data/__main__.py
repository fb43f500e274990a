"""Images + captions -> training records (.rec, .idx, .json).

    python data2rec.py captions.jsonl out/train --images photos --where split=train --workers 8
    python data2rec.py captions.jsonl out/train --texts captions.0 captions.1 captions.2
    python data2rec.py 'shards/{00000..00331}.tar' out/train --shard-size 100000 --verify
    python data2rec.py yfcc15m/data out/yfcc15m --shard-size 1000000 --workers 16
    python data2rec.py tokens.npy out/train --images images.txt

The same command again goes on where an interrupted one stopped.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ..errors import run_command
from ..processes import work_until_stopped
from .build import BuildSettings, build_records


@dataclass(frozen=True)
class Command(BuildSettings):
    """The settings as the command line shows them; up to release 0.5.0 `--texts` was called `--views`."""

    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")]
    prefix: Annotated[str, tyro.conf.arg(metavar="PREFIX")]
    images: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...", aliases=["--views"])] = ()
    where: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CONDITION ...")] = ()
    image_field: Annotated[str | None, tyro.conf.arg(metavar="FIELD")] = None
    token_field: Annotated[str | None, tyro.conf.arg(metavar="FIELD")] = None


def parse(arguments: list[str] | None = None) -> Command:
    """The settings on the command line; `arguments` replace those of this process."""
    return tyro.cli(Command, description=__doc__, args=arguments, config=(tyro.conf.PositionalRequiredArgs,))


def main() -> int:
    """Read the command line and build; returns the exit code."""
    told = "data2rec: stopped; run the same command again to go on (complete shards are kept)"
    memory = "use fewer --workers"
    return run_command(lambda: work_until_stopped(_build, told), "data2rec", memory=memory)


def _build() -> None:
    print(build_records(**vars(parse())))


if __name__ == "__main__":
    sys.exit(main())
