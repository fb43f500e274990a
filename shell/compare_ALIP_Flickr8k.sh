#!/usr/bin/env bash
# CLIP, ALIP and RWKV towers on Flickr8k, 30 % of whose raw texts belong to another picture: not a published row, but who
# minds noise, and whether ALIP's gates find it. Three seeds each, 15 runs in all.
#
#   FLICKR8K=folder with captions.jsonl ({"image", "captions": [5], "split"}) and images/ [OUTPUT=logs/noise]
#   bash shell/compare_ALIP_Flickr8k.sh [--extras] [--share 0.3 --epochs 16 --repeats 3 --jobs 2]
#
# Table and numbers: tests/bench/results/noise-*.json; pictures: figure/alip_weights.png, figure/flickr8k_noise.png. The same
# command resumes after an interruption. With --extras also two rows that explain the others.
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file FLICKR8K "the folder that holds captions.jsonl"
source shell/setup.sh
exec python tests/bench/noise.py --data "$FLICKR8K/captions.jsonl" --work "${OUTPUT:-logs/noise}" "$@"
