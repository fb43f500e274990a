#!/usr/bin/env bash
# Make the pictures of figure/ again: the demo set's contact sheet, training.png and retrieval.png of a demo run, and the plot of the benches.
# [RUN=newest logs/demo-rwkv-clip-*] bash shell/make_figures.sh
set -euo pipefail
source "$(dirname "$0")/setup.sh"
RUN=${RUN:-$(ls -d logs/demo-rwkv-clip-*/ | tail -n 1)}
python -m rwkv_clip.demo --output "${DEMO_DATA:-data/demo}" --contact-sheet figure/demo_set.png
cp "$RUN/training.png" figure/demo_training.png
cp "$RUN/retrieval.png" figure/demo_retrieval.png
if ls -d logs/flickr8k-*/eval >/dev/null 2>&1; then # train_Flickr8k_small.sh's runs, both models
  REPORT=$(mktemp -d)/flickr8k
  python -m rwkv_clip.eval.main report logs/flickr8k-*/eval --output "$REPORT"
  cp "$REPORT"/bars-zero-shot-retrieval.png figure/flickr8k_recall.png
fi
python tests/bench/summary.py # figure/bench.png, from the results that are there; tests/bench/resolution.py draws resolution.png
