"""A training run in which ranks fail on purpose, each at its step and once only:

torchrun .. -m helpers.fail_at FOLDER RANK:STEP:KIND[,RANK:STEP:KIND ..] --setting value ..

KIND is a signal, or `hang`, `compute` (for eight seconds), or `error`. FOLDER gets a file per failure with the time of
it, and so each happens once.
"""

import os
import signal
import sys
import time
from pathlib import Path

from rwkv_clip.training import loop, main
from rwkv_clip.training.data.samples import DataError


def hang_here() -> None:
    time.sleep(600)


def compute_here() -> None:
    until = time.monotonic() + 8
    while time.monotonic() < until:
        sum(range(1000))


def fail_at(folder: str, plan: str) -> None:
    """Let `Trainer.step` end with a failure where the plan says so."""
    failures = [failure.split(":") for failure in plan.split(",") if failure]
    original = loop.Trainer.step

    def failing(self, batch):
        values = original(self, batch)
        for rank, step, kind in failures:
            mark = Path(folder, f"failed-{rank}-{step}")
            if (self.state.world.rank, self.state.progress.step) == (int(rank), int(step)) and not mark.exists():
                mark.write_text(str(time.monotonic()))
                if kind == "hang":
                    hang_here()
                if kind == "compute":
                    compute_here()
                if kind == "error":
                    raise DataError("a planted error")
                if kind.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, kind))
        return values

    loop.Trainer.step = failing


def failure_times(folder: Path) -> list[float]:
    """When the failures happened, on the monotonic clock that all processes share."""
    return sorted(float(path.read_text()) for path in folder.glob("failed-*"))


if __name__ == "__main__":
    fail_at(sys.argv.pop(1), sys.argv.pop(1))
    main.main()
