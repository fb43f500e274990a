"""Run the benches of this folder one after the other, then write the summary and the plot.

python tests/bench/all.py [loss loader ..] [--minutes 15] [what else the named benches take, e.g. --device cpu]

Each bench is a process of its own with a time limit: what fails or takes too long is named and the others still run.
The exit code is 1 when one failed. Without names: the usual ones, of kernels, encoding, training and data, within 15
minutes on a CPU, 10 on a GPU; what one use of the library costs (search, exports, describe, ..) is measured by name.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import ROOT
from summary import write_summary

FOLDER = Path(__file__).resolve().parent
SHARED = {"all", "harness", "summary"}
TRAININGS = {"noise", "chinese", "third_text", "finetune", "open_clip_run"}  # on real data, by recipes in shell/
USUAL = ("wkv6", "encode", "train_step", "block", "loss", "loader", "resolution")  # the most important first
CLOSING = 10  # seconds kept for the summary


def find_benches() -> list[str]:
    """Names of the benches here, the usual ones first, the rest by name."""
    here = {path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    here -= SHARED | TRAININGS
    return [name for name in USUAL if name in here] + sorted(here - set(USUAL))


def run_bench(name: str, options: list[str], limit: float) -> str | None:
    """Run one; None, or what went wrong."""
    print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, str(FOLDER / f"{name}.py"), *options], start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"took longer than {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its own children, or they would run beside the next
        process.wait()
    print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return None if code == 0 else f"ended with exit code {code}"


def run_all(names: list[str], options: list[str], minutes: float) -> dict[str, str]:
    """Run them within `minutes`; each may take 1.5 even shares of what is left -> name: what went wrong."""
    end = time.monotonic() + 60 * minutes - CLOSING
    failures = {}
    for place, name in enumerate(names):
        left = end - time.monotonic()
        if left < 1:
            failures[name] = f"not started, the {minutes:g} minutes were over; give more --minutes"
            continue
        problem = run_bench(name, options, left * min(1, 1.5 / (len(names) - place)))
        if problem:
            failures[name] = problem
    return failures


def main() -> int:
    """Command line; the exit code."""
    # Names come first; behind them an option that only the benches know may take a word, which is no name.
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    parser = argparse.ArgumentParser(
        usage="all.py [names ..] [--minutes M] [options of the benches ..]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10 if torch.cuda.is_available() else 15)
    args, options = parser.parse_known_args(sys.argv[1 + len(names) :])
    unknown = sorted(set(names) - set(find_benches()))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such bench; there are {', '.join(find_benches())}")
    failures = run_all(names or list(USUAL), options, args.minutes)
    for path in write_summary():
        print(path.relative_to(ROOT))
    for name, problem in failures.items():
        print(f"error: {name} {problem}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
