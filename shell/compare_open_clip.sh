#!/usr/bin/env bash
# open_clip's own trainer and ours, side by side: the same small ViT-CLIP from the same initial weights on the same CSV of Flickr8k,
# three seeds. Loss curves, recall, speed, memory, and what each loses when it is killed in the middle of an epoch.
#
#   FLICKR8K=folder with captions.jsonl ({"image", "captions": [5], "split"}) and images/
#   [OUTPUT=logs/open-clip] bash shell/compare_open_clip.sh [--epochs 4 --repeats 3]
#
# Table and numbers: tests/bench/results/open_clip_run-*.json; picture: figure/open_clip_run.png. The same command resumes.
# Leave the machine alone meanwhile: seconds are measured.
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file FLICKR8K "the folder that holds captions.jsonl"
NEEDED=bench source shell/setup.sh
exec python tests/bench/open_clip_run.py --data "$FLICKR8K/captions.jsonl" --work "${OUTPUT:-logs/open-clip}" "$@"
