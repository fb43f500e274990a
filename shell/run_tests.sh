#!/usr/bin/env bash
# Set up .venv with the development extras, check style and types and run the tests.
#
#   bash shell/run_tests.sh            the gate: everything
#   bash shell/run_tests.sh --fast     every subject, without the tests that take long (tests/helpers/tiers.py)
#
# Other arguments go to pytest: bash shell/run_tests.sh -k recordio
set -euo pipefail
EXTRAS=${EXTRAS-dev,dali} source "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS=1 # same bits everywhere, and no fight over cores between processes
python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
