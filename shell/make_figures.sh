#!/usr/bin/env bash
# Make the pictures of figure/ again: the demo set's contact sheet, training.png and retrieval.png of a demo run, and the plot of the benches.
# [RUN=newest logs/demo-rwkv-clip-*] bash shell/make_figures.sh
set -euo pipefail
source "$(dirname "$0")/setup.sh"
RUN=${RUN:-$(ls -d logs/demo-rwkv-clip-*/ | tail -n 1)}
python -m rwkv_clip.training.demo --output "${DEMO_DATA:-data/demo}" --contact-sheet figure/demo_set.png
cp "$RUN/training.png" figure/demo_training.png
cp "$RUN/retrieval.png" figure/demo_retrieval.png
python tests/bench/summary.py # figure/bench.png, from the results that are there; tests/bench/resolution.py draws resolution.png
