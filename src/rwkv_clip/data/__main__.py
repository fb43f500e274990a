"""Images + captions -> training records (.rec, .idx, .json).

    python data2rec.py captions.jsonl out/train --images photos --where split=train --workers 8
    python data2rec.py captions.jsonl out/train --views captions.0 captions.1 captions.2
    python data2rec.py 'shards/{00000..00331}.tar' out/train --shard-size 100000 --verify
    python data2rec.py yfcc15m/data out/yfcc15m --shard-size 1000000 --workers 16
    python data2rec.py tokens.npy out/train --images images.txt

The same command again goes on where an interrupted one stopped.
"""

import signal
import sys

from ..errors import INTERRUPTED, STOPPED, run_command
from .build import build_records

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Read the command line and build; returns the exit code."""
    return run_command(_command, "data2rec", memory="use fewer --workers")


def _command() -> int:
    import tyro

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    try:
        print(tyro.cli(build_records, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,)))
    except KeyboardInterrupt as stopped:
        print("data2rec: stopped; run the same command again to go on (complete shards are kept)", file=sys.stderr)
        return INTERRUPTED if stopped.args == (signal.SIGINT,) else STOPPED
    return 0


def _stop(number: int, _) -> None:
    """The first signal ends the work in good order, a second one at once."""
    for other in SIGNALS:
        if signal.getsignal(other) == _stop:
            signal.signal(other, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
