#!/usr/bin/env bash
# The usual benches (kernels, encoding, training, data), at most 15 minutes on a CPU and 10 on a GPU, then
# tests/bench/results/SUMMARY.md and figure/bench.png. Others by name, with options: bash shell/bench.sh search --repeats 5
# Where nothing can be installed (torch, ninja and nvcc are there, but no network): python tests/bench/all.py
set -euo pipefail
EXTRAS=${EXTRAS-bench,dali} source "$(dirname "$0")/setup.sh"
exec python tests/bench/all.py "$@"
