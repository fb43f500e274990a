"""Deliberate bugs, each with the test that has to catch it: proof that the promises' tests can fail.

python tests/faults/mutants.py [part of a name ..]     # plants them one by one in this checkout, which must be clean

Lists: the files planted_*.py beside this one. Each bug is an exact replacement in one file, undone at once.
Prints a table; the exit code is 1 when a test stays green.
`test_mutants.py` keeps the list applicable.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from planted_chinese_data import CHINESE_DATA
from planted_describe import DESCRIBE
from planted_inputs import INPUTS
from planted_mixture import MIXTURE
from planted_training import TRAINING, Mutant

ROOT = Path(__file__).resolve().parents[2]


MUTANTS = [*TRAINING, *MIXTURE, *INPUTS, *CHINESE_DATA, *DESCRIBE]


def plant(mutant: Mutant) -> tuple[Path, str, str]:
    """(file, its text, the text with the bug). ValueError unless `old` is there just once."""
    path = ROOT / "src" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has the text {text.count(mutant.old)} times")
    return path, text, text.replace(mutant.old, mutant.new)


def is_caught(mutant: Mutant) -> bool:
    """Whether the test fails with the bug; the file is as before when this returns."""
    path, text, bad = plant(mutant)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{mutant.test}"]
    try:
        path.write_text(bad)
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
        )
        return done.returncode == 1
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(text)


def main() -> int:
    if subprocess.run(["git", "diff", "--quiet", "--", "src"], cwd=ROOT).returncode:
        print("error: src/ has changes that are not committed; commit them first", file=sys.stderr)
        return 2
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    missed = 0
    for number, mutant in enumerate(chosen, 1):
        start = time.monotonic()
        caught = is_caught(mutant)
        missed += not caught
        verdict = "caught" if caught else "MISSED"
        print(f"{number:2} {verdict} {time.monotonic() - start:4.0f} s  {mutant.name}  ({mutant.test})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
